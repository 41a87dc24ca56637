"""Hidden rules, one for each document: what a model can know of a question is what the examples before it tell.

    table    ac bh ac ...   a random function of 8 letters: an example tells the answer to its own question alone
    shift    37 04 93 ...   a digit plus a hidden one, modulo 10: one example tells everything
    line     BF CA ...      a x + b modulo 7, a not 0: two different examples tell everything

An example is a word of two symbols, question and answer, and a token. To be asked is to complete a word: which of the
words that begin with the question is most likely? Questions are drawn uniformly, with repetition. `Kind.best` is the
accuracy of the best possible answer after K examples, in closed form. Every kind has symbols of its own, so that a
question tells which kind of rule it is about.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gptjax.data.bpe import train_bpe
from gptjax.data.tokenizer import Tokenizer


class Kind(NamedTuple):
    """symbols: questions and answers. draw: rng -> answer (a place in symbols) of each question. best: K -> the
    accuracy of the best answer after K examples."""

    symbols: str
    draw: Callable[[np.random.Generator], np.ndarray]
    best: Callable[[int], float]


def _line(rng: np.random.Generator) -> np.ndarray:
    return (rng.integers(1, 7) * np.arange(7) + rng.integers(7)) % 7


def _best_of_line(k: int) -> float:
    """Without examples, 1 of 7. With a single question answered so far: itself, or one of the six other answers."""
    if k == 0:
        return 1 / 7
    alone = (1 / 7) ** (k - 1)  # all k examples have the same question
    return (1 - alone) + alone * (1 / 7 + 6 / 7 * 1 / 6)


KINDS = {
    "table": Kind("abcdefgh", lambda rng: rng.integers(0, 8, 8), lambda k: 1 - (7 / 8) ** k * 7 / 8),
    "shift": Kind("0123456789", lambda rng: (np.arange(10) + rng.integers(10)) % 10, lambda k: 0.1 if k == 0 else 1.0),
    "line": Kind("ABCDEFG", _line, _best_of_line),
}


def examples(kind: Kind, rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
    """n (question, answer) pairs of one new rule."""
    rule = kind.draw(rng)
    return [(kind.symbols[x], kind.symbols[rule[x]]) for x in rng.integers(0, len(kind.symbols), n)]


def text(pairs: list[tuple[str, str]]) -> str:
    return "".join(f" {question}{answer}" for question, answer in pairs)


def make_tokenizer() -> Tokenizer:
    """Every example is a token. There is a merge for each question after its space, and one for each word."""
    words = [(a, b) for kind in KINDS.values() for a in kind.symbols for b in kind.symbols]
    merges = len({a for a, _ in words}) + len(words)
    return train_bpe([text(words)], 256 + merges + 1)


def documents(n: int, length: int, seed: int) -> list[dict]:
    """n documents of `length` examples each, the kinds in turn, as rows {text}."""
    rng = np.random.default_rng(seed)
    kinds = list(KINDS.values())
    return [{"text": text(examples(kinds[i % len(kinds)], rng, length))} for i in range(n)]


def questions(name: str, shots: int, n: int, seed: int) -> list[dict]:
    """n rows of a task of kind choice: {query: K examples of a rule, choices: the words that begin with a question,
    gold}."""
    kind, rng, rows = KINDS[name], np.random.default_rng([seed, shots]), []
    for _ in range(n):
        *shown, (question, answer) = examples(kind, rng, shots + 1)
        choices = [text([(question, symbol)]) for symbol in kind.symbols]
        rows.append({"query": text(shown), "choices": choices, "gold": kind.symbols.index(answer)})
    return rows
