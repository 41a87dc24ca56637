"""The command line: config flags, paths, steps, --help and --print_config, and how a command ends.

    --config=configs/gpt2.py:124m --config.model.dropout=0.1
"""

import dataclasses
import errno
import functools
import importlib.util
import json
import operator
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from absl import app, flags
from etils import epath
from ml_collections import config_dict as mlc
from ml_collections import config_flags

from gptjax import console, paths, ranges, usage
from gptjax.config import RENAMED, build, config_dict, flatten, nearest, sections
from gptjax.distributed import hosts
from gptjax.errors import INTERRUPTED, InputError

flags.disclaim_key_flags()  # what is defined here is the caller's, whose --help shows it
_HELP = ("-h", "--help", "-help", "--helpshort", "-helpshort", "-?")


def run(main, config_class=None):
    """absl's app.run. User-correctable errors (exit code 2) and Ctrl-C (130) print one line, not a traceback.

    config_class: the dataclass of --config, whose keys --help lists.
    """

    def parse(argv):
        try:
            argv = [paths.expand_flag(argument, "config") for argument in argv]
            _check_config_file(argv)
            if _asks_for_help(argv):
                _show(_help(argv, config_class))
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
            _fail(f"The disk is full ({error.filename or error.strerror}): free some space and start again.")

    console.escape_unprintable()
    console.plain_warnings()
    try:
        app.run(guarded, flags_parser=parse)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run_stage(stage, config_class):
    """A training stage from the command line, on this host and those that join it. stage: (config, workdir);
    config_class: the dataclass of its config."""
    define_flags(print_config=True)

    def main(_):
        if flags.FLAGS.print_config:
            file = _quoted("--config=", config_flags.get_config_filename(flags.FLAGS["config"]))
            print("\n".join([file, *config_lines(flags.FLAGS.config, config_class)]))
            return
        with hosts.join(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.join_limit):
            stage(flags.FLAGS.config, flags.FLAGS.workdir)

    run(main, config_class)


def overridden(key: str) -> bool:
    """Whether the command line gives this config key itself, instead of the config file. True where there is no command
    line: code that calls a stage is responsible for all of its config."""
    try:
        return key in config_flags.get_override_values(flags.FLAGS["config"])
    except (KeyError, TypeError):  # no such flag, or another program's
        return True


def define_flags(print_config: bool = False):
    """--config, --workdir and --join_limit, as every training stage has them. print_config: --print_config too, with
    which no workdir is needed."""
    config_flags.DEFINE_config_file("config", None, "A config file, as configs/gpt2.py:124m.", lock_config=True)
    define_path("workdir", None, "Folder of this run: config, checkpoints, metrics, samples, report.")
    flags.DEFINE_integer("join_limit", 300, "Seconds to wait for the other hosts of the job.", lower_bound=1)
    if print_config:
        help = "Print the resolved config, one flag per key, and exit; no --workdir is needed."
        flags.DEFINE_bool("print_config", False, help)
    flags.mark_flag_as_required("config")
    flags.register_validator(
        "workdir", lambda value: value is not None or (print_config and flags.FLAGS["print_config"].value),
        message="Flag --workdir must have a value other than None.",
    )  # fmt: skip


def define_path(name: str, default: str | None, help: str, required: bool = False):
    """A flag for a path, in which `~` is the home directory."""
    flags.DEFINE(_PathParser(), name, default, help, serializer=flags.ArgumentSerializer(), required=required)


def define_step():
    """--step, as every reader of a workdir has it."""
    help = "A checkpoint's step, or 'best': the lowest validation loss on disk. The newest good one if not given."
    flags.DEFINE(_StepParser(), "step", None, help, serializer=flags.ArgumentSerializer())


def define_seeds(default: str | None, help: str):
    """--seeds, parsed as a list of integers. help: what is done with them."""
    flags.DEFINE(_SeedsParser(), "seeds", default, f"Seeds, with commas: {help}", serializer=flags.ArgumentSerializer())


# --- --print_config ---------------------------------------------------------------------------------------


