"""Reading one file according to its name: text, JSON lines, a JSON list, CSV, TSV, Parquet, ArrayRecord."""

from __future__ import annotations

import codecs
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from gptjax.data.compression import Part, parts, uncompressed_name
from gptjax.data.tables import Table, delimited, table_rows
from gptjax.data.values import Unreadable, parse_json, python_values
from gptjax.errors import InputError

JSON_LINES = (".jsonl", ".ndjson")
JSON = (".json",)  # a list, or one row per line, as in C4's .json.gz
PARQUET = (".parquet",)
_ARRAY_RECORD = (".arrayrecord", ".array_record")
_SNIFFED = 8192  # bytes that are searched for a NUL, which marks a binary file, as in git
_RECORDS = 256  # ArrayRecord records read at a time
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Document(NamedTuple):
    """name: path relative to the source's root, with `:line` or `:row` (from 1) for rows; text: its text."""

    name: str
    text: str


class File(NamedTuple):
    """A file in an fsspec file system; name: path relative to the source's root."""

    fs: Any  # fsspec.AbstractFileSystem
    path: str
    name: str
    size: int
    stamp: str  # modification time or ETag, depending on the file system


class NotText(Exception):
    """A file that was read as text is not text, because of the byte at `offset`; reason: the rest of that sentence."""

    def __init__(self, offset: int, reason: str):
        super().__init__(offset, reason)
        self.offset, self.reason = offset, reason


class NotRows(Exception):
    """A file contains no rows. reason: the predicate of a sentence; data: its contents; value: its JSON value."""

    def __init__(self, reason: str, data: bytes = b"", value: Any = None):
        super().__init__(reason)
        self.data, self.value = data, value


Skip = Callable[[str, int], None]  # called with the name of a file that is skipped, and its bytes on disk


