"""Metrics of labeled predictions against closed forms and scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gptjax.data.labeled import Example
from gptjax.evals import classification as metrics

BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=30)


@given(BINARY)
def test_f1_and_matthews_by_their_definitions(pairs):
    predicted, gold = np.array(pairs).T
    tp, fp = ((predicted == 1) & (gold == 1)).sum(), ((predicted == 1) & (gold == 0)).sum()
    fn, tn = ((predicted == 0) & (gold == 1)).sum(), ((predicted == 0) & (gold == 0)).sum()
    assert metrics.accuracy(predicted, gold) == (tp + tn) / len(pairs)
    assert metrics.f1(predicted, gold) == pytest.approx(2 * tp / max(2 * tp + fp + fn, 1))
    spread = float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    expected = (tp * tn - fp * fn) / np.sqrt(spread) if spread else 0.0
    assert metrics.matthews(predicted, gold) == pytest.approx(expected)


def test_matthews_of_three_classes():
    """Gorodkin's R_K of the confusion matrix [[2, 1, 0], [0, 2, 1], [1, 0, 2]]: (n trace - sum p g) / ... = 1/2."""
    gold, predicted = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 1, 1, 2, 2, 2, 0])
    assert metrics.matthews(predicted, gold) == pytest.approx((9 * 6 - 27) / (81 - 27))


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-3, 3, width=32)), min_size=3, max_size=20))
def test_correlations_are_scipys(pairs):
    x, y = np.array(pairs, float).T
    if np.ptp(x) == 0 or np.ptp(y) < 1e-3:
        assert metrics.spearman(np.ones(4), np.arange(4.0)) == 0
        return
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def example(target, value):
    return Example([[1]], np.array(target, np.float32), value, False)


def test_figures_of_classes():
    logits = np.log(np.array([[0.75, 0.25], [0.5, 0.5], [0.2, 0.8]]))
    rows = [example([1, 0], 0), example([0, 1], 1), example([0, 1], 1)]
    found = metrics.figures(logits, rows, None)
    assert found["loss"] == pytest.approx(-np.log([0.75, 0.5, 0.8]).mean())
    assert found["accuracy"] == pytest.approx(2 / 3)  # of equal logits the first is taken
    assert found["accuracy_stderr"] == pytest.approx(np.sqrt(2 / 9 / 2))
    assert found["f1"] == pytest.approx(2 / 3)


def test_figures_of_scores():
    """A distribution of .25 on 1 and .75 on 2 is the score 1.75."""
    logits = np.array([[-50, np.log(0.25), np.log(0.75)], [0.0, -50, -50], [-50, 0, -50]])
    np.testing.assert_allclose(metrics.expected_scores(logits, (0, 2)), [1.75, 0, 1], atol=1e-9)
    rows = [example([0, 0.25, 0.75], 1.75), example([1, 0, 0], 0.0), example([0, 1, 0], 1.0)]
    found = metrics.figures(logits, rows, (0, 2))
    assert found["pearson"] == pytest.approx(1) and found["spearman"] == pytest.approx(1)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert found["loss"] == pytest.approx(entropy / 3)  # the lowest possible cross-entropy


def test_choices_that_are_not_there_have_no_probability():
    p = metrics.probabilities(np.array([[0.0, 0.0, -np.inf]]))
    np.testing.assert_allclose(p, [[0.5, 0.5, 0]])
