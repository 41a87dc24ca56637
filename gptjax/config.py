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
import importlib.util
import json
import math
import os
import socket
import sys
import typing
from collections.abc import Mapping

from absl import app, flags
from etils import epath
from ml_collections import config_dict as mlc
from ml_collections import config_flags

from gptjax import console, paths, ranges
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
        optional = type(None) in typing.get_args(kind)
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
    """The dataclass that a ConfigDict or dict describes. Unknown and missing keys, values of another type and numbers
    outside their range (ranges.py) are InputErrors."""
    hints, fields = typing.get_type_hints(cls, include_extras=True), {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(section, mlc.ConfigDict | Mapping):
        raise InputError(f"{path}={section!r} must be a section with the keys {', '.join(fields)}.")
    section = section.to_dict() if isinstance(section, mlc.ConfigDict) else dict(section)
    for key in section:
        if key not in fields:
            raise InputError(f"Unknown key {path}.{key}{nearest(key, fields)}.")
    values = {}
    for name, value in section.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            value = build(kind, value, f"{path}.{name}")
        else:
            ranges.check(value, kind, f"{path}.{name}")
            if isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, dict):
                value = dict(value)
            elif "path" in fields[name].metadata and paths.is_path(value, fields[name].metadata["path"]):
                value = paths.expand(value)
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
            argv = [paths.expand_flag(argument, "config") for argument in argv]
            _check_config_file(argv)
            others, weights = _mixture_weights(argv) if "config" in flags.FLAGS else (argv, {})
            before, sys.argv = sys.argv, others  # config_flags reads it
            try:
                rest = flags.FLAGS(others)
            finally:
                sys.argv = before
            if weights:
                c = flags.FLAGS.config
                with c.unlocked(), c.ignore_type():  # a weight of 1 in the file does not make it a whole number
                    c.data.mixture.update(weights)
            return rest
        except (AttributeError, KeyError) as error:
            _fail(_unknown_key(argv) or error)
        except (flags.Error, InputError, TypeError, ValueError, OSError) as error:
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
    console.plain_warnings()
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
    define_path("workdir", None, "Where everything of this run is kept.")
    flags.DEFINE_integer("join_limit", 300, "Seconds to wait for the other hosts of the job.", lower_bound=1)
    flags.mark_flags_as_required(["config", "workdir"])


def define_path(name: str, default: str | None, help: str, required: bool = False):
    """A flag for a path, in which `~` is the home directory."""
    flags.DEFINE(_PathParser(), name, default, help, serializer=flags.ArgumentSerializer(), required=required)


def define_step():
    """--step, as every reader of a workdir has it."""
    help = "A checkpoint's step, or 'best': the lowest validation loss on disk. The newest good one if not given."
    flags.DEFINE(_StepParser(), "step", None, help, serializer=flags.ArgumentSerializer())


class _StepParser(flags.IntegerParser):
    def parse(self, argument):
        return argument if argument == "best" else super().parse(argument)

    def convert(self, argument):
        try:
            return super().convert(argument)
        except ValueError:
            raise ValueError(f"{argument!r} is neither a number nor 'best'") from None


class _PathParser(flags.ArgumentParser):
    def parse(self, argument):
        return paths.expand(argument)


def _check_config_file(argv):
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        path = epath.Path(value.split(":")[0])
        if name == "config" and not path.exists():
            there = [str(p) for p in path.parent.iterdir() if p.suffix == ".py"] if path.parent.is_dir() else []
            raise InputError(f"There is no config file {path}{nearest(path, there) if there else ''}.")


def _mixture_weights(argv) -> tuple[list[str], dict[str, float]]:
    """The arguments without those for new keys of the one section whose keys are the user's own, and those:
    --config.data.mixture.web=.5 gives {'web': .5}."""
    flag = "config.data.mixture."
    ours = [a for a in argv[1:] if a.lstrip("-").startswith(flag) and "=" in a]
    weights = {}
    for name, _, value in (a.lstrip("-").removeprefix(flag).partition("=") for a in ours):
        try:
            weights[name] = float(value)
        except ValueError:
            raise InputError(f"config.data.mixture.{name}={value!r} must be a number, the weight of {name}.") from None
    return [a for a in argv if a not in ours], weights


