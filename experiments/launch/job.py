"""What every launcher shares: the run's own command, what can be refused before a machine is paid for, the shell.

A launcher is a function from arguments to one shell script. --dry_run prints that script, and without it the same
text is given to the shell: what is read is what runs. Nothing here needs more than Python itself.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import shlex
import shutil
import sys

from gptjax.errors import InputError

LOST = 75  # how a run ends that lost another of its hosts: the same command resumes from the last checkpoint
TRIES = 20  # how often it is given again; a fault of the run's own would come back for ever
MESH_AXES = ("data", "fsdp", "tensor", "stage", "seq")


@dataclasses.dataclass(frozen=True)
class Job:
    """words: what follows `python -m`, as ("gptjax.pretrain", "--workdir=gs://b/x", ...). env: (name, value) pairs."""

    words: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()

    def flag(self, name: str) -> str | None:
        """The last value given for --name, else None."""
        values = [word.partition("=")[2] for word in self.words if word.startswith(f"--{name}=")]
        return values[-1] if values else None

    @property
    def workdir(self) -> str:
        workdir = self.flag("workdir")
        if not workdir:
            raise InputError("The run has no --workdir=...: a run that can be resumed needs one.")
        return workdir

    @property
    def remote_workdir(self) -> bool:
        return "://" in self.workdir

    def shell(self, python: str) -> str:
        """The run as one line of shell. python: as the shell is to see it, quoted where it must be."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.env]
        return " ".join([*(["env", *assignments] if assignments else []), python, "-m", shlex.join(self.words)])

    def check(self, devices: int, *, keeps_disk: bool, slices: int = 1):
        """Raises InputError for what would fail on `devices` devices, once they are there and are paid for.

        keeps_disk: whether a local workdir is one disk, and is still there after a preemption.
        """
        if not keeps_disk and not self.remote_workdir:
            raise InputError(
                f"--workdir={self.workdir} is a local disk, of one host among several or of a machine that may be "
                "taken away: give --workdir=gs://BUCKET/NAME."
            )
        if self.words[0] == "gptjax.pretrain" and self.remote_workdir and not self.flag("config.data.cache"):
            raise InputError(
                "Token shards are memory-mapped, so they are on a local disk while the workdir is not: "
                "add --config.data.cache=/tmp/tokens."
            )
        if slices > 1 and self.flag("config.mesh.dcn_data") != str(slices):
            raise InputError(f"{slices} slices: say so to the run too, with --config.mesh.dcn_data={slices}.")
        sizes = [int(size) for axis in MESH_AXES if (size := self.flag(f"config.mesh.{axis}"))]
        fixed = math.prod(size for size in sizes if size != -1)
        exact = len(sizes) == len(MESH_AXES) and -1 not in sizes
        if fixed < 1 or devices % fixed or (exact and fixed != devices):
            raise InputError(f"The mesh takes {fixed} devices and there are {devices}: change --config.mesh.*.")


def nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}."


def require(program: str, fix: str):
    """Raises InputError where a program that the script calls is not installed."""
    if not shutil.which(program):
        raise InputError(f"{program} is not on the PATH: {fix}.")


# --- the command line: options, then --, then the run ---------------------------------------------------------


def parser(documentation: str, **kwargs) -> argparse.ArgumentParser:
    """With the options that every launcher has."""
    p = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s OPTIONS -- MODULE FLAGS", **kwargs,
    )  # fmt: skip
    p.add_argument("--name", required=True, help="of the machine and of the job")
    p.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the run; may be repeated")
    p.add_argument("--dry_run", action="store_true", help="print the script and run nothing")
    return p


def parse(p: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, Job]:
    """(options, the run). Raises InputError for a missing run and for names that no machine takes."""
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    a = p.parse_args(own)
    if not words or words[0].startswith("-"):
        raise InputError("No run given: end with  -- gptjax.pretrain --config=... --workdir=...")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", a.name):
        raise InputError(f"--name={a.name}: lower-case letters, digits and hyphens, a letter first, at most 40.")
    if broken := [word for word in own + words if "\n" in word]:
        raise InputError(f"{broken[0]!r} has a line break, which not every machine's shell hands on: take it out.")
    env = [pair.partition("=") for pair in a.env]
    for name, equals, _ in env:
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(f"--env={name}{equals}: write --env=NAME=VALUE.")
    return a, Job(tuple(words), tuple((name, value) for name, _, value in env))


def project_of(a: argparse.Namespace) -> str:
    """The Google Cloud project: --project, or gcloud's own variable."""
    project = a.project or os.environ.get("CLOUDSDK_CORE_PROJECT")
    if not project:
        raise InputError("No Google Cloud project: give --project=ID (`gcloud projects list` shows yours).")
    return project


def main(make):
    """make(argv) -> (options, script, programs): prints the script, or hands it to bash; bad input is one line."""
    try:
        a, script, programs = make(sys.argv[1:])
        if a.dry_run:
            print(script, end="")
            return
        for program, fix in programs.items():
            require(program, fix)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    os.execvp("bash", ["bash", "-c", script])
