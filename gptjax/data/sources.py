"""Sources of text and rows: files, directories, glob patterns, the Python standard library, the Hugging Face Hub.

A source is a string. Paths are opened with fsspec, so `gs://bucket/folder` works if its driver (gcsfs) is installed.
Documents are read in a fixed order, one in memory at a time.
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

from gptjax.data.formats import (
    Document,
    File,
    may_hold_rows,
    read_documents,
    read_rows,
    split_document,
    text_of,
)
from gptjax.data.links import FollowingLinks, once
from gptjax.data.specials import END_OF_TEXT
from gptjax.data.tables import Table
from gptjax.errors import InputError

_STDLIB_SUFFIXES = (".py", ".txt", ".rst")
_STDLIB_SKIPPED = "test tests idle_test site-packages dist-packages lib-dynload __pycache__".split()


class Row(NamedTuple):
    """where: 'path:line' or 'path: row N' (from 1), for messages; value: its fields or columns."""

    where: str
    value: dict


def documents(
    source: str, *, text_field: str = "text", separator: str | None = None, lines: bool = False
) -> Iterator[Document]:
    """Documents of a source, with files sorted by name; empty documents are dropped.

    Args:
        source: 'stdlib' (the Python standard library's code and documentation), a text file, a directory, a glob
            pattern, .jsonl, .json (a list of objects or texts, or one object per line), .parquet, .arrayrecord, or
            hf:NAME[:CONFIG][:SPLIT]. Text and JSON may be compressed (.gz, .bz2, .xz, .zst, .lz4, .zip).
        text_field: the field, column or feature with the text of a row.
        separator: text that ends a document inside a text, such as '<|endoftext|>'.
        lines: each line of a text file is a document, without its line break.
    Raises:
        InputError: missing, empty, damaged, not text, a row that is not JSON or lacks the field; the message names the
        file and line. In a directory, files that are not text are skipped with one warning that names them, but it is
        an error if they are most of its files or bytes.
    """
    if separator == "":
        raise InputError("The document separator is empty: give the text that separates documents.")
    read = (
        _hub_documents(source, text_field) if source.startswith("hf:") else _file_documents(source, text_field, lines)
    )
    found, occurrences, containing = False, 0, 0
    for whole in read:
        for document in [whole] if separator is None else split_document(whole, separator):
            if document.text:
                found = True
                count = document.text.count(END_OF_TEXT)
                occurrences, containing = occurrences + count, containing + bool(count)
                yield document
    if not found:
        raise InputError(f"The source {source!r} contains no text: give one that does.")
    if occurrences:
        warnings.warn(
            f"The source {source!r} contains {END_OF_TEXT} {occurrences} times in {containing} documents. It is "
            "treated as ordinary text and does not separate documents. To end a document at each one in pre-training, "
            f"give --config.data.document_separator='{END_OF_TEXT}'.",
            stacklevel=1,  # this line: the warning is shown once, however often the source is read
        )


def rows(
    source: str, on_bad: Callable[[str, InputError], None] | None = None, table: Table = Table()
) -> Iterator[Row]:
    """Rows of a source with all their fields, with files sorted by name.

    Args:
        source: .jsonl or .ndjson, a .json file with a list of objects or one object per line (all also compressed: .gz,
            .bz2, .xz, .zst, .lz4, .zip), .csv or .tsv, .parquet, a directory or glob pattern of those, or
            hf:NAME[:CONFIG][:SPLIT]. A value that Python cannot represent (values.Unreadable) is an error only if it is
            used.
        on_bad: called with the place and error of a line that is not JSON or a row that is not an object, and reading
            continues; None: raise the error.
        table: how .csv and .tsv files are read.
    Raises:
        InputError: missing, empty, damaged, a row that is not an object, a file of another format. In a directory,
        files of other formats are skipped with one warning that names them, unless they are most of its bytes.
    """
    found = False
    for where, value in _hub_rows(source) if source.startswith("hf:") else _file_rows(source, table):
        found = True
        if isinstance(value, dict):
            yield Row(where, value)
            continue
        error = value
        if not isinstance(error, InputError):
            error = InputError(f"The row is a JSON {type(value).__name__}, not an object: fix or remove it.")
        if on_bad is None:
            raise InputError(f"{where}: {error}")
        on_bad(where, error)
    if not found:
        raise InputError(f"The source {source!r} contains no rows: give one that does.")


def fingerprint(source: str) -> str:
    """SHA-256 (hex) of the names, sizes and modification times of a source's files, whose contents are not read.

    For 'stdlib' of the Python version and the sizes, so that it survives a reinstallation; for hf: of the name only.
    InputError: missing source.
    """
    if source.startswith("hf:"):
        content: list = [source]
    else:
        files = listing(source).files
        content = [[f.name, f.size] if source == "stdlib" else [f.name, f.size, f.stamp] for f in files]
    if source == "stdlib":
        content.append([platform.python_implementation(), platform.python_version()])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_documents(source: str, text_field: str, lines: bool) -> Iterator[Document]:
    found = listing(source)
    skipped = _Skipped(source, found)
    for file in found.files:
        with _readable(file):
            skip, as_text = (skipped.add, skipped.as_text.append) if found.in_directory else (None, None)
            yield from read_documents(file, text_field, lines=lines, skip=skip, as_text=as_text)
    if source != "stdlib":  # a few of its files have other encodings
        skipped.report("that are not UTF-8 text", count_files=True)


def _file_rows(source: str, table: Table) -> Iterator[tuple[str, Any]]:
    """(where, row), not yet checked to be an object."""
    found = listing(source)
    skipped = _Skipped(source, found)
    other = [file for file in found.files if not may_hold_rows(file.name, table)]
    if other and (not found.in_directory or len(other) == len(found.files)):
        raise InputError(
            f"{other[0].path} contains no readable rows: convert it to .jsonl, .ndjson, .json, .csv, .tsv or "
            ".parquet, or give hf:NAME."
        )
    for file in other:
        skipped.add(file.name, file.size)
    skipped.check("without rows", count_files=False)
    for file in found.files:
        if may_hold_rows(file.name, table):
            with _readable(file):
                yield from read_rows(file, skipped.add if found.in_directory else None, table)
    skipped.report("without rows", count_files=False)


class _Skipped:
    """The files of a directory that were skipped: one warning names them, or an error if they are most of it."""

    def __init__(self, source: str, found: Found):
        self._source, self._found = source, found
        self._names, self._bytes = [], 0
        self.as_text: list[str] = []  # .json files without rows

    def add(self, name: str, size: int) -> None:
        self._names.append(name)
        self._bytes += size

    def check(self, kind: str, count_files: bool) -> None:
        """InputError: most of the directory's bytes were skipped or, with count_files, most of its files (not counted
        for rows, which often come with a README and a license)."""
        total = sum(file.size for file in self._found.files)
        names = [*self._found.broken, *self._names]
        files = len(self._found.files) + len(self._found.broken)
        if self._bytes * 2 > total or (count_files and len(names) * 2 > files):
            pattern = os.path.join(self._source, "*.txt" if count_files else "*.jsonl")
            raise InputError(
                f"Most of the source {self._source!r} would be skipped, {len(names)} of {files} files "
                f"({self._bytes:,} of {total:,} bytes) {kind}: {_listed_names(names)}. Convert them, or select the "
                f"files to read with a pattern such as {pattern}."
            )

    def report(self, kind: str, count_files: bool) -> None:
        self.check(kind, count_files)
        found, notes = self._found, []
        if self._names:
            notes.append(f"Skipped {len(self._names)} files {kind}: {_listed_names(self._names)}.")
        if found.broken:
            notes.append(f"Skipped {len(found.broken)} links to missing files: {_listed_names(found.broken)}.")
        if found.loops:
            notes.append(f"Did not follow {len(found.loops)} links to a folder above: {_listed_names(found.loops)}.")
        if found.repeated:
            names = _listed_names(found.repeated)
            notes.append(f"Read only once {len(found.repeated)} files with further names through links: {names}.")
        if self.as_text:
            names = _listed_names(self.as_text)
            notes.append(f"Read {len(self.as_text)} .json files without rows as text: {names}.")
        if notes:
            warnings.warn(f"source {self._source!r}: {' '.join(notes)}", stacklevel=1)


def _listed_names(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@contextmanager
def _readable(file: File) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{file.path} cannot be read ({error}): check its permissions and disk.") from None


class Found(NamedTuple):
    """The files of a source, sorted by name. in_directory: unreadable files may be skipped; broken: links without a
    target; loops: links to a folder above; repeated: second names of files through links, which are read only once."""

    files: list[File]
    in_directory: bool
    broken: list[str] = []
    loops: list[str] = []
    repeated: list[str] = []


def listing(source: str) -> Found:
    """The files of a source, sorted by name. InputError: none, or they cannot be listed."""
    if source == "stdlib":
        return Found(_stdlib_files(), True)
    if not source:
        raise InputError("The source is an empty string: give a file, a directory or 'stdlib'.")
    try:
        fs, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"The source {source!r} cannot be opened ({error}): install its driver (`pip install gcsfs` for gs://), or "
            "give a local path."
        ) from None
    if isinstance(fs, LocalFileSystem):
        fs = FollowingLinks()
    try:
        return _listed(source, fs, path)
    except PermissionError as error:  # otherwise the files of that folder would be missing
        raise InputError(
            f"{error.filename} in the source {source!r} cannot be listed ({error}): check its permissions."
        ) from None


def _listed(source: str, fs: Any, path: str) -> Found:
    if fs.isfile(path):
        return Found([_file(fs, path, fs.info(path), os.path.dirname(path))], False)
    if fs.isdir(path):
        path = _curated(source, fs, path)
        return _sorted(fs, path, fs.find(path, detail=True), in_directory=True)
    if any(c in path for c in "*?["):
        root = path[: min(path.index(c) for c in "*?[" if c in path)].rpartition("/")[0]
        found = _sorted(fs, root, fs.glob(path, detail=True), in_directory=False)
        if found.broken:
            raise InputError(
                f"The source {source!r} has {len(found.broken)} links to missing files, {_listed_names(found.broken)}: "
                "remove them, or restore the files."
            )
        if found.files:
            return found
        raise InputError(f"No file matches the source {source!r}: check the pattern.")
    if os.path.islink(path) and isinstance(fs, FollowingLinks):
        raise InputError(
            f"The source {source!r} is a link to {os.readlink(path)}, which does not exist: restore it."
        )
    raise InputError(f"The source {source!r} does not exist: {_nearest(fs, path)}")


def _curated(source: str, fs: Any, path: str) -> str:
    """Of a workdir of gptjax.curate the folder of its documents; any other folder as it is."""
    if not fs.exists(f"{path}/curation.json"):
        return path
    if not fs.exists(f"{path}/manifest.json"):
        raise InputError(
            f"The curation in {source!r} has not come to its end: run `python -m gptjax.curate` there again."
        )
    return f"{path}/documents"


def _sorted(fs: Any, root: str, found: dict[str, dict], in_directory: bool) -> Found:
    """The files found under root, sorted by name; in a directory without hidden ones."""
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
    """A clause that names the entry most similar to the missing one in the nearest existing folder."""
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
    return f"there is nothing like {name!r} in {parent or '/'}, so check the path."


def _hub_documents(source: str, text_field: str) -> Iterator[Document]:
    for number, (where, row) in enumerate(_hub_rows(source), 1):
        yield Document(f"{source}:{number}", text_of(row, text_field, where))


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Streamed rows of hf:NAME[:CONFIG][:SPLIT]; the split is 'train' by default."""
    name, config, split, *rest = [*source.split(":")[1:], "", ""]
    if not name or any(rest):
        raise InputError(f"The source {source!r} is malformed: write hf:NAME[:CONFIG][:SPLIT].")
    try:
        import datasets
    except ImportError:
        raise InputError(f"The source {source!r} needs a package: run `pip install datasets`.") from None
    try:
        stream = iter(datasets.load_dataset(name, config or None, split=split or "train", streaming=True))
        for number in itertools.count(1):
            row = next(stream, None)
            if row is None:
                return
            yield f"{source}: row {number}", row
    except Exception as error:  # many types: no such dataset, config or split, no network, no permission
        reason = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            f"The source {source!r} cannot be read from the Hugging Face Hub ({type(error).__name__}: {reason}): check "
            "its name, config and split, the network and, for a gated dataset, `hf auth login`."
        ) from None
