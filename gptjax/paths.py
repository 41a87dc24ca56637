"""Paths in configs and on the command line: `~`, values that are not paths, and how config.json stores them.

A config field that holds a path is declared with `field`. config.json then stores its absolute form and, in the section
`paths`, its form relative to the workdir, so that it stays valid from any folder and when both folders are moved.
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
    """A dataclass field that holds a path. names: regex of values that are not paths ('stdlib', 'bpe:300')."""
    return dataclasses.field(default=default, metadata={"path": names})


SOURCE = r"stdlib|hf:.*"  # sources of data/sources.py that are not paths
SHARE = rf"{SOURCE}|[-+]?[\d.]+([eE][-+]?\d+)?"  # a fraction of the documents, or another source
TOKENIZER = r"char|bpe:.*"


def is_remote(path) -> bool:
    """Whether a path is a URL, such as gs://bucket/..."""
    return "://" in os.fspath(path)


def expand(path):
    """Expands `~` and `~user` like a shell; None stays None. InputError: no such user."""
    if path is None or not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/")[0][1:]
        raise InputError(f"{path}: There is no user {user!r}. For a folder of that name write ./{path}.")
    return expanded


def expand_flag(argument: str, name: str) -> str:
    """Expands `~` in a command-line argument --name=~/...; returns any other argument unchanged."""
    flag, equals, value = argument.partition("=")
    return flag + equals + expand(value) if flag.lstrip("-") == name else argument


def local(path) -> epath.Path:
    """A path to open, with `~` expanded."""
    return epath.Path(expand(os.fspath(path)))


def fields(cls, prefix: str = "") -> dict[str, str]:
    """{dotted key: regex of values that are not paths} of a dataclass and the dataclasses in it."""
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
    """InputError: a workdir whose name the checkpoint storage (TensorStore) would misread."""
    text = "" if is_remote(workdir) else os.path.abspath(workdir)
    wrong = {
        "a backslash": "\\" in text, "a colon at the end": ":/" in text + "/",
        "bytes that are not UTF-8": text != text.encode(errors="replace").decode(),
    }  # fmt: skip
    for what, found in wrong.items():
        if found:
            raise InputError(
                f"{ascii(text)} has {what} in the name of a folder, so checkpoints cannot be stored there: rename the "
                "folder, or give another --workdir."
            )


# --- paths in config.json -------------------------------------------------------------------------------


def absolute(path: str) -> str:
    """The absolute path. For a glob pattern (texts/*.txt) the current folder is escaped."""
    path = expand(path)
    current = os.getcwd()
    return os.path.normpath(os.path.join(glob.escape(current) if _is_pattern(path) else current, path))


def relative(path: str, workdir) -> str | None:
    """An absolute path relative to the workdir; None if the workdir is remote."""
    if is_remote(workdir):
        return None
    workdir = os.path.abspath(workdir)
    return os.path.relpath(path, glob.escape(workdir) if _is_pattern(path) else workdir)


def resolve(absolute_path: str, relative_path: str | None, workdir) -> str:
    """The current location of a path in config.json: relative to the workdir if that exists, else the absolute path.

    The relative path comes first: if both folders were moved or copied together, the copy is meant, even if something
    else now exists at the old location. The two differ only if the workdir was moved.
    """
    if relative_path is not None:
        workdir = os.path.abspath(workdir)
        for base in (workdir, glob.escape(workdir)):
            found = os.path.normpath(os.path.join(base, relative_path))
            if os.path.exists(found) or (_WILD.search(found) and glob.glob(found)):
                return found
    return absolute_path


def same(a: str, b: str) -> bool:
    """Whether two paths are the same location, following symbolic links."""
    return a == b or os.path.realpath(expand(a)) == os.path.realpath(expand(b))


def _is_pattern(path: str) -> bool:
    return bool(_WILD.search(path)) and not os.path.exists(path)
