"""Batches for language modeling: the batch of step t is a pure function of (seed, t).

The tokens of example i follow from arithmetic, so any process can start at any step; Grain only prefetches. Sampling is
without replacement within an epoch (GPT-3 §2.2).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from gptjax.data.hashing import mix64
from gptjax.data.tokens import TokenShards
from gptjax.errors import InputError

_SLOTS = 10_000  # examples in a block of a mixture: weights are exact to 1/10,000 in every block
_ROUNDS = 6
FEW = 20  # fewer validation examples than this cause a warning
_PHASE, _ORDER, _BLOCK = range(3)  # purposes of random keys
_U64 = np.uint64
_DRAWN = 4096  # up to this length the order of an epoch is a sampled permutation
SHUFFLE = 2  # version of `shuffled`; a run keeps the one it started with (data.json, data/records.py)


class Examples(Protocol):
    """Random access to example i, for any i ≥ 0: context_length + 1 tokens."""

    context_length: int

    def read(self, index: np.ndarray) -> np.ndarray:
        """int32 [n, context_length + 1] for index int64 [n]."""


def _key(seed: int, purpose: int, number: np.ndarray | int) -> np.ndarray:
    """uint64 keys of epochs or blocks `number`, of its shape (at least 1-D)."""
    key = mix64(np.array([seed % 2**64], _U64) + _U64(0x9E3779B97F4A7C15))
    key = mix64(key + _U64(purpose + 1))
    return mix64(key + np.atleast_1d(np.asarray(number)).astype(_U64) * _U64(0x9E3779B97F4A7C15))


def permute(index: np.ndarray, length: int, key: int | np.ndarray) -> np.ndarray:
    """Keyed pseudorandom permutation of range(length), elementwise: int64 of index's shape.

    A Feistel network on pairs (left, right) of about √length values each, with cycle walking (Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains"). key: an int, or uint64 of index's shape. ValueError: an index out of
    range.
    """
    index = np.asarray(index, np.int64)
    if index.size and (index.min() < 0 or index.max() >= length):
        raise ValueError(f"index outside range({length})")
    left_size = max(1, math.isqrt(length - 1) + 1) if length > 1 else 1
    right_size = -(-length // left_size)
    flat = index.ravel().astype(_U64)
    keys = np.asarray(key % 2**64 if isinstance(key, int) else key, _U64)
    keys = np.broadcast_to(keys, index.shape).ravel()
    rounds = [mix64(keys + _U64((r + 1) * 0x9E3779B97F4A7C15 % 2**64)) for r in range(_ROUNDS)]
    out, todo = flat.copy(), np.arange(flat.size)
    while todo.size:
        left, right = np.divmod(out[todo], _U64(right_size))
        for r in range(0, _ROUNDS, 2):
            left = (left + mix64(right + rounds[r][todo]) % _U64(left_size)) % _U64(left_size)
            right = (right + mix64(left + rounds[r + 1][todo]) % _U64(right_size)) % _U64(right_size)
        out[todo] = left * _U64(right_size) + right
        todo = todo[out[todo] >= length]
    return out.astype(np.int64).reshape(index.shape)


@functools.lru_cache(maxsize=256)
def _drawn(length: int, key: int) -> np.ndarray:
    """int64 [length]: a uniform permutation (up to ties), the argsort of splitmix64's stream from `key`."""
    stream = mix64(_U64(key) + np.arange(1, length + 1, dtype=_U64) * _U64(0x9E3779B97F4A7C15))
    return np.argsort(stream, kind="stable")


def shuffled(index: np.ndarray, length: int, seed: int, version: int = SHUFFLE) -> np.ndarray:
    """The elements at positions index (int64 ≥ 0) of an endless stream over range(length): int64 of index's shape.

    Position i belongs to epoch i // length; each epoch has its own order. version: 1 uses `permute` for short ranges
    too, where it is not uniform over all orders.
    """
    epoch, number = np.divmod(np.asarray(index, np.int64), length)
    if version == 1 or length > _DRAWN:
        return permute(number, length, _key(seed, _ORDER, epoch))
    out = np.empty_like(number)
    for e in np.unique(epoch).tolist():
        out[epoch == e] = _drawn(length, int(_key(seed, _ORDER, e)[0]))[number[epoch == e]]
    return out


class Windows:
    """Windows of context_length + 1 tokens from one split, with a new order and a new offset each epoch.

    len() is the number of windows in an epoch. Adjacent windows share one token, the last target of one and the first
    input of the next. shuffle: version of `shuffled`. InputError: a split shorter than context_length + 1.
    """

    def __init__(self, shards: TokenShards, context_length: int, seed: int, shuffle: int = SHUFFLE):
        self.context_length, self._shards, self._seed, self._shuffle = context_length, shards, seed, shuffle
        _check_length(shards, context_length)
        # As many as fit for every offset; at least one, with fewer possible offsets.
        self._windows = max(1, len(shards) // context_length - 1)
        self._phases = min(context_length, len(shards) - self._windows * context_length)

    def __len__(self) -> int:
        return self._windows

    def starts(self, index: np.ndarray) -> np.ndarray:
        """int64 [n]: position of the first token of each example of index, int64 [n]."""
        index = np.asarray(index, np.int64)
        position = shuffled(index, self._windows, self._seed, self._shuffle)
        phase = (_key(self._seed, _PHASE, index // self._windows) % _U64(self._phases)).astype(np.int64)
        return phase + position * self.context_length

    def read(self, index: np.ndarray) -> np.ndarray:
        """int32 [n, context_length + 1] for index int64 [n]."""
        return self._shards.read(self.starts(index), self.context_length + 1)


class Mixture:
    """Examples from several Windows in proportion to weights (GPT-3 Table 2.2), which are normalized.

    Every block of 10,000 examples has the exact share of each source (rounded by the largest-remainder method) in its
    own random order. The examples of each source are used in their order, for as many epochs as its share needs.
    InputError: no sources, weights that are not positive or below 1 in 10,000, unequal context lengths.
    """

    def __init__(self, sources: Sequence[Windows], weights: Sequence[float], seed: int):
        if not sources or len(sources) != len(weights):
            raise InputError(f"A mixture of {len(sources)} sources has {len(weights)} weights: give one for each.")
        if len({s.context_length for s in sources}) > 1:
            raise InputError("The sources of a mixture have different context lengths: make them equal.")
        for weight in weights:
            if not (weight > 0 and math.isfinite(weight)):
                raise InputError(f"The mixture weight {weight} is not positive: remove that source.")
        share = np.array(weights, np.float64) / math.fsum(weights) * _SLOTS
        self._counts = np.floor(share).astype(np.int64)
        largest = np.argsort(self._counts - share, kind="stable")[: _SLOTS - self._counts.sum()]
        self._counts[largest] += 1
        if not self._counts.all():
            weight = weights[int(self._counts.argmin())]
            raise InputError(
                f"The mixture weight {weight} is less than one example in {_SLOTS}: raise it, or remove that source."
            )
        self.context_length = sources[0].context_length
        self._sources, self._seed = list(sources), seed
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each slot of a block, number of earlier slots with the same source), int64 [_SLOTS] each."""
        slots = permute(np.arange(_SLOTS), _SLOTS, _key(self._seed, _BLOCK, block))
        source = np.repeat(np.arange(len(self._sources)), self._counts)[slots]
        rank = np.empty(_SLOTS, np.int64)
        rank[np.argsort(source, kind="stable")] = np.concatenate([np.arange(c) for c in self._counts])
        return source, rank

    def assign(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source [n], index within that source [n]), int64, for index int64 [n]."""
        blocks, slots = np.divmod(np.asarray(index, np.int64), _SLOTS)
        source, within = np.empty_like(slots), np.empty_like(slots)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            of_slot, rank = self._block(block)
            source[here] = of_slot[slots[here]]
            within[here] = block * self._counts[source[here]] + rank[slots[here]]
        return source, within

    def read(self, index: np.ndarray) -> np.ndarray:
        """int32 [n, context_length + 1] for index int64 [n]."""
        source, within = self.assign(index)
        out = np.empty((len(source), self.context_length + 1), np.int32)
        for number in np.unique(source).tolist():
            out[source == number] = self._sources[number].read(within[source == number])
        return out


def with_segments(tokens: np.ndarray, eot_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(segment_ids, positions), int32 with the shape of the input tokens, [batch, time].

    Segment ids count from 1. A segment starts at each end-of-text, which as a target ended the previous document and as
    an input starts the next one. Positions restart at 0 in each segment.
    """
    first = tokens == eot_id
    first[:, 0] = True
    time = np.arange(tokens.shape[1], dtype=np.int32)
    start = np.maximum.accumulate(np.where(first, time, 0), axis=1)
    return np.cumsum(first, axis=1, dtype=np.int32), time - start


class LmBatches:
    """This host's rows of the batch of any step: batches[step] is a dict of

    tokens: int32 [rows, context_length + 1]; inputs are [:, :-1], targets [:, 1:]
    weights: float32 [rows, context_length], 1 for targets of real rows (`weigh` may set others to 0), 0 for padding
    sequences: int, number of real rows over all hosts
    target_bytes: int32 [rows], UTF-8 bytes of each row's targets of weight 1
    segment_ids, positions: int32 [rows, context_length], with isolate_documents only

    Args:
        schedule: step → (number of its first example, number of sequences), over all hosts.
        rows: step → rows of the padded batch; None = no padding.
        byte_lengths: of each token, [vocab_size] (of Tokenizer).
        here: number of rows → those that this host holds, ascending (distributed/hosts.py); by default all.
        weigh: example numbers [n] → weights [n, context_length]; None = 1.
        steps: len().
    Raises:
        InputError: isolate_documents without an end-of-text token.
    """

    def __init__(
        self,
        examples: Examples,
        schedule: Callable[[int], tuple[int, int]],
        rows: Callable[[int], int] | None = None,
        *,
        byte_lengths: np.ndarray,
        eot_id: int | None = None,
        isolate_documents: bool = False,
        here: Callable[[int], np.ndarray] = np.arange,
        weigh: Callable[[np.ndarray], np.ndarray] | None = None,
        steps: int = sys.maxsize,
    ):
        if isolate_documents and eot_id is None:
            raise InputError(
                "Documents cannot be isolated because the tokenizer has no end-of-text: use a bpe tokenizer, or set "
                "data.isolate_documents=False."
            )
        self._examples, self._schedule, self._rows, self._steps = examples, schedule, rows, steps
        self._byte_lengths, self._eot_id, self._isolate, self._here = byte_lengths, eot_id, isolate_documents, here
        self._weigh = weigh

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        first, sequences = self._schedule(step)
        rows = self._rows(step) if self._rows else sequences
        if rows < sequences:
            raise ValueError(f"step {step}: {sequences} sequences do not fit into {rows} rows")
        row = self._here(rows)
        real = int(np.searchsorted(row, sequences))  # the rest is padding
        context = self._examples.context_length
        tokens = np.zeros((len(row), context + 1), np.int32)
        weights = np.zeros((len(row), context), np.float32)
        if real:
            tokens[:real] = self._examples.read(first + row[:real])
            weights[:real] = 1 if self._weigh is None else self._weigh(first + row[:real])
        target_bytes = np.rint((self._byte_lengths.take(tokens[:, 1:]) * (weights > 0)).sum(1)).astype(np.int32)
        batch = {"tokens": tokens, "weights": weights, "sequences": sequences, "target_bytes": target_bytes}
        if self._isolate:
            batch["segment_ids"], batch["positions"] = with_segments(tokens[:, :-1], self._eot_id)
        return batch


def iterate(
    batches: LmBatches, start_step: int, stop_step: int, *, threads: int = 1, buffer: int = 8
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, batch) for start_step ≤ step < stop_step, in order, prefetched by Grain.

    threads: more than 2 are slower for small batches. buffer: number of prefetched batches.
    """
    dataset = grain.MapDataset.source(batches)[start_step:stop_step]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffer, threads))
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from enumerate(iterator, start_step)
    finally:
        iterator.close()


def _check_length(shards: TokenShards, context_length: int) -> None:
    if len(shards) < context_length + 1:
        raise InputError(
            f"{getattr(shards, 'name', 'The text')} has {len(shards)} tokens, fewer than one context of "
            f"{context_length} and its last target: give more text or a shorter context_length."
        )
