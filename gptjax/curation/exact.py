"""Exact deduplication: of documents with the same normalized text the first one is kept; likewise of rows with one id.

Two texts are the same if they are so after Unicode NFC, lower case and with each white space as one space. Keys are 128
bits of BLAKE2b: among 10^10 documents two different ones are equal by chance with probability below 10^-18.
"""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from pathlib import Path

import numpy as np

from gptjax.curation import storage, twins
from gptjax.curation.documents import Document


def normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def key(text: str) -> np.ndarray:
    """uint64 [2]; never zeros."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")


_NONE = np.zeros(2, "<u8")


@dataclasses.dataclass(frozen=True)
class Exact:
    """ids: also drop rows that repeat the id of an earlier, kept row (config.id_field)."""

    ids: bool = True
    name = "exact"

    def sketch(self, prefix: Path, folder: Path) -> _Sketch:
        return _Sketch(prefix, self.ids)

    def decide(self, sketches, folder: Path) -> dict:
        """In the order of the corpus: reason 'duplicate' (of a text) or 'repeated_id'."""
        texts, ids = (
            np.concatenate([storage.numbers(s.prefix, name, "<u8", 2) for s in sketches]) for name in ("text", "own")
        )
        repeated = np.flatnonzero(_repeated(texts) | (_repeated(ids) & ids.any(1)))
        seen: dict[tuple[str, bytes], int] = {}
        found = []
        for row in repeated.tolist():
            keys = [("duplicate", texts[row].tobytes())]
            keys += [("repeated_id", ids[row].tobytes())] if ids[row].any() else []
            earlier = next(((kind, seen[kind, value]) for kind, value in keys if (kind, value) in seen), None)
            if earlier is not None:
                found.append(twins.Twin(row, earlier[1], earlier[0]))
            else:
                seen |= {pair: row for pair in keys}
        twins.write(folder, sketches, found)
        return {}

    def applied(self, folder: Path, shard: int):
        return twins.applied(folder, shard)


class _Sketch:
    def __init__(self, prefix: Path, ids: bool):
        self._ids = ids
        self._columns = storage.Columns(prefix, {"text": "<u8", "own": "<u8"})

    def add(self, document: Document) -> None:
        own = document.fields.get("id") if self._ids else None
        self._columns.add(text=key(normalized(document.text)), own=_NONE if own is None else key(str(own)))

    def close(self) -> None:
        self._columns.close()


def _repeated(keys: np.ndarray) -> np.ndarray:
    """bool [rows]: whether another row has the same key [2]."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    same = (keys[order[1:]] == keys[order[:-1]]).all(1)
    found = np.zeros(len(keys), bool)
    found[order[1:][same]] = found[order[:-1][same]] = True
    return found
