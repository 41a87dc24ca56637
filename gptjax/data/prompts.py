"""Prompts for reinforcement learning: read, and drawn by their place in an endless stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gptjax.data import lm
from gptjax.data.chat import Template
from gptjax.data.rows import Record, TooLong, check_config, fingerprint, limit, load
from gptjax.errors import InputError

_FIELDS = ("prompt",)


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """source: rows with `prompt`, a text or messages. fields: our name → the rows' name.
    max_length: tokens of a prompt, None = the model's context without the response.
    drop_long: leave longer prompts out, rather than stop."""

    source: str | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=lambda: {name: name for name in _FIELDS})
    max_length: int | None = None
    drop_long: bool = False

    def __post_init__(self):
        check_config(self, _FIELDS)


class Prompts(NamedTuple):
    """ids of each prompt; texts: its own text, of messages the last turn's; dropped: rows left out;
    fingerprint: of the ids."""

    ids: list[list[int]]
    texts: list[str]
    dropped: int
    fingerprint: str


def load_prompts(c: PromptConfig, template: Template, length: int) -> Prompts:
    """Every row of the source as tokens. length: the model's context less the response, the most of a prompt.

    InputError: with the row, no such field, no text, or more than max_length tokens.
    """
    most = limit(c.max_length, length)

    def make(record: Record) -> tuple[list[int], str]:
        said = record["prompt"]
        ids = template.prompt(said)
        if not ids:
            raise InputError("the prompt is empty; give it some text or leave it out")
        if len(ids) > most:
            raise TooLong(
                f"the prompt has {len(ids)} tokens, more than {most}: the model's context less the response, or "
                "max_length; shorten it, or leave such rows out with --config.data.drop_long=True"
            )
        return ids, said if isinstance(said, str) else said[-1]["content"]

    made, dropped = load(c.source, c, make)
    ids, texts = map(list, zip(*made, strict=True))
    return Prompts(ids, texts, dropped, fingerprint(np.array(i, np.int32) for i in ids))


class PromptBatches:
    """Batches of an endless stream of the prompts, in a new order each epoch; all is arithmetic on (seed, place).

    InputError: no prompts, or one longer than `length`.
    """

    def __init__(self, prompts: Prompts, batch: int, length: int, seed: int, pad_id: int):
        longest = max(map(len, prompts.ids), default=0)
        if not 0 < longest <= length:
            raise InputError(f"a prompt of {longest} tokens doesn't fit {length}; load the prompts with that length")
        self._ids, self._batch, self._length, self._seed, self._pad_id = prompts.ids, batch, length, seed, pad_id

    def at(self, position: int) -> dict[str, np.ndarray]:
        """The prompts at places position to position + batch - 1.

        tokens: int32 [batch, length], left-padded with pad_id; lengths: int32 [batch], without padding;
        index: int64 [batch], which prompts they are.
        """
        index = lm.shuffled(position + np.arange(self._batch), len(self._ids), self._seed)
        chosen = [self._ids[i] for i in index]
        tokens = np.full((self._batch, self._length), self._pad_id, np.int32)
        for row, ids in zip(tokens, chosen, strict=True):
            row[self._length - len(ids) :] = ids
        return {"tokens": tokens, "lengths": np.array([len(ids) for ids in chosen], np.int32), "index": index}
