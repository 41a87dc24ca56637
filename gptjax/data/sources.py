"""Where text comes from: files, directories, globs, rows of tables, the standard library, the Hub.

A source is one string. Paths go through fsspec, so `gs://bucket/folder` works where its driver (gcsfs)
is installed. Documents come in a fixed order, one in memory at a time.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec

from gptjax.data.formats import Document, File, NotText, document_reader, row_reader, text_of
from gptjax.errors import InputError

_STDLIB_SUFFIXES = (".py", ".txt", ".rst")
_STDLIB_SKIPPED = "test tests idle_test site-packages dist-packages lib-dynload __pycache__".split()


class Row(NamedTuple):
    """where: 'path:line' or 'path: row N', from 1, for messages; value: its fields or columns."""

    where: str
    value: dict


def documents(source: str, *, text_field: str = "text") -> Iterator[Document]:
    """Documents of a source, in sorted order of files; documents without any text are left out.

    source: 'stdlib' (the Python standard library's code and documentation), a text file, a directory, a
    glob pattern, .jsonl[.gz], .json.gz, .txt.gz, .parquet, .arrayrecord, or hf:NAME[:CONFIG][:SPLIT].
    text_field: the field, column or feature that holds the text of a row.

    InputError: missing, empty, not text, a row that isn't JSON or lacks the field; the message names the
    file and line. In a directory, files that aren't text are skipped with one warning.
    """
    found = False
    for document in (_hub_documents if source.startswith("hf:") else _file_documents)(source, text_field):
        if document.text:
            found = True
            yield document
    if not found:
        raise InputError(f"source {source!r} is empty: it holds no text; name one that has some")


def rows(source: str, on_bad: Callable[[str, InputError], None] | None = None) -> Iterator[Row]:
    """Rows of a source with all their fields, in sorted order of files.

    source: .jsonl or .ndjson (also .gz), .json.gz with a row a line, a .json file that holds a list of
    objects, .parquet, a directory or glob pattern of those, or hf:NAME[:CONFIG][:SPLIT].

    on_bad: gets the place and the error of a line that isn't JSON or a row that isn't an object, and reading goes on;
    None = they are raised.

    InputError: missing, empty, damaged, a bad row, a file of another kind. In a directory, files of other kinds are
    skipped with one warning.
    """
    found = False
    for where, value in (_hub_rows if source.startswith("hf:") else _file_rows)(source):
        found = True
        if isinstance(value, dict):
            yield Row(where, value)
            continue
        error = value
        if not isinstance(error, InputError):
            error = InputError(f"the row is a JSON {type(value).__name__}, not an object; fix or remove it")
        if on_bad is None:
            raise InputError(f"{where}: {error}")
        on_bad(where, error)
    if not found:
        raise InputError(f"source {source!r} is empty: it holds no rows; name one that has some")


def fingerprint(source: str) -> str:
    """sha256 (hex) of the source's file names, sizes and times: cheap, reads no content.

    For 'stdlib', the Python version and sizes, so that a reinstall of the same Python is the same source;
    for hf:, the name alone. InputError: missing source.
    """
    if source.startswith("hf:"):
        content: list = [source]
    else:
        files, _ = _files(source)
        content = [[f.name, f.size] if source == "stdlib" else [f.name, f.size, f.stamp] for f in files]
    if source == "stdlib":
        content.append([platform.python_implementation(), platform.python_version()])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_documents(source: str, text_field: str) -> Iterator[Document]:
    files, skip_binary = _files(source)
    skipped = []
    for file in files:
        reader = document_reader(file.name)
        try:
            with _readable(file):
                yield from reader(file, text_field)
        except NotText as error:
            if not skip_binary:
                raise InputError(
                    f"{file.path} is not text: byte offset {error.offset} {error.reason}; convert it to "
                    "UTF-8, or name a text, JSONL, Parquet or ArrayRecord file"
                ) from None
            skipped.append(file.name)
    if skipped and source != "stdlib":
        warnings.warn(
            f"source {source!r}: skipped {len(skipped)} binary files (not UTF-8 text), first {skipped[0]!r}",
            stacklevel=2,
        )


def _file_rows(source: str) -> Iterator[tuple[str, Any]]:
    """(where, row), not yet known to be an object."""
    files, in_directory = _files(source)
    readers = [(file, row_reader(file.name)) for file in files]
    other = [file for file, reader in readers if reader is None]
    if other and (not in_directory or len(other) == len(files)):
        raise InputError(
            f"{other[0].path} holds no rows that can be read: rows come from .jsonl, .ndjson (also .gz), .json, "
            ".parquet or hf:NAME; convert it to one of them"
        )
    for file, reader in readers:
        if reader is not None:
            with _readable(file):
                yield from ((where, value) for _, where, value in reader(file))
    if other:
        warnings.warn(
            f"source {source!r}: skipped {len(other)} files that hold no rows, first {other[0].name!r}", stacklevel=3
        )


@contextmanager
def _readable(file: File) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"can't read {file.path} ({error}); check its permissions and disk") from None


def _files(source: str) -> tuple[list[File], bool]:
    """The files of a source, sorted by name, and whether binary files among them may be skipped."""
    if source == "stdlib":
        return _stdlib_files(), True
    if not source:
        raise InputError("the source is an empty string; name a file, a directory or 'stdlib'")
    try:
        fs, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"source {source!r} can't be opened: {error}; install its driver (gs:// needs `pip install "
            "gcsfs`) or name a local path"
        ) from None
    if fs.isfile(path):
        return [_file(fs, path, fs.info(path), os.path.dirname(path))], False
    if fs.isdir(path):
        found = fs.find(path, detail=True)
        files = [_file(fs, p, info, path) for p, info in found.items()]
        visible = [f for f in files if not any(part.startswith(".") for part in f.name.split("/"))]
        return sorted(visible, key=lambda f: f.name), True
    if any(c in path for c in "*?["):
        found = {p: i for p, i in fs.glob(path, detail=True).items() if i["type"] == "file"}
        if found:
            root = path[: min(path.index(c) for c in "*?[" if c in path)].rpartition("/")[0]
            return sorted((_file(fs, p, i, root) for p, i in found.items()), key=lambda f: f.name), False
        raise InputError(f"no file matches the source {source!r}; check the pattern")
    raise InputError(f"source {source!r} doesn't exist; {_nearest(fs, path)}")


def _file(fs: Any, path: str, info: dict, root: str) -> File:
    stamp = next((info[k] for k in ("mtime", "updated", "LastModified", "ETag", "created") if k in info), "")
    name = path[len(root) :].lstrip("/") if path.startswith(root) else path
    return File(fs, path, name, info["size"], str(stamp))


def _stdlib_files() -> list[File]:
    root = sysconfig.get_paths()["stdlib"]
    fs = fsspec.filesystem("file")
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _STDLIB_SKIPPED and not f.startswith(".")]
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(_STDLIB_SUFFIXES) and os.path.isfile(path):
                relative = os.path.relpath(path, root).replace(os.sep, "/")
                files.append(File(fs, path, relative, os.path.getsize(path), ""))
    return sorted(files, key=lambda f: f.name)


def _nearest(fs: Any, path: str) -> str:
    """Names the entry most like the missing one, in the nearest folder that exists."""
    parent, name = os.path.split(path.rstrip("/"))
    while parent and parent != os.path.dirname(parent) and not fs.isdir(parent):
        parent, name = os.path.split(parent)
    try:
        names = [os.path.basename(entry.rstrip("/")) for entry in fs.ls(parent or "/", detail=False)]
    except (OSError, ValueError):
        names = []
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    if close:
        return f"did you mean {os.path.join(parent, close[0])}?"
    return f"there is nothing like {name!r} in {parent or '/'}; check the path"


def _hub_documents(source: str, text_field: str) -> Iterator[Document]:
    for number, (where, row) in enumerate(_hub_rows(source), 1):
        yield Document(f"{source}:{number}", text_of(row, text_field, where))


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Rows of hf:NAME[:CONFIG][:SPLIT], streamed; the split is 'train' unless named."""
    name, config, split, *rest = [*source.split(":")[1:], "", ""]
    if not name or any(rest):
        raise InputError(f"source {source!r} is not of the form hf:NAME[:CONFIG][:SPLIT]")
    try:
        import datasets
    except ImportError:
        raise InputError(f"source {source!r} needs a package; run `pip install datasets`") from None
    stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    for number, row in enumerate(stream, 1):
        yield f"{source}: row {number}", row
