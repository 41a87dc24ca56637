"""Prompts for reinforcement learning: reading, and batches by position in an endless shuffled stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gptjax import paths
from gptjax.data import lm, published
from gptjax.data.chat import Template
from gptjax.data.rows import FLAGS, LeftOut, Record, TooLong, check_config, fingerprint, limit, load
from gptjax.errors import InputError
from gptjax.ranges import Count

_FIELDS = ("prompt",)


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """The prompts.

    source: rows with `prompt`, a text, messages or a transcript (data/published.py), of which an answer at the end is
        left out.
    fields: the rows' name for our field NAME; it may reach inside, as 'a.0.b', and join several, as 'a,b'
        (rows.Record).
    max_length: maximum number of tokens of a prompt; None = the model's context without the response.
    drop_long: leave longer prompts out, rather than stop.
    buckets: maximum number of widths that batches are padded to; each is compiled when a batch first needs it.
    bad_rows: 'stop', or 'drop' rows with anything else wrong; what is left out is written to dropped_rows.jsonl.
    """

    source: str | None = paths.field(paths.SOURCE)
    fields: Mapping[str, str] = dataclasses.field(default_factory=lambda: {name: name for name in _FIELDS})
    max_length: Count | None = None
    drop_long: bool = False
    buckets: Count = 4
    bad_rows: str = "stop"

    def __post_init__(self):
        check_config(self, _FIELDS)
        if self.buckets < 1:
            raise InputError(f"data.buckets={self.buckets}: batches need at least 1 padded width.")


class Prompts(NamedTuple):
    """ids: of each prompt; texts: of each prompt, for messages that of the last turn; left_out: the dropped rows;
    fingerprint: of the ids."""

    ids: list[list[int]]
    texts: list[str]
    left_out: LeftOut
    fingerprint: str


def load_prompts(c: PromptConfig, template: Template, length: int, flags: str = FLAGS) -> Prompts:
    """Reads and tokenizes the prompts of c.source.

    length: the model's context less the response, the maximum number of tokens of a prompt; flags: see rows.load.
    InputError, naming the rows: a missing field, no text, or more than max_length tokens.
    """
    most = limit(c.max_length, length)

    def make(record: Record) -> tuple[list[int], str]:
        prompt = published.prompt(record["prompt"], template.kind, answered=True)
        ids = template.prompt(prompt)
        if not ids:
            raise InputError("The prompt is empty: give it some text, or remove it.")
        if len(ids) > most:
            raise TooLong(
                f"The prompt has {len(ids)} tokens, more than the {most} of "
                f"{'max_length' if c.max_length else 'the context less the response'}: shorten it, or drop such rows "
                f"with {FLAGS}drop_long=True."
            )
        return ids, prompt if isinstance(prompt, str) else prompt[-1]["content"]

    made, left_out = load(c.source, c, make, flags)
    ids, texts = map(list, zip(*made, strict=True))
    return Prompts(ids, texts, left_out, fingerprint(np.array(i, np.int32) for i in ids))


def bucket_widths(longest: int, buckets: int, length: int) -> tuple[int, ...]:
    """The widths that batches are padded to, ascending: at most `buckets` equal steps, multiples of 8, the last of
    which fits the longest prompt. length: upper limit of the widths.

    Equal steps rather than powers of two, because the longest prompt of a large batch is mostly in the upper half.
    """
    widest = min(length, _eights(longest))
    step = _eights(-(-widest // buckets))
    return (*range(step, widest, step), widest)


def longest_of(prompts: Prompts) -> int:
    """Number of tokens of the longest prompt; 0 if there are none."""
    return max(map(len, prompts.ids), default=0)


def _eights(n: int) -> int:
    return -(-n // 8) * 8


class PromptBatches:
    """Batches of an endless stream of the prompts, reshuffled each epoch. A batch is a pure function of (seed,
    position), and so is its width: the smallest of `widths` (ascending) that fits its longest prompt. shuffle: version
    of lm.shuffled.

    InputError: no prompts, or one longer than the last of `widths`.
    """

    def __init__(
        self, prompts: Prompts, batch: int, widths: Sequence[int], seed: int, pad_id: int, shuffle: int = lm.SHUFFLE
    ):
        longest = longest_of(prompts)
        if not 0 < longest <= widths[-1]:
            raise InputError(
                f"A prompt of {longest} tokens does not fit into {widths[-1]}: load the prompts with that length."
            )
        self._ids, self._batch, self._widths, self._seed, self._pad_id = prompts.ids, batch, widths, seed, pad_id
        self._shuffle = shuffle

    @property
    def widest(self) -> int:
        return self._widths[-1]

    def at(self, position: int) -> dict[str, np.ndarray]:
        """The prompts at positions position to position + batch - 1 of the stream.

        tokens: int32 [batch, width], left-padded with pad_id; lengths: int32 [batch], without padding; index: int64
        [batch], the numbers of the prompts.
        """
        index = lm.shuffled(position + np.arange(self._batch), len(self._ids), self._seed, self._shuffle)
        chosen = [self._ids[i] for i in index]
        lengths = np.array([len(ids) for ids in chosen], np.int32)
        width = next(w for w in self._widths if w >= lengths.max())
        tokens = np.full((self._batch, width), self._pad_id, np.int32)
        for row, ids in zip(tokens, chosen, strict=True):
            row[width - len(ids) :] = ids
        return {"tokens": tokens, "lengths": lengths, "index": index}
