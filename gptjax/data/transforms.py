"""GPT-1's input transformations: a labeled example as token sequences (Radford et al. 2018 §3.3, Figure 1).

    classification   [start] text [extract]
    entailment       [start] premise [delimiter] hypothesis [extract]
    similarity       [start] first [delimiter] second [extract]   and   [start] second [delimiter] first [extract]
    choice           [start] context [delimiter] choice [extract]   for each choice

The three tokens are new: their ids follow the vocabulary, in the order start, delimiter, extract, as in
openai/finetune-transformer-lm. The task's head reads the hidden state at `extract`, which is always last.

A sequence that is longer than the context is cut at the end of its segments. The released code cuts every segment at
half the context (context/2 - 2 tokens). Here a segment may also have what the other one leaves free, so that a long
story before a short answer keeps more of itself; two long segments are cut as there.
"""

from collections.abc import Sequence
from typing import NamedTuple

NEW_TOKENS = 3
TASKS = ("classification", "entailment", "similarity", "choice")


class Marks(NamedTuple):
    """Ids of the new tokens."""

    start: int
    delimiter: int
    extract: int

    @classmethod
    def after(cls, vocab_size: int) -> "Marks":
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)


def single(text: Sequence[int], marks: Marks, context: int) -> tuple[list[int], bool]:
    """([start] text [extract], whether the text was cut to fit the context)."""
    room = context - 2
    return [marks.start, *text[:room], marks.extract], len(text) > room


def pair(first: Sequence[int], second: Sequence[int], marks: Marks, context: int) -> tuple[list[int], bool]:
    """([start] first [delimiter] second [extract], whether a segment was cut to fit the context)."""
    a, b = cut(len(first), len(second), context - 3)
    ids = [marks.start, *first[:a], marks.delimiter, *second[:b], marks.extract]
    return ids, (a, b) != (len(first), len(second))


def cut(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens of two segments of a and b tokens are kept, in all at most `room`: each has half of it, and what
    the other does not need."""
    half = room // 2
    if a + b <= room:
        return a, b
    if b <= half:
        return room - b, b
    if a <= half:
        return a, room - a
    return room - half, half


def sequences(task: str, segments: Sequence[Sequence[int]], marks: Marks, context: int) -> tuple[list[list[int]], bool]:
    """The sequences of an example, and whether any was cut.

    segments: of token ids. classification: the text. entailment: premise, hypothesis. similarity: the two texts.
    choice: the context, then the choices.
    """
    if task == "classification":
        made = [single(segments[0], marks, context)]
    elif task == "entailment":
        made = [pair(*segments, marks, context)]
    elif task == "similarity":
        first, second = segments
        made = [pair(first, second, marks, context), pair(second, first, marks, context)]
    else:
        given, *choices = segments
        made = [pair(given, choice, marks, context) for choice in choices]
    return [ids for ids, _ in made], any(was_cut for _, was_cut in made)
