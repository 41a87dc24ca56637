"""Labeled examples for fine-tuning on a task: rows of text and a label, as GPT-1's input transformations.

A label becomes a distribution over the outputs of the head: all of it on one class or choice, or, for a real-valued
score, on the two whole scores around it (Tai et al. 2015 §5.2; STS-B in GPT-1's released code). The batch of step t is
a pure function of (seed, t), as in data/lm.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax import paths
from gptjax.config import nearest
from gptjax.data import lm
from gptjax.data.batches import InOrder, Shuffled, padded_groups, padded_lengths
from gptjax.data.rows import (
    LeftOut,
    Record,
    check_config,
    fingerprint,
    fraction_of,
    hold_out,
    load,
    warn_if_few,
)
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.transforms import TASKS, Marks, sequences
from gptjax.errors import InputError
from gptjax.ranges import Count

FIELDS = {
    "classification": ("text", "label"),
    "entailment": ("premise", "hypothesis", "label"),
    "similarity": ("first", "second", "label"),
    "choice": ("context", "question", "choices", "label"),
}
_ALL_FIELDS = tuple(dict.fromkeys(name for names in FIELDS.values() for name in names))
FORMS = ("rows", "race", "mctest")
_MOST_LABELS = 1000


@dataclasses.dataclass(frozen=True)
class LabeledConfig:
    """The labeled rows, and what is held out of them for validation.

    task: 'classification' of one text, 'entailment' (an ordered pair), 'similarity' (a pair without an order) or
        'choice' (one of several answers).
    train: rows to train on: .csv, .tsv, .jsonl, .json, .parquet or hf:NAME.
    valid: the share of the training rows that is held out, or another source.
    test: rows to predict after training, with or without labels; None = none.
    labels: the label set, with commas, in the order of the head's outputs; of a choice the labels of the first, second,
        ... choice. None = the labels of the training rows, sorted; of a choice 0, 1, ...
    scores: '0,5', the lowest and highest score, where the label is a real-valued score; None = classes.
    fields: the rows' name for our field NAME; the names of several columns with commas are joined by spaces, and for
        choices, which may be one field with a list, name each choice.
    form: 'rows', or a published form with several questions to a text: 'race' (lists of questions, options and
        answers), 'mctest' (its .tsv, with the .ans next to it).
    columns: names of the columns of .csv and .tsv files without a header, with commas; None = the first line has them.
    format: 'csv' or 'tsv' for files whose names do not say so.
    max_length: maximum number of tokens of a sequence; None = the model's context.
    bad_rows: 'stop', or 'drop' bad rows, which are written to dropped_rows.jsonl.
    """

    task: str = "classification"
    train: str | None = paths.field(paths.SOURCE)
    valid: str = paths.field(paths.SHARE, "0.1")
    test: str | None = paths.field(paths.SOURCE)
    labels: str | None = None
    scores: str | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=lambda: {name: name for name in _ALL_FIELDS})
    form: str = "rows"
    columns: str | None = None
    format: str | None = None
    max_length: Count | None = None
    bad_rows: str = "stop"

    def __post_init__(self):
        if self.task not in TASKS:
            raise InputError(f"data.task={self.task!r} is unknown{nearest(self.task, TASKS)}")
        if self.form not in FORMS:
            raise InputError(f"data.form={self.form!r} is unknown{nearest(self.form, FORMS)}")
        if self.format not in (None, "csv", "tsv"):
            raise InputError(f"data.format={self.format!r}: choose csv or tsv, or leave it out.")
        if self.form != "rows" and self.task != "choice":
            raise InputError(f"data.form={self.form!r} has questions with several answers: set data.task to choice.")
        if self.scores is not None:
            low, _, high = self.scores.partition(",")
            if not (_is_whole(low) and _is_whole(high) and int(low) < int(high)):
                raise InputError(f"data.scores={self.scores!r}: give the lowest and the highest score, as 0,5.")
            if self.labels is not None or self.task == "choice":
                raise InputError("data.scores is for real-valued scores, which have no labels: leave data.labels out.")
        for name in ("labels", "columns"):
            listed = names_of(getattr(self, name)) or ("", " ")
            if len(set(listed)) < max(2, len(listed)):
                raise InputError(f"data.{name}={getattr(self, name)!r}: give at least two with commas, each once.")
        check_config(self, _ALL_FIELDS, FIELDS[self.task])

    @property
    def score_range(self) -> tuple[int, int] | None:
        return tuple(map(int, self.scores.split(","))) if self.scores else None

    @property
    def validation(self) -> str:  # the name that rows.check_config knows
        return self.valid


def names_of(listed: str | None) -> tuple[str, ...] | None:
    """'a, b' -> ('a', 'b')."""
    return None if listed is None else tuple(name.strip() for name in listed.split(","))


def _is_whole(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


class Example(NamedTuple):
    """sequences: ids of each; target: float32 [outputs], the distribution to learn, all zeros if the row has no label;
    value: the score, or the index of the label; -1 without one. cut: whether a segment was cut."""

    sequences: list[list[int]]
    target: np.ndarray
    value: float
    cut: bool


class Labeled(NamedTuple):
    """train, validation, test: the splits; labels: names of the head's outputs; most: the maximum number of sequences
    of an example; left_out: the dropped rows; fingerprint: of the training sequences and targets."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    most: int
    left_out: LeftOut
    fingerprint: str

    def __str__(self):
        cut = sum(e.cut for e in (*self.train, *self.validation, *self.test))
        return (
            f"{len(self.train):,} labeled examples{self.left_out.describe()}; {len(self.validation):,} held out"
            + (f"; {cut:,} had more tokens than the context and were cut" if cut else "")
        )


