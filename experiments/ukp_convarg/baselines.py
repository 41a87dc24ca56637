"""What a reward model must be held against: the longer text wins, and bag-of-words logistic regression.

Both are fitted, where there is anything to fit, on the training debates alone.
"""

import re
from collections import Counter

import numpy as np
import scipy.optimize

from experiments.ukp_convarg.debates import Pair, arguments

_WORD = re.compile(r"[a-z']+|[0-9]+|[^\sa-z0-9]", re.IGNORECASE)


def accuracy_of(better, worse) -> np.ndarray:
    """1 where the better one's score is higher, .5 where the scores are equal, else 0."""
    return np.sign(np.asarray(better, float) - np.asarray(worse, float)) / 2 + 0.5


class TfIdf:
    """Sublinear tf x idf over words and pairs of neighboring words that are in at least `least` texts, unit length."""

    def __init__(self, texts: list[str], least: int = 2):
        counts = Counter(term for text in texts for term in set(_terms(text)))
        self._place = {term: i for i, term in enumerate(sorted(t for t, n in counts.items() if n >= least))}
        self._idf = np.array([np.log((1 + len(texts)) / (1 + counts[t])) + 1 for t in self._place])

    def __call__(self, texts: list[str]) -> np.ndarray:
        """float64 [texts, terms]."""
        features = np.zeros((len(texts), len(self._place)))
        for row, text in zip(features, texts, strict=True):
            for term, n in Counter(_terms(text)).items():
                if term in self._place:
                    row[self._place[term]] = 1 + np.log(n)
        features *= self._idf
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _terms(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


def logistic(x: np.ndarray, better: np.ndarray, worse: np.ndarray, penalty: float = 1.0) -> np.ndarray:
    """w that minimizes sum log(1 + exp(-(x[better] - x[worse]) . w)) + penalty/2 |w|^2, over pairs of rows of x.

    Logistic regression on differences of features, without an intercept; penalty 1 is scikit-learn's default (C = 1).
    """

    def loss(w):
        score = x @ w
        margin = score[better] - score[worse]
        pull = 1 / (1 + np.exp(margin))
        by_row = np.bincount(worse, pull, len(x)) - np.bincount(better, pull, len(x))
        return np.logaddexp(0, -margin).sum() + penalty / 2 * w @ w, x.T @ by_row + penalty * w

    return scipy.optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x


def tfidf_right(train: list[Pair], held_out: list[Pair], lengths: dict[str, int]) -> dict[str, np.ndarray]:
    """Per held-out pair, whether logistic regression orders it right: 'tfidf' on unit-length vectors, which say little
    of length, 'tfidf_and_length' with the logarithm of the number of tokens besides."""
    seen, new = arguments(train), arguments(held_out)
    vectorize = TfIdf(seen)
    log_length = lambda texts: np.log([[lengths[text]] for text in texts])
    bags = {"tfidf": vectorize, "tfidf_and_length": lambda texts: np.hstack([vectorize(texts), log_length(texts)])}
    right = {}
    for name, features in bags.items():
        w = logistic(features(seen), *_rows(seen, train))
        better, worse = _rows(new, held_out)
        score = features(new) @ w
        right[name] = accuracy_of(score[better], score[worse])
    return right


def _rows(texts: list[str], pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Where in the texts the better and the worse ones of the pairs are."""
    place = {text: i for i, text in enumerate(texts)}
    return np.array([place[p.better] for p in pairs]), np.array([place[p.worse] for p in pairs])


def longer_right(pairs: list[Pair], lengths: dict[str, int]) -> np.ndarray:
    """Per pair, whether the better one is the longer. lengths: of each text, in tokens or characters."""
    return accuracy_of([lengths[p.better] for p in pairs], [lengths[p.worse] for p in pairs])
