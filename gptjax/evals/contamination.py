"""Which items of an evaluation set occur in a training corpus, by the methods of three papers.

    gpt2    share of an evaluation set's 8-grams that a Bloom filter of the corpus's 8-grams holds (GPT-2 §4, Table 6)
    gpt3    an item is dirty if one of its N-grams occurs in the corpus; N is the 5th percentile of the set's item
            lengths in words, between 8 and 13 (GPT-3 appendix C)
    gpt4    an item is dirty if one of three of its 50-character substrings, drawn at random, occurs in the corpus; only
            letters and digits count (GPT-4 appendix C)

The corpus is read as a stream, once, or twice for gpt2, whose filter is sized by the corpus's words.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from gptjax.data import ngrams

METHODS = ("gpt2", "gpt3", "gpt4")
SHORTEST, LONGEST, PROBE, PROBES = 8, 13, 50, 3


@dataclasses.dataclass
class Overlap:
    """What was found for an evaluation set.

    n: words of an n-gram, or characters of a probe. dirty: bool [items]; evidence: what of each was found, '' where
    nothing was. short: items without an n-gram, which count as clean. ngrams, found: of all items, and how many of them
    the corpus holds (gpt2 and gpt3).
    """

    n: int
    dirty: np.ndarray
    evidence: list[str]
    short: int
    ngrams: int = 0
    found: int = 0

    def figures(self) -> dict:
        """'items', 'dirty', 'dirty_percent', 'short', 'n', and where there are n-grams 'overlap_percent' of them."""
        items = len(self.dirty)
        found = {"items": items, "dirty": int(self.dirty.sum()), "dirty_percent": 100 * float(self.dirty.mean())}
        if self.ngrams:
            found["overlap_percent"] = 100 * self.found / self.ngrams
        return found | {"short": self.short, "n": self.n}


def ngram_length(items: Sequence[str]) -> int:
    """N of GPT-3: the 5th percentile of the items' lengths in words, at least 8 and at most 13."""
    lengths = [len(ngrams.words(text)) for text in items]
    return int(np.clip(np.percentile(lengths, 5), SHORTEST, LONGEST))


def by_ngrams(sets: Mapping[str, Sequence[str]], corpus: Iterable[str]) -> dict[str, Overlap]:
    """GPT-3's method, exact but for collisions of 64-bit hashes. sets: {name: texts of its items}."""
    length = {name: ngram_length(items) for name, items in sets.items()}
    hashes = {name: _item_ngrams(items, length[name]) for name, items in sets.items()}
    seen = {}
    for n in set(length.values()):
        known = np.unique(np.concatenate([h for name in sets if length[name] == n for h in hashes[name]]))
        seen[n] = (known, np.zeros(len(known), bool))
    for text in corpus:
        of_text = ngrams.word_hashes(text)
        for n, (known, found) in seen.items():
            here = np.unique(ngrams.ngram_hashes(of_text, n))
            place = np.searchsorted(known, here)
            hit = (place < len(known)) & (known[np.minimum(place, len(known) - 1)] == here) if len(known) else place < 0
            found[place[hit]] = True
    holds = {n: (lambda values, n=n: _among(values, *seen[n])) for n in seen}
    return {name: _overlap(items, hashes[name], length[name], holds[length[name]]) for name, items in sets.items()}


def by_filter(
    sets: Mapping[str, Sequence[str]], corpus: Callable[[], Iterable[str]], n: int = 8, p: float = 1e-8
) -> dict[str, Overlap]:
    """GPT-2's method. corpus: () -> its texts, called twice."""
    total = sum(max(len(ngrams.words(text)) - n + 1, 0) for text in corpus())
    bloom = ngrams.Bloom(total, p)
    for text in corpus():
        bloom.add(ngrams.ngram_hashes(ngrams.word_hashes(text), n))
    return {name: _overlap(items, _item_ngrams(items, n), n, bloom.contains) for name, items in sets.items()}


def by_probes(sets: Mapping[str, Sequence[str]], corpus: Iterable[str], seed: int = 0) -> dict[str, Overlap]:
    """GPT-4's method. An item of less than 50 characters is a probe as a whole."""
    probes = {name: [_probes(text, seed) for text in items] for name, items in sets.items()}
    every = {probe for items in probes.values() for of_item in items for probe in of_item if probe}
    by_length: dict[int, dict[int, set[str]]] = {}
    for probe in every:
        value = int(ngrams.Windows(probe).hashes(len(probe))[0])
        by_length.setdefault(len(probe), {}).setdefault(value, set()).add(probe)
    known = {length: np.array(sorted(values), np.uint64) for length, values in by_length.items()}
    found: set[str] = set()
    for text in corpus:
        text = ngrams.characters(text)
        windows = ngrams.Windows(text)
        for length, values in known.items():
            here = windows.hashes(length)
            for start in np.flatnonzero(np.isin(here, values)):
                probe = text[start : start + length]
                if probe in by_length[length][int(here[start])]:
                    found.add(probe)
    result = {}
    for name, items in probes.items():
        evidence = [next((probe for probe in of_item if probe in found), "") for of_item in items]
        short = sum(not any(of_item) for of_item in items)
        result[name] = Overlap(PROBE, np.array([bool(e) for e in evidence], bool), evidence, short)
    return result


def _probes(text: str, seed: int) -> list[str]:
    """Three substrings of an item; which ones depends on the seed and its text alone."""
    text = ngrams.characters(text)
    if len(text) <= PROBE:
        return [text]
    digest = hashlib.sha256(f"{seed}:{text}".encode(errors="surrogatepass")).digest()
    starts = np.random.default_rng(np.frombuffer(digest, np.uint32)).integers(0, len(text) - PROBE + 1, PROBES)
    return [text[start : start + PROBE] for start in starts]


def _item_ngrams(items: Sequence[str], n: int) -> list[np.ndarray]:
    return [ngrams.ngram_hashes(ngrams.word_hashes(text), n) for text in items]


def _among(values, known, found) -> np.ndarray:
    """bool: the values that are in `known` and marked."""
    if not len(known):
        return np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return (known[place] == values) & found[place]


def _overlap(items, hashes, n: int, holds) -> Overlap:
    dirty, evidence, total, found = np.zeros(len(items), bool), [], 0, 0
    for i, of_item in enumerate(hashes):
        hit = holds(of_item)
        total, found = total + len(hit), found + int(hit.sum())
        dirty[i] = bool(hit.any())
        start = int(hit.argmax()) if dirty[i] else 0
        evidence.append(" ".join(ngrams.words(items[i])[start : start + n]) if dirty[i] else "")
    return Overlap(n, dirty, evidence, sum(not len(h) for h in hashes), total, found)


# --- scores on both subsets -------------------------------------------------------------------------------


def split_scores(scores: np.ndarray, dirty: np.ndarray) -> dict:
    """Mean score and its standard error over all, the clean and the dirty items, and 'clean_minus_all' (the figure of
    GPT-3's Figure 4.2, there in percent of the score). None for a subset without items."""
    found = {}
    for name, chosen in (("all", np.ones(len(scores), bool)), ("clean", ~dirty), ("dirty", dirty)):
        part = scores[chosen]
        spread = float(part.std(ddof=1) / np.sqrt(len(part))) if len(part) > 1 else None
        found[name] = {"score": float(part.mean()), "stderr": spread, "items": len(part)} if len(part) else None
    gap = found["clean"]["score"] - found["all"]["score"] if found["clean"] and found["all"] else None
    return found | {"clean_minus_all": gap}
