"""Batches with random access over a fixed number of examples: in a new order each epoch, or in their own order."""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from gptjax.data import lm


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
