"""Demonstrations for supervised fine-tuning: reading, the validation split, packing into rows, batches by step.

The batch of step t is a pure function of (seed, t), as in data/lm.py. With a mix, a fraction of its rows are
pre-training examples.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax import paths
from gptjax.data import lm, published
from gptjax.data.batches import InOrder
from gptjax.data.chat import KINDS, Template
from gptjax.data.rows import (
    FLAGS,
    LeftOut,
    Record,
    check_config,
    check_length,
    fingerprint,
    limit,
    load_split,
    prompt_text,
)
from gptjax.errors import InputError
from gptjax.ranges import Count

_FIELDS = ("prompt", "response", "messages")
_LOSS_ON = ("response", "all")


@dataclasses.dataclass(frozen=True)
class DemonstrationConfig:
    """The demonstrations, and what is held out of them for validation.

    source: rows with `prompt` and `response` (or `completion`), or with `messages` (or `conversations`), in the forms
        of data/published.py; see sources.rows.
    fields: the rows' name for our field NAME; it may reach inside, as 'a.0.b', and join several, as 'a,b'
        (rows.Record).
    validation: share of the prompts that is held out, or another source.
    template: 'chat' or 'plain' (the texts alone).
    max_length: maximum number of tokens of an example; None = the model's context.
    loss_on: 'response' or 'all' tokens.
    packing: several examples per row; attention stays within each.
    drop_long: leave longer examples out, rather than stop.
    bad_rows: 'stop', or 'drop' rows with anything else wrong; what is left out is written to dropped_rows.jsonl.
    """

    source: str | None = paths.field(paths.SOURCE)
    fields: Mapping[str, str] = dataclasses.field(default_factory=lambda: {name: name for name in _FIELDS})
    validation: str = paths.field(paths.SHARE, "0.05")
    template: str = "chat"
    max_length: Count | None = None
    loss_on: str = "response"
    packing: bool = True
    drop_long: bool = False
    bad_rows: str = "stop"

    def __post_init__(self):
        check_config(self, _FIELDS)
        if self.template not in KINDS:
            raise InputError(f"data.template={self.template!r} is unknown: use {' or '.join(map(repr, KINDS))}.")
        _check_loss_on(self.loss_on)


class Demonstration(NamedTuple):
    """ids: int32 [n]; response: bool [n], the tokens of responses; prompt: number of tokens before the first of
    them."""

    ids: np.ndarray
    response: np.ndarray
    prompt: int


class Demonstrations(NamedTuple):
    """train, validation: the splits; left_out: the dropped rows; fingerprint: of the training ids and masks;
    byte_ratio: bytes of the responses' text per byte that their tokens stand for, 1 unless the tokenizer normalizes
    (GPT-1)."""

    train: list[Demonstration]
    validation: list[Demonstration]
    left_out: LeftOut
    fingerprint: str
    byte_ratio: float = 1.0


def load_demonstrations(
    c: DemonstrationConfig, template: Template, length: int, seed: int, flags: str | None = FLAGS
) -> Demonstrations:
    """Reads and tokenizes the demonstrations of c.source.

    length: the model's context, the maximum number of tokens of an example; flags: see rows.load.
    InputError, naming the rows: a missing field, no text, or more than max_length tokens.
    """
    most = limit(c.max_length, length)
    text_bytes = token_bytes = 0

    def make(record: Record) -> tuple[str, Demonstration]:
        nonlocal text_bytes, token_bytes
        answer = "response" if "response" in record or "completion" not in record else "completion"
        turns = "messages" if "messages" in record or "conversations" not in record else "conversations"
        if turns in record and not ("prompt" in record and answer in record):
            text, rest = published.messages(record[turns]), "turns after it"
            ids, response = template.conversation(text)
            answers = [turn["content"] for turn in text if turn["role"] == "assistant"]
        else:
            text, rest = published.prompt(record["prompt"], template.kind), "response"
            answers = [published.response(record[answer])]
            before, after = template.prompt(text), template.response(answers[0])
            ids, response = before + after, [False] * len(before) + [True] * len(after)
        prompt = response.index(True)
        check_length(prompt, len(ids) - prompt, most, rest)
        example = Demonstration(np.array(ids, np.int32), np.array(response), prompt)
        text_bytes += sum(len(answer.encode()) + 1 for answer in answers)  # end-of-text counts as one byte
        token_bytes += int(template.byte_lengths[example.ids[example.response]].sum())
        return prompt_text(text), example

    train, validation, left_out = load_split(c, make, seed, flags)
    content = (array for example in train for array in (example.ids, example.response))
    ratio = 1.0 if template.lossless else text_bytes / max(token_bytes, 1)
    return Demonstrations(train, validation, left_out, fingerprint(content), ratio)


class PackedRows:
    """Examples packed into rows of length + 1 tokens; len() is the number of rows.

    packing: first-fit decreasing; else one example per row. InputError: an example longer than length + 1.
    """

    def __init__(self, examples: Sequence[Demonstration], length: int, packing: bool, pad_id: int):
        self.length, self._pad_id, self._examples = length, pad_id, examples
        sizes = [len(example.ids) for example in examples]
        longest = max(sizes, default=0)
        if longest > length + 1:
            raise InputError(
                f"An example of {longest} tokens does not fit into a row of {length + 1}: load the examples with "
                f"max_length={length}."
            )
        self._rows = _first_fit(sizes, length + 1) if packing else [[i] for i in range(len(sizes))]

    def __len__(self) -> int:
        return len(self._rows)

    def arrays(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of index, int64 [n]; -1 is a row of padding.

        tokens: int32 [n, length + 1]; inputs are [:, :-1], targets [:, 1:]
        response, real: float32 [n, length], 1 where the target belongs to a response, or to any example, and the input
            to the same example
        segment_ids: int32 [n, length], of the inputs, from 1 in each row, 0 for padding
        positions: int32 [n, length], from 0 in each example
        """
        shape = (len(index), self.length + 1)
        tokens = np.full(shape, self._pad_id, np.int32)
        response, real = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, number in enumerate(index):
            start = 0
            for segment, i in enumerate(self._rows[number] if number >= 0 else (), 1):
                example = self._examples[i]
                here = np.s_[row, start : start + len(example.ids)]
                targets = np.s_[row, start + 1 : start + len(example.ids)]  # all but the first
                tokens[here], segment_ids[here], positions[here] = example.ids, segment, np.arange(len(example.ids))
                response[targets], real[targets] = example.response[1:], 1
                start += len(example.ids)
        return {
            "tokens": tokens,
            "response": response[:, 1:],
            "real": real[:, 1:],
            "segment_ids": segment_ids[:, :-1],
            "positions": positions[:, :-1],
        }


