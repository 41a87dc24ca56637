"""Gopher's rules of quality and repetition (Rae et al. 2021, section A.1.1 and Table A1).

Each rule's name is the reason in the manifest, and its figure the score. The order is datatrove's, so that documents
go for the same reason; so are its readings where the paper leaves one open: words with a letter or digit count toward
length, '...' is an ellipsis too, '-' a bullet.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence

from gptjax.curation.documents import Document, Drop
from gptjax.curation.punctuation import PUNCTUATION
from gptjax.curation.tokens import split_words

STOP_WORDS = frozenset("the be to of and that have with".split())


@dataclasses.dataclass(frozen=True)
class GopherQuality:
    """Thresholds of section A.1.1. words: text -> its words and marks (tokens.py)."""

    words: Callable[[str], Sequence[str]] = split_words
    fewest_words: int = 50
    most_words: int = 100_000
    shortest_mean: float = 3
    longest_mean: float = 10
    most_symbols: float = 0.1
    most_bullets: float = 0.9
    most_ellipses: float = 0.3
    fewest_alphabetic: float = 0.8
    fewest_stop_words: int = 2
    name = "gopher_quality"

    def __call__(self, document: Document) -> Document | Drop:
        text, words = document.text, self.words(document.text)
        lengths = [len(word) for word in words if not PUNCTUATION.issuperset(word)]
        if len(lengths) < self.fewest_words:
            return Drop("few_words", len(lengths))
        if len(lengths) > self.most_words:
            return Drop("many_words", len(lengths))
        mean = sum(lengths) / len(lengths)
        if mean < self.shortest_mean:
            return Drop("short_words", mean)
        if mean > self.longest_mean:
            return Drop("long_words", mean)
        hashes = text.count("#") / len(words)
        if hashes > self.most_symbols:
            return Drop("hashes", hashes)
        ellipses = (text.count("...") + text.count("…")) / len(words)
        if ellipses > self.most_symbols:
            return Drop("ellipses", ellipses)
        lines = text.splitlines()
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)
        if bullets > self.most_bullets:
            return Drop("bullets", bullets)
        unfinished = sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines)
        if unfinished > self.most_ellipses:
            return Drop("unfinished_lines", unfinished)
        alphabetic = sum(any(map(str.isalpha, word)) for word in words) / len(words)
        if alphabetic < self.fewest_alphabetic:
            return Drop("alphabetic", alphabetic)
        stop_words = len(STOP_WORDS.intersection(words))
        if stop_words < self.fewest_stop_words:
            return Drop("stop_words", stop_words)
        return document


@dataclasses.dataclass(frozen=True)
class GopherRepetition:
    """Thresholds of Table A1: shares of lines, paragraphs and of their characters that occurred before; of characters
    in the most frequent n-gram (top), and in n-grams that occurred before (repeated), each counted once."""

    words: Callable[[str], Sequence[str]] = split_words
    lines: float = 0.30
    paragraphs: float = 0.30
    line_characters: float = 0.20
    paragraph_characters: float = 0.20
    top: tuple[tuple[int, float], ...] = ((2, 0.20), (3, 0.18), (4, 0.16))
    repeated: tuple[tuple[int, float], ...] = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    name = "gopher_repetition"

    def __call__(self, document: Document) -> Document | Drop:
        text = document.text
        parts = (
            ("paragraphs", _PARAGRAPH.split(text.strip()), self.paragraphs, self.paragraph_characters),
            ("lines", _LINE.split(text), self.lines, self.line_characters),
        )
        for what, found, most, most_characters in parts:
            count, characters = duplicates(found)
            if count / len(found) > most:
                return Drop(what, count / len(found))
            if characters / len(text) > most_characters:
                return Drop(f"{what[:-1]}_characters", characters / len(text))
        words = self.words(text)
        for n, most in self.top:
            if len(words) >= n and (share := top_characters(words, n) / len(text)) > most:
                return Drop(f"top_{n}_gram", share)
        for n, most in self.repeated:
            if (share := repeated_characters(words, n) / len(text)) > most:
                return Drop(f"repeated_{n}_grams", share)
        return document


_PARAGRAPH, _LINE = re.compile(r"\n{2,}"), re.compile(r"\n+")


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """(how many occurred before, their characters)."""
    seen, count, characters = set(), 0, 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    return count, characters


def top_characters(words: Sequence[str], n: int) -> int:
    """Characters of all occurrences of the most frequent n-gram, of several the first one."""
    (gram, count), = Counter(zip(*(words[i:] for i in range(n)), strict=False)).most_common(1)
    return (sum(map(len, gram)) + n - 1) * count


def repeated_characters(words: Sequence[str], n: int) -> int:
    """Characters of the n-grams that occurred before, none of which overlap."""
    seen, characters, at = set(), 0, 0
    while at <= len(words) - n:
        gram = "".join(words[at : at + n])
        if gram in seen:
            characters += len(gram)
            at += n
        else:
            seen.add(gram)
            at += 1
    return characters
