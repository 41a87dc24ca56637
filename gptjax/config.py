"""Configs: from a file and the command line to frozen dataclasses, and to a workdir's config.json.

    --config=configs/gpt2.py:124m --config.model.dropout=0.1

A config file's `get_config(arg)` returns a ConfigDict; flags override it; `build` turns it at once into
frozen dataclasses that validate themselves. Nothing below the mains ever sees a ConfigDict. The defaults
live in the dataclasses alone: `config_dict` makes the ConfigDict from them.
"""

import dataclasses
import difflib
import errno
import functools
import json
import math
import os
import socket
import sys
import types
import typing

from absl import app, flags
from etils import epath
from ml_collections import config_dict as mlc
from ml_collections import config_flags

from gptjax import console
from gptjax.errors import INTERRUPTED, InputError
from gptjax.parallel import hosts, rules

# --- dataclass <-> ConfigDict -----------------------------------------------------------------------------


def config_dict(cls, **overrides) -> mlc.ConfigDict:
    """A ConfigDict with the fields and defaults of a dataclass; `X | None` fields become placeholders."""
    result = mlc.ConfigDict()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            result[field.name] = config_dict(kind)
            continue
        optional = isinstance(kind, types.UnionType) and type(None) in kind.__args__
        if field.default_factory is not dataclasses.MISSING:
            value = mlc.ConfigDict(field.default_factory())
        elif field.default is dataclasses.MISSING or (optional and field.default is None):
            value = mlc.config_dict.placeholder(kind.__args__[0] if optional else kind)
        else:
            value = field.default
        result[field.name] = value
    result.update(overrides)
    return result


