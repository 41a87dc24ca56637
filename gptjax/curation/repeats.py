"""Exact substring deduplication: passages of many words that occurred before, anywhere in the corpus, are cut out.

As Lee et al. 2022, with 50 words in place of 50 tokens, and sorted hashes of all runs of so many words in place of a
suffix array: what is found is the same, but for collisions of 64 bits. The first occurrence stays, in the order of the
corpus.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from gptjax.curation import storage
from gptjax.curation.documents import Document, Drop
from gptjax.curation.words import words
from gptjax.data import ngrams

_ONCE, _FIRST, _AGAIN = 0, 1, 2  # what a run of words is


@dataclasses.dataclass(frozen=True)
class Repeats:
    """n: words of a passage, at least. parts: the hashes are sorted in so many parts, each in memory by itself."""

    n: int = 50
    parts: int = 16
    name = "repeats"

    def sketch(self, prefix: Path, folder: Path) -> _Sketch:
        return _Sketch(prefix, self.n)

    def decide(self, sketches, folder: Path) -> dict:
        hashes = [storage.numbers(s.prefix, "runs", "<u8") for s in sketches]
        kinds = [np.zeros(len(of_shard), np.uint8) for of_shard in hashes]
        starts = np.cumsum([0, *map(len, hashes)])
        for part in range(self.parts):
            places = [np.flatnonzero(of_shard % np.uint64(self.parts) == part) for of_shard in hashes]
            values = np.concatenate([of_shard[at] for of_shard, at in zip(hashes, places, strict=True)])
            place = np.concatenate([at + start for at, start in zip(places, starts, strict=False)])
            order = np.argsort(values, kind="stable")  # of equal ones the first in the corpus comes first
            same = values[order[1:]] == values[order[:-1]]
            for kind, found in ((_FIRST, order[:-1][same]), (_AGAIN, order[1:][same])):
                for shard, at in _by_shard(np.sort(place[found]), starts):
                    kinds[shard][at] = kind
        for shard, (sketch, of_shard) in enumerate(zip(sketches, kinds, strict=True)):
            ends = np.cumsum(storage.numbers(sketch.prefix, "counts", "<i8"))
            storage.write_arrays(folder / f"{shard:05d}.npz", kinds=of_shard, ends=ends)
        return {"runs": int(starts[-1]), "repeated": int(sum((of_shard == _AGAIN).sum() for of_shard in kinds))}

    def applied(self, folder: Path, shard: int):
        with np.load(folder / f"{shard:05d}.npz") as file:
            kinds, ends = file["kinds"], file["ends"]

        def step(document: Document) -> Document | Drop:
            of_document = kinds[ends[document.row - 1] if document.row else 0 : ends[document.row]]
            return self.cut(document, of_document) if (of_document == _AGAIN).any() else document

        return step

    def cut(self, document: Document, kinds: np.ndarray) -> Document | Drop:
        """The document without the words of repeated runs; what belongs to a first occurrence too stays."""
        found = words(document.text)
        covered = [self._covered(kinds == kind, len(found.hashes)) for kind in (_FIRST, _AGAIN)]
        gone = covered[1] & ~covered[0]
        if gone.all():
            return Drop("repeated", len(gone))
        edges = np.flatnonzero(np.diff(np.concatenate([[False], gone, [False]]).astype(np.int8)))
        pieces, end = [], 0
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            pieces.append(document.text[end : found.starts[first]])
            end = found.starts[last] if last < len(gone) else len(document.text)
        if len(edges):
            document.text = "".join([*pieces, document.text[end:]])
            document.edits["repeats"] = len(edges) // 2
        return document

    def _covered(self, runs: np.ndarray, count: int) -> np.ndarray:
        """bool [words]: which are in one of the runs, given by where they begin."""
        change = np.zeros(count + 1, np.int64)
        begins = np.flatnonzero(runs)
        np.add.at(change, begins, 1)
        np.add.at(change, begins + self.n, -1)
        return np.cumsum(change[:-1]) > 0


def _by_shard(places: np.ndarray, starts: np.ndarray):
    """(shard, places in it) of places in the corpus, which are sorted."""
    cuts = np.searchsorted(places, starts)
    for shard, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
        if last > first:
            yield shard, places[first:last] - starts[shard]


class _Sketch:
    """Of each document a hash of every run of n words."""

    def __init__(self, prefix: Path, n: int):
        self._n, self._columns = n, storage.Columns(prefix, {"counts": "<i8", "runs": "<u8"})

    def add(self, document: Document) -> None:
        runs = ngrams.ngram_hashes(words(document.text).hashes, self._n)
        self._columns.add(counts=[len(runs)], runs=runs)

    def close(self) -> None:
        self._columns.close()
