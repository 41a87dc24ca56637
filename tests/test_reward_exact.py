"""The reward model on the task whose ceiling is known, and the task itself against draws and hand-made figures."""

import itertools

import numpy as np
import pytest

from experiments.reward_exact import task
from experiments.reward_exact.task import Task, TaskConfig

pytestmark = pytest.mark.optimized

SEED = 0


@pytest.fixture(scope="module")
def trained():
    """Figures of one seed: {'all' pairs of each ranking, 'one'}."""
    runs = {pairs: Task(SEED, TaskConfig(pairs=pairs)) for pairs in ("all", "one")}
    return {pairs: run.figures(run.train()) for pairs, run in runs.items()}


@pytest.mark.slow
def test_one_epoch_of_rankings_comes_within_two_hundredths_of_the_ceiling(trained):
    f = trained["all"]
    assert f["bayes_accuracy"] == pytest.approx(task.BAYES, abs=1e-4)
    assert f["bayes_accuracy"] - 0.02 <= f["accuracy"] <= f["bayes_accuracy"]
    assert f["floor"] <= f["cross_entropy"] <= f["floor"] + 0.02
    assert 0.8 <= f["slope"] <= 1.2
    assert task.outside_the_bar(f) == []


@pytest.mark.slow
def test_one_pair_of_a_ranking_teaches_less_than_all(trained):
    one, every = trained["one"], trained["all"]
    assert one["accuracy"] < every["accuracy"] - 0.005
    assert one["cross_entropy"] > every["cross_entropy"] + 0.005
    assert one["correlation"] < every["correlation"]


# --- the task ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return Task(3, TaskConfig(prompts=40, batch=4))


def test_rankings_are_plackett_luces():
    """Of three completions, each of the six orders as often as its product of softmaxes says."""
    utility = np.array([[0.0, 0.7, -0.5]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "completions", lambda: [(0,), (1,), (2,)])
        patch.setattr(task, "PROMPTS", 1)
        patch.setattr(task, "FEWEST", 3)
        patch.setattr(task, "MOST", 3)
        rows = task.ranked(np.random.default_rng(0), utility, [(1, 1, 1)], 20_000)
    seen = [tuple(y[0] for _, y in sorted(zip(row.ranks, row.completions, strict=True))) for row in rows]
    weight = np.exp(utility[0])
    for order in itertools.permutations(range(3)):
        a, b, c = weight[list(order)]
        expected = a / (a + b + c) * b / (b + c)
        assert np.mean([s == order for s in seen]) == pytest.approx(expected, abs=0.012)


def test_rankings_have_four_to_nine_different_completions(small):
    rows = task.ranked(np.random.default_rng(1), small.table, small.prompts, 300)
    assert {len(row.completions) for row in rows} == set(range(4, 10))
    assert all(len(set(map(tuple, row.completions))) == len(row.completions) for row in rows)
    assert all(sorted(row.ranks) == list(range(len(row.completions))) for row in rows)
    assert {tuple(row.prompt[:-1]) for row in rows} == set(small.prompts)
    one = task.one_pair(rows[0])
    assert one.completions == rows[0].completions[:2] and len(one.ranks) == 2


def test_the_utility_is_no_sum_over_tokens(small):
    """Exchanging a pair of neighbors would cancel in one: r(aab) - r(abb) - (r(aac) - r(abc)) has only their terms."""
    at = {y: i for i, y in enumerate(task.completions())}
    r = small.table
    rest = r[:, at[0, 0, 1]] - r[:, at[0, 1, 1]] - r[:, at[0, 0, 2]] + r[:, at[0, 1, 2]]
    assert np.abs(rest).min() > 0.01
    np.testing.assert_allclose(rest, rest[0])  # while the prompts differ
    assert np.corrcoef(r)[0, 1] < 0.99


def test_figures_of_the_truth_and_of_the_ignorant(small):
    truth = task.figures(small.table, small.table)
    assert truth["accuracy"] == pytest.approx(truth["bayes_accuracy"])
    assert truth["cross_entropy"] == pytest.approx(truth["floor"])
    assert truth["slope"] == pytest.approx(1) and truth["correlation"] == pytest.approx(1)
    doubled = task.figures(2 * small.table + 5, small.table)  # no order changes, only what the margins promise
    assert doubled["accuracy"] == pytest.approx(truth["accuracy"]) and doubled["slope"] == pytest.approx(2)
    assert doubled["cross_entropy"] > truth["floor"]
    reversed_ = task.figures(-small.table, small.table)
    assert reversed_["accuracy"] == pytest.approx(1 - truth["bayes_accuracy"])
    assert set(task.outside_the_bar(reversed_)) == {"accuracy", "cross_entropy", "slope"}


def test_figures_of_three_completions_by_hand():
    table, scores = np.array([[0.0, 1.0, 3.0]]), np.array([[0.0, 2.0, 1.0]])
    s = 1 / (1 + np.exp(-np.array([1.0, 3.0, 2.0])))  # better than: 1 > 0, 2 > 0, 2 > 1
    p = 1 / (1 + np.exp(-np.array([2.0, 1.0, -1.0])))
    f = task.figures(scores, table)
    assert f["accuracy"] == pytest.approx((s[0] + s[1] + 1 - s[2]) / 3)
    assert f["bayes_accuracy"] == pytest.approx(s.mean())
    assert f["cross_entropy"] == pytest.approx(-(s * np.log(p) + (1 - s) * np.log(1 - p)).mean())
    assert f["slope"] == pytest.approx((1 * 2 + 3 * 1 + 2 * -1) / (1 + 9 + 4))
