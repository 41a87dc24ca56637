"""Documents of files as they come from a crawl: what cannot be read is named and counted, and reading goes on.

`data/sources.py` reads a corpus that is meant to be whole, and stops at the first fault. Here a fault costs the least
that it can:

    cut, damaged      the file from there on; what was read before it stays
    not_json          that line
    invalid_utf8      that line, or text file; with invalid_utf8='replace' the bytes alone
    too_long          that line, or text file, which is passed over without being held in memory
    no_text           that row: no such field, or it holds no text
    empty             that document: nothing but white space
    not_text          that file: it has NUL bytes
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterator
from typing import Any

import fsspec

from gptjax.curation.documents import Document, Unreadable
from gptjax.data import formats
from gptjax.data.compression import Part, parts, uncompressed_name
from gptjax.data.values import Unreadable as UnreadableValue
from gptjax.data.values import parse_json
from gptjax.errors import InputError

_BLOCK = 1 << 20  # bytes of a line that is passed over, at a time


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read: the keys of CurateConfig with these names."""

    text_field: str = "text"
    invalid_utf8: str = "drop"
    longest: int = 64 << 20


def read(file: dict, how: Reading) -> Iterator[Document | Unreadable]:
    """The documents of a file in order, and what could not be read. file: {'path', 'name', 'size'}."""
    name, (fs, path) = file["name"], fsspec.core.url_to_fs(file["path"])
    try:
        if uncompressed_name(name).lower().endswith(formats.PARQUET):
            yield from _rows(fs, path, file, how)
            return
        with fs.open(path, "rb") as stream:
            for part in parts(stream, name, path, file["size"]):
                yield from _part(part, how)
    except (InputError, OSError) as error:
        reason = "cut" if isinstance(error, InputError) and _says_cut(error) else "damaged"
        yield Unreadable(f"{name}:rest", reason, str(error).replace(f"{path} ", "").partition("): ")[0])


def _says_cut(error: InputError) -> bool:
    return any(word in str(error).lower() for word in ("ended before", "truncated", "incomplete"))


def _part(part: Part, how: Reading) -> Iterator[Document | Unreadable]:
    name = part.name.lower()
    if name.endswith(formats.JSON):
        yield from _json(part, how)
    elif name.endswith(formats.JSON_LINES):
        yield from _lines(part, how)
    else:
        yield _text(part, how)


def _text(part: Part, how: Reading) -> Document | Unreadable:
    data = part.stream.read(how.longest + 1)
    if len(data) > how.longest:
        size = len(data) + sum(map(len, iter(lambda: part.stream.read(_BLOCK), b"")))
        return _too_long(part.label, size, how)
    if b"\0" in data:
        return Unreadable(part.label, "not_text", f"NUL at byte {data.index(0)}", len(data))
    text, fault = _decoded(data.removeprefix(codecs.BOM_UTF8), part.label, how)
    return fault or _document(part.label, text, {}, len(data))


def _lines(part: Part, how: Reading, first: bytes = b"") -> Iterator[Document | Unreadable]:
    """first: the beginning of the file, already read, if it is not a whole line."""
    number = 0
    while True:
        line = first + part.stream.readline(how.longest + 1 - len(first))
        number, first = number + 1, b""
        if not line:
            return
        where = f"{part.label}:{number}"
        if len(line) > how.longest and not line.endswith(b"\n"):
            size = len(line)
            while not line.endswith(b"\n") and (line := part.stream.readline(_BLOCK)):
                size += len(line)
            yield _too_long(where, size, how)
        elif line.strip():
            yield _line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where, how)


def _line(line: bytes, where: str, how: Reading) -> Document | Unreadable:
    text, fault = _decoded(line, where, how)
    if fault:
        return fault
    try:
        row = parse_json(text)
    except ValueError as error:
        return Unreadable(where, "not_json", str(error), len(line))
    return _row(row, where, how, len(line))


def _json(part: Part, how: Reading) -> Iterator[Document | Unreadable]:
    """A .json file: a list of rows, which is read whole, or a row a line."""
    head = part.stream.readline(1)
    while head.isspace():
        head = part.stream.readline(1)
    if head != b"[":
        yield from _lines(part, how, head)
        return
    data = head + part.stream.read(how.longest + 1)
    if len(data) > how.longest:
        yield _too_long(part.label, len(data), how)
        return
    text, fault = _decoded(data, part.label, how)
    if fault:
        yield fault
        return
    try:
        rows = parse_json(text)
    except ValueError as error:
        yield Unreadable(part.label, "not_json", str(error), len(data))
        return
    for number, row in enumerate(rows, 1):
        yield _row(row, f"{part.label}:{number}", how, 0)


def _rows(fs: Any, path: str, file: dict, how: Reading) -> Iterator[Document | Unreadable]:
    opened = formats.File(fs, path, file["name"], file["size"], "")
    for number, _, row in formats.parquet_rows(opened):
        yield _row(row, f"{file['name']}:{number}", how, 0)


def _row(row: Any, where: str, how: Reading, size: int) -> Document | Unreadable:
    if isinstance(row, str):
        return _document(where, row, {}, size)
    value = row.get(how.text_field) if isinstance(row, dict) else None
    if isinstance(value, UnreadableValue):
        return Unreadable(where, "invalid_utf8" if "UTF-8" in value.reason else "no_text", value.reason, size)
    try:
        text = formats.text_of(row, how.text_field, where)
    except InputError as error:
        return Unreadable(where, "no_text", str(error).removeprefix(f"{where}: "), size)
    return _document(where, text, {k: v for k, v in row.items() if k != how.text_field}, size)


def _document(where: str, text: str, fields: dict, size: int) -> Document | Unreadable:
    return Document(where, text, fields) if text.strip() else Unreadable(where, "empty", "no text", size)


def _decoded(data: bytes, where: str, how: Reading) -> tuple[str, Unreadable | None]:
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        if how.invalid_utf8 == "replace":
            return data.decode(errors="replace"), None
        return "", Unreadable(where, "invalid_utf8", f"{error.reason} at byte {error.start}", len(data))


def _too_long(where: str, size: int, how: Reading) -> Unreadable:
    return Unreadable(where, "too_long", f"{size:,} bytes, above longest={how.longest:,}", size)
