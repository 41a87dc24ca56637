"""What one file holds, by its name: text, JSON lines, a JSON list, Parquet, ArrayRecord."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from gptjax.errors import InputError

_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")  # .json.gz as C4 names them
_PARQUET = (".parquet",)
_ARRAY_RECORD = (".arrayrecord", ".array_record")
_SNIFFED = 8192  # bytes in which a NUL marks a file as binary, as git does
_RECORDS = 256  # ArrayRecord records read at a time


class Document(NamedTuple):
    """name: path relative to the source's root, and `:line` or `:row` (from 1) for rows; text: its text."""

    name: str
    text: str


class File(NamedTuple):
    """A file that fsspec opens; name: path relative to the source's root."""

    fs: Any  # fsspec.AbstractFileSystem
    path: str
    name: str
    size: int
    stamp: str  # modification time or etag, whatever the file system keeps


def document_reader(name: str) -> Callable[[File, str], Iterator[Document]]:
    """What yields the documents of a file of that name: (file, the field that holds a row's text)."""
    name = name.lower()
    if name.endswith(_JSON_LINES):
        return _json_lines
    if name.endswith(_PARQUET):
        return _parquet
    return _array_record if name.endswith(_ARRAY_RECORD) else _text_file


def row_reader(name: str) -> Callable[[File], Iterator[tuple[int, str, Any]]] | None:
    """What yields (number, where, row) of a file of that name, None where it has no rows. A line that can't be read
    is a row that is an InputError."""
    name = name.lower()
    if name.endswith(_JSON_LINES):
        return _json_line_rows
    if name.endswith(_PARQUET):
        return _parquet_rows
    return _json_list_rows if name.endswith(".json") else None


class NotText(Exception):
    """A file that was read as text has a byte at `offset` that cannot be text; reason: why."""

    def __init__(self, offset: int, reason: str):
        super().__init__(offset, reason)
        self.offset, self.reason = offset, reason


def _decode(data: bytes) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        raise NotText(nul, "is a NUL")
    try:
        return data.decode()  # no newline translation: the text is what the file holds
    except UnicodeDecodeError as error:
        raise NotText(error.start, f"isn't UTF-8 ({error.reason})") from None


@contextmanager
def _opened(file: File) -> Iterator[BinaryIO]:
    with file.fs.open(file.path, "rb") as stream:
        if not file.name.lower().endswith(".gz"):
            yield stream
            return
        try:
            with gzip.open(stream) as unpacked:
                yield unpacked
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{file.path} is a damaged gzip file ({error}); get it again") from None


def _text_file(file: File, text_field: str) -> Iterator[Document]:
    with _opened(file) as stream:
        head = stream.read(_SNIFFED)
        if b"\0" in head:  # before a large binary file is read whole
            raise NotText(head.index(b"\0"), "is a NUL")
        data = head + stream.read()
    yield Document(file.name, _decode(data))


def _json_lines(file: File, text_field: str) -> Iterator[Document]:
    for number, where, row in _json_line_rows(file):
        yield Document(f"{file.name}:{number}", text_of(row, text_field, where))


def _json_line_rows(file: File) -> Iterator[tuple[int, str, Any]]:
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{file.path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # also bytes that aren't UTF-8
                row = InputError(f"the line isn't JSON ({error}); fix or remove it")  # what reads it may go on
            yield number, where, row


def _json_list_rows(file: File) -> Iterator[tuple[int, str, Any]]:
    with _opened(file) as stream:
        try:
            values = json.load(stream)
        except ValueError as error:
            raise InputError(
                f"{file.path} isn't one JSON value ({error}); mend it, or name it .jsonl where each line is a row"
            ) from None
    if not isinstance(values, list):
        raise InputError(f"{file.path} is a JSON {type(values).__name__}, not a list of objects; make it one")
    for number, value in enumerate(values, 1):
        yield number, f"{file.path}: row {number}", value


def text_of(row: Any, text_field: str, where: str) -> str:
    """The text in a field of a row. InputError, which says where: no such field, or no text in it."""
    if isinstance(row, InputError):
        raise InputError(f"{where}: {row}")
    if not isinstance(row, dict):
        raise InputError(f"{where}: the row is a JSON {type(row).__name__}, not an object with a field {text_field!r}")
    if text_field not in row:
        raise InputError(
            f"{where}: no field {text_field!r}; the row has {', '.join(map(repr, row)) or 'none'}: "
            "name one of them as the text field"
        )
    text = row[text_field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise InputError(f"{where}: field {text_field!r} is {kind}, not text; mend or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: field {text_field!r} has half a surrogate pair; mend or remove the row") from None
    return text


def _parquet(file: File, text_field: str) -> Iterator[Document]:
    for number, where, row in _parquet_rows(file, text_field):
        yield Document(f"{file.name}:{number}", text_of(row, text_field, where))


def _parquet_rows(file: File, column: str | None = None) -> Iterator[tuple[int, str, dict]]:
    """Rows with one column, or with all."""
    import pyarrow
    import pyarrow.parquet

    with file.fs.open(file.path, "rb") as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if column is not None and column not in names:
                raise InputError(
                    f"{file.path}: no column {column!r}; the file has "
                    f"{', '.join(map(repr, names))}: name one of them as the text field"
                )
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=None if column is None else [column]):
                for row in batch.to_pylist():
                    number += 1
                    yield number, f"{file.path}: row {number}", row
        except pyarrow.ArrowException as error:
            raise InputError(f"{file.path} isn't a whole Parquet file ({error}); get it again") from None


def _array_record(file: File, text_field: str) -> Iterator[Document]:
    """Records of UTF-8 text, or of JSON objects with the field: the first record says which."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise InputError(f"{file.path} needs a reader; run `pip install array-record`") from None
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
            raise InputError(f"{file.path} is not a whole ArrayRecord file ({error}); get it again") from None


def _record(record: bytes, where: str) -> tuple[str, dict | None]:
    try:
        text = record.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} isn't UTF-8 at byte offset {error.start}; write it as text") from None
    try:
        row = json.loads(text) if text.startswith("{") else None
    except ValueError:
        row = None
    return text, row if isinstance(row, dict) else None