class DemonstrationBatches:
    """This host's rows of the batch of any step: batches[step] is a dict of

    tokens, segment_ids, positions: of PackedRows.arrays
    weights: float32 [rows, length], 1 for the targets in the loss, by loss_on
    lm_weights: float32 [rows, length], 1 for every real target
    target_bytes: int32 [rows], UTF-8 bytes of each row's targets of weight 1

    The packed rows are reshuffled each epoch. mix: pre-training examples that follow the demonstrations of each step,
    ⌊tRf⌋ in the first t steps of R rows, with f = mix_fraction; all their tokens have weight 1. mix_eot_id:
    end-of-text, after which the next document of a mixed row is isolated, as in pre-training; None = documents are not
    isolated.
    rows: per step, over all hosts; here: number of rows → those that this host holds, by default all. shuffle: version
    of lm.shuffled. InputError: a mix with another context length, a fraction outside [0, 1).
    """

    def __init__(
        self,
        packed: PackedRows,
        rows: int,
        seed: int,
        *,
        byte_lengths: np.ndarray,
        loss_on: str,
        mix: lm.Examples | None = None,
        mix_fraction: float = 0.0,
        mix_eot_id: int | None = None,
        shuffle: int = lm.SHUFFLE,
        here: Callable[[int], np.ndarray] = np.arange,
    ):
        if not 0 <= mix_fraction < 1:
            raise InputError(f"A mix of {mix_fraction} of the rows is invalid: give a fraction in [0, 1).")
        if mix_fraction and mix is None:
            raise InputError(f"A mix of {mix_fraction} of the rows has no text: give its source.")
        if mix is not None and mix.context_length != packed.length:
            raise InputError(
                f"The mix has examples of {mix.context_length} tokens, the demonstrations of {packed.length}: make "
                "them equal."
            )
        _check_loss_on(loss_on)
        self._packed, self._rows, self._seed = packed, rows, seed
        self._byte_lengths, self._loss_on = byte_lengths, loss_on
        self._mix, self._mix_fraction = mix, mix_fraction
        self._mix_eot_id, self._shuffle = mix_eot_id, shuffle
        self._here = here(rows)

    def __len__(self) -> int:
        return sys.maxsize  # endless, but Grain needs a length

    def __getitem__(self, step: int) -> dict[str, Any]:
        if step < 0:
            raise IndexError(f"step {step}")
        row = self._here
        own = self._first(step + 1) - self._first(step)
        place = self._first(step) + row[row < own]
        batch = self._packed.arrays(lm.shuffled(place, len(self._packed), self._seed, self._shuffle))
        if own < self._rows:
            mixed = self._mixed_arrays(self._mixed(step) + row[row >= own] - own)
            batch = {name: np.concatenate([batch[name], mixed[name]]) for name in batch}
        return _with_weights(batch, self._loss_on, self._byte_lengths)

    def steps(self, epochs: float) -> int:
        """Number of steps after which every packed row has been used `epochs` times; at least 1."""
        wanted = epochs * len(self._packed)
        step = max(1, int((wanted - 1) / (self._rows * (1 - self._mix_fraction))) - 1)  # a lower bound
        while self._first(step) < wanted:
            step += 1
        return step

    def _mixed(self, step: int) -> int:
        """Number of rows of the mix before this step."""
        return math.floor(step * self._rows * self._mix_fraction)

    def _first(self, step: int) -> int:
        """Number of rows of demonstrations before this step."""
        return step * self._rows - self._mixed(step)

    def _mixed_arrays(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of the mix with the arrays of PackedRows; all targets of each are in the loss."""
        shape = (len(index), self._packed.length)
        tokens = np.asarray(self._mix.read(index), np.int32)
        segment_ids = np.ones(shape, np.int32)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        if self._mix_eot_id is not None:
            segment_ids, positions = lm.with_segments(tokens[:, :-1], self._mix_eot_id)
        return {
            "tokens": tokens,
            "response": np.ones(shape, np.float32),
            "real": np.ones(shape, np.float32),
            "segment_ids": segment_ids,
            "positions": positions,
        }


def validation_batches(
    packed: PackedRows,
    rows: int,
    *,
    byte_lengths: np.ndarray,
    loss_on: str,
    here: Callable[[int], np.ndarray] = np.arange,
) -> InOrder:
    """Batches of the packed rows in order, with the arrays of DemonstrationBatches. The last batch is padded with rows
    of weight 0."""
    _check_loss_on(loss_on)
    return InOrder(
        len(packed),
        rows,
        here(rows),
        lambda index: _with_weights(packed.arrays(index), loss_on, byte_lengths),
    )


def _with_weights(arrays: dict[str, np.ndarray], loss_on: str, byte_lengths: np.ndarray) -> dict[str, Any]:
    weights = arrays["response" if loss_on == "response" else "real"]
    return {
        "tokens": arrays["tokens"],
        "weights": weights,
        "lm_weights": arrays["real"],
        "segment_ids": arrays["segment_ids"],
        "positions": arrays["positions"],
        "target_bytes": np.rint((byte_lengths.take(arrays["tokens"][:, 1:]) * (weights > 0)).sum(1)).astype(np.int32),
    }


def _check_loss_on(loss_on: str) -> None:
    if loss_on not in _LOSS_ON:
        raise InputError(f"data.loss_on={loss_on!r} is unknown: use {' or '.join(map(repr, _LOSS_ON))}.")


def _first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """First-fit decreasing bin packing (Johnson 1973): the indices of the sizes in each row, whose sum is at most
    `room`.

    A segment tree of the maximum free room finds the first fitting row in logarithmic time.
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    most = [room] * (2 * leaves)
    filled: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        node = 1
        while node < leaves:
            node = 2 * node + (most[2 * node] < sizes[i])
        if node - leaves == len(filled):
            filled.append([])
        filled[node - leaves].append(i)
        most[node] -= sizes[i]
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return filled
