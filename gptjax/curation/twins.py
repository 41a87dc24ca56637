"""The decisions of a step that removes documents because others are kept: by shard, with the twin of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.curation import storage
from gptjax.curation.documents import Document, Drop


class Twin(NamedTuple):
    """row, kept: of the removed and of the kept document, counted over all shards."""

    row: int
    kept: int
    reason: str
    score: float | None = None


def write(folder: Path, sketches: Sequence, found: Sequence[Twin]) -> None:
    """A file for each shard, with the ids of the kept documents."""
    starts = np.cumsum([0, *(sketch.count for sketch in sketches)])
    of_kept = ids(sketches, {twin.kept for twin in found})
    of_shard: list[dict] = [{} for _ in sketches]
    for twin in found:
        shard = int(np.searchsorted(starts, twin.row, "right")) - 1
        of_shard[shard][str(twin.row - int(starts[shard]))] = [twin.reason, twin.score, of_kept[twin.kept]]
    for shard, decisions in enumerate(of_shard):
        storage.write_bytes(folder / f"{shard:05d}.json", json.dumps(decisions).encode())


def ids(sketches: Sequence, wanted: set[int]) -> dict[int, str]:
    """{row: id} of documents, by their rows over all shards."""
    starts, rows, found = np.cumsum([0, *(sketch.count for sketch in sketches)]), sorted(wanted), {}
    for shard, sketch in enumerate(sketches):
        first, last = np.searchsorted(rows, starts[shard : shard + 2])
        if last > first:
            column = storage.column(sketch.documents, "id")
            found |= {row: column[row - starts[shard]] for row in rows[first:last]}
    return found


def applied(folder: Path, shard: int) -> Callable[[Document], Document | Drop]:
    """The function that removes them."""
    decisions = json.loads((folder / f"{shard:05d}.json").read_text())

    def step(document: Document) -> Document | Drop:
        if (decision := decisions.get(str(document.row))) is None:
            return document
        reason, score, twin = decision
        return Drop(reason, score, twin)

    return step
