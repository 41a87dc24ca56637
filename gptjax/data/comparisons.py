"""Comparisons for the reward model: a prompt and K completions ranked by preference, ties allowed.

The batch of step t is a pure function of (seed, t), as in data/lm.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax import paths
from gptjax.data import lm, published
from gptjax.data.batches import InOrder, Shuffled, padded_groups, padded_lengths
from gptjax.data.chat import Template
from gptjax.data.rows import (
    AllTied,
    LeftOut,
    Record,
    check_config,
    check_length,
    fingerprint,
    limit,
    load_split,
    prompt_text,
)
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.parallel.sharding import batch_sharding
from gptjax.ranges import Count

_FIELDS = ("prompt", "completions", "ranks", "chosen", "rejected")
MOST = 9  # completions per prompt, as in InstructGPT §3.5


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """The ranked completions, and what is held out of them for validation.

    source: rows with `prompt`, `completions` and `ranks`, or `prompt`, `chosen` and `rejected`; or with whole
        conversations `chosen` and `rejected`, whose shared beginning is the prompt (data/published.py).
    fields: the rows' name for our field NAME; it may reach inside, as 'a.0.b', and join several, as 'a,b'
        (rows.Record).
    validation: share of the prompts that is held out, or another source.
    max_length: maximum number of tokens of a prompt and completion; None = the model's context.
    drop_long: leave longer rows out, rather than stop.
    bad_rows: 'stop', or 'drop' rows with anything else wrong; what is left out is written to dropped_rows.jsonl.
    """

    source: str | None = paths.field(paths.SOURCE)
    fields: Mapping[str, str] = dataclasses.field(default_factory=lambda: {name: name for name in _FIELDS})
    validation: str = paths.field(paths.SHARE, "0.1")
    max_length: Count | None = None
    drop_long: bool = False
    bad_rows: str = "stop"

    def __post_init__(self):
        check_config(self, _FIELDS)


More = Callable[[np.ndarray], dict[str, np.ndarray]]


class Comparison(NamedTuple):
    """prompt: its ids; completions: ids of each, with end-of-text; ranks: of each, lower is better, equal is a tie;
    characters: length of each completion's text."""

    prompt: list[int]
    completions: list[list[int]]
    ranks: list[float]
    characters: tuple[int, ...] = ()

    def pairs(self) -> tuple[int, int]:
        """(number of pairs with different ranks, how many of them have identical texts)."""
        both = itertools.combinations(zip(self.completions, self.ranks, strict=True), 2)
        ranked = [(a, b) for (a, i), (b, j) in both if i != j]
        return len(ranked), sum(a == b for a, b in ranked)


class Comparisons(NamedTuple):
    """train, validation: the splits; k: maximum number of completions of a prompt in them; left_out: the dropped rows;
    fingerprint: of the training ids and ranks."""

    train: list[Comparison]
    validation: list[Comparison]
    k: int
    left_out: LeftOut
    fingerprint: str

    def __str__(self):
        return (
            f"{len(self.train):,} comparisons of up to {self.k} completions{self.left_out.describe()}; "
            f"{len(self.validation):,} held out"
        )


def load_comparisons(c: ComparisonConfig, template: Template, length: int, seed: int) -> Comparisons:
    """Reads and tokenizes the comparisons of c.source.

    length: the model's context, the maximum number of tokens of a prompt and a completion.
    InputError, naming the rows: a missing field, no text, not 2 to 9 completions, not a finite rank for each, or more
    than max_length tokens.
    """
    most = limit(c.max_length, length)

    def make(record: Record) -> tuple[str, Comparison]:
        messages, texts, ranks = _ranked(record, template.kind)
        prompt, completions = template.prompt(messages), []
        for number, text in enumerate(texts, 1):
            try:
                completions.append(template.response(text))
            except InputError as error:
                raise InputError(f"Completion {number}: {error}") from None
        longest = max(range(len(completions)), key=lambda i: len(completions[i]))
        check_length(len(prompt), len(completions[longest]), most, f"completion {longest + 1}")
        if len(set(ranks)) == 1:
            raise AllTied("All ranks are equal, so no completion is preferred: rank them, or remove the row.")
        given = record["prompt"] if "prompt" in record else messages
        key = prompt_text(given if isinstance(given, str) else messages)
        return key, Comparison(prompt, completions, ranks, tuple(map(len, texts)))

    train, validation, left_out = load_split(c, make, seed)
    content = (
        array
        for e in train
        for array in (np.array(e.prompt), *map(np.array, e.completions), np.array(e.ranks, np.float32))
    )
    k = max(len(e.completions) for e in train + validation)
    return Comparisons(train, validation, k, left_out, fingerprint(content))


def padded_length(comparisons: Comparisons, limit: int, shards: int) -> tuple[int, int]:
    """padded_lengths for the longest prompt and completion."""
    longest = max(len(e.prompt) + max(map(len, e.completions)) for e in comparisons.train + comparisons.validation)
    return padded_lengths(longest, limit, shards)


