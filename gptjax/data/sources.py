"""Where text comes from: files, directories, globs, rows of tables, the standard library, the Hub.

A source is one string. Paths go through fsspec, so `gs://bucket/folder` works where its driver (gcsfs)
is installed. Documents come in a fixed order, one in memory at a time.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gptjax.data.formats import Document, File, may_hold_rows, read_documents, read_rows, split_document, text_of
from gptjax.data.links import FollowingLinks, once
from gptjax.data.specials import END_OF_TEXT
from gptjax.errors import InputError

_STDLIB_SUFFIXES = (".py", ".txt", ".rst")
_STDLIB_SKIPPED = "test tests idle_test site-packages dist-packages lib-dynload __pycache__".split()


class Row(NamedTuple):
    """where: 'path:line' or 'path: row N', from 1, for messages; value: its fields or columns."""

    where: str
    value: dict


def documents(
    source: str, *, text_field: str = "text", separator: str | None = None, lines: bool = False
) -> Iterator[Document]:
    """Documents of a source, in sorted order of files; documents without any text are left out.

    source: 'stdlib' (the Python standard library's code and documentation), a text file, a directory, a glob
    pattern, .jsonl, .json (a list of objects or texts, or an object a line), .parquet, .arrayrecord, or
    hf:NAME[:CONFIG][:SPLIT]. Text and JSON may be compressed (.gz, .bz2, .xz, .zst, .lz4, .zip).
    text_field: the field, column or feature that holds the text of a row. separator: text that ends a document inside
    a text, such as '<|endoftext|>'. lines: each line of a text file is a document, without its line break.

    InputError: missing, empty, damaged, not text, a row that isn't JSON or lacks the field; the message names the
    file and line. In a directory, files that aren't text are skipped with one warning that names them; where they
    are most of its files or bytes, that is an InputError too.
    """
    if separator == "":
        raise InputError("the document separator is empty; give the text that stands between documents")
    read = (
        _hub_documents(source, text_field) if source.startswith("hf:") else _file_documents(source, text_field, lines)
    )
    found, written, holders = False, 0, 0
    for whole in read:
        for document in [whole] if separator is None else split_document(whole, separator):
            if document.text:
                found = True
                times = document.text.count(END_OF_TEXT)
                written, holders = written + times, holders + bool(times)
                yield document
    if not found:
        raise InputError(f"source {source!r} is empty: it holds no text; name one that has some")
    if written:
        warnings.warn(
            f"source {source!r}: {END_OF_TEXT} is written {written} times in {holders} documents. It is ordinary text "
            "there and separates nothing; to pre-train with a document ending at each, give "
            f"--config.data.document_separator='{END_OF_TEXT}'",
            stacklevel=1,  # of this place: said once, however often and from wherever the source is read
        )


def rows(source: str, on_bad: Callable[[str, InputError], None] | None = None) -> Iterator[Row]:
    """Rows of a source with all their fields, in sorted order of files.

    source: .jsonl or .ndjson, a .json file that holds a list of objects or an object a line (all of them also
    compressed: .gz, .bz2, .xz, .zst, .lz4, .zip), .parquet, a directory or glob pattern of those, or
    hf:NAME[:CONFIG][:SPLIT]. A value that has no Python form (formats.Unreadable) is an error only where it is used.
    on_bad: gets the place and the error of a line that isn't JSON or a row that isn't an object, and reading goes on;
    None: they are raised.

    InputError: missing, empty, damaged, a row that isn't an object, a file of another kind. In a directory, files of
    other kinds are skipped with one warning that names them, but not where they are most of its bytes.
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
        files = _found(source).files
        content = [[f.name, f.size] if source == "stdlib" else [f.name, f.size, f.stamp] for f in files]
    if source == "stdlib":
        content.append([platform.python_implementation(), platform.python_version()])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_documents(source: str, text_field: str, lines: bool) -> Iterator[Document]:
    found = _found(source)
    skipped = _Skipped(source, found)
    for file in found.files:
        with _readable(file):
            skip, as_text = (skipped.add, skipped.as_text.append) if found.in_directory else (None, None)
            yield from read_documents(file, text_field, lines=lines, skip=skip, as_text=as_text)
    if source != "stdlib":  # whose few files in other encodings are part of it
        skipped.report("that can't be read as UTF-8 text", count_files=True)


def _file_rows(source: str) -> Iterator[tuple[str, Any]]:
    """(where, row), not yet known to be an object."""
    found = _found(source)
    skipped = _Skipped(source, found)
    other = [file for file in found.files if not may_hold_rows(file.name)]
    if other and (not found.in_directory or len(other) == len(found.files)):
        raise InputError(
            f"{other[0].path} holds no rows that can be read: rows come from .jsonl, .ndjson, .json, .parquet or "
            "hf:NAME; convert it to one of them"
        )
    for file in other:
        skipped.add(file.name, file.size)
    skipped.stop_if_most("that hold no rows", count_files=False)
    for file in found.files:
        if may_hold_rows(file.name):
            with _readable(file):
                yield from read_rows(file, skipped.add if found.in_directory else None)
    skipped.report("that hold no rows", count_files=False)


class _Skipped:
    """The files of a directory that were skipped: counted, named in one warning, refused where they are most of it."""

    def __init__(self, source: str, found: Found):
        self._source, self._found = source, found
        self._names, self._bytes = [], 0
        self.as_text: list[str] = []  # .json files that hold no rows

    def add(self, name: str, size: int) -> None:
        self._names.append(name)
        self._bytes += size

    def stop_if_most(self, kind: str, count_files: bool) -> None:
        """InputError: most of the directory's bytes were skipped or, with count_files, most of its files (rows often
        have a README and a license beside them)."""
        total = sum(file.size for file in self._found.files)
        names = [*self._found.broken, *self._names]
        files = len(self._found.files) + len(self._found.broken)
        if self._bytes * 2 > total or (count_files and len(names) * 2 > files):
            pattern = os.path.join(self._source, "*.txt" if count_files else "*.jsonl")
            raise InputError(
                f"most of source {self._source!r} would be skipped: {len(names)} of {files} files "
                f"({self._bytes:,} of {total:,} bytes) {kind}: {_named(names)}. Convert them, or name the files to "
                f"read with a pattern such as {pattern}"
            )

    def report(self, kind: str, count_files: bool) -> None:
        self.stop_if_most(kind, count_files)
        broken = self._found.broken
        said = []
        if self._names:
            said.append(f"skipped {len(self._names)} files {kind}: {_named(self._names)}")
        if broken:
            said.append(f"skipped {len(broken)} links to files that aren't there: {_named(broken)}")
        if self._found.loops:
            said.append(f"didn't follow {len(self._found.loops)} links to a folder above: {_named(self._found.loops)}")
        if self._found.repeated:
            count = len(self._found.repeated)
            said.append(f"read once {count} files that links show again: {_named(self._found.repeated)}")
        if self.as_text:
            said.append(f"read as text {len(self.as_text)} .json files that hold no rows: {_named(self.as_text)}")
        if said:
            warnings.warn(f"source {self._source!r}: {'; '.join(said)}", stacklevel=1)


def _named(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@contextmanager
def _readable(file: File) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"can't read {file.path} ({error}); check its permissions and disk") from None


class Found(NamedTuple):
    """The files of a source, by name. in_directory: files that can't be read may be skipped; broken: links to nothing;
    loops: links to a folder above them; repeated: files that a link shows under a second name, read once."""

    files: list[File]
    in_directory: bool
    broken: list[str] = []
    loops: list[str] = []
    repeated: list[str] = []


def _found(source: str) -> Found:
    if source == "stdlib":
        return Found(_stdlib_files(), True)
    if not source:
        raise InputError("the source is an empty string; name a file, a directory or 'stdlib'")
    try:
        fs, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"source {source!r} can't be opened: {error}; install its driver (gs:// needs `pip install "
            "gcsfs`) or name a local path"
        ) from None
    if isinstance(fs, LocalFileSystem):
        fs = FollowingLinks()
    try:
        return _listed(source, fs, path)
    except PermissionError as error:  # a folder in it, whose files would be missing
        raise InputError(f"can't list {error.filename} of source {source!r} ({error}); check its permissions") from None


