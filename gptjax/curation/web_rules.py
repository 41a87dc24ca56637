"""The rules of C4 (Raffel et al. 2020, section 2.2), mC4 and FineWeb (Penedo et al. 2024, section 3.6).

C4's drop lines and change the text; other readings are those of its code, as in datatrove: lines with a word of more
than 1,000 characters or a phrase of a cookie policy go, [3] and [edit] are cut out.
"""

from __future__ import annotations

import dataclasses
import heapq
import re
from collections.abc import Callable, Sequence

from gptjax.curation.documents import Document, Drop
from gptjax.curation.gopher import duplicates
from gptjax.curation.punctuation import TERMINAL
from gptjax.curation.tokens import count_sentences, split_words

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_ENDS = (".", "?", "!", '"', "'")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclasses.dataclass(frozen=True)
class C4:
    """terminal: keep only lines that end in punctuation; FineWeb leaves this rule out. sentences: text -> how many it
    has (tokens.py)."""

    sentences: Callable[[str], int] = count_sentences
    terminal: bool = True
    fewest_sentences: int = 5
    fewest_words: int = 3
    longest_word: int = 1_000
    name = "c4"

    def __call__(self, document: Document) -> Document | Drop:
        kept, count = [], 0
        lines = document.text.splitlines()
        for line in lines:
            line = line.strip()
            words = line.split()
            if any(len(word) > self.longest_word for word in words):
                continue
            line = _CITATION.sub("", line)
            if self.terminal and (not line.endswith(_ENDS) or line.endswith("...")):
                continue
            if len(words) < self.fewest_words:
                continue
            lowered = line.lower()
            if "lorem ipsum" in lowered:
                return Drop("lorem_ipsum")
            if "javascript" in lowered:
                continue
            if "{" in line:
                return Drop("curly_bracket")
            if any(phrase in lowered for phrase in _POLICY):
                continue
            kept.append(line)
            count += self.sentences(line)
        if count < self.fewest_sentences:
            return Drop("few_sentences", count)
        document.text = "\n".join(kept).strip()
        if len(kept) < len(lines):
            document.edits["c4_lines"] = len(lines) - len(kept)
        return document


@dataclasses.dataclass(frozen=True)
class MC4Paragraphs:
    """mC4 (Xue et al. 2021): at least so many lines of so many characters."""

    fewest: int = 3
    shortest: int = 200
    name = "mc4_paragraphs"

    def __call__(self, document: Document) -> Document | Drop:
        longest = heapq.nlargest(self.fewest, map(len, document.text.split("\n")))
        if len(longest) < self.fewest or longest[-1] < self.shortest:
            return Drop("few_long_lines", sum(length >= self.shortest for length in longest))
        return document


@dataclasses.dataclass(frozen=True)
class FineWeb:
    """Shares of lines that end in punctuation and of short lines, of characters in lines that occurred before, and line
    breaks per word."""

    words: Callable[[str], Sequence[str]] = split_words
    fewest_ended: float = 0.12
    most_short: float = 0.67
    short: int = 30
    most_repeated: float = 0.01
    most_breaks: float = 0.3
    name = "fineweb"

    def __call__(self, document: Document) -> Document | Drop:
        text = document.text
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            return Drop("empty")
        ended = sum(line[-1] in TERMINAL for line in lines) / len(lines)
        if ended < self.fewest_ended:
            return Drop("lines_without_end", ended)
        short = sum(len(line) <= self.short for line in lines) / len(lines)
        if short > self.most_short:
            return Drop("short_lines", short)
        repeated = duplicates(lines)[1] / len(text.replace("\n", ""))
        if repeated > self.most_repeated:
            return Drop("repeated_lines", repeated)
        breaks = text.count("\n") / len(self.words(text))
        if breaks > self.most_breaks:
            return Drop("line_breaks", breaks)
        return document
