"""Batches with random access over a fixed number of examples: in a new order each epoch, or in their own order."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.data import lm


def padded_groups(groups: Sequence[Sequence[Sequence[int]]], n: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Groups of sequences (the completions of a prompt, the choices of a question) as arrays; an empty one is a row of
    padding.

    groups: token ids, at most n sequences of at most `length` tokens each.
    Returns {tokens: int32 [rows, n, length], padded on the right with pad_id; lengths: int32 [rows, n], tokens before
    the padding, 1 where there is no sequence; valid: float32 [rows, n], 1 where there is one}.
    """
    shape = (len(groups), n)
    tokens = np.full((*shape, length), pad_id, np.int32)
    lengths, valid = np.ones(shape, np.int32), np.zeros(shape, np.float32)
    for row, group in enumerate(groups):
        for i, ids in enumerate(group):
            tokens[row, i, : len(ids)], lengths[row, i] = ids, len(ids)
        valid[row, : len(group)] = 1
    return {"tokens": tokens, "lengths": lengths, "valid": valid}


def padded_lengths(longest: int, limit: int, shards: int) -> tuple[int, int]:
    """(tokens that a schedule counts for a sequence, tokens that it is padded to): the longest one rounded up to a
    multiple of 8, and to one of 8 for each of the `shards` that time is sharded over; at most `limit`."""
    counted, padded = (min(limit, -(-longest // step) * step) for step in (8, 8 * shards))
    return counted, padded


class Shuffled:
    """Batches of `count` examples in an order that is drawn anew each epoch, for training: endless, with random access.

    rows: of a batch, over all hosts; here: number of rows → those that this host holds, by default all. read: example
    numbers int64 [n] → dict of arrays. shuffle: version of lm.shuffled.
    """

    def __init__(
        self, count: int, rows: int, seed: int, read: Callable[[np.ndarray], dict], *,
        here: Callable[[int], np.ndarray] = np.arange, shuffle: int = lm.SHUFFLE,
    ):  # fmt: skip
        self._count, self._rows, self._seed, self._shuffle = count, rows, seed, shuffle
        self._read, self._here = read, here(rows)

    def __len__(self) -> int:
        return sys.maxsize  # endless, but Grain needs a length

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if step < 0:
            raise IndexError(f"step {step}")
        place = step * self._rows + self._here
        return self._read(lm.shuffled(place, self._count, self._seed, self._shuffle))

    def steps(self, epochs: float) -> int:
        """Number of steps after which every example has been used `epochs` times; at least 1."""
        return max(1, math.ceil(epochs * self._count / self._rows))


class InOrder:
    """Batches of `count` examples in order, with random access, for validation; len() is their number.

    rows: of a batch, over all hosts; here: those that this host holds. read: example numbers int64 [n], -1 for the
    padding of the last batch → dict of arrays.
    """

    def __init__(self, count: int, rows: int, here: np.ndarray, read: Callable[[np.ndarray], dict]):
        self._count, self._rows, self._here, self._read = count, rows, here, read

    def __len__(self) -> int:
        return -(-self._count // self._rows)

    def __getitem__(self, step: int) -> dict[str, Any]:
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step} of {len(self)}")
        index = step * self._rows + self._here
        return self._read(np.where(index < self._count, index, -1))