def _unknown_key(argv) -> str | None:
    """What is wrong with the first --config.x.y of the arguments whose key the config file does not have: absl says no
    more than the key. None where every key is known."""
    given = dict(a.lstrip("-").partition("=")[::2] for a in argv[1:])
    path, _, argument = given.get("config", "").partition(":")
    try:
        spec = importlib.util.spec_from_file_location("config_file", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(*([argument] if argument else []))
    except Exception:  # the file itself is at fault: that error is the one to report
        return None
    for flag in given:
        section, *keys = flag.split(".")
        here, within = config, section
        for key in keys if section == "config" else ():
            if not isinstance(here, mlc.ConfigDict) or key not in here:
                if not isinstance(here, mlc.ConfigDict):
                    return f"unknown config key {flag}: {within} has no keys of its own."
                return f"unknown config key {within}.{key}{nearest(key, list(here))}"
            here, within = here.get(key), f"{within}.{key}"
    return None


def _fail(error):
    """One line: what ml_collections and absl wrap around a message is peeled off."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text.strip()
    if "Traceback" in text:  # an error inside a config file
        text = text.splitlines()[-1].split("InputError: ")[-1]
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


# --- the workdir ------------------------------------------------------------------------------------------

# What may differ between two starts of one run: where and how fast it runs, not what it computes.
_MAY_CHANGE = (
    "mesh", "checkpoint", "eval", "log", "steps", "tokens", "epochs", "episodes", "steps_per_dispatch", "samples",
    "offload", "microbatch_size", "loss_chunk", "rollout.forward_rows", "ppo.microbatch_size", "model.remat",
    "model.pipeline_microbatches", "model.pipeline_rounds", "optimizer.offload", "data.cache", "mix.cache", "ptx.cache",
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


def dumps(value, **options) -> str:
    """json.dumps of what json_safe makes of a value."""
    return json.dumps(json_safe(value), allow_nan=False, **options)


def write_json(path, value):
    """Atomic: a reader sees the old file or the new one. What isn't finite becomes null (json_safe)."""
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    text = dumps(value, indent=2) + "\n"
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def claim_workdir(workdir, stage: str, config, **sections) -> bool:
    """Writes config.json into a new workdir, or checks that the one there is the same run's.

    sections: what takes the place of the config's own or is added to it (the whole model, where the config overrides
    a part of one). `origin`: {<field>_<what>: value} of the models in the workdirs that the config's fields name
    (workdir.origin); a value that is left out is not compared.
    Returns whether the run is being resumed. Raises InputError listing the keys that differ. Of many hosts one
    claims it for all.
    """
    resumed = hosts.from_first(lambda: _claim(paths.local(workdir), stage, config, sections))
    if not (paths.local(workdir) / "config.json").exists():
        raise InputError(
            f"What process 0 wrote to {workdir} is not there on {socket.gethostname()}: give a --workdir on storage "
            "that all hosts share (checkpoints are written by all of them)."
        )
    return resumed


def _claim(workdir, stage, config, sections) -> bool:
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    new = {"stage": stage, **to_json(config), **{name: to_json(section) for name, section in sections.items()}}
    local = _absolute_paths(new, config, workdir)
    if not path.exists():
        if _steps(workdir):
            raise InputError(
                f"{workdir} has checkpoints but no config.json to say of which run: put it back or take another "
                "--workdir."
            )
        write_json(path, new)
        return False
    old = read_config(workdir)
    moved = _compare_origin(workdir, old, new, bool(_steps(workdir)))
    a, b = _flatten(old), _flatten({k: v for k, v in new.items() if k != "paths"})
    different = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    different = [k for k in different if not (k in local and a.get(k) and b.get(k) and paths.same(a[k], b[k]))]
    within = lambda k, names: any(k == n or k.startswith(f"{n}.") for n in names)
    # A key that the run has no word of came with a later version, which takes it to be what it is by default.
    defaults = _flatten(config_dict(type(config)).to_dict()) if dataclasses.is_dataclass(config) else {}
    later = {k for k in b.keys() - a.keys() if not within(k, a) and k in defaults and b[k] == defaults[k]}
    may_change = (*_MAY_CHANGE, "origin", *moved)
    fatal = [k for k in different if k not in later and not within(k, may_change)]
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
        elif not within(k, ("origin",)):
            print(f"config.{k} changed from {a.get(k)!r} to {b.get(k)!r} since this run began")
    write_json(path, new)
    return True


def has_checkpoints(workdir) -> bool:
    """Whether a run can go on from a checkpoint of its own; the same on all hosts."""
    return hosts.from_first(lambda: bool(_steps(workdir)))


def _steps(workdir) -> list[str]:
    directory = paths.local(workdir) / "checkpoints"
    return [p.name for p in directory.iterdir() if p.name.isdecimal()] if directory.is_dir() else []


def _absolute_paths(new: dict, config, workdir) -> set[str]:
    """Makes the config's local paths absolute in `new` and adds its section `paths`: {dotted key: from the workdir}.
    Returns the dotted keys."""
    found = {}
    for key, names in (paths.fields(type(config)) if dataclasses.is_dataclass(config) else {}).items():
        *sections, name = key.split(".")
        section = functools.reduce(dict.__getitem__, sections, new)
        if paths.is_path(section.get(name), names):
            section[name] = paths.absolute(section[name])
            found[key] = paths.relative(section[name], workdir)
    if found:
        new["paths"] = found
    return set(found)


_CHANGED = {"step": "is at step {} now and was at {} then", "weights": "has other weights now",
            "tokenizer": "has another tokenizer now", "bias": "has the bias {} now and had {} then"}  # fmt: skip


def _compare_origin(workdir, old: dict, new: dict, has_checkpoints: bool) -> set[str]:
    """InputError where a model that the run depends on is another one than when the run began. What is not known now
    stays as it was. Returns the fields whose workdir has the same weights, wherever it is now."""
    then, now = old.get("origin") or {}, new.get("origin") or {}
    same = {key.removesuffix("_weights") for key in now if key.endswith("_weights") and then.get(key) == now[key]}
    changed, unknown = [], set()
    for key, value in now.items():
        name, _, what = key.rpartition("_")
        where = _flatten(new).get(name)
        if key not in then:
            unknown.add(f"{name} ({where})")
        elif value != then[key] and name == "init_from" and has_checkpoints and what != "tokenizer":
            now[key] = then[key]
            if what == "weights":  # they were needed at step 0 alone
                print(f"note: the weights in {where} have changed since this run began from them; it goes on from its "
                      "own checkpoint")  # fmt: skip
        elif value != then[key]:
            changed.append(f"  {name}: {where} {_CHANGED[what].format(value, then[key])}")
    if changed:
        raise InputError(
            f"{workdir} began with other models than those there are now:\n" + "\n".join(changed) + "\n"
            "Put back what was there, or start anew in another --workdir."
        )
    for name in sorted(unknown):
        print(f"note: this run was begun by an earlier version, which kept no digest of {name}: it is taken to be the "
              "same")  # fmt: skip
    if then or now:
        new["origin"] = {**then, **now}
    return same


def read_config(workdir) -> dict:
    """A workdir's config.json as a dict, its paths as they are to be opened from here. Raises InputError if there is
    none or it is damaged."""
    workdir = paths.local(workdir)
    path = workdir / "config.json"
    if not path.exists():
        why = "it has no config.json" if workdir.exists() else "there is no such folder"
        raise InputError(f"{workdir} is not a workdir: {why}. Give the --workdir of a training run.")
    try:
        run = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}): restore it or start a new workdir.") from error
    for key, relative in run.pop("paths", {}).items():
        *sections, name = key.split(".")
        section = functools.reduce(dict.__getitem__, sections, run)
        section[name] = paths.resolve(section[name], relative, workdir)
    return run


def _flatten(d, prefix=""):
    flat = {}
    for key, value in d.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
