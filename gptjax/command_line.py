"""The command line: config flags, paths, steps, and how a command ends.

    --config=configs/gpt2.py:124m --config.model.dropout=0.1
"""

import errno
import importlib.util
import sys

from absl import app, flags
from etils import epath
from ml_collections import config_dict as mlc
from ml_collections import config_flags

from gptjax import console, paths
from gptjax.config import nearest
from gptjax.distributed import hosts
from gptjax.errors import INTERRUPTED, InputError


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