def read_documents(
    file: File,
    text_field: str,
    *,
    lines: bool = False,
    skip: Skip | None = None,
    as_text: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """The documents of a file. text_field: of a row's text. lines: each line of a text file is a document.

    skip: called for a file, or a member of a zip archive, that is not text; None: raise InputError. as_text: called
    with the name of a .json file without rows, whose JSON then becomes the text; None: raise InputError.
    """
    name = uncompressed_name(file.name).lower()
    if name.endswith(PARQUET):
        yield from _parquet(file, text_field)
    elif name.endswith(_ARRAY_RECORD):
        yield from _array_record(file, text_field)
    else:
        with file.fs.open(file.path, "rb") as stream:
            for part in parts(stream, file.name, file.path, file.size):
                try:
                    yield from _part_documents(part, text_field, lines, as_text)
                except NotText as error:
                    if skip is None:
                        raise InputError(
                            f"{part.path} is not text, because the byte at offset {error.offset} {error.reason}: "
                            "convert it to UTF-8, or give a text, JSON, Parquet or ArrayRecord file."
                        ) from None
                    skip(part.label, part.size)


def may_hold_rows(name: str, table: Table = Table()) -> bool:
    """Whether a file of that name may contain rows."""
    known = (*JSON_LINES, *JSON, *PARQUET)
    return (
        uncompressed_name(name).lower().endswith(known)
        or name.lower().endswith(".zip")
        or delimited(uncompressed_name(name), table) is not None
    )


def read_rows(file: File, skip: Skip | None = None, table: Table = Table()) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row of a file; the row is an InputError if it is not readable.

    skip: called for a JSON file, or a member of a zip archive, without rows; None: raise InputError.
    """
    if uncompressed_name(file.name).lower().endswith(PARQUET):
        yield from ((where, row) for _, where, row in parquet_rows(file))
        return
    with file.fs.open(file.path, "rb") as stream:
        for part in parts(stream, file.name, file.path, file.size):
            try:
                kind = None if part.name.lower().endswith((*JSON_LINES, *JSON)) else delimited(part.name, table)
                rows = _json_rows(part) if kind is None else table_rows(part, kind, table.columns)
                yield from ((where, row) for _, where, row in rows)
            except NotRows as error:
                if skip is None:
                    raise InputError(f"{part.path} {error}. Give a file with rows.") from None
                skip(part.label, part.size)


# --- text -------------------------------------------------------------------------------------------------


def _part_documents(
    part: Part, text_field: str, lines: bool, as_text: Callable[[str], None] | None
) -> Iterator[Document]:
    if part.name.lower().endswith((*JSON_LINES, *JSON)):
        try:
            for number, where, row in _json_rows(part):
                if isinstance(row, InputError):
                    raise InputError(f"{where}: {row}")
                text = row if isinstance(row, str) else text_of(row, text_field, where)
                yield Document(f"{part.label}:{number}", text)
            return
        except NotRows as error:
            if isinstance(error.value, dict) and text_field in error.value:  # one document per file
                yield Document(part.label, text_of(error.value, text_field, part.path))
                return
            if as_text is None:
                raise InputError(
                    f"{part.path} {error}. To train on the JSON itself, rename the file to .txt."
                ) from None
            text = _decode(error.data)  # like the other files in a folder of code
            as_text(part.label)
    else:
        text = _text(part.stream)
    if not lines:
        yield Document(part.label, text)
        return
    for number, line in enumerate(_split(text, "\n"), 1):
        if line.strip():
            yield Document(f"{part.label}:{number}", line.removesuffix("\r"))


def split_document(document: Document, separator: str) -> Iterator[Document]:
    """The parts of a document between separators, without the line breaks around them; empty parts are dropped."""
    if separator not in document.text:
        yield document
        return
    for number, text in enumerate(_split(document.text, separator), 1):
        if text := text.strip("\r\n"):
            yield Document(f"{document.name}#{number}", text)


def _split(text: str, separator: str) -> Iterator[str]:
    """text.split(separator), one part in memory at a time."""
    start = 0
    while (end := text.find(separator, start)) >= 0:
        yield text[start:end]
        start = end + len(separator)
    yield text[start:]


def _text(stream: BinaryIO) -> str:
    head = stream.read(_SNIFFED)
    if head.startswith(_UTF16):
        raise NotText(0, "begins a UTF-16 byte order mark")
    if b"\0" in head:  # without reading a large binary file to the end
        raise NotText(head.index(b"\0"), "is a NUL")
    return _decode(head + stream.read())


def _decode(data: bytes) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        raise NotText(nul, "is a NUL")
    try:
        return data.decode().removeprefix("\ufeff")  # otherwise the text is exactly the file's contents
    except UnicodeDecodeError as error:
        raise NotText(error.start, f"is not UTF-8 ({error.reason})") from None


# --- JSON -------------------------------------------------------------------------------------------------


def _json_rows(part: Part) -> Iterator[tuple[int, str, Any]]:
    """(number, where, row) of JSON lines or, in a .json file, of a list; the row is an InputError if a line is not
    JSON.

    NotRows: a file of another format, or a .json file with neither.
    """
    name, stream = part.name.lower(), part.stream
    if not name.endswith((*JSON_LINES, *JSON)):
        raise NotRows("contains no readable rows: rows come from .jsonl, .ndjson, .json, .parquet, .csv or .tsv files")
    first, number = stream.readline(), 1
    if first.startswith(_UTF16):
        raise InputError(f"{part.path} has a UTF-16 byte order mark: convert it to UTF-8.")
    first = first.removeprefix(codecs.BOM_UTF8)
    while first and not first.strip():
        first, number = stream.readline(), number + 1
    lines = itertools.chain([first], stream)
    if name.endswith(JSON) and first:
        value, lines = _one_value(first, stream)
        if value is not None:
            yield from ((row, f"{part.path}: row {row}", item) for row, item in enumerate(value, 1))
            return
    for number, line in enumerate(lines, number):  # noqa: B020 (continues from the number of the first line)
        if line.strip():
            where = f"{part.path}:{number}"
            try:
                row = parse_json(line)
            except ValueError as error:  # also for bytes that are not UTF-8
                row = InputError(f"The line is not readable JSON ({error}): fix or remove it.")
            yield number, where, row


def _one_value(first: bytes, stream: BinaryIO) -> tuple[list | None, Iterator[bytes]]:
    """(the list in a .json file, no lines), or (None, all its lines) if each line is a row.

    first: the first line that is not blank; stream: positioned after it. NotRows: neither.
    """
    try:
        value = parse_json(first)
    except ValueError:
        value = None  # several lines, or not JSON
    if isinstance(value, dict):
        skipped = []
        while (line := stream.readline()) and not line.strip():
            skipped.append(line)
        if line:
            return None, itertools.chain([first, *skipped, line], stream)
        data = first
    else:
        data = first + stream.read()
        try:
            value = parse_json(data)
        except ValueError as error:
            raise NotRows(f"is not readable JSON ({error})", data) from None
    if isinstance(value, list) and (not value or isinstance(value[0], dict | str)):
        return value, iter(())
    reason = f"contains a single JSON {type(value).__name__}, not a list of objects or one object per line"
    lists = [k for k, v in value.items() if isinstance(v, list) and v] if isinstance(value, dict) else []
    if lists:
        reason += f" (its field {lists[0]!r} is a list: write that to a separate file)"
    raise NotRows(reason, data, value)


def text_of(row: Any, text_field: str, where: str) -> str:
    """The text in a field of a row. InputError, with the place: no such field, or it is not text."""
    if isinstance(row, InputError):
        raise InputError(f"{where}: {row}")
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: The row is a JSON {type(row).__name__}: give an object with a field {text_field!r}."
        )
    if text_field not in row:
        raise InputError(
            f"{where}: There is no field {text_field!r}, only {', '.join(map(repr, row)) or 'an empty object'}. "
            "Name one of them as the text field."
        )
    text = row[text_field]
    if isinstance(text, Unreadable):
        raise InputError(f"{where}: The field {text_field!r} {text.reason}: fix or remove the row.")
    if not isinstance(text, str):
        kind = type(text).__name__
        raise InputError(f"{where}: The field {text_field!r} is {kind}, not text: fix or remove the row.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: The field {text_field!r} has a lone surrogate: fix or remove the row."
        ) from None
    return text


# --- tables and records -----------------------------------------------------------------------------------


def _parquet(file: File, text_field: str) -> Iterator[Document]:
    for number, where, row in parquet_rows(file, text_field):
        yield Document(f"{file.name}:{number}", text_of(row, text_field, where))


def parquet_rows(file: File, column: str | None = None) -> Iterator[tuple[int, str, dict]]:
    """Rows with one column, or with all; a value that Python cannot represent is an Unreadable."""
    import pyarrow
    import pyarrow.parquet

    with file.fs.open(file.path, "rb") as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if column is not None and column not in names:
                raise InputError(
                    f"{file.path}: There is no column {column!r}, only {', '.join(map(repr, names))}. Name one of them "
                    "as the text field."
                )
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=None if column is None else [column]):
                columns = [python_values(values) for values in batch.columns]
                for row in zip(*columns, strict=True):
                    number += 1
                    yield number, f"{file.path}: row {number}", dict(zip(batch.schema.names, row, strict=True))
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # a disk error
                raise
            raise InputError(f"{file.path} is not a complete Parquet file ({error}): download it again.") from None


def _array_record(file: File, text_field: str) -> Iterator[Document]:
    """Records of UTF-8 text, or of JSON objects with the field; the first record decides which."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise InputError(f"{file.path} needs a package to read it: run `pip install array-record`.") from None
    with tempfile.TemporaryDirectory() as temporary:
        path = file.path
        if "file" not in file.fs.protocol:  # the reader opens local files only
            path = os.path.join(temporary, "copy")
            file.fs.get(file.path, path)
        try:
            reader = ArrayRecordReader(path)
            is_json = None
            for first in range(0, reader.num_records(), _RECORDS):
                last = min(first + _RECORDS, reader.num_records())
                for number, record in enumerate(reader.read(first, last), first + 1):
                    where = f"{file.path}: record {number}"
                    text, row = _record(record, where)
                    is_json = row is not None if is_json is None else is_json
                    text = text_of(row, text_field, where) if is_json else text
                    yield Document(f"{file.name}:{number}", text)
            reader.close()
        except (RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file.path} is not a complete ArrayRecord file ({error}): download it again.") from None


def _record(record: bytes, where: str) -> tuple[str, dict | None]:
    try:
        text = record.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: The record is not UTF-8 at byte offset {error.start}: write it as text.") from None
    try:
        row = parse_json(text) if text.startswith("{") else None
    except ValueError:
        row = None
    return text, row if isinstance(row, dict) else None