def config_lines(config: mlc.ConfigDict, config_class) -> list[str]:
    """The whole config as flags, quoted for a shell; keys without a value as comments: no flag takes a value away.

    Raises InputError where a run with this config would, except for errors that depend on its data or devices.
    """
    section = config.to_dict()
    model = section.get("model") or {}
    by_tokenizer = "vocab_size" in model and model["vocab_size"] is None  # pre-training: the tokenizer decides
    if by_tokenizer:
        section["model"] = {**model, "vocab_size": 1}
    flat = flatten(build(config_class, section))
    if by_tokenizer:
        flat["model.vocab_size"] = None
    return [
        f"# --config.{key} is not set" if value is None else _quoted(f"--config.{key}=", _written(value))
        for key, value in flat.items()
    ]


def _written(value) -> str:
    """A config's value as its flag takes it."""
    if isinstance(value, tuple):
        items = [json.dumps(v, ensure_ascii=False) if isinstance(v, str) else repr(v) for v in value]
        return f"({', '.join(items)}{',' * (len(items) == 1)})"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def _quoted(flag: str, value: str) -> str:
    """flag + value for a shell, as readable as can be."""
    if value and shlex.quote(value) != value and "'" in value and not set(value) & set('"\\$`!'):
        return f'{flag}"{value}"'
    return flag + (value and shlex.quote(value))


# --- --help -----------------------------------------------------------------------------------------------


def _asks_for_help(argv) -> bool:
    value_of = None  # --prompt --help: the prompt
    for argument in argv[1:]:
        if argument == "--":
            return False
        if value_of is None and argument in _HELP:
            return True
        name = argument.lstrip("-") if argument.startswith("-") and value_of is None else ""
        value_of = name if name in flags.FLAGS and not flags.FLAGS[name].boolean else None
    return False


def _given_config(argv) -> str | None:
    """FILE[:ARGUMENT] of the last --config on the command line."""
    found = None
    for argument, following in zip(argv[1:], [*argv[2:], None], strict=True):
        name, equals, value = argument.partition("=")
        if argument.startswith("-") and name.lstrip("-") == "config":
            found = value if equals else following
    return found


def _help(argv, config_class) -> str:
    columns, main = usage.width(), sys.modules["__main__"]
    parts = [usage.paragraphs(main.__doc__, columns), "options:\n" + usage.table(_options(config_class), columns)]
    if config_class is not None:
        spec = getattr(main, "__spec__", None)
        name = (spec.name if spec else Path(argv[0]).stem).removesuffix(".__main__")
        if presets := usage.presets(name.removeprefix("gptjax.")):
            rows = [(p.path, f"{p.about} {_arguments(p)}".strip()) for p in presets]
            parts.append("presets, as --config=FILE or --config=FILE:ARGUMENT:\n" + usage.table(rows, columns))
        path = _given_config(argv)
        config = None if path is None else flags.FLAGS["config"].parser.parse(path)
        of_file = f" in {path}" if path else ""
        about = f"config keys, with their values{of_file} where the command line gives no other:"
        parts.append(usage.wrapped(about, columns))
        parts.append(config_help(config_class, config, columns))
    return "\n\n".join(parts)


def config_help(config_class, config: mlc.ConfigDict | None, columns: int) -> str:
    """Every key of a config by section, with its type, explanation, range and value: that of `config`, or the default
    where it has none."""
    configs = [config_dict(config_class)] if config is None else [config, config_dict(config_class)]
    parts = []
    for section in sections(config_class, values=config):
        rows = []
        for name, (hint, field, text) in section.keys.items():
            key = ".".join(filter(None, (section.path, name)))
            rows.append(_key_row(key, hint, field, text, _first_value(key, configs)))
        title = ".".join(filter(None, ("config", section.path)))
        parts.append(usage.wrapped(f"{title}: {section.about}", columns) + "\n" + usage.table(rows, columns))
    return "\n\n".join(parts)


def _arguments(preset: usage.Preset) -> str:
    shown = " | ".join(f"{a} (default)" if a == preset.default else a for a in preset.arguments)
    return shown and f"ARGUMENT: {shown}"


def _first_value(key: str, configs):
    """The key's value in the first of the configs that has it: a config file may leave keys at their defaults."""
    for config in configs:
        try:
            return functools.reduce(operator.getitem, key.split("."), config)
        except (KeyError, TypeError):
            continue
    return None


