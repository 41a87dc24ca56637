"""GPT-3's quality classifier and its rule (Brown et al. 2020, appendix A).

Logistic regression on hashed words tells a good corpus from a bad one, which the user names. A document with score s is
kept if a draw of numpy's pareto(9) exceeds 1 - s, that is with probability (2 - s)^-9: nearly always at 1, and one in
512 at 0, so that some of what the classifier does not know stays. The draw is a hash of seed and id.

Where the paper is silent, ours: features are log(1 + count), of length 1; both corpora have the same weight; a long
document is learned from in parts; an L2 penalty.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptjax.curation import storage
from gptjax.curation.documents import Document, Drop
from gptjax.curation.words import words
from gptjax.data import sources
from gptjax.data.hashing import draw
from gptjax.errors import InputError

ALPHA = 9.0


def keep_probability(score, alpha: float = ALPHA):
    """P(pareto(alpha) > 1 - score) = (2 - score)^-alpha; numpy's pareto is Lomax's distribution."""
    return (2.0 - np.asarray(score, float)) ** -alpha


@dataclasses.dataclass(frozen=True)
class Quality:
    """good, bad: sources of text (data/sources.py). seed: of the draws. alpha: of the Pareto rule. least: in place of
    that rule, the least score that is kept. features: as a power of two. most: parts of a corpus that are learned from,
    drawn at random; part: words of each. l2: penalty, of a mean loss in nats."""

    good: str
    bad: str
    seed: int = 0
    alpha: float = ALPHA
    least: float | None = None
    text_field: str = "text"
    features: int = 18
    most: int = 20_000
    part: int = 500
    l2: float = 1e-5
    name = "quality"

    def prepare(self, folder: Path) -> dict:
        """Learns from nine tenths of the parts that are drawn; the figures are those of the others."""
        parts = [self._parts(source) for source in (self.good, self.bad)]
        for source, found in zip((self.good, self.bad), parts, strict=True):
            if len(found) < 20:
                raise InputError(
                    f"{source} has {len(found)} parts of {self.part} words, too few to learn from: give more text."
                )
        weights, bias = fit(*(found[len(found) // 10 :] for found in parts), 1 << self.features, self.l2)
        storage.write_arrays(folder / "weights.npz", weights=weights, bias=bias)
        good, bad = (np.array([score(weights, bias, x) for x in found[: len(found) // 10]]) for found in parts)
        means = {"good_mean": float(good.mean()), "bad_mean": float(bad.mean())}
        return {"auc": auc(good, bad), **means, "held_out": [len(good), len(bad)]}

    def _parts(self, source: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Features of the parts with the lowest draws, in the order of the draws."""
        heap: list = []
        for name, x in self._features(source):
            key = -draw(self.seed, name)
            if len(heap) < self.most:
                heapq.heappush(heap, (key, name, x))
            elif key > heap[0][0]:
                heapq.heapreplace(heap, (key, name, x))
        return [x for _, _, x in sorted(heap, key=lambda item: (-item[0], item[1]))]

    def _features(self, source: str) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
        for document in sources.documents(source, text_field=self.text_field):
            hashes = words(document.text).hashes
            for begin in range(0, max(len(hashes) - self.part // 2, 1), self.part):
                yield f"{document.name}@{begin}", features(hashes[begin : begin + self.part], self.features)

    def opened(self, folder: Path):
        with np.load(folder / "weights.npz") as file:
            weights, bias = file["weights"], float(file["bias"])

        def step(document: Document) -> Document | Drop:
            s = score(weights, bias, features(words(document.text).hashes, self.features))
            document.scores["quality"] = round(s, 6)
            return document if self.keeps(s, document.id) else Drop("quality", s)

        return step

    def keeps(self, s: float, id: str) -> bool:
        if self.least is not None:
            return s >= self.least
        u = (draw(self.seed, f"pareto:{id}") + 0.5) / 2**64
        return u ** (-1 / self.alpha) - 1 > 1 - s  # the inverse of Lomax's survival function


def features(hashes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns int64, distinct; values float32, of length 1) of word hashes."""
    columns, counts = np.unique(hashes >> np.uint64(64 - bits), return_counts=True)
    values = np.log1p(counts)
    return columns.astype(np.int64), (values / max(np.linalg.norm(values), 1e-12)).astype(np.float32)


def score(weights: np.ndarray, bias: float, x: tuple[np.ndarray, np.ndarray]) -> float:
    """Probability of the good corpus."""
    return float(1 / (1 + np.exp(-np.clip(weights[x[0]] @ x[1] + bias, -60, 60))))


def fit(good, bad, count: int, l2: float) -> tuple[np.ndarray, float]:
    """(weights float32 [count], bias) at the minimum of the mean log loss, half of it each corpus's, + l2/2 |w|^2."""
    from scipy import optimize, sparse

    rows = [*good, *bad]
    begins = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    x = sparse.csr_matrix((np.concatenate([v for _, v in rows]), np.concatenate([c for c, _ in rows]), begins),
                          (len(rows), count), dtype=np.float64)  # fmt: skip
    signs = np.concatenate([np.ones(len(good)), -np.ones(len(bad))])
    share = np.concatenate([np.full(len(good), 0.5 / len(good)), np.full(len(bad), 0.5 / len(bad))])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = parameters[:-1], parameters[-1]
        margins = signs * (x @ w + b)
        slope = -share * signs / (1 + np.exp(np.clip(margins, -60, 60)))
        gradient = np.append(x.T @ slope + l2 * w, slope.sum())
        return float(share @ np.logaddexp(0, -margins) + l2 / 2 * w @ w), gradient

    found = optimize.minimize(loss, np.zeros(count + 1), jac=True, method="L-BFGS-B", options={"maxiter": 300})
    return found.x[:-1].astype(np.float32), float(found.x[-1])


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve: probability that a positive's score is higher, half of it where they are equal."""
    negative = np.sort(negative)
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.mean() / (2 * len(negative)))
