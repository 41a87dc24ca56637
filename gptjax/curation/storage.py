"""Tables of documents and records, and columns of numbers, each written once, whole or not there.

What one input shard becomes is a file of the same number, in the same order, so that nothing depends on who wrote it.
"""

from __future__ import annotations

import gzip
import heapq
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gptjax.curation.documents import Document, Drop, Unreadable
from gptjax.data.hashing import draw
from gptjax.json_files import json_safe

_GROUP_BYTES, _GROUP_ROWS = 16 << 20, 1 << 14  # of a row group
_SHOWN = 2_000  # characters of a text that is kept for reading

DOCUMENT = pa.schema([("id", pa.string()), ("text", pa.string()), ("fields", pa.string()), ("scores", pa.string()),
                      ("edits", pa.string()), ("place", pa.int64()), ("read", pa.int64())])  # fmt: skip
RECORD = pa.schema([("id", pa.string()), ("status", pa.string()), ("step", pa.string()), ("reason", pa.string()),
                    ("score", pa.float64()), ("twin", pa.string()), ("detail", pa.string()), ("read", pa.int64()),
                    ("kept", pa.int64()), ("scores", pa.string()), ("edits", pa.string()),
                    ("place", pa.int64())])  # fmt: skip
OUTPUT = pa.schema([("text", pa.string()), ("id", pa.string()), ("fields", pa.string()), ("scores", pa.string())])


