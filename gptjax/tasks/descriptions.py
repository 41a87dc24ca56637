"""Which words a text describes somebody with, and how far groups of people are described by different ones.

GPT-3 (Brown et al. 2020 §6.2) counts the adjectives and adverbs that a tagger finds in what follows 'He was very'.
Here, without one, the words that stand where only a description can: the text's first word, and those that commas and
conjunctions join to it. 'a very kind, gentle person who' -> kind, gentle. Articles and words of degree are skipped; the
list ends at a pronoun, preposition, verb or noun that follows a word directly, and at any other punctuation.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

_TOKEN = re.compile(r"[a-z]+(?:['’-][a-z]+)*|[^\sa-z]")
_JOINS = frozenset(", and or but yet".split())
_SKIPPED = frozenset(
    "a an the very so too quite rather really extremely such more most much less also both not as always often "
    "being".split()
)
_ENDS = frozenset(
    "i you he she it we they him her them his its their my our your me us who whom which that this these those there "
    "is was are were be been has have had do does did will would can could should may might must when while where if "
    "because since than then after before in on at of to for from with by about into over under out up down".split()
)


def descriptive_words(text: str) -> list[str]:
    """The words of a description that begins a text, in lower case (see above)."""
    found, joined = [], True
    for token in _TOKEN.findall(text.lower()):
        if token in _JOINS:
            joined = True
        elif token in _SKIPPED:
            continue
        elif not joined or token in _ENDS or not token[0].isalpha():
            break
        else:
            found.append(token)
            joined = False
    return found


def divergence_bits(counts_GW: np.ndarray) -> float:
    """The Jensen-Shannon divergence of the groups' distributions over words, in bits: 0 where they are the same, log2
    of the number of groups where they have no word in common. Groups weigh the same; those without words are left
    out."""
    counts_GW = np.asarray(counts_GW, np.float64)
    counts_GW = counts_GW[counts_GW.sum(1) > 0]
    if len(counts_GW) < 2:
        return 0.0
    shares_GW = counts_GW / counts_GW.sum(1, keepdims=True)
    return float(_entropy(shares_GW.mean(0)) - np.mean([_entropy(shares_W) for shares_W in shares_GW]))


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def favored_words(words: Mapping[str, Sequence[str]], most: int = 10) -> dict[str, list[str]]:
    """Of each group the words that are the most over-represented in it: by the count above what the group's share of
    all words would give, in units of that number's square root (Pearson's residuals)."""
    counts = {group: Counter(of_group) for group, of_group in words.items()}
    every = sum(counts.values(), Counter())
    total, found = every.total(), {}
    for group, of_group in counts.items():
        part = of_group.total() / max(total, 1)
        excess = {word: (count - part * every[word]) / (part * every[word]) ** 0.5 for word, count in of_group.items()}
        above = sorted((word for word in excess if excess[word] > 0), key=lambda word: (-excess[word], word))
        found[group] = above[:most]
    return found
