"""Which items of an evaluation set occur in a training corpus, by the methods of three papers.

    gpt2    share of an evaluation set's 8-grams that a Bloom filter of the corpus's 8-grams holds (GPT-2 §4, Table 6)
    gpt3    an item is dirty if one of its N-grams occurs in the corpus; N is the 5th percentile of the set's item
            lengths in words, between 8 and 13 (GPT-3 appendix C, where synthetic tasks have no minimum)
    gpt4    an item is dirty if one of three of its 50-character substrings, drawn at random, occurs in the corpus; only
            letters and digits count (GPT-4 appendix C)

The corpus is read as a stream, once, or twice for gpt2, whose filter is sized by the corpus's n-grams.
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
        known = ngrams.Known(np.concatenate([h for name in sets if length[name] == n for h in hashes[name]]))
        seen[n] = known, np.zeros(len(known.values), bool)
    for batch in ngrams.word_batches(corpus, max(seen) - 1):
        for n, (known, found) in seen.items():
            starts, place = known.find(ngrams.ngram_hashes(batch.units, n))
            found[place[batch.within(starts, n)]] = True
    held = {n: ngrams.Known(known.values[found]) for n, (known, found) in seen.items()}
    return {name: _overlap(sets[name], hashes[name], n, held[n].contains) for name, n in length.items()}


def by_filter(
    sets: Mapping[str, Sequence[str]], corpus: Callable[[], Iterable[str]], n: int = 8, p: float = 1e-8
) -> dict[str, Overlap]:
    """GPT-2's method. corpus: () -> its texts, called twice."""

    def read() -> Iterable[np.ndarray]:
        for batch in ngrams.word_batches(corpus(), n - 1):
            starts = np.arange(max(len(batch.units) - n + 1, 0))
            yield ngrams.ngram_hashes(batch.units, n)[batch.within(starts, n)]

    bloom = ngrams.Bloom(sum(map(len, read())), p)
    for hashes in read():
        bloom.add(hashes)
    return {name: _overlap(items, _item_ngrams(items, n), n, bloom.contains) for name, items in sets.items()}


def by_probes(sets: Mapping[str, Sequence[str]], corpus: Iterable[str], seed: int = 0) -> dict[str, Overlap]:
    """GPT-4's method. An item of less than 50 characters is a probe as a whole."""
    probes = {name: [_probes(text, seed) for text in items] for name, items in sets.items()}
    open_ = {probe for items in probes.values() for of_item in items for probe in of_item if probe}
    found: set[str] = set()
    searches = [_Search(length, group) for length, group in _by_window(open_).items()]
    for batch in ngrams.character_batches(corpus, PROBE - 1):
        windows, text = ngrams.Windows(batch.units), None
        for search in searches:
            starts, place = search.known.find(windows.hashes(search.length))
            if len(starts) and text is None:
                text = batch.units.tobytes().decode("utf-32-le", "surrogatepass")
            search.confirm(text, batch, starts, place, found)
    result = {}
    for name, items in probes.items():
        evidence = [next((probe for probe in of_item if probe in found), "") for of_item in items]
        short = sum(not any(of_item) for of_item in items)
        result[name] = Overlap(PROBE, np.array([bool(e) for e in evidence], bool), evidence, short)
    return result


def _by_window(probes: Iterable[str]) -> dict[int, list[str]]:
    """Probes by the length of their beginning that is looked for: of 1 to 7 characters, 8, 16, 32 or 50, as each length
    costs a pass over the corpus."""
    found: dict[int, list[str]] = {}
    for probe in probes:
        length = next((n for n in (PROBE, 32, 16) if len(probe) >= n), min(len(probe), 8))
        found.setdefault(length, []).append(probe)
    return found


class _Search:
    """Probes whose beginnings of some length are looked for. Those that were found are looked for no more."""

    def __init__(self, length: int, probes: Sequence[str]):
        self.length, self._probes = length, {}
        for probe in probes:
            value = int(ngrams.Windows(probe[:length]).hashes(length)[0])
            self._probes.setdefault(value, set()).add(probe)
        self._index()

    def _index(self):
        self.known = ngrams.Known(np.array(list(self._probes), np.uint64))

    def confirm(self, text, batch, starts, place, found: set[str]) -> None:
        """Adds the probes that stand in a batch's text where their beginnings were found."""
        done = False
        for start, value in zip(starts.tolist(), self.known.values[place].tolist(), strict=True):
            for probe in tuple(self._probes.get(value, ())):
                if text.startswith(probe, start) and batch.within(np.array([start]), len(probe))[0]:
                    found.add(probe)
                    self._probes[value].discard(probe)
            if value in self._probes and not self._probes[value]:
                del self._probes[value]
                done = True
        if done:
            self._index()


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
