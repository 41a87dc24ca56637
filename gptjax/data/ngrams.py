"""Overlap between texts: normalization, hashes of word n-grams and of character windows, and a Bloom filter.

Hashes are 64-bit and computed for a whole document at once. Two of 10^6 n-grams of an evaluation set and 10^11 of a
corpus are equal by chance with probability 10^17 / 2^64 = .005.
"""

import functools
import hashlib
import math
import re

import numpy as np

from gptjax.data.hashing import mix64

_WORD = re.compile(r"[^\W_]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))


def words(text: str) -> list[str]:
    """The lower-cased alphanumeric words of a text (GPT-2 §4; GPT-3 appendix C)."""
    return _WORD.findall(text.lower())


def characters(text: str) -> str:
    """The letters and digits of a text, without spaces and symbols (GPT-4 appendix C)."""
    return "".join(filter(str.isalnum, text))


@functools.lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(text: str) -> np.ndarray:
    """uint64 [words]."""
    return np.fromiter(map(_word_hash, words(text)), np.uint64)


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [words - n + 1] of a text's word hashes: a hash for each n consecutive words."""
    count = len(hashes) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for i in range(n):
        total = total * _BASE + hashes[i : i + count]
    return mix64(total)


class Windows:
    """Hashes of all windows of a text's characters, of any length, from one pass over it."""

    def __init__(self, text: str):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64) + np.uint64(1)
        self._prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * powers(len(codes)), dtype=np.uint64)])
        self._inverse = powers(len(codes), inverse=True)

    def hashes(self, length: int) -> np.ndarray:
        """uint64 [characters - length + 1]."""
        count = len(self._prefix) - length
        if count < 1:
            return np.zeros(0, np.uint64)
        return mix64((self._prefix[length:] - self._prefix[:count]) * self._inverse[:count])


def powers(count: int, inverse: bool = False) -> np.ndarray:
    """_BASE^0 ... _BASE^(count - 1) modulo 2^64, or of its inverse."""
    return _powers(1 << max(count - 1, 1).bit_length(), inverse)[:count]


@functools.lru_cache(maxsize=4)
def _powers(count: int, inverse: bool) -> np.ndarray:
    base = _INVERSE if inverse else _BASE
    return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(count - 1, base, np.uint64)]), dtype=np.uint64)


class Bloom:
    """A set of 64-bit hashes that may hold some it was not given, with probability p (Bloom 1970).

    count: hashes that it is made for. bits: -count ln p / (ln 2)^2, 38.34 for each of them at GPT-2's p = 10^-8;
    hashes: of each element, ceil(-log2 p) = 27.
    """

    def __init__(self, count: int, p: float = 1e-8):
        self.bits = max(64, math.ceil(-max(count, 1) * math.log(p) / math.log(2) ** 2))
        self.hashes = math.ceil(-math.log2(p))
        self._table = np.zeros(-(-self.bits // 8), np.uint8)

    def add(self, values: np.ndarray) -> None:
        for place in self._places(np.unique(values)):
            np.bitwise_or.at(self._table, place >> np.uint64(3), _BIT[(place & np.uint64(7)).astype(np.intp)])

    def contains(self, values: np.ndarray) -> np.ndarray:
        """bool [values]."""
        found = np.ones(len(values), bool)
        for place in self._places(values):
            found &= (self._table[place >> np.uint64(3)] & _BIT[(place & np.uint64(7)).astype(np.intp)]) > 0
        return found

    def _places(self, values: np.ndarray):
        """The places of each value's bits, one for all values at a time: h1 + i h2 (Kirsch and Mitzenmacher 2006)."""
        first, step = mix64(values), mix64(values ^ _BASE) | np.uint64(1)
        for i in range(self.hashes):
            yield (first + np.uint64(i) * step) % np.uint64(self.bits)


_BIT = (1 << np.arange(8)).astype(np.uint8)