def load_labeled(c: LabeledConfig, tokenizer: Tokenizer, marks: Marks, context: int, seed: int) -> Labeled:
    """Reads and tokenizes the rows. InputError, naming the rows: a missing field, an empty segment, a label that is not
    in the label set, a score out of range, or more choices than labels."""
    if c.max_length is not None and c.max_length > context:
        raise InputError(f"data.max_length={c.max_length} is more than the model's context of {context}: lower it.")
    answers = {s: _mctest_answers(s) for s in (c.train, c.valid, c.test) if c.form == "mctest" and s}

    def read(source: str, labels: tuple[str, ...] | None, needs_label: bool = True):
        parse = lambda record: _parsed(record, c, tokenizer, labels, needs_label, answers.get(source))
        found, left_out = load(source, dataclasses.replace(c, columns=c.columns or _columns(c.form)), parse)
        return [question for questions in found for question in questions], left_out

    # --- the training rows, which tell the label set where the config does not ---
    found, left_out = read(c.train, _given_labels(c))
    labels = _given_labels(c) or _labels_of(c, found)
    fraction = fraction_of(c.valid)
    if fraction is None:
        train, (held_out, more) = found, read(c.valid, labels)
        left_out = left_out + more
    else:
        train, held_out = hold_out([(p.key, p) for p in found], fraction, seed, c.train, "valid", "text")
    warn_if_few(train, held_out, c.train, "valid")
    test, more = read(c.test, labels, needs_label=False) if c.test else ([], LeftOut())

    # --- the sequences and targets ---
    def made(parsed: _Parsed) -> Example:
        ids, was_cut = sequences(c.task, parsed.segments, marks, c.max_length or context)
        target, value = _target(c, parsed.label, labels)
        return Example(ids, target, value, was_cut)

    splits = [[made(parsed) for parsed in split] for split in (train, held_out, test)]
    content = (a for e in splits[0] for a in (*map(np.array, e.sequences), e.target))
    most = max(len(e.sequences) for split in splits for e in split)
    return Labeled(*splits, labels, most, left_out + more, fingerprint(content))


# --- rows ---------------------------------------------------------------------------------------------------


