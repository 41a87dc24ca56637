"""Paths as people write them: `~`, names that are no paths, and what a workdir's config.json keeps of them.

A config's field that holds a path is made with `field`: config.json then has it in absolute form and, in its section
`paths`, relative to the workdir, so that it means the same from anywhere and when both folders are moved together.
"""

import dataclasses
import glob
import os
import re
import typing

from etils import epath

from gptjax.errors import InputError

_WILD = re.compile(r"[*?[]")


def field(names: str = "", default=None):
    """A dataclass field that holds a path. names: pattern of values that name something else ('stdlib', 'bpe:300')."""
    return dataclasses.field(default=default, metadata={"path": names})


SOURCE = r"stdlib|hf:.*"  # what data/sources.py reads besides paths
SHARE = rf"{SOURCE}|[-+]?[\d.]+([eE][-+]?\d+)?"  # a share of the documents or another source
TOKENIZER = r"char|bpe:.*"


def is_remote(path) -> bool:
    """gs://bucket/... and the like."""
    return "://" in os.fspath(path)


def expand(path):
    """`~` and `~user` as the shell has them. Raises InputError where there is no such user. None stays None."""
    if path is None or not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/")[0][1:]
        raise InputError(f"{path}: there is no user {user!r}. Write ./{path} for a folder of that name.")
    return expanded


def expand_flag(argument: str, name: str) -> str:
    """A command-line argument --name=~/... with `~` expanded, any other as it is."""
    flag, equals, value = argument.partition("=")
    return flag + equals + expand(value) if flag.lstrip("-") == name else argument


def local(path) -> epath.Path:
    """A path to open, `~` expanded."""
    return epath.Path(expand(os.fspath(path)))


def fields(cls, prefix: str = "") -> dict[str, str]:
    """{dotted key: pattern of values that are no paths} of a dataclass and those in it."""
    found, kinds = {}, typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if "path" in f.metadata:
            found[prefix + f.name] = f.metadata["path"]
        elif dataclasses.is_dataclass(kinds[f.name]):
            found |= fields(kinds[f.name], f"{prefix}{f.name}.")
    return found


def is_path(value, names: str) -> bool:
    """Whether a field's value is a local path."""
    return isinstance(value, str) and value != "" and not is_remote(value) and not re.fullmatch(names, value)


def check_workdir(workdir):
    """InputError for a workdir whose name the storage of checkpoints takes to be another's."""
    text = "" if is_remote(workdir) else os.path.abspath(workdir)
    wrong = {
        "a backslash": "\\" in text, "a colon at the end": ":/" in text + "/",
        "bytes that are not UTF-8": text != text.encode(errors="replace").decode(),
    }  # fmt: skip
    for what, there in wrong.items():
        if there:
            raise InputError(
                f"{ascii(text)} has {what} in the name of a folder, where checkpoints cannot be stored: rename the "
                "folder, or give another --workdir."
            )


# --- what config.json keeps -------------------------------------------------------------------------------


def absolute(path: str) -> str:
    """The path from anywhere. Of a pattern (texts/*.txt) the folder that is put before it is escaped."""
    path = expand(path)
    here = os.getcwd()
    return os.path.normpath(os.path.join(glob.escape(here) if _is_pattern(path) else here, path))


def relative(path: str, workdir) -> str | None:
    """An absolute path as seen from the workdir; None from a remote one."""
    if is_remote(workdir):
        return None
    workdir = os.path.abspath(workdir)
    return os.path.relpath(path, glob.escape(workdir) if _is_pattern(path) else workdir)


def resolve(absolute_path: str, relative_path: str | None, workdir) -> str:
    """Where a path of config.json is now: relative to the workdir if something is there, else the absolute one.

    Relative first: where both folders were moved or copied together the copy's own is meant, whatever has come to lie
    at the old place since. The two differ only where the workdir was moved.
    """
    if relative_path is not None:
        workdir = os.path.abspath(workdir)
        for place in (workdir, glob.escape(workdir)):
            found = os.path.normpath(os.path.join(place, relative_path))
            if os.path.exists(found) or (_WILD.search(found) and glob.glob(found)):
                return found
    return absolute_path


def same(a: str, b: str) -> bool:
    """Whether two spellings mean one place, through symbolic links too."""
    return a == b or os.path.realpath(expand(a)) == os.path.realpath(expand(b))


def _is_pattern(path: str) -> bool:
    return bool(_WILD.search(path)) and not os.path.exists(path)
