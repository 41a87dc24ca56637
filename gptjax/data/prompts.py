"""Prompts for reinforcement learning: read, and drawn by their place in an endless stream."""

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
    max_length: most tokens of a prompt; None = the model's context without the response.
    drop_long: leave longer prompts out, rather than stop.
    buckets: most widths that batches are padded to, each compiled once when a batch first needs it.
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
            raise InputError(f"data.buckets={self.buckets}: batches are padded to at least 1 width.")


class Prompts(NamedTuple):
    """ids of each prompt; texts: its own text, of messages the last turn's; left_out: the other rows;
    fingerprint: of the ids."""

    ids: list[list[int]]
    texts: list[str]
    left_out: LeftOut
    fingerprint: str


def load_prompts(c: PromptConfig, template: Template, length: int, flags: str = FLAGS) -> Prompts:
    """Every row of the source as tokens. length: the model's context less the response, the most of a prompt; flags:
    see rows.load.

    InputError: with the rows, no such field, no text, or more than max_length tokens.
    """
    most = limit(c.max_length, length)

    def make(record: Record) -> tuple[list[int], str]:
        said = published.prompt(record["prompt"], template.kind, answered=True)
        ids = template.prompt(said)
        if not ids:
            raise InputError("the prompt is empty; give it some text or leave it out")
        if len(ids) > most:
            raise TooLong(
                f"the prompt has {len(ids)} tokens, more than {most}: "
                f"{'max_length' if c.max_length else 'the context less the response'}; shorten it, or leave such rows "
                f"out with {FLAGS}drop_long=True"
            )
        return ids, said if isinstance(said, str) else said[-1]["content"]

    made, left_out = load(c.source, c, make, flags)
    ids, texts = map(list, zip(*made, strict=True))
    return Prompts(ids, texts, left_out, fingerprint(np.array(i, np.int32) for i in ids))


def bucket_widths(longest: int, buckets: int, length: int) -> tuple[int, ...]:
    """The widths batches are padded to, ascending: at most `buckets` equal steps of whole eights, the last one for the
    longest prompt. length: no width is more.

    Equal steps, not powers of two: the longest of many prompts drawn lies mostly in the upper half.
    """
    widest = min(length, _eights(longest))
    step = _eights(-(-widest // buckets))
    return (*range(step, widest, step), widest)


def longest_of(prompts: Prompts) -> int:
    return max(map(len, prompts.ids), default=0)


def _eights(n: int) -> int:
    return -(-n // 8) * 8


class PromptBatches:
    """Batches of an endless stream of the prompts, in a new order each epoch; all is arithmetic on (seed, place), the
    width of a batch too: the first of `widths` (ascending) that its longest prompt fits. shuffle: version of
    lm.shuffled.

    InputError: no prompts, or one longer than the last of `widths`.
    """

    def __init__(
        self, prompts: Prompts, batch: int, widths: Sequence[int], seed: int, pad_id: int, shuffle: int = lm.SHUFFLE
    ):
        longest = longest_of(prompts)
        if not 0 < longest <= widths[-1]:
            raise InputError(
                f"a prompt of {longest} tokens doesn't fit {widths[-1]}; load the prompts with that length"
            )
        self._ids, self._batch, self._widths, self._seed, self._pad_id = prompts.ids, batch, widths, seed, pad_id
        self._shuffle = shuffle

    @property
    def widest(self) -> int:
        return self._widths[-1]

    def at(self, position: int) -> dict[str, np.ndarray]:
        """The prompts at places position to position + batch - 1.

        tokens: int32 [batch, width], left-padded with pad_id; lengths: int32 [batch], without padding;
        index: int64 [batch], which prompts they are.
        """
        index = lm.shuffled(position + np.arange(self._batch), len(self._ids), self._seed, self._shuffle)
        chosen = [self._ids[i] for i in index]
        lengths = np.array([len(ids) for ids in chosen], np.int32)
        width = next(w for w in self._widths if w >= lengths.max())
        tokens = np.full((self._batch, width), self._pad_id, np.int32)
        for row, ids in zip(tokens, chosen, strict=True):
            row[width - len(ids) :] = ids
        return {"tokens": tokens, "lengths": lengths, "index": index}