class _Parsed(NamedTuple):
    """key: the text that is held out or trained on together; label: as text, None without one."""

    key: str
    segments: list[list[int]]
    label: str | None


def _parsed(record: Record, c: LabeledConfig, tokenizer, labels, needs_label: bool, answers) -> list[_Parsed]:
    """The examples of a row: one, or one for each question of a published form."""

    def encoded(text: Any, what: str) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"The {what} is {type(text).__name__}, not text: fix the row.")
        ids = tokenizer.encode(text)
        if not ids:
            raise InputError(f"The {what} is empty: give it some text, or remove the row.")
        return ids

    if c.task != "choice":
        *names, _ = FIELDS[c.task]
        label = _label(record["label"], c, labels) if needs_label or "label" in record else None
        texts = [record.text(name) for name in names]
        segments = [encoded(text, name) for name, text in zip(names, texts, strict=True)]
        return [_Parsed("\n".join(texts), segments, label)]
    found = []
    for text, question, choices, answer in _questions(record, c.form, needs_label, answers):
        if labels is not None and len(choices) > len(labels):
            raise InputError(
                f"The row has {len(choices)} choices for {len(labels)} labels: name them all in data.labels."
            )
        if len(choices) < 2:
            raise InputError(f"The row has {len(choices)} choices: give at least 2.")
        label = None if answer is None else _label(answer, c, (labels or _numbers(len(choices)))[: len(choices)])
        context = encoded(f"{text} {question}" if question else text, "context")
        segments = [context, *(encoded(choice, f"choice {i}") for i, choice in enumerate(choices, 1))]
        found.append(_Parsed(text, segments, label))
    return found


def _questions(record: Record, form: str, needs_label: bool, answers) -> Iterator[tuple]:
    """(text, question or None, choices, label or None) of each question of a row."""
    if form == "race":
        labels = record["answers"] if needs_label or "answers" in record else [None] * len(record["questions"])
        for question, choices, answer in zip(record["questions"], record["options"], labels, strict=True):
            yield record["article"], question, choices, answer
    elif form == "mctest":
        number = int(record["id"].rpartition(".")[2])
        story = record["story"].replace("\\newline", "\n")
        for i in range(1, 5):
            question = record[f"question{i}"].partition(": ")[2] or record[f"question{i}"]  # 'one: ' or 'multiple: '
            choices = [record[f"choice{i}{letter}"] for letter in "ABCD"]
            yield story, question, choices, answers[number][i - 1] if answers else None
    else:
        context = record.text("context")
        question = record.text("question") if "question" in record else None
        label = record["label"] if needs_label or "label" in record else None
        yield context, question, record.values("choices"), label


def _columns(form: str) -> str | None:
    """The columns of a published form without a header: MCTest has an id, remarks, the story and 4 questions."""
    if form != "mctest":
        return None
    of_question = lambda i: (f"question{i}", *(f"choice{i}{letter}" for letter in "ABCD"))
    return ",".join(("id", "remarks", "story", *(column for i in range(1, 5) for column in of_question(i))))


def _mctest_answers(source: str) -> list[list[str]] | None:
    """The letters of each story's four answers, from the .ans next to a .tsv; None where there is none, as of the test
    set."""
    path = paths.local(source).with_suffix(".ans")
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else None


# --- labels -------------------------------------------------------------------------------------------------


def _given_labels(c: LabeledConfig) -> tuple[str, ...] | None:
    if c.score_range is not None:
        return tuple(str(s) for s in range(c.score_range[0], c.score_range[1] + 1))
    return names_of(c.labels) or (tuple("ABCD") if c.form != "rows" else None)


def _labels_of(c: LabeledConfig, found: Sequence[_Parsed]) -> tuple[str, ...]:
    """The label set of the training rows."""
    if c.task == "choice":
        return _numbers(max(len(p.segments) - 1 for p in found))
    labels = sorted({p.label for p in found})
    if not 2 <= len(labels) <= _MOST_LABELS:
        raise InputError(
            f"The source {c.train!r} has {len(labels):,} different labels ({', '.join(labels[:5])}): give 2 to "
            f"{_MOST_LABELS}, name the field of the label with --config.data.fields.label=NAME, or set "
            "--config.data.scores where it is a real-valued score."
        )
    return tuple(labels)


