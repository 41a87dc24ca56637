"""Fuzzy deduplication: MinHash nominates pairs of documents, and the shared n-grams of each pair decide.

A document goes only if one that is kept and no shorter contains it: at least `containment` of its n-grams occur there,
and all that have a digit, for a table or a log with other numbers is another document. What goes is compared with what
is kept directly, never through a chain of neighbors: chains have joined tens of thousands of unrelated books.

Longer documents come first, of equally long ones (in words) the earlier; so which is kept depends on the corpus alone.
A short document inside a much longer one is not nominated: their Jaccard similarity is the ratio of their lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from gptjax.curation import storage, twins
from gptjax.curation.documents import Document
from gptjax.curation.minhash import Bands, band_keys, shingles, signature
from gptjax.curation.words import Words, batches
from gptjax.data import ngrams

_PENDING = 1 << 17  # characters that are hashed at once
_COMPARED = pa.schema([("id", pa.string()), ("candidate", pa.string()), ("containment", pa.float64()),
                       ("numbers_missing", pa.int64()), ("removed", pa.bool_())])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fuzzy:
    """how: which pairs are nominated. containment: share of a document's n-grams that the kept one has; 1 is the rule
    of Marin's curators, at which a reviewed sample of removals lost nothing. n: words of an n-gram. most: kept
    documents of a bucket that later ones are compared with, the longest; `left_out` in the figures counts others."""

    how: Bands = Bands()
    containment: float = 0.95
    n: int = 3
    most: int = 64
    name = "fuzzy"

    def sketch(self, prefix: Path, folder: Path) -> _Sketch:
        return _Sketch(prefix, self)

    def decide(self, sketches, folder: Path) -> dict:
        """Writes the twins, and compared.parquet: of each document that was nominated the candidate that has most of
        it, whether it was removed or not."""
        corpus = _Corpus(sketches, self.how.bands)
        found, compared, figures = [], [], dict.fromkeys(("nominated", "compared", "left_out"), 0)
        kept_in: dict[int, list[int]] = {}
        for row, buckets in _nominated(corpus):
            figures["nominated"] += 1
            best = None
            for candidate in _by_bands(kept_in, buckets):
                share, missing = contained(corpus.ngrams(row), corpus.ngrams(candidate))
                figures["compared"] += 1
                accepted = share >= self.containment and not missing
                if best is None or (accepted, share) > (best[0], best[2]):
                    best = accepted, candidate, share, missing
                if accepted:
                    break
            if best is not None:
                compared.append((row, *best))
            if best is not None and best[0]:
                found.append(twins.Twin(row, best[1], "contained", best[2]))
            else:
                for of_bucket in [kept_in.setdefault(bucket, []) for bucket in buckets]:
                    if len(of_bucket) < self.most:
                        of_bucket.append(row)
                    else:
                        figures["left_out"] += 1
        twins.write(folder, sketches, found)
        _write_compared(folder / "compared.parquet", sketches, compared)
        return figures

    def applied(self, folder: Path, shard: int):
        return twins.applied(folder, shard)


def contained(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """(share of the n-grams of a that b has, how many with a digit it has not). uint32, sorted; the lowest bit says
    whether an n-gram has a digit."""
    if not len(a) or not len(b):
        return 0.0, 0
    place = np.minimum(np.searchsorted(b, a), len(b) - 1)
    there = b[place] == a
    return float(there.mean()), int(np.count_nonzero(a[~there] & 1))


def document_ngrams(words: Words, n: int) -> np.ndarray:
    """uint32, sorted and distinct: the n-grams of a document, its words if it has fewer than n; the lowest bit says
    whether one has a digit."""
    n = max(min(n, len(words.hashes)), 1)
    hashes = (ngrams.ngram_hashes(words.hashes, n) >> np.uint64(32)).astype(np.uint32)
    digits = np.zeros(len(hashes), bool)
    for i in range(n if len(hashes) else 0):
        digits |= words.digits[i : i + len(hashes)]
    return np.unique(hashes & np.uint32(0xFFFFFFFE) | digits)


class _Sketch:
    """Of each document the keys of its bands, its words and its n-grams."""

    def __init__(self, prefix: Path, step: Fuzzy):
        self._step, self._texts, self._size = step, [], 0
        types = {"bands": "<u8", "words": "<i8", "counts": "<i8", "ngrams": "<u4"}
        self._columns = storage.Columns(prefix, types)

    def add(self, document: Document) -> None:
        self._texts.append(document.text)
        self._size += len(document.text)
        if self._size >= _PENDING:
            self._flush()

    def _flush(self) -> None:
        how = self._step.how
        for batch in batches(self._texts):
            signatures = np.stack([signature(shingles(w.hashes, how.shingle), how.hashes) for w in batch])
            grams = [document_ngrams(w, self._step.n) for w in batch]
            self._columns.add(
                bands=band_keys(signatures, how), words=[len(w.hashes) for w in batch],
                counts=[len(g) for g in grams], ngrams=np.concatenate(grams),
            )  # fmt: skip
        self._texts, self._size = [], 0

    def close(self) -> None:
        self._flush()
        self._columns.close()


class _Corpus:
    """The sketches of all shards, mapped into memory but for the counts of words and n-grams."""

    def __init__(self, sketches, bands: int):
        read = lambda name, dtype, width=None: [storage.numbers(s.prefix, name, dtype, width) for s in sketches]
        self.keys = read("bands", "<u8", bands)
        self.words = np.concatenate(read("words", "<i8"))
        self._ngrams = read("ngrams", "<u4")
        self._starts = np.cumsum([0, *(sketch.count for sketch in sketches)])
        self._ends = [np.cumsum(counts) for counts in read("counts", "<i8")]

    def ngrams(self, row: int) -> np.ndarray:
        shard = int(np.searchsorted(self._starts, row, "right")) - 1
        at, ends = row - self._starts[shard], self._ends[shard]
        return self._ngrams[shard][ends[at - 1] if at else 0 : ends[at]]


def _nominated(corpus: _Corpus) -> Iterator[tuple[int, list[int]]]:
    """(row, its buckets) of the documents that share a bucket, which is a key of a band: the longest first."""
    rows, buckets, count = [np.zeros(0, int)], [np.zeros(0, int)], 0
    for band in range(corpus.keys[0].shape[1] if corpus.keys else 0):
        keys = np.concatenate([shard[:, band] for shard in corpus.keys])  # one band in memory at a time
        order = np.argsort(keys, kind="stable")
        order = order[corpus.words[order] > 0]
        begins = np.concatenate([[True], keys[order[1:]] != keys[order[:-1]]])[: len(order)]
        bucket = np.cumsum(begins) - 1
        shared = np.bincount(bucket)[bucket] > 1 if len(order) else begins
        rows.append(order[shared])
        buckets.append(bucket[shared] + count)
        count += len(order)
    row, bucket = np.concatenate(rows), np.concatenate(buckets)
    if not len(row):
        return
    order = np.lexsort((bucket, row, -corpus.words[row]))
    row, bucket = row[order], bucket[order]
    begins = np.flatnonzero(np.concatenate([[True], np.diff(row) != 0])[: len(row)])
    for begin, end in zip(begins, [*begins[1:], len(row)], strict=True):
        yield int(row[begin]), bucket[begin:end].tolist()


def _by_bands(kept_in: dict[int, list[int]], buckets: list[int]) -> list[int]:
    """The kept documents that share a bucket, those with most of them first, then in the order they were kept in."""
    shared: dict[int, int] = {}
    for bucket in buckets:
        for row in kept_in.get(bucket, ()):
            shared[row] = shared.get(row, 0) + 1
    return sorted(shared, key=lambda row: -shared[row])


def _write_compared(path: Path, sketches, compared: list[tuple]) -> None:
    ids = twins.ids(sketches, {row for pair in compared for row in (pair[0], pair[2])})
    table = storage.Table(path, _COMPARED)
    for row, accepted, candidate, share, missing in compared:
        table.add({"id": ids[row], "candidate": ids[candidate], "containment": share, "numbers_missing": missing,
                   "removed": accepted})  # fmt: skip
    table.close()