class Table:
    """A Parquet file, written a row group at a time and there once it is closed."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._path, self._schema = path, schema
        self._temporary = _temporary(path)
        self._writer = pq.ParquetWriter(self._temporary, schema, compression="zstd")
        self._rows, self._bytes = [], 0

    def add(self, row: dict) -> None:
        self._rows.append(row)
        self._bytes += len(row.get("text") or "") + 100
        if self._bytes >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows, self._bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()
        os.replace(self._temporary, self._path)


class JsonLines:
    """A .jsonl.gz file, there once it is closed; its bytes depend on its rows alone."""

    def __init__(self, path: Path):
        self._path, self._temporary = path, _temporary(path)
        self._raw = open(self._temporary, "wb")
        self._file = gzip.GzipFile(fileobj=self._raw, mode="wb", mtime=0, filename="", compresslevel=6)

    def add(self, row: dict) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()
        self._raw.close()
        os.replace(self._temporary, self._path)


def rows(path: Path) -> Iterator[dict]:
    """The rows of a Parquet file, a batch in memory at a time."""
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def column(path: Path, name: str) -> list:
    """One column of a Parquet file."""
    return pq.read_table(path, columns=[name])[name].to_pylist()


def merged(paths: Iterable[Path]) -> Iterator[dict]:
    """The rows of tables that are sorted by place, sorted by place."""
    return heapq.merge(*(rows(path) for path in paths), key=lambda row: row["place"])


# --- documents and records ------------------------------------------------------------------------------------


def document_row(document: Document) -> dict:
    return {
        "id": document.id, "text": document.text, "fields": _json(document.fields), "scores": _json(document.scores),
        "edits": _json(document.edits), "place": document.place, "read": document.read,
    }  # fmt: skip


def document_of(row: dict, number: int) -> Document:
    loaded = {key: json.loads(row[key]) for key in ("fields", "scores", "edits")}
    return Document(row["id"], row["text"], place=row["place"], row=number, read=row["read"], **loaded)


def output_row(document: Document, flat: bool) -> dict:
    """A document as it is in documents/. flat: its fields beside the text, as JSON lines have them; else as JSON."""
    if flat:
        own = {key: value for key, value in document.fields.items() if key not in ("text", "id")}
        own |= {"source_id": document.fields["id"]} if "id" in document.fields else {}
        row = {"text": document.text, "id": document.id, **own}
        return json_safe(json.loads(_json(row | ({"scores": document.scores} if document.scores else {}))))
    more = {"fields": _json(document.fields), "scores": _json(document.scores)}
    return {"text": document.text, "id": document.id, **more}


def removed_record(document: Document, step: str, drop: Drop) -> dict:
    return {
        "id": document.id, "status": "removed", "step": step, "reason": drop.reason, "score": drop.score,
        "twin": drop.twin, "detail": drop.detail, "read": document.read, "kept": 0, "scores": _json(document.scores),
        "edits": _json(document.edits), "place": document.place,
    }  # fmt: skip


def unreadable_record(item: Unreadable, place: int) -> dict:
    return {
        "id": item.id, "status": "unreadable", "step": "read", "reason": item.reason, "detail": item.detail,
        "read": 0, "kept": 0, "place": place,
    }  # fmt: skip


def kept_record(document: Document) -> dict:
    return {
        "id": document.id, "status": "kept", "read": document.read, "kept": len(document.text),
        "scores": _json(document.scores), "edits": _json(document.edits), "place": document.place,
    }  # fmt: skip


def _json(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, default=str, sort_keys=False)


# --- columns of numbers ---------------------------------------------------------------------------------------


class Columns:
    """Arrays that grow at their end, each a file of raw numbers, there once they are closed. dtypes: {name: dtype}."""

    def __init__(self, prefix: Path, dtypes: dict):
        self._paths = {name: Path(f"{prefix}.{name}.bin") for name in dtypes}
        self._dtypes = dtypes
        self._temporary = {name: _temporary(path) for name, path in self._paths.items()}
        self._files = {name: open(path, "wb") for name, path in self._temporary.items()}

    def add(self, **arrays) -> None:
        for name, array in arrays.items():
            self._files[name].write(np.ascontiguousarray(array, self._dtypes[name]).tobytes())

    def close(self) -> None:
        for name, file in self._files.items():
            file.close()
            os.replace(self._temporary[name], self._paths[name])


def numbers(prefix: Path, name: str, dtype, width: int | None = None) -> np.ndarray:
    """A column that Columns wrote, [rows] or [rows, width], mapped into memory."""
    path = Path(f"{prefix}.{name}.bin")
    if not path.stat().st_size:
        return np.zeros((0,) if width is None else (0, width), dtype)
    array = np.memmap(path, dtype, "r")
    return array if width is None else array.reshape(-1, width)


# --- texts for reading ----------------------------------------------------------------------------------------


class Samples:
    """Some documents of each kind, drawn by a hash of seed and id: the same ones however work is divided."""

    def __init__(self, count: int, seed: int):
        self._count, self._seed, self._heaps = count, seed, {}

    def add(self, kind: str, id: str, make) -> None:
        """make: () -> the row that is kept of the document, called only if it is drawn."""
        heap, key = self._heaps.setdefault(kind, []), -draw(self._seed, id)
        if len(heap) < self._count:
            heapq.heappush(heap, (key, id, make()))
        elif key > heap[0][0]:
            heapq.heapreplace(heap, (key, id, make()))

    def found(self) -> dict[str, list]:
        """{kind: [(draw, id, row)]}, the lowest draws first."""
        return {kind: [(-key, id, row) for key, id, row in sorted(heap, key=lambda item: (-item[0], item[1]))]
                for kind, heap in sorted(self._heaps.items())}  # fmt: skip


def shown(text: str) -> str:
    """As much of a text as is kept for reading."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} [... {len(text) - _SHOWN:,} characters more]"


def difference(before: str, after: str) -> dict:
    """{'before', 'after'}: of two texts what is between their common beginning and end, and 200 characters of those."""
    start = len(os.path.commonprefix([before, after]))
    end = len(os.path.commonprefix([before[start:][::-1], after[start:][::-1]]))
    start = max(start - 200, 0)
    return {"before": shown(before[start : len(before) - max(end - 200, 0)]),
            "after": shown(after[start : len(after) - max(end - 200, 0)])}  # fmt: skip


def write_bytes(path: Path, data: bytes) -> None:
    """Creates or replaces a file, whole."""
    temporary = _temporary(path)
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_arrays(path: Path, **arrays) -> None:
    """An .npz file, whole."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp"