def _numbers(n: int) -> tuple[str, ...]:
    return tuple(map(str, range(n)))


def _label(value: Any, c: LabeledConfig, labels: tuple[str, ...] | None) -> str:
    """The label as text. InputError: not in the label set, or a score that is no number in the range."""
    text = str(int(value)) if isinstance(value, bool) else str(value).strip()
    if c.scores is not None:
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        low, high = c.score_range
        if not low <= score <= high:
            raise InputError(f"The score {text!r} is not a number from {low} to {high} (data.scores).")
    elif labels is not None and text not in labels:
        known = ", ".join(labels)
        raise InputError(f"The label {text!r} is not one of {known}: fix the row, or name it in data.labels.")
    return text


def _target(c: LabeledConfig, label: str | None, labels: tuple[str, ...]) -> tuple[np.ndarray, float]:
    """(distribution over the outputs, the score or the index of the label)."""
    target = np.zeros(len(labels), np.float32)
    if label is None:
        return target, -1.0
    if c.scores is None:
        target[labels.index(label)] = 1
        return target, float(labels.index(label))
    score, (low, _) = float(label), c.score_range
    below = min(math.floor(score) - low, len(labels) - 2)
    target[below + 1] = score - low - below
    target[below] = 1 - target[below + 1]
    return target, score


# --- batches ------------------------------------------------------------------------------------------------


def padded_length(labeled: Labeled, limit: int, shards: int) -> tuple[int, int]:
    """padded_lengths for the longest sequence."""
    every = (ids for split in labeled[:3] for e in split for ids in e.sequences)
    return padded_lengths(max(map(len, every)), limit, shards)


class LabeledBatches(Shuffled):
    """This host's rows of the batch of any step: batches[step] is a dict of

    tokens: int32 [rows, N, length], the sequences, right-padded with pad_id; N is Labeled.most
    lengths: int32 [rows, N], number of tokens before the padding, 1 where there is no sequence
    valid: float32 [rows, N], 1 where there is a sequence
    target: float32 [rows, outputs]
    weights: float32 [rows], 1

    The examples are reshuffled each epoch. rows: examples per step, over all hosts; here: number of rows → those that
    this host holds, by default all. shuffle: version of lm.shuffled.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        rows: int,
        most: int,
        length: int,
        seed: int,
        *,
        pad_id: int,
        here: Callable[[int], np.ndarray] = np.arange,
        shuffle: int = lm.SHUFFLE,
    ):
        padded = _Padded(examples, most, length, pad_id)
        super().__init__(len(examples), rows, seed, padded.arrays, here=here, shuffle=shuffle)


def in_order(
    examples: Sequence[Example], rows: int, most: int, length: int, *, pad_id: int,
    here: Callable[[int], np.ndarray] = np.arange,
) -> InOrder:  # fmt: skip
    """Batches of the examples in order, with the arrays of LabeledBatches. The last one is padded with rows of weight
    0."""
    return InOrder(len(examples), rows, here(rows), _Padded(examples, most, length, pad_id).arrays)


class _Padded:
    def __init__(self, examples: Sequence[Example], most: int, length: int, pad_id: int):
        self._examples, self._shape, self._pad_id = examples, (most, length), pad_id

    def arrays(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of LabeledBatches for the examples of index, int64 [n]; -1 is padding."""
        texts = [self._examples[number].sequences if number >= 0 else [] for number in index]
        nothing = np.zeros_like(self._examples[0].target)
        target = np.array([self._examples[number].target if number >= 0 else nothing for number in index], np.float32)
        batch = padded_groups(texts, *self._shape, self._pad_id)
        return batch | {"target": target, "weights": (index >= 0).astype(np.float32)}