def _key_row(key: str, hint, field: dataclasses.Field, text: str, value) -> tuple[str, str]:
    """(--config.key=TYPE, its explanation, range and value) of a field."""
    _, range_, optional = ranges.split(hint)
    if isinstance(value, Mapping | mlc.ConfigDict):
        key, shown = f"{key}.NAME", ", ".join(f"{k}={_written(v)}" for k, v in value.items())
    else:
        shown = "" if value == () else repr(value) if value == "" else _written(value)
    default = f"default: {shown or 'none'}" if value is not None or optional else "no default"
    limits = range_.brief() if range_ else ""
    kind = "PATH" if field.metadata.get("path") == "" else ranges.metavar(hint)  # a path and nothing else
    return f"--config.{key}={kind}", f"{text} ({'; '.join(filter(None, (limits, default)))})".strip()


_METAVARS = {"int": "INT", "float": "FLOAT", "path": "PATH", "step": "STEP", "config object": "FILE[:ARGUMENT]"}


def _options(config_class) -> list[tuple[str, str]]:
    more = "; with --config, the values shown are that file's" if config_class else ""
    rows = [("-h, --help", f"Show this help and exit{more}. --helpfull: the flags of libraries too.")]
    for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]):
        parser = flag.parser
        choices = "|".join(getattr(parser, "enum_values", ()))
        name = f"--{flag.name}={choices or _METAVARS.get(parser.flag_type(), 'TEXT')}"
        if flag.boolean:
            name = f"--[no]{flag.name}" if flag.default else f"--{flag.name}"
        limits = {"at least": getattr(parser, "lower_bound", None), "at most": getattr(parser, "upper_bound", None)}
        details = [f"{words} {limit:g}" for words, limit in limits.items() if limit is not None]
        if flag.default is None and any(not v.checker(None) for v in flag.validators if hasattr(v, "flag_name")):
            details.append("required")
        elif flag.default if flag.boolean else flag.default not in (None, "", [""]):
            details.append(f"default: {flag.default}")
        about = (flag.help or "").split(";\n")[0].removeprefix(f"<{choices}>: ")  # absl adds the form of the value
        rows.append((name, about + (f" ({'; '.join(details)})" if details else "")))
        if parser.flag_type() == "config object":
            where = "below" if config_class else "in the --help of the stage, as `python -m gptjax.pretrain --help`"
            rows.append(("--config.KEY=VALUE", f"A value of the config, in place of the file's. The keys are {where}."))
    return rows


def _show(text: str):
    """Prints the text, or as much of it as `| head` reads, and exits with 0."""
    try:
        print(text)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        console.reader_is_gone()
    sys.exit(0)


# --- flags ------------------------------------------------------------------------------------------------


class _StepParser(flags.IntegerParser):
    def flag_type(self):
        return "step"

    def parse(self, argument):
        return argument if argument == "best" else super().parse(argument)

    def convert(self, argument):
        try:
            return super().convert(argument)
        except ValueError:
            raise ValueError(f"{argument!r} is neither a number nor 'best'") from None


class _SeedsParser(flags.ListParser):
    def parse(self, text):
        try:
            return [int(seed) for seed in super().parse(text)]
        except ValueError as error:
            raise ValueError("give whole numbers with commas between") from error


class _PathParser(flags.ArgumentParser):
    def flag_type(self):
        return "path"

    def parse(self, argument):
        return paths.expand(argument)


def _check_config_file(argv):
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        path = epath.Path(value.split(":")[0])
        if name == "config" and not path.exists():
            there = [str(p) for p in path.parent.iterdir() if p.suffix == ".py"] if path.parent.is_dir() else []
            raise InputError(f"There is no config file {path}{nearest(path, there) if there else '.'}")


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
    """The message for the first --config.x.y whose key the config file does not have, with the nearest key, which absl
    does not name. None if every key is known."""
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
                new = RENAMED.get(flag.removeprefix("config."))
                end = f": it is now {section}.{new}." if new else nearest(key, list(here))
                return f"unknown config key {within}.{key}{end}"
            here, within = here.get(key), f"{within}.{key}"
    return None


def _fail(error):
    """Prints the error in one line, without what ml_collections and absl wrap around its message, and exits with 2."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text.strip()
    if "Traceback" in text:  # an error inside a config file
        text = text.splitlines()[-1].split("InputError: ")[-1]
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)
