"""MinHash signatures and locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman, Ullman, chapter 3).

A document is the set of its shingles, all runs of `shingle` words. Of b bands with r hashes each, two documents with
Jaccard similarity s share at least one with probability 1 - (1 - s^r)^b, which is 1/2 near s = (1/b)^(1/r).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from gptjax.data import ngrams
from gptjax.data.hashing import mix64

_BLOCK = 1 << 15  # products in the cache of a core at a time


@dataclasses.dataclass(frozen=True)
class Bands:
    """bands, rows: b and r; shingle: words of a shingle."""

    bands: int = 14
    rows: int = 8
    shingle: int = 5

    @property
    def hashes(self) -> int:
        return self.bands * self.rows

    def probability(self, similarity):
        """Of a candidate, by Jaccard similarity: 1 - (1 - s^r)^b."""
        return 1 - (1 - np.asarray(similarity, float) ** self.rows) ** self.bands


GPT3 = Bands(10, 1)  # Spark's MinHashLSH with 10 hashes (GPT-3 appendix A), any of which may agree
FINEWEB = Bands(14, 8)  # Penedo et al. 2024: 112 hashes
MARIN = Bands(26, 11)  # 286 hashes: candidates above a similarity of about .74


def shingles(words: np.ndarray, length: int) -> np.ndarray:
    """uint32, of a text's word hashes, in order. A text with fewer words than `length` is one shingle."""
    hashes = ngrams.ngram_hashes(words, min(length, max(len(words), 1)))
    return (hashes >> np.uint64(32)).astype(np.uint32)


def signature(shingles: np.ndarray, hashes: int) -> np.ndarray:
    """uint32 [hashes]: the least value of each hash function, x -> (a x + b) mod 2^32 with a odd, over a set of
    shingles, which are hashes already; all ones of an empty set."""
    a, b = _functions(hashes)
    least = np.full(hashes, 0xFFFFFFFF, np.uint32)
    step = max(_BLOCK // hashes, 1)
    for start in range(0, len(shingles), step):
        products = shingles[start : start + step, None] * a
        products += b
        np.minimum(least, products.min(0), out=least)
    return least


def band_keys(signatures: np.ndarray, how: Bands) -> np.ndarray:
    """uint64 [documents, bands]: a hash of the rows of each band. signatures: uint32 [documents, hashes]."""
    rows = signatures.reshape(-1, how.bands, how.rows).astype(np.uint64)
    keys = np.tile(mix64(np.arange(1, how.bands + 1, dtype=np.uint64)), (len(rows), 1))
    for row in range(how.rows):
        keys = mix64(keys ^ rows[:, :, row]) + rows[:, :, row]
    return keys


@functools.cache
def _functions(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0x6D696E68)
    a, b = rng.integers(0, 2**32, (2, count), dtype=np.uint32)
    return a | np.uint32(1), b
