"""What a reward model must be held against: the longer text wins, and bag-of-words logistic regression.

Both are fitted, where there is anything to fit, on the training debates alone.
"""

import re
from collections import Counter

import numpy as np

from experiments.ukp_convarg.debates import Pair

_WORD = re.compile(r"[a-z']+|[0-9]+|[^\sa-z0-9]", re.IGNORECASE)


def accuracy_of(better, worse) -> np.ndarray:
    """1 where the better one's score is higher, .5 where the scores are equal, else 0."""
    return np.sign(np.asarray(better, float) - np.asarray(worse, float)) / 2 + 0.5


class TfIdf:
    """Sublinear tf x idf over words and pairs of neighbouring words that are in at least `least` texts, unit length."""

    def __init__(self, texts: list[str], least: int = 2):
        counts = Counter(term for text in texts for term in set(_terms(text)))
        self._place = {term: i for i, term in enumerate(sorted(t for t, n in counts.items() if n >= least))}
        self._idf = np.array([np.log((1 + len(texts)) / (1 + counts[t])) + 1 for t in self._place], np.float32)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """float32 [texts, terms]."""
        features = np.zeros((len(texts), len(self._place)), np.float32)
        for row, text in zip(features, texts, strict=True):
            for term, n in Counter(_terms(text)).items():
                if term in self._place:
                    row[self._place[term]] = 1 + np.log(n)
        features *= self._idf
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _terms(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


def logistic(differences: np.ndarray, penalty: float = 1.0, iterations: int = 300) -> np.ndarray:
    """w that minimises sum log(1 + exp(-d . w)) + penalty/2 |w|^2: Bradley-Terry with scores w . x.

    penalty 1 is scikit-learn's default (C = 1). Nesterov's method, with restarts and the step 1/L.
    """
    w = momentum = np.zeros(differences.shape[1], np.float32)
    step, t = 1 / (_largest_eigenvalue(differences) / 4 + penalty), 1.0
    for _ in range(iterations):
        pull = differences.T @ (1 / (1 + np.exp(differences @ momentum)))
        gradient = penalty * momentum - pull
        new, next_t = momentum - step * gradient, (1 + np.sqrt(1 + 4 * t * t)) / 2
        if gradient @ (new - w) > 0:
            next_t = 1.0
        momentum = new + (t - 1) / next_t * (new - w)
        w, t = new, next_t
    return w


def _largest_eigenvalue(a: np.ndarray, iterations: int = 30) -> float:
    """Of a^T a, by power iteration, a twentieth above what it finds."""
    v = np.ones(a.shape[1], np.float32)
    for _ in range(iterations):
        v = a.T @ (a @ v)
        norm = float(np.linalg.norm(v))
        v /= norm
    return 1.05 * norm


def tfidf_right(train: list[Pair], held_out: list[Pair], lengths: dict[str, int]) -> dict[str, np.ndarray]:
    """Per held-out pair, whether logistic regression orders it right: 'tfidf' on unit-length vectors, which say little
    of length, 'tfidf_and_length' with the logarithm of the number of tokens besides."""
    seen = sorted({text for p in train for text in (p.better, p.worse)})
    new = sorted({text for p in held_out for text in (p.better, p.worse)})
    vectorise = TfIdf(seen)
    log_length = lambda texts: np.log([[lengths[text]] for text in texts]).astype(np.float32)
    bags = {"tfidf": vectorise, "tfidf_and_length": lambda texts: np.hstack([vectorise(texts), log_length(texts)])}
    right = {}
    for name, features in bags.items():
        w = logistic(_difference(seen, features(seen), train))
        right[name] = accuracy_of(_difference(new, features(new) @ w, held_out), 0.0)
    return right


def _difference(texts, features, pairs: list[Pair]):
    """What the better text of each pair has less what the worse one has: [pairs, ...]."""
    row = {text: i for i, text in enumerate(texts)}
    return features[[row[p.better] for p in pairs]] - features[[row[p.worse] for p in pairs]]


def longer_right(pairs: list[Pair], lengths: dict[str, int]) -> np.ndarray:
    """Per pair, whether the better one has more tokens."""
    return accuracy_of([lengths[p.better] for p in pairs], [lengths[p.worse] for p in pairs])
