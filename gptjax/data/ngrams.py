"""Overlap between texts: normalization, hashes of word n-grams and of character windows, and a Bloom filter.

A corpus is read as a stream of batches of about 2^17 characters: many short documents at a time, a long one in pieces.
Hashes are 64-bit polynomials, computed for a whole batch at once. Two of 10^6 n-grams of an evaluation set and 10^11 of
a corpus are equal by chance with probability 10^17 / 2^64 = .005.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptjax.data.hashing import mix64

_WORD = re.compile(r"[^\W_]+")
_SPACE = re.compile(r"\s")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_BATCH = 1 << 17  # characters: its arrays of 8 bytes each fit in a core's cache


def words(text: str) -> list[str]:
    """The lower-cased alphanumeric words of a text (GPT-2 §4; GPT-3 appendix C)."""
    return _WORD.findall(text.lower())


def characters(text: str) -> str:
    """The letters and digits of a text, without spaces and symbols (GPT-4 appendix C)."""
    return "".join(filter(str.isalnum, text))


# --- a corpus as a stream -----------------------------------------------------------------------------------------


class Hashes(NamedTuple):
    """Of a batch: hashes uint64 [units], of words; or codes uint32 [units], the letters and digits. begins: int
    [documents], the unit that each document begins with. A batch begins with the last units of the one before it, so
    that no n-gram or window is lost between them."""

    units: np.ndarray
    begins: np.ndarray

    def within(self, starts: np.ndarray, length: int) -> np.ndarray:
        """bool [starts]: whether so many units from each start on are of one document."""
        document = np.searchsorted(self.begins, starts, "right")
        return document == np.searchsorted(self.begins, starts + length - 1, "right")


def word_batches(corpus: Iterable[str], overlap: int) -> Iterator[Hashes]:
    """The hashes of a corpus's words, of which `overlap` are repeated."""
    return _batches(map(str.lower, corpus), _hashed_words, overlap)


def character_batches(corpus: Iterable[str], overlap: int) -> Iterator[Hashes]:
    """The letters and digits of a corpus, of which `overlap` are repeated."""
    return _batches(corpus, _letters_and_digits, overlap)


def _batches(corpus: Iterable[str], units_of, overlap: int) -> Iterator[Hashes]:
    last, begins = None, np.zeros(0, int)
    for text, at in _joined(corpus):
        units, places = units_of(text)
        new = np.searchsorted(places, at)
        if last is None:
            last = units[:0]
        units, new = np.concatenate([last, units]), new + len(last)
        begins = np.concatenate([begins, new])
        yield Hashes(units, begins)
        last = units[max(len(units) - overlap, 0) :]
        begins = np.maximum(begins - (len(units) - len(last)), 0)
        begins = begins[max(np.count_nonzero(begins == 0) - 1, 0) :]


