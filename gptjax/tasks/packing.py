"""Many requests in few rows: each row is a forest of prefix trees (model/attention/tree.py), in which what requests
share at their beginning, such as a K-shot prompt or the context of several choices, is computed once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.tasks.requests import Request

# Slots of a row: several requests fill a long one better than one a short one; steps few enough to compile for each.
_LEAST, _STEP = 512, 128


class Row(NamedTuple):
    """tokens, positions, visible_until: int32 [T], as gpt.hidden takes them. read: the slots whose predictions are
    asked for, ascending [M]. asked: int [N, 3], (request, index into read, target token)."""

    tokens: np.ndarray
    positions: np.ndarray
    visible_until: np.ndarray
    read: np.ndarray
    asked: np.ndarray


def row_capacity(request: Request) -> int:
    """Slots that the rows which a request is packed in may have: a power of two that it fits, at least 512."""
    return max(_LEAST, 1 << (len(request.context) + len(request.continuation) - 2).bit_length())


def pack(requests: Sequence[Request], share: bool = True) -> dict[int, list[Row]]:
    """{row length: rows} of all requests. A row is as long as it is filled, rounded up to an eighth of its capacity, or
    to 128.

    Sorted by their tokens, each request shares with its predecessor as much as with any before it, so that rows are
    filled in that order. share: False repeats shared beginnings, for models that have no attention to share them by.
    """
    by_capacity: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        by_capacity.setdefault(row_capacity(request), []).append(i)
    packed: dict[int, list[Row]] = {}
    for capacity, members in sorted(by_capacity.items()):
        builder, builders = _Builder(capacity), []
        for i in sorted(members, key=lambda i: (*requests[i].context, *requests[i].continuation)):
            if not builder.add(i, requests[i], share):
                builders.append(builder)
                builder = _Builder(capacity)
                builder.add(i, requests[i], share)
        step = max(_STEP, capacity // 8)
        for row in [b.row(step) for b in (*builders, builder)]:
            packed.setdefault(len(row.tokens), []).append(row)
    return dict(sorted(packed.items()))


class _Builder:
    """A row that requests are added to."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.visible_until: list[int] = []
        self.path: list[int] = []  # slots of the last request's tokens, in order
        self.asked: list[tuple[int, int, int]] = []  # (request, slot, target)

    def add(self, index: int, request: Request, share: bool) -> bool:
        """False, and nothing is done, if it does not fit."""
        ids = (*request.context, *request.continuation)
        read = ids[:-1]  # the last token is predicted, not read
        shared = 0
        while share and shared < min(len(read), len(self.path)) and self.tokens[self.path[shared]] == read[shared]:
            shared += 1
        if len(self.tokens) + len(read) - shared > self.capacity:
            return False
        self._close(shared)
        for position in range(shared, len(read)):
            self.path.append(len(self.tokens))
            self.tokens.append(read[position])
            self.positions.append(position)
            self.visible_until.append(-1)
        first = len(request.context) - 1
        self.asked += [(index, self.path[first + i], ids[first + i + 1]) for i in range(len(request.continuation))]
        return True

    def _close(self, depth: int) -> None:
        """Ends the subtrees of the last path below a depth."""
        for slot in self.path[depth:]:
            self.visible_until[slot] = len(self.tokens)
        del self.path[depth:]

    def row(self, step: int) -> Row:
        """The row, as long as a multiple of step."""
        self._close(0)
        padding = range(len(self.tokens), -(-len(self.tokens) // step) * step)
        read = sorted({slot for _, slot, _ in self.asked})
        place = {slot: i for i, slot in enumerate(read)}
        return Row(
            np.array(self.tokens + [0] * len(padding), np.int32),
            np.array(self.positions + [0] * len(padding), np.int32),
            np.array(self.visible_until + [slot + 1 for slot in padding], np.int32),  # padding sees itself
            np.array(read, np.int32),
            np.array([(i, place[slot], target) for i, slot, target in self.asked], np.int32),
        )
