"""The best of k samples and the chance of any hit, against all choices of k."""

import itertools
import math

import numpy as np
import pytest

from gptjax.errors import InputError
from gptjax.evals.best_of_k import expected_maximum, probability_of_any, weights_of_best


@pytest.mark.parametrize("n", [1, 4, 6])
def test_both_are_the_mean_over_all_choices(n):
    values = np.random.default_rng(n).normal(size=n).round(1)  # with ties
    for k in range(1, n + 1):
        choices = list(itertools.combinations(range(n), k))
        assert expected_maximum(values, k) == pytest.approx(np.mean([max(values[list(c)]) for c in choices]), abs=1e-12)
        for hits in range(n + 1):
            share = np.mean([any(i < hits for i in c) for c in choices])
            assert probability_of_any(n, hits, k) == pytest.approx(share, abs=1e-12)
            of_hits = [1.0] * hits + [0.0] * (n - hits)  # any hit: the largest of zeros and ones is 1
            assert expected_maximum(of_hits, k) == pytest.approx(share, abs=1e-12)


def test_the_weights_are_binomial_coefficients():
    found = weights_of_best(30, 25)
    exact = [math.comb(j - 1, 24) / math.comb(30, 25) if j >= 25 else 0.0 for j in range(1, 31)]
    np.testing.assert_allclose(found, exact, rtol=1e-12)
    assert weights_of_best(3000, 25).sum() == pytest.approx(1, rel=1e-12)


def test_many_samples_neither_overflow_nor_cancel():
    assert probability_of_any(200, 3, 1) == pytest.approx(3 / 200, rel=1e-12)
    exact = 1 - math.comb(10**5 - 7, 1000) / math.comb(10**5, 1000)  # of Python's whole numbers
    assert probability_of_any(10**5, 7, 1000) == pytest.approx(exact, rel=1e-9)
    uniform = (np.arange(10**4) + 1) / (10**4 + 1)  # E[max of k] of order statistics: (k / (k + 1)) exactly
    assert expected_maximum(uniform, 25) == pytest.approx(25 / 26, rel=1e-12)


@pytest.mark.parametrize("bad", [(5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0)])
def test_impossible_counts_are_refused(bad):
    with pytest.raises(InputError, match="take at least k samples"):
        probability_of_any(*bad)


@pytest.mark.parametrize("k", [0, 4])
def test_too_few_samples_are_refused(k):
    with pytest.raises(InputError, match=f"The best of {k} samples cannot be estimated from 3"):
        expected_maximum([1.0, 2.0, 3.0], k)