def _joined(corpus: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Texts joined by line breaks, and where in it documents begin; one in several pieces is cut at white space."""
    pieces, at, size = [], [], 0
    for document in corpus:
        begin = 0
        while begin < len(document) or not begin:
            space = _SPACE.search(document, begin + _BATCH)
            end = space.start() + 1 if space else len(document)
            at += [size] if not begin else []
            pieces.append(document[begin:end])
            size += end - begin + 1
            begin = max(end, 1)
            if size >= _BATCH:
                yield "\n".join(pieces), np.array(at, int)
                pieces, at, size = [], [], 0
    if pieces:
        yield "\n".join(pieces), np.array(at, int)


def _hashed_words(lowered: str) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint64 [words], the character that each begins with)."""
    return hashed_spans(_codes(lowered))[:2]


def hashed_spans(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hashes uint64 [words], where each begins, where it ends) of a text in lower case. codes: uint32 [characters]."""
    inside = np.zeros(len(codes) + 2, bool)
    inside[1:-1] = _alphanumeric()[codes]
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    prefix = _prefix(codes)
    return mix64((prefix[ends] - prefix[starts]) * powers(len(codes), inverse=True)[starts]), starts, ends


def _letters_and_digits(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint32, the character that each is)."""
    codes = _codes(text)
    places = np.flatnonzero(_alphanumeric()[codes])
    return codes[places], places


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@functools.cache
def _alphanumeric() -> np.ndarray:
    """bool [code points]: str.isalnum, which is also what a regular expression's \\w is, but for '_'."""
    return np.fromiter(map(str.isalnum, map(chr, range(0x110000))), bool, 0x110000)


# --- hashes -------------------------------------------------------------------------------------------------------


def word_hashes(text: str) -> np.ndarray:
    """uint64 [words]."""
    return _hashed_words(text.lower())[0]


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [words - n + 1] of a text's word hashes: a hash for each n consecutive words."""
    count = len(hashes) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    total = hashes[:count].copy()
    for i in range(1, n):
        total *= _BASE
        total += hashes[i : i + count]
    return mix64(total)


class Windows:
    """Hashes of all windows of characters, of any length, from one pass over them. codes: uint32, or a text."""

    def __init__(self, codes: np.ndarray | str):
        codes = _codes(codes) if isinstance(codes, str) else codes
        self._prefix, self._inverse = _prefix(codes), powers(len(codes), inverse=True)

    def hashes(self, length: int) -> np.ndarray:
        """uint64 [characters - length + 1]: the high bits of each are those that depend on all of its characters."""
        count = len(self._prefix) - length
        if count < 1:
            return np.zeros(0, np.uint64)
        return (self._prefix[length:] - self._prefix[:count]) * self._inverse[:count]


def _prefix(codes: np.ndarray) -> np.ndarray:
    """uint64 [codes + 1]: sum of (code + 1) base^place of those before each place."""
    prefix = np.zeros(len(codes) + 1, np.uint64)
    values = codes.astype(np.uint64)
    values += np.uint64(1)
    values *= powers(len(codes))
    np.cumsum(values, out=prefix[1:])
    return prefix


def powers(count: int, inverse: bool = False) -> np.ndarray:
    """_BASE^0 ... _BASE^(count - 1) modulo 2^64, or of its inverse."""
    return _powers(1 << max(count - 1, 1).bit_length(), inverse)[:count]


@functools.lru_cache(maxsize=4)
def _powers(count: int, inverse: bool) -> np.ndarray:
    base = _INVERSE if inverse else _BASE
    return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(count - 1, base, np.uint64)]), dtype=np.uint64)


# --- sets of hashes -----------------------------------------------------------------------------------------------


class Known:
    """A set of 64-bit hashes, sorted in `values`, that finds the few of many hashes that are in it."""

    def __init__(self, values: np.ndarray):
        self.values = np.unique(values)
        bits = min(max(16 * len(self.values), 1 << 12).bit_length(), 26)
        self._shift, self._table = np.uint64(64 - bits), np.zeros(1 << bits, bool)
        self._table[self.values >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places in hashes of those in the set, the place in `values` of each)."""
        maybe = np.flatnonzero(self._table[hashes >> self._shift])
        if not len(self.values):
            return maybe, maybe
        place = np.minimum(np.searchsorted(self.values, hashes[maybe]), len(self.values) - 1)
        hit = self.values[place] == hashes[maybe]
        return maybe[hit], place[hit]

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """bool [hashes]."""
        found = np.zeros(len(hashes), bool)
        found[self.find(hashes)[0]] = True
        return found


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
        for place in self._places(values):
            byte, bit = (place >> 3), _BIT[place & 7]
            while len(byte):  # of two bits of the same byte an assignment keeps one: the other is set in another turn
                self._table[byte] |= bit
                lost = np.flatnonzero((self._table[byte] & bit) == 0)
                byte, bit = byte[lost], bit[lost]

    def contains(self, values: np.ndarray) -> np.ndarray:
        """bool [values]."""
        found = np.ones(len(values), bool)
        for place in self._places(values):
            found &= (self._table[place >> 3] & _BIT[place & 7]) > 0
        return found

    def _places(self, values: np.ndarray):
        """int64 places of each value's bits, one for all values at a time: splitmix64's numbers from that value on.

        Not h1 + i h2: of a set of n hashes the pairs (h1, h2) alone are wrong about .02 / n of the others (h2 = 0 is a
        single bit), which is 10^-8 only from millions on."""
        state = values
        for _ in range(self.hashes):
            yield (mix64(state) % np.uint64(self.bits)).astype(np.int64)
            state = state + _BASE


_BIT = (1 << np.arange(8)).astype(np.uint8)
