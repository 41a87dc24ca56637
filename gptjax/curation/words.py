"""The words of many documents at once, as hashes: letters and digits, in lower case, of any script.

Words are those of data/ngrams.py (GPT-2 §4, GPT-3 appendix C): runs of letters and digits. Digits stay what they are: a
form that maps all numbers to one symbol takes tables, logs and code for repetitions of each other.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptjax.data import ngrams

_PIECE = 1 << 22  # characters
_SPACE = re.compile(r"\s")
_PLANES = 0x20000  # code points of the planes that have letter case and digits


class Words(NamedTuple):
    """hashes: uint64 [words]; starts, ends: the characters that each is, [start, end); digits: bool [words], whether
    it has one."""

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    digits: np.ndarray


def words(text: str) -> Words:
    """The words of a text. Characters are lowered one by one, so that places in it are places in the text."""
    if len(text) <= _PIECE:
        return _words(text)
    found, begin = [], 0
    while begin < len(text):  # a long one in pieces, cut at white space: what is computed of one fits in memory
        space = _SPACE.search(text, begin + _PIECE)
        end = space.start() if space else len(text)
        hashes, starts, ends, digits = _words(text[begin:end])
        found.append((hashes, starts + begin, ends + begin, digits))
        begin = end
    return Words(*map(np.concatenate, zip(*found, strict=True)))


def _words(text: str) -> Words:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    hashes, starts, ends = ngrams.hashed_spans(_lower()[codes])
    digits = np.concatenate([np.zeros(1, np.int32), np.cumsum(_digit()[codes], dtype=np.int32)])
    return Words(hashes, starts, ends, digits[ends] > digits[starts])


def batches(texts: Iterable[str], size: int = 1 << 17) -> Iterator[list[Words]]:
    """The words of each text, of many short ones at a time; starts and ends are places of the text."""
    pending, length = [], 0
    for text in texts:
        pending.append(text)
        length += len(text) + 1
        if length >= size:
            yield _joined(pending)
            pending, length = [], 0
    if pending:
        yield _joined(pending)


def _joined(texts: list[str]) -> list[Words]:
    if len(texts) == 1:
        return [words(texts[0])]
    found = words("\n".join(texts))
    begins = np.cumsum([0, *(len(text) + 1 for text in texts)])
    cuts = np.searchsorted(found.starts, begins)
    made = []
    for begin, first, last in zip(begins, cuts, cuts[1:], strict=False):
        hashes, starts, ends, digits = (array[first:last] for array in found)
        made.append(Words(hashes, starts - begin, ends - begin, digits))
    return made


@functools.cache
def _lower() -> np.ndarray:
    """uint32 [code points]: the lower case of each, itself where that is several characters."""
    table, several = np.arange(0x110000, dtype=np.uint32), 0x130  # the only one, I with a dot
    characters = "".join(map(chr, range(_PLANES))).replace(chr(several), "0").lower()
    table[:_PLANES] = np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), "<u4")
    table[several] = several
    return table


@functools.cache
def _digit() -> np.ndarray:
    """bool [code points]: str.isdigit."""
    table = np.zeros(0x110000, bool)
    table[:_PLANES] = np.fromiter(map(str.isdigit, map(chr, range(_PLANES))), bool, _PLANES)
    return table