def build(cls, section, path="config"):
    """The dataclass that a ConfigDict or dict describes. Unknown and missing keys are InputErrors."""
    section = section.to_dict() if isinstance(section, mlc.ConfigDict) else dict(section)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in section:
        if key not in fields:
            raise InputError(f"Unknown key {path}.{key}{nearest(key, fields)}.")
    values = {}
    for name, value in section.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            value = build(kind, value, f"{path}.{name}")
        elif value is None and fields[name].default is dataclasses.MISSING and not _is_optional(kind):
            raise InputError(f"{path}.{name} is not set: give it with --{path}.{name}=...")
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, dict):
            value = dict(value)
        values[name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{path}: {error}.") from error


def by_its_rules(stage):
    """Of a stage, whose first argument is a config: called with that config's mesh.rules in force, and with an output
    whose failing does not end it (console.lenient_output)."""

    @functools.wraps(stage)
    def under_rules(config, *args, **kwargs):
        section = (config.get("mesh") or {}).get("rules") or {}  # a config may leave out what it takes as it is
        with console.lenient_output(), rules.use(build(rules.Rules, section, "config.mesh.rules")):
            return stage(config, *args, **kwargs)

    return under_rules


def _is_optional(kind):
    return isinstance(kind, types.UnionType) and type(None) in kind.__args__


def nearest(name, names) -> str:
    """' (did you mean x?)', or the list of what there is."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1)
    return f": did you mean {close[0]!r}?" if close else f": there are {', '.join(sorted(map(str, names)))}"


def choose(presets: dict, name: str, what: str):
    """presets[name], or an InputError that names the nearest."""
    if name not in presets:
        raise InputError(f"Unknown {what} {name!r}{nearest(name, presets)}")
    return presets[name]


# --- the command line -------------------------------------------------------------------------------------


def run(main):
    """absl's app.run, with bad input told in one line instead of a traceback (exit code 2), and so Ctrl-C (130)."""

    def parse(argv):
        try:
            _check_config_file(argv)
            return flags.FLAGS(argv)
        except (flags.Error, InputError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            _fail(error)

    def guarded(argv):
        if len(argv) > 1:
            _fail(f"Unexpected argument {argv[1]!r}: every option is written --name=value.")
        try:
            code = main(argv)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except InputError as error:
            _fail(error)
        except BrokenPipeError:  # `| head` has seen enough
            console.reader_is_gone()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _fail(f"the disk is full ({error.filename or error.strerror}): free some space and start again")

    console.escape_unprintable()
    try:
        app.run(guarded, flags_parser=parse)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run_stage(stage):
    """A training stage from the command line, on this host and those that join it. stage: (config, workdir)."""
    define_flags()

    def main(_):
        with hosts.join(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.join_limit):
            stage(flags.FLAGS.config, flags.FLAGS.workdir)

    run(main)


def overridden(key: str) -> bool:
    """Whether the command line gives this config key itself, instead of the config file. True where there is no command
    line: code that calls a stage is responsible for all of its config."""
    try:
        return key in config_flags.get_override_values(flags.FLAGS["config"])
    except (KeyError, TypeError):  # no such flag, or another program's
        return True


def define_flags():
    """--config, --workdir and --join_limit, as every training stage has them."""
    config_flags.DEFINE_config_file("config", None, "A config file, as configs/gpt2.py:124m.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where everything of this run is kept.")
    flags.DEFINE_integer("join_limit", 300, "Seconds to wait for the other hosts of the job.", lower_bound=1)
    flags.mark_flags_as_required(["config", "workdir"])


def _check_config_file(argv):
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        path = epath.Path(value.split(":")[0])
        if name == "config" and not path.exists():
            there = [str(p) for p in path.parent.glob("*.py")] if path.parent.exists() else []
            raise InputError(f"There is no config file {path}{nearest(path, there) if there else ''}.")


def _fail(error):
    """One line: what ml_collections and absl wrap around a message is peeled off."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text.strip()
    if "Traceback" in text:  # an error inside a config file
        text = text.splitlines()[-1].split("InputError: ")[-1]
    if isinstance(error, AttributeError | KeyError) and "Did you mean" in text:
        text = "unknown config key " + text.strip("\"'").replace("'\n", ": ").replace("\\'", "'").replace("\\n", " ")
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


# --- the workdir ------------------------------------------------------------------------------------------

# What may differ between two starts of one run: where and how fast it runs, not what it computes.
_MAY_CHANGE = (
    "mesh", "checkpoint", "eval", "log", "steps", "tokens", "epochs", "episodes", "steps_per_dispatch", "samples",
    "offload", "microbatch_size", "loss_chunk", "rollout.forward_rows", "ppo.microbatch_size", "model.remat",
    "model.pipeline_microbatches", "model.pipeline_rounds", "optimizer.offload",
)  # fmt: skip


def to_json(config) -> dict:
    """A nested dataclass (or a plain value) as JSON types."""
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    return json.loads(json.dumps(config, default=dict))


def json_safe(value):
    """A value as JSON has it, at any depth: null for NaN and infinities, numbers and lists for numpy's and JAX's."""
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    if hasattr(value, "tolist"):  # a scalar or an array of numpy or JAX
        return json_safe(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Atomic: a reader sees the old file or the new one. What isn't finite becomes null (json_safe)."""
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    text = json.dumps(json_safe(value), indent=2, sort_keys=False, allow_nan=False) + "\n"
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def claim_workdir(workdir, stage: str, config, **sections) -> bool:
    """Writes config.json into a new workdir, or checks that the one there is the same run's.

    sections: what takes the place of the config's own or is added to it (the whole model, where the config overrides
    a part of one).
    Returns whether the run is being taken up again. Raises InputError listing the keys that differ. Of many hosts one
    claims it for all.
    """
    taken_up = hosts.from_first(lambda: _claim(epath.Path(workdir), stage, config, sections))
    if not (epath.Path(workdir) / "config.json").exists():
        raise InputError(
            f"What process 0 wrote to {workdir} is not there on {socket.gethostname()}: give a --workdir on storage "
            "that all hosts share (checkpoints are written by all of them)."
        )
    return taken_up


def _claim(workdir, stage, config, sections) -> bool:
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    new = {"stage": stage, **to_json(config), **{name: to_json(section) for name, section in sections.items()}}
    if not path.exists():
        if any((workdir / "checkpoints").glob("[0-9]*")):
            raise InputError(
                f"{workdir} has checkpoints but no config.json to say of which run: put it back or take another "
                "--workdir."
            )
        write_json(path, new)
        return False
    old = read_config(workdir)
    a, b = _flatten(old), _flatten(new)
    different = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    within = lambda k, names: any(k == n or k.startswith(f"{n}.") for n in names)
    # A key that the run has no word of came with a later version, which takes it to be what it is by default.
    defaults = _flatten(config_dict(type(config)).to_dict()) if dataclasses.is_dataclass(config) else {}
    later = {k for k in b.keys() - a.keys() if not within(k, a) and k in defaults and b[k] == defaults[k]}
    fatal = [k for k in different if k not in later and not within(k, _MAY_CHANGE)]
    if fatal:
        lines = "\n".join(f"  {k}: there {a.get(k)!r}, now {b.get(k)!r}" for k in fatal)
        raise InputError(
            f"{workdir} holds another run's config:\n{lines}\n"
            "Take another --workdir, or give the same config to go on with that run."
        )
    for k in different:
        if k in later:
            if not within(k, _MAY_CHANGE):
                print(f"config.{k} is newer than this run, which goes on with {b[k]!r}")
            continue
        print(f"config.{k} changed from {a.get(k)!r} to {b.get(k)!r} since this run began")
    write_json(path, new)
    return True


def read_config(workdir) -> dict:
    """A workdir's config.json as a dict. Raises InputError if there is none or it is damaged."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise InputError(f"{workdir} is not a workdir: it has no config.json. Give the --workdir of a training run.")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}): restore it or start a new workdir.") from error


def _flatten(d, prefix=""):
    flat = {}
    for key, value in d.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
