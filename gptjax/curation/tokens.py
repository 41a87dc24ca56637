"""Words and sentences as the rules of quality count them.

The published thresholds were set on tokens: words, with punctuation apart. `split_words` and `count_sentences` are
regular expressions for that, some forty times as fast as spaCy's tokenizer for English, which `spacy_words` and
`spacy_sentences` are (the one that datatrove's filters use: with them the rules decide as its filters do).
"""

from __future__ import annotations

import functools
import re

# Python's str.isalpha letters stay together with the digits, apostrophes and inner marks of their word
_WORD = re.compile(r"\w+(?:[.,:/@'’_-]\w+)*|\.{2,}|[^\w\s]")
_CLITIC = re.compile(r"(?i)(.+?)(n['’]t|['’](?:s|m|d|re|ve|ll))")
_SENTENCE = re.compile(r"[.!?…。！？]+[\"'”’)\]]*(?=\s|$)")


@functools.lru_cache(maxsize=2)
def split_words(text: str) -> list[str]:
    """Words and marks; contractions in two, as do|n't, and words at hyphens and slashes in their parts."""
    found = []
    for token in _WORD.findall(text):
        if token.isalnum() or len(token) == 1:
            found.append(token)
            continue
        for part in re.split(r"(?<=[^\W\d])([-/])(?=[^\W\d])", token):
            match = _CLITIC.fullmatch(part)
            found += match.groups() if match else [part]
    return found


def count_sentences(text: str) -> int:
    """Sentences of a text; what follows the last mark is one too."""
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    return len(ends) + bool(text[ends[-1] if ends else 0 :].strip())


@functools.cache
def _spacy():
    import spacy

    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    return nlp


@functools.lru_cache(maxsize=2)  # several rules ask for the words of one document
def _tokens(text: str) -> tuple[list[str], int]:
    nlp = _spacy()
    nlp.max_length = len(text) + 10
    with nlp.memory_zone():  # otherwise it keeps every word it has seen
        found = nlp(text)
        return [stripped for token in found if (stripped := token.text.strip())], sum(1 for _ in found.sents)


def spacy_words(text: str) -> list[str]:
    """spaCy's tokens of English, without those that are white space."""
    return _tokens(text)[0]


def spacy_sentences(text: str) -> int:
    return _tokens(text)[1]
