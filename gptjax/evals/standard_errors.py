"""Standard errors of evaluation figures: of means, shares, ratios (perplexity), clusters of items, and whole corpora.

The items are taken as a sample of those that the task could have had (Miller 2024, "Adding error bars to evals"). A
standard error of fewer than two items, or clusters, is NaN, which JSON files hold as null.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np


def mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error s / sqrt(n), s with n - 1 degrees of freedom)."""
    return clustered_mean(values, range(len(values)))


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """(mean over items, its standard error where items of a cluster depend on each other, as questions on one passage).

    sqrt(G / (G - 1) sum_g (sum of the residuals of cluster g)^2) / n, of G clusters: Miller 2024, equation 4, with the
    factor that makes it that of `mean` where every item is a cluster of its own.
    """
    values = np.asarray(values, np.float64)
    numbers = {}
    of = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], int)
    return float(values.mean()), _sum_error(values - values.mean(), of) / len(values)


def ratio(numerators: Sequence[float], denominators: Sequence[float], clusters=None) -> tuple[float, float]:
    """(sum of the numerators / sum of the denominators, its standard error by the delta method), items in pairs.
    clusters: their numbers, from 0, as in `clustered_mean`; None = every item is one.

    The variance of a ratio r = X / N is that of sum(x_i - r n_i) / N to first order (Cochran, Sampling Techniques, 3rd
    ed. 1977, equation 2.46).
    """
    x, n = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    found = x.sum() / n.sum()
    of = np.arange(len(x)) if clusters is None else clusters
    return float(found), _sum_error(x - found * n, of) / float(n.sum())


def perplexity(nats: Sequence[float], units: Sequence[float], clusters=None) -> tuple[float, float]:
    """(exp(sum of nats / sum of units), its standard error), of documents: -log p of each, and its words, tokens or
    whatever the perplexity is per. Delta method: that of the ratio, times exp."""
    found, stderr = ratio(nats, units, clusters)
    value = math.exp(found) if found < 709 else math.inf  # e^710 is more than a float holds
    return value, value * stderr


def bits_per_unit(nats: Sequence[float], units: Sequence[float], clusters=None) -> tuple[float, float]:
    """(bits per byte or character, its standard error), as `perplexity`."""
    return tuple(figure / math.log(2) for figure in ratio(nats, units, clusters))


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, *, seed: int = 0, resamples: int = 1000) -> float:
    """Standard error of a statistic of a whole corpus: its standard deviation over corpora of n items drawn from these
    with replacement (Efron 1979; Koehn 2004 for BLEU). statistic: of the indices of items. The same seed, the same
    value."""
    if n < 2:
        return math.nan
    rng = np.random.default_rng(seed)
    return float(np.std([statistic(rng.integers(0, n, n)) for _ in range(resamples)], ddof=1))


def clustered_bootstrap(statistic: Callable[[np.ndarray], float], clusters: np.ndarray, **options) -> float:
    """`bootstrap` over clusters, whose items are drawn together. clusters: int [items], their numbers, from 0."""
    members = np.split(np.argsort(clusters, kind="stable"), np.cumsum(np.bincount(clusters))[:-1])
    if len(members) == len(clusters):
        return bootstrap(statistic, len(clusters), **options)
    return bootstrap(lambda drawn: statistic(np.concatenate([members[i] for i in drawn])), len(members), **options)


def _sum_error(residuals: np.ndarray, clusters: np.ndarray) -> float:
    """Standard error of a sum of terms with mean 0, independent between clusters, which are numbered from 0."""
    sums = np.bincount(clusters, residuals) if len(clusters) else np.zeros(0)
    groups = len(sums)
    return float(np.sqrt(groups / (groups - 1) * (sums**2).sum())) if groups > 1 else math.nan
