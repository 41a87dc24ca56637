"""Held-out text: windows in which each token of a split is scored once, and batches of them."""

import warnings
from collections.abc import Callable

import numpy as np

from gptjax.data.lm import FEW, LmBatches
from gptjax.data.tokens import TokenShards
from gptjax.errors import InputError


class Scored:
    """Sliding windows in which each token of a split is a target of weight 1 exactly once; len() is their number.

    Window k of a document has up to context_length targets from token k·stride on. In the first window all count, in
    the others only the last `stride`, with the tokens before them as context (as in transformers' perplexity guide).
    The first token of a document is predicted from end-of-text, as in lm-evaluation-harness; if the tokenizer has none,
    that token is not scored.

    Args:
        stride: None = context_length.
        most: maximum number of windows, spread evenly over the split; None = all.
        documents: int64 [n, 2], first and last + 1 token of each text to score separately; None = the split as one
        text.
    Raises:
        InputError: nothing to score, or a stride outside 1 .. context_length.
    """

    def __init__(self, shards: TokenShards, context_length: int, *, stride: int | None = None, most: int | None = None,
                 documents: np.ndarray | None = None):  # fmt: skip
        stride = stride or context_length
        if not 1 <= stride <= context_length:
            raise InputError(f"The stride {stride} is out of range: give one from 1 to the context, {context_length}.")
        self.context_length, self._shards, self._stride = context_length, shards, stride
        spans = np.array([[0, len(shards)]]) if documents is None else np.asarray(documents, np.int64).reshape(-1, 2)
        given = shards.eot_id is not None
        self._ends = spans[:, 1]
        self._first = spans[:, 0] + (not given)  # targets of each document
        targets = np.maximum(self._ends - self._first, 0)
        windows = np.where(targets > 0, 1 + -(-np.maximum(targets - context_length, 0) // stride), 0)
        self._before = np.concatenate([[0], np.cumsum(windows)])
        self._windows = int(self._before[-1])
        self._used = self._windows if most is None else min(most, self._windows)
        if not self._windows:
            raise InputError(
                f"A split of {len(shards)} tokens has nothing to score (the first token is not scored if the tokenizer "
                "has no end-of-text): give more text."
            )

    def __len__(self) -> int:
        return self._used

    def _places(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        """(number in its document, first target, end of its document) of each window, int64 [n] each."""
        window = np.asarray(index, np.int64) * self._windows // self._used
        document = np.searchsorted(self._before, window, side="right") - 1
        number = window - self._before[document]
        return number, self._first[document] + number * self._stride, self._ends[document]

    def read(self, index: np.ndarray) -> np.ndarray:
        """int32 [n, context_length + 1] for index int64 [n]; zeros after the end of a document."""
        number, first, ends = self._places(index)
        length = self.context_length + 1
        out = np.zeros((len(first), length), np.int32)
        inside = (first > 0) & (first - 1 + length <= ends)
        out[inside] = self._shards.read(first[inside] - 1, length)
        for row in np.flatnonzero(~inside).tolist():
            start, stop = max(int(first[row]) - 1, 0), min(int(first[row]) - 1 + length, int(ends[row]))
            offset = start - (int(first[row]) - 1)
            out[row, offset : offset + stop - start] = self._shards.read(np.array([start]), stop - start)[0]
        if self._shards.eot_id is not None:
            out[number == 0, 0] = self._shards.eot_id
        return out

    def weights(self, index: np.ndarray) -> np.ndarray:
        """float32 [n, context_length] for index int64 [n]: 1 where a target counts, else 0."""
        number, first, ends = self._places(index)
        place = np.arange(self.context_length)
        new = (number[:, None] == 0) | (place >= self.context_length - self._stride)
        return (new & (first[:, None] + place < ends[:, None])).astype(np.float32)


def validation_batches(
    shards: TokenShards,
    context_length: int,
    batch_size: int,
    max_batches: int | None = None,
    *,
    byte_lengths: np.ndarray,
    isolate_documents: bool = False,
    here: Callable[[int], np.ndarray] = np.arange,
    stride: int | None = None,
    documents: np.ndarray | None = None,
) -> LmBatches:
    """Fixed batches of the windows of a split in which each token is a target once (Scored).

    Every batch has batch_size rows; the last is padded with rows of weight 0. max_batches: that many batches of windows
    spread evenly over the split; None = all of it. stride, documents: of Scored. InputError: as Scored and LmBatches.
    """
    most = None if max_batches is None else max_batches * batch_size
    windows = Scored(shards, context_length, stride=stride, most=most, documents=documents)
    return LmBatches(
        windows,
        schedule=lambda step: (step * batch_size, min(batch_size, len(windows) - step * batch_size)),
        rows=lambda step: batch_size,
        byte_lengths=byte_lengths,
        eot_id=shards.eot_id,
        isolate_documents=isolate_documents,
        here=here,
        weigh=windows.weights,
        steps=-(-len(windows) // batch_size),
    )


def warn_if_few(shards: TokenShards, context_length: int) -> None:
    """Warns if a validation split has fewer than 20 windows of the context length."""
    windows = (len(shards) - 1) // context_length
    if 0 < windows < FEW:
        warnings.warn(
            f"{shards.name} has only {windows} examples of {context_length} tokens, fewer than {FEW}, so its loss is "
            "noisy: hold out more with data.validation, or give more text.",
            stacklevel=3,
        )
