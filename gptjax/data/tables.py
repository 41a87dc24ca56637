"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from gptjax.data.compression import Part
from gptjax.errors import InputError

_SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv"}


class Table(NamedTuple):
    """How tables of text are read. format: 'csv' or 'tsv' whatever the files' names; None = by the name. columns: names
    of the columns of files without a header; None = the first line has them."""

    format: str | None = None
    columns: tuple[str, ...] | None = None


def delimited(name: str, table: Table) -> str | None:
    """'csv' or 'tsv' where a file of that name, which is of no other known format, is read as one."""
    return table.format or _SUFFIXES.get(os.path.splitext(name)[1].lower())


def table_rows(part: Part, kind: str, columns: tuple[str, ...] | None) -> Iterator[tuple[int, str, Any]]:
    """(line number, where, {column: text}); an InputError in place of a row with another number of cells, or whose text
    is not UTF-8. A .csv file may quote its cells ("a, b", with "" for a quote); in a .tsv file quotes are text.

    InputError: no header, or one with a name twice.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = io.TextIOWrapper(part.stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text) if kind == "csv" else csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    number = 0
    try:
        if columns is None:
            columns = tuple(cell.strip() for cell in next(reader, ()))
            number = reader.line_num
            if not columns or len(set(columns)) < len(columns):
                raise InputError(
                    f"{part.path} begins with {list(columns)}, not with a line of column names: name them with "
                    "--config.data.columns=NAME,NAME."
                )
        for cells in reader:
            first, number = number + 1, reader.line_num
            if cells:
                yield first, f"{part.path}:{first}", _row_of(cells, columns, kind)
    except csv.Error as error:
        raise InputError(f"{part.path}:{number + 1} is not {kind.upper()} ({error}): fix the file.") from None
    finally:
        if not text.closed:  # as where an error in a row has ended the reading
            text.detach()  # the stream is the caller's to close


def _row_of(cells: list[str], columns: tuple[str, ...], kind: str) -> dict[str, str] | InputError:
    if len(cells) != len(columns):
        hint = 'put quotes ("...") around a cell with a comma' if kind == "csv" else "a cell must have no tab"
        return InputError(f"The row has {len(cells)} cells for the {len(columns)} columns: {hint}.")
    if any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
        return InputError("The row is not UTF-8: convert the file.")
    return dict(zip(columns, cells, strict=True))