class ComparisonBatches(Shuffled):
    """This host's rows of the batch of any step: batches[step] is a dict of

    tokens: int32 [rows, k, length], prompt and completion, right-padded with pad_id
    lengths: int32 [rows, k], number of tokens before the padding, 1 where there is no completion
    ranks: float32 [rows, k], lower is better
    valid: float32 [rows, k], 1 where there is a completion
    weights: float32 [rows], 1

    The comparisons are reshuffled each epoch. rows: comparisons per step, over all hosts; here: number of rows → those
    that this host holds, by default all. shuffle: version of lm.shuffled. more: numbers of comparisons [rows], -1 for
    padding → further arrays [rows, ...]. InputError: a comparison that does not fit k or length.
    """

    def __init__(
        self,
        comparisons: Sequence[Comparison],
        rows: int,
        k: int,
        length: int,
        seed: int,
        *,
        pad_id: int,
        here: Callable[[int], np.ndarray] = np.arange,
        shuffle: int = lm.SHUFFLE,
        more: More | None = None,
    ):
        padded = _Padded(comparisons, k, length, pad_id, more)
        super().__init__(len(comparisons), rows, seed, padded.arrays, here=here, shuffle=shuffle)


def batches_of(c, comparisons: Comparisons, length: int, pad_id: int, mesh, shuffle: int,
               more: tuple[More | None, More | None] = (None, None)) -> tuple[ComparisonBatches, InOrder]:  # fmt: skip
    """(batches to train on, validation batches). c: a stage's config, with batch_size, microbatch_rows and seed. more:
    of either. The others as ComparisonBatches has them."""
    here, k = hosts.batch_rows(batch_sharding(mesh, 0), c.microbatch_rows), comparisons.k
    train = ComparisonBatches(
        comparisons.train, c.batch_size, k, length, c.seed, pad_id=pad_id, here=here, shuffle=shuffle, more=more[0]
    )
    held_out = validation_batches(
        comparisons.validation, c.microbatch_rows, k, length, pad_id=pad_id, here=here, more=more[1]
    )
    return train, held_out


def validation_batches(
    comparisons: Sequence[Comparison],
    rows: int,
    k: int,
    length: int,
    *,
    pad_id: int,
    here: Callable[[int], np.ndarray] = np.arange,
    more: More | None = None,
) -> InOrder:
    """Batches of the comparisons in order, with the arrays of ComparisonBatches. The last batch is padded with rows of
    weight 0 without completions. InputError: as ComparisonBatches.
    """
    padded = _Padded(comparisons, k, length, pad_id, more)
    return InOrder(len(comparisons), rows, here(rows), padded.arrays)


class _Padded:
    def __init__(self, comparisons: Sequence[Comparison], k: int, length: int, pad_id: int, more: More | None):
        self._comparisons, self._shape, self._pad_id, self._more = comparisons, (k, length), pad_id, more
        for e in comparisons:
            tokens = len(e.prompt) + max(map(len, e.completions))
            if len(e.completions) > k or tokens > length:
                raise InputError(
                    f"A comparison has {len(e.completions)} completions and up to {tokens} tokens, more than k={k} or "
                    f"length={length}: load the comparisons with that length, and use their k."
                )

    def arrays(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of ComparisonBatches for the comparisons of index, int64 [n]; -1 is padding."""
        chosen = [self._comparisons[number] if number >= 0 else None for number in index]
        texts = [[e.prompt + completion for completion in e.completions] if e else [] for e in chosen]
        ranks = np.zeros((len(index), self._shape[0]), np.float32)
        for row, e in zip(ranks, chosen, strict=True):
            if e:
                row[: len(e.ranks)] = e.ranks
        batch = padded_groups(texts, *self._shape, self._pad_id)
        batch |= {"ranks": ranks, "weights": (index >= 0).astype(np.float32)}
        return batch if self._more is None else batch | self._more(index)


def _ranked(record: Record, kind: str) -> tuple[Any, list[Any], list[float]]:
    """(prompt, completions, ranks) of a row of either form; not yet checked to be text."""
    if "completions" not in record and "chosen" in record:
        given = record["prompt"] if "prompt" in record else None
        prompt, *texts = published.preference(given, record["chosen"], record["rejected"], kind)
        return prompt, texts, [0.0, 1.0]
    prompt = published.prompt(record["prompt"], kind)
    texts, ranks = record["completions"], record["ranks"]
    for name, value in (("completions", texts), ("ranks", ranks)):
        if not isinstance(value, list):
            raise InputError(f"The {name} are {type(value).__name__}, not a list: fix the row.")
    if not 2 <= len(texts) <= MOST:
        raise InputError(f"The row has {len(texts)} completions: give 2 to {MOST}.")
    if len(ranks) != len(texts):
        raise InputError(f"The row has {len(ranks)} ranks for {len(texts)} completions: give one for each.")
    for rank in ranks:
        # bool is a subclass of int. The bound keeps ranks within float32, and is false for NaN.
        if isinstance(rank, bool) or not isinstance(rank, int | float) or not abs(rank) < 2.0**127:
            raise InputError(f"The rank {rank!r} is not a finite number: give each completion one, lower is better.")
    return prompt, [published.response(text) for text in texts], [float(np.float32(rank)) for rank in ranks]