def _listed(source: str, fs: Any, path: str) -> Found:
    if fs.isfile(path):
        return Found([_file(fs, path, fs.info(path), os.path.dirname(path))], False)
    if fs.isdir(path):
        return _sorted(fs, path, fs.find(path, detail=True), in_directory=True)
    if any(c in path for c in "*?["):
        root = path[: min(path.index(c) for c in "*?[" if c in path)].rpartition("/")[0]
        found = _sorted(fs, root, fs.glob(path, detail=True), in_directory=False)
        if found.broken:
            raise InputError(
                f"source {source!r}: {len(found.broken)} links point to files that aren't there: "
                f"{_named(found.broken)}; remove them or put the files back"
            )
        if found.files:
            return found
        raise InputError(f"no file matches the source {source!r}; check the pattern")
    if os.path.islink(path) and isinstance(fs, FollowingLinks):
        raise InputError(f"source {source!r} is a link to {os.readlink(path)}, which isn't there; put it back")
    raise InputError(f"source {source!r} doesn't exist; {_nearest(fs, path)}")


def _sorted(fs: Any, root: str, found: dict[str, dict], in_directory: bool) -> Found:
    """What fs found under root, by name; in a directory without what is hidden."""
    name = lambda path: path[len(root) :].lstrip("/") if path.startswith(root) else path
    if in_directory:
        found = {p: i for p, i in found.items() if not any(part.startswith(".") for part in name(p).split("/"))}
    of_type = lambda kind: sorted(path for path, info in found.items() if info["type"] == kind)
    paths, repeated = once(of_type("file"), found)
    files = sorted((_file(fs, path, found[path], root) for path in paths), key=lambda f: f.name)
    return Found(files, in_directory, *([name(p) for p in ps] for ps in (of_type("broken"), of_type("loop"), repeated)))


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
    try:
        stream = iter(datasets.load_dataset(name, config or None, split=split or "train", streaming=True))
        for number in itertools.count(1):
            row = next(stream, None)
            if row is None:
                return
            yield f"{source}: row {number}", row
    except Exception as error:  # of many kinds: no such dataset, config or split, no network, no permission
        reason = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            f"source {source!r} can't be read from the Hugging Face Hub ({type(error).__name__}: {reason}); check its "
            "name, config and split, the network, and for a gated dataset `hf auth login`"
        ) from None
