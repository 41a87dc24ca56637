"""Fairness metrics by hand, and intervals by their closed forms and their exact coverage."""

import math

import numpy as np
import pytest

from gptjax.errors import InputError
from gptjax.evals import fairness
from gptjax.evals.calibration import wilson
from gptjax.tasks import figures


def test_gaps_by_hand():
    """Of a 3 of 4 are predicted 1, of b 1 of 4. Gold 1: a 2 of 2, b 1 of 2. Gold 0: a 1 of 2, b 0 of 2."""
    groups = list("aaaabbbb")
    predicted, gold = [1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]
    assert fairness.demographic_parity_gap(predicted, groups) == 0.5
    assert fairness.equalized_odds_gap(predicted, gold, groups) == 0.5
    assert fairness.equalized_odds_gap(gold, gold, groups) == 0.0  # a perfect predictor
    three = fairness.demographic_parity_gap([1, 0, 1, 1, 0, 0], list("aabbcc"))
    assert three == 1.0


def test_a_perfect_predictor_of_unequal_groups_has_equal_odds_and_no_parity():
    gold, groups = [1, 1, 1, 0, 1, 0, 0, 0], list("aaaabbbb")
    assert fairness.equalized_odds_gap(gold, gold, groups) == 0
    assert fairness.demographic_parity_gap(gold, groups) == 0.5


def test_a_class_that_one_group_lacks_is_left_out_of_equalized_odds():
    """Gold 0 occurs in a only: the gap is that of gold 1, 1 - 1/2."""
    assert fairness.equalized_odds_gap([1, 0, 1, 0], [1, 0, 1, 1], list("aabb")) == 0.5
    with pytest.raises(InputError, match="no class has items of two"):
        fairness.equalized_odds_gap([1, 0], [1, 0], list("ab"))
    with pytest.raises(InputError, match="there are 1"):
        fairness.demographic_parity_gap([1, 0], list("aa"))


def test_calibration_within_groups():
    """.75 is right 3 of 4 times in a, 1 of 4 times in b, which is off by a half."""
    found = fairness.calibration_within_groups([0.75] * 8, [1, 1, 1, 0, 1, 0, 0, 0], list("aaaabbbb"))
    assert found == {"a": 0.0, "b": 0.5}


# --- intervals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, p", [(40, 0.5), (40, 0.1), (200, 0.02), (200, 0.5)])
def test_a_share_has_wilsons_interval_which_covers(n, p):
    """Its exact coverage, by the binomial distribution; the bounds solve |p - share| = z sqrt(p (1 - p) / n)."""
    covered = 0.0
    for k in range(n + 1):
        found = figures.share([1.0] * k + [0.0] * (n - k))
        assert (found.low, found.high) == pytest.approx(wilson(k, n), abs=1e-12)
        covered += math.comb(n, k) * p**k * (1 - p) ** (n - k) * (found.low <= p <= found.high)
        if 0 < k < n:
            for bound in (found.low, found.high):
                assert abs(bound - k / n) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-5)
    assert 0.92 < covered < 0.98


def test_crows_pairs_interval_at_50_percent():
    """1,508 pairs: ± 2.5 points."""
    found = figures.share([1.0, 0.0] * 754).scaled(100)
    assert (found.value, found.n) == (50, 1508) and found.high - 50 == pytest.approx(2.52, abs=0.01)


def test_repeated_items_count_once():
    """Each of 40 items 25 times, as a cluster: the interval is about that of the 40."""
    values = np.repeat([1.0, 0.0, 1.0, 1.0], 10)
    many = figures.share(np.repeat(values, 25), np.repeat(np.arange(40), 25))
    effective = 1000 * 39 / 999  # n over the design effect 25 G (n - 1) / (n (G - 1))
    assert (many.low, many.high) == pytest.approx(wilson(0.75 * effective, effective), abs=1e-12)
    one = figures.share(values)
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.03) and many.n == 1000
    alternating = figures.share([1.0, 0.0] * 20, np.repeat(np.arange(20), 2))  # no variance between clusters
    assert alternating.high == figures.share([1.0, 0.0] * 20).high
    same = figures.share([1.0] * 20, np.repeat(np.arange(5), 4))
    assert (same.low, same.high) == wilson(5, 5)


@pytest.mark.parametrize("both, one, other", [(0.5, 0.2, 0.1), (0.3, 0.3, 0.3)])
def test_a_paired_difference_covers(both, one, other):
    """Exact coverage over all tables of 24 pairs."""
    n, p, covered = 24, (both, one, other, 1 - both - one - other), 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            for c in range(n + 1 - a - b):
                d = n - a - b - c
                ways = math.factorial(n) // math.prod(map(math.factorial, (a, b, c, d)))
                chance = ways * math.prod(q**k for q, k in zip(p, (a, b, c, d), strict=True))
                if chance < 1e-7:
                    continue
                found = figures.paired_difference([1] * (a + b) + [0] * (c + d), [1] * a + [0] * b + [1] * c + [0] * d)
                assert -1 <= found.low <= found.value <= found.high <= 1
                covered += chance * (found.low <= one - other <= found.high)
    assert 0.93 < covered < 0.99


def test_a_paired_difference_without_correlation_is_newcombes_of_two_samples():
    """Every combination once: phi is 0, and the limits are the square roots of sums of squares."""
    found = figures.paired_difference([1, 1, 0, 0] * 5, [1, 0, 1, 0] * 5)
    low, high = wilson(10, 20)
    half = math.hypot(0.5 - low, high - 0.5)
    assert (found.low, found.high) == pytest.approx((-half, half))
    alike = figures.paired_difference([1, 1, 0, 0] * 5, [1, 1, 0, 0] * 5)
    assert alike.value == 0 and alike.high - alike.low < 0.5 * (found.high - found.low)  # pairs that agree tell more


def test_a_correlation_has_fishers_interval():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 4000))
    found = figures.correlation(x, 0.6 * x + 0.8 * noise)
    assert found.low < 0.6 < found.high and found.high - found.low == pytest.approx(2 * 1.96 * 0.64 / 63.2, rel=0.05)
    assert figures.correlation([1, 2, 3, 4], [2, 4, 6, 8])[:4] == (1.0, 0.0, 1.0, 1.0)
    assert figures.correlation([1, 2, 3], [1, 2, 4]) is None and figures.correlation([1] * 9, range(9)) is None


def test_a_bootstrap_draws_whole_clusters():
    values = np.repeat([0.0, 1.0] * 20, 5)
    of = lambda i: float(values[i].mean())
    apart = figures.bootstrapped(of, range(200)).stderr
    together = figures.bootstrapped(of, np.repeat(np.arange(40), 5).tolist()).stderr
    assert together / apart == pytest.approx(math.sqrt(5), rel=0.2)
