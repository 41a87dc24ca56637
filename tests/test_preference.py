"""The ranking loss against pairs counted by hand, best-of-k, DPO, best-of-n, and agreement with planted rankings."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import approx, assert_close, tolerance

from gptjax.errors import InputError
from gptjax.evals import preference
from gptjax.objectives.preference import best_of_k_loss, dpo_loss, pairs, ranking_loss, ranking_statistics
from gptjax.rlhf.best_of_n import best_of_n, expected_best

K = 9
TERMS = 2 * K * K  # pairs, and what is done to each
every_seed = settings(max_examples=40, deadline=None, derandomize=True)
loss_and_gradient = jax.jit(jax.value_and_grad(ranking_loss, has_aux=True))
best_and_gradient = jax.jit(jax.value_and_grad(best_of_k_loss, has_aux=True))
LN2 = math.log(2)


def rankings(seed, prompts=6):
    """(scores, ranks, valid) [prompts, 9] with ties, 2 to 9 completions and, in the last row, a single one."""
    rng = np.random.default_rng(seed)
    n = np.append(rng.integers(2, K + 1, prompts - 1), 1)
    valid = (np.arange(K)[None] < n[:, None]).astype(np.float32)
    return 2 * rng.standard_normal((prompts, K)).astype(np.float32), rng.integers(0, 6, (prompts, K)), valid


def by_hand(scores, ranks, valid):
    """(sum over prompts of the mean over their pairs, prompts with a pair), a double loop in float64."""
    total, prompts = 0.0, 0
    for r, rank, ok in zip(scores.astype(np.float64), ranks, valid, strict=True):
        losses = [
            math.log1p(math.exp(-(r[i] - r[j])))
            for i in range(len(r)) for j in range(len(r))
            if ok[i] and ok[j] and rank[i] < rank[j]
        ]  # fmt: skip
        total, prompts = total + (sum(losses) / len(losses) if losses else 0), prompts + bool(losses)
    return total, prompts


def row(*x):
    return jnp.array([x], jnp.float32)


def to_nine(*arrays):
    return (np.pad(np.float32(x), ((0, 0), (0, K - np.shape(x)[1]))) for x in arrays)


def loss(scores, ranks, valid):
    return loss_and_gradient(*to_nine(scores, ranks, valid))[0]


def best_of_k(scores, ranks, valid):
    return best_and_gradient(*to_nine(scores, ranks, valid))[0]


# --- the ranking loss -------------------------------------------------------------------------------------


def test_golden():
    total, count = loss(row(2, 1, 0), row(0, 1, 2), jnp.ones((1, 3)))
    assert float(total / count) == approx(0.2511504620, terms=6)


@pytest.mark.parametrize("k", [2, 9])
def test_equal_scores_cost_ln_2(k):
    total, count = loss(jnp.full((1, k), 5.0), jnp.arange(k)[None], jnp.ones((1, k)))
    assert float(total / count) == approx(LN2, terms=TERMS)


@every_seed
@given(st.integers(0, 2**31))
def test_it_is_the_double_loop(seed):
    arguments = rankings(seed)
    (total, count), _ = loss_and_gradient(*arguments)
    expected, prompts = by_hand(*arguments)
    assert float(total) == approx(expected, terms=TERMS, scale=1) and float(count) == prompts


def test_the_better_one_is_pushed_up():
    _, gradient = loss_and_gradient(row(0, 0), row(1, 0), row(1, 1))
    np.testing.assert_allclose(gradient, row(0.5, -0.5))


def test_a_constant_added_to_a_prompts_scores_changes_nothing():
    scores, ranks, valid = rankings(0)
    (a, _), gradient = loss_and_gradient(scores, ranks, valid)
    (b, _), gradient_2 = loss_and_gradient(scores + np.float32(4) * np.arange(-3, 3)[:, None], ranks, valid)
    # the scores were rounded at a magnitude of up to 12 and more
    assert_close((float(a), gradient), (float(b), gradient_2), terms=TERMS, stored=20.0)
    np.testing.assert_allclose(gradient.sum(1), 0, atol=tolerance(TERMS))


def test_the_order_of_the_completions_changes_nothing():
    arguments = rankings(1)
    order = np.random.default_rng(0).permutation(K)
    (a, _), gradient = loss_and_gradient(*arguments)
    (b, _), gradient_2 = loss_and_gradient(*(x[:, order] for x in arguments))
    assert_close((float(a), gradient[:, order]), (float(b), gradient_2), terms=TERMS)


def test_ties_count_for_nothing():
    """Of ranks 0 0 1 two pairs are left; of 0 0 0 none, and the prompt is not counted."""
    total, count = loss(row(3, -1, 1), row(0, 0, 1), jnp.ones((1, 3)))
    assert float(total) == approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2, terms=6)
    total, count = loss(row(3, -1, 1), row(0, 0, 0), jnp.ones((1, 3)))
    assert float(total) == 0 and float(count) == 0


@pytest.mark.parametrize("garbage", [np.nan, 1e9, -np.inf])
def test_padding_to_nine_changes_nothing(garbage):
    """Whatever its score and rank are, in value and gradient."""
    scores, ranks = row(0.3, -1, 2, 0.5), row(2, 0, 1, 1)
    (total, count), gradient = loss_and_gradient(scores, ranks, jnp.ones((1, 4)))
    pad = lambda x, value: jnp.pad(x, ((0, 0), (0, 5)), constant_values=value)
    (padded, n), wide = loss_and_gradient(pad(scores, garbage), pad(ranks, -7), pad(jnp.ones((1, 4)), 0))
    assert float(padded) == approx(float(total), terms=TERMS) and float(n) == float(count) == 1
    assert_close(wide[:, :4], gradient, terms=TERMS)
    assert (wide[:, 4:] == 0).all()


def test_a_prompt_with_one_pair_weighs_as_much_as_one_with_36():
    scores, ranks, valid = np.zeros((2, K), np.float32), np.tile(np.arange(K), (2, 1)), np.ones((2, K), np.float32)
    valid[0, 2:] = 0
    scores[:, 0] = 1.0
    _, gradient = loss_and_gradient(scores, ranks, valid)
    total, count = loss(scores, ranks, valid)
    each = [float(loss(scores[i : i + 1], ranks[i : i + 1], valid[i : i + 1])[0]) for i in (0, 1)]
    assert float(total) == approx(sum(each), terms=TERMS) and float(count) == 2
    assert each[0] == approx(math.log1p(math.exp(-1)), terms=TERMS)  # not 1/36 of it
    assert each[1] == approx((8 * math.log1p(math.exp(-1)) + 28 * LN2) / 36, terms=TERMS)
    assert np.abs(gradient[0]).sum() == approx(2 / (1 + math.e), terms=TERMS)


def test_the_gradient_of_k_forwards_is_that_of_all_pairs_forwards():
    """Through a small scalar model: K forwards of a prompt against two forwards for each of its C(K, 2) pairs."""
    _, ranks, valid = rankings(3)
    x = np.random.default_rng(0).standard_normal((*ranks.shape, 5)).astype(np.float32)
    params = {"w": np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32), "v": np.ones(4, np.float32)}
    model = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    together = jax.jit(jax.grad(lambda p: ranking_loss(model(p, x), ranks, valid)[0]))(params)

    chosen, rejected, weights = [], [], []
    for b in range(len(x)):
        found = [
            (i, j) for i, j in itertools.permutations(range(K), 2)
            if valid[b, i] and valid[b, j] and ranks[b, i] < ranks[b, j]
        ]  # fmt: skip
        for i, j in found:
            chosen.append(x[b, i])
            rejected.append(x[b, j])
            weights.append(1 / len(found))
    chosen, rejected, weights = map(np.array, (chosen, rejected, weights))
    pairwise = jax.jit(
        jax.grad(lambda p: -(weights * jax.nn.log_sigmoid(model(p, chosen) - model(p, rejected))).sum())
    )(params)
    assert_close(together, pairwise, terms=len(weights) + K + 5)


def test_pairs():
    found = np.asarray(jax.jit(pairs)(row(1, 0, 1, 2), row(1, 1, 1, 0)))[0]
    assert {(int(i), int(j)) for i, j in np.argwhere(found)} == {(1, 0), (1, 2)}


def test_ranking_statistics():
    """A right pair, a wrong one, one of equal scores; a tie in rank and what is no completion are no pairs."""
    found = jax.jit(ranking_statistics)(row(1, -1, -1, 3, 9), row(0, 1, 2, 2, 3), row(1, 1, 1, 1, 0))
    # pairs: (0,1) right by 2, (0,2) right by 2, (0,3) wrong by 2, (1,2) equal, (1,3) wrong by 4
    assert {k: float(v) for k, v in found.items()} == {"pairs": 5, "correct": 2.5, "margin": -2}


# --- best of k --------------------------------------------------------------------------------------------


def test_best_of_k_is_the_cross_entropy_of_the_best():
    scores, ranks, valid = rankings(5)
    ranks = np.argsort(np.random.default_rng(0).random(ranks.shape), 1)  # no ties
    total, count = best_of_k(scores, ranks, valid)
    expected = 0.0
    for r, rank, ok in zip(scores.astype(np.float64), ranks, valid > 0, strict=True):
        best = min(np.flatnonzero(ok), key=lambda i: rank[i])
        expected += np.log(np.exp(r[ok]).sum()) - r[best]
    assert float(total) == approx(expected, terms=TERMS) and float(count) == len(scores)


def test_best_of_two_is_the_ranking_loss():
    scores, ranks = row(0.3, -1.1), row(1, 0)
    a, b = (f(scores, ranks, jnp.ones((1, 2)))[0] for f in (best_of_k, loss))
    assert float(a) == approx(float(b), terms=TERMS)


def test_ties_for_the_best_share_the_target():
    total, _ = best_of_k(row(0, 1, 2), row(0, 0, 1), jnp.ones((1, 3)))
    normalizer = math.log(1 + math.e + math.e**2)
    assert float(total) == approx(normalizer - 0.5, terms=6)


@pytest.mark.parametrize("garbage", [np.nan, 1e9, -np.inf])
def test_best_of_k_does_not_see_what_is_no_completion(garbage):
    """Nor a prompt without any; in value and gradient."""
    valid = jnp.array([[1.0, 1, 0], [0, 0, 0]])
    ranks = jnp.array([[1, 0, -1], [0, 1, 2]])
    results = [best_and_gradient(jnp.where(valid > 0, 0.5, bad), ranks, valid) for bad in (0.0, garbage)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    (total, count), gradient = results[1]
    assert float(total) == approx(LN2, terms=4) and float(count) == 1
    assert_close(gradient, np.array([[0.5, -0.5, 0], [0, 0, 0]]), terms=4)


# --- DPO --------------------------------------------------------------------------------------------------

ONE = np.ones(1, np.float32)
jitted_dpo = jax.jit(dpo_loss)


def dpo(chosen, rejected, ref_chosen=0.0, ref_rejected=0.0, beta=0.1, weights=ONE):
    one = lambda x: jnp.full(1, x, jnp.float32)
    return jitted_dpo(one(chosen), one(rejected), one(ref_chosen), one(ref_rejected), weights, beta)


def test_a_policy_equal_to_the_reference_costs_ln_2():
    total, count, found = dpo(-7.0, -3.0, -7.0, -3.0)
    assert float(total) == approx(LN2, terms=4) and float(count) == 1
    assert float(found["margin"]) == 0 and float(found["correct"]) == 0


def test_dpo_closed_form():
    total, _, found = dpo(-5.0, -8.0, -6.0, -4.0, beta=0.5)  # margin .5 (1 + 4)
    assert float(total) == approx(math.log1p(math.exp(-2.5)), terms=6)
    assert float(found["margin"]) == 2.5 and float(found["correct"]) == 1


def test_dpo_raises_the_chosen_and_lowers_the_rejected():
    d_chosen, d_rejected = jax.jit(jax.grad(lambda a, b: dpo(a, b, beta=0.3)[0].sum(), (0, 1)))(-1.0, -1.0)
    assert float(d_chosen) == pytest.approx(-0.15) and float(d_rejected) == pytest.approx(0.15)


def test_shifting_both_of_a_models_log_probabilities_changes_nothing():
    a = dpo(-5.0, -8.0, -6.0, -4.0)[0]
    assert float(dpo(-5.0, -8.0, -6.0 + 3, -4.0 + 3)[0]) == approx(float(a), terms=6)
    assert float(dpo(-5.0 - 2, -8.0 - 2, -6.0, -4.0)[0]) == approx(float(a), terms=6)


def test_what_is_no_pair_may_be_anything():
    x = jnp.array([-1.0, np.nan])
    f = lambda x: dpo_loss(x, 2 * x, 3 * x, 4 * x, jnp.array([1.0, 0.0]), 0.1)
    (total, count, found), gradient = jax.jit(lambda x: (f(x), jax.grad(lambda x: f(x)[0])(x)))(x)
    margin = 0.1 * (-1 + 3 + 2 - 4)
    assert float(total) == approx(math.log1p(math.exp(-margin)), terms=6) and float(count) == 1
    assert np.isfinite(gradient).all() and float(found["margin"]) == approx(margin, terms=6)


# --- best of n --------------------------------------------------------------------------------------------


def test_best_of_n_keeps_the_best_of_the_first_n():
    scores = np.array([[1.0, 3, 2, 9], [4, 0, 5, -1]])
    best, kl = best_of_n(scores, 3)
    assert best.tolist() == [1, 2] and kl == pytest.approx(math.log(3) - 2 / 3, rel=1e-6)
    for n in (0, 5):
        with pytest.raises(InputError, match="4"):
            best_of_n(scores, n)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_expected_best_is_the_mean_over_all_choices(n):
    rng = np.random.default_rng(0)
    scores, gold = rng.random((3, 6)), rng.random((3, 6))
    of_score, of_gold = [], []
    for s, g in zip(scores, gold, strict=True):
        for choice in itertools.combinations(range(6), n):
            best = max(choice, key=lambda i: s[i])
            of_score.append(s[best])
            of_gold.append(g[best])
    found = expected_best(scores, gold, n)
    np.testing.assert_allclose(found, (np.mean(of_score), np.mean(of_gold)), rtol=1e-12)


# --- agreement with rankings ------------------------------------------------------------------------------


def test_pairs_of_a_validation_set():
    scores, ranks = np.array([[1.0, 2, 4], [7, 7, np.nan]]), np.array([[1, 0, 1], [3, 1, 0]])
    valid, lengths = np.array([[1, 1, 1], [1, 1, 0]]), np.array([[5, 9, 9], [2, 1, 50]])
    p = preference.pairs(scores, ranks, valid, lengths, np.array([[1, 20, 2], [5, 9, 0]]))
    assert p.margin.tolist() == [1, -2, 0] and p.longer.tolist() == [4, 0, -1]
    assert p.characters.tolist() == [19, 18, 4]
    assert p.weight.tolist() == [0.5, 0.5, 1]
    figures = preference.agreement(p)
    assert figures["pairs"] == 3 and figures["accuracy"] == 0.5  # right, wrong, equal
    assert figures["accuracy_by_prompt"] == 0.5 and figures["margin"] == pytest.approx(-1 / 3)
    assert figures["longer_wins"] == 0.5 and figures["longer_wins_characters"] == 1
    assert figures["length_baseline"] == {"rule": "more characters", "accuracy": 1}
    assert figures["accuracy_better_is_longer"] == 1 and figures["accuracy_better_is_shorter"] is None
    assert figures["accuracy_same_length"] == 0.25


def test_prompts_weigh_the_same_in_accuracy_by_prompt():
    """36 wrong pairs of one prompt and one right pair of another."""
    scores, ranks, valid = np.zeros((2, K)), np.tile(np.arange(K), (2, 1)), np.ones((2, K))
    scores[0] = np.arange(K)
    scores[1, :2] = 1, 0
    valid[1, 2:] = 0
    figures = preference.agreement(preference.pairs(scores, ranks, valid, *np.ones((2, 2, K))))
    assert figures["accuracy"] == pytest.approx(1 / 37) and figures["accuracy_by_prompt"] == pytest.approx(0.5)


def test_no_pairs_at_all():
    p = preference.pairs(*np.zeros((2, 2, 3)), *np.ones((3, 2, 3)))
    figures = preference.agreement(p)
    assert figures["pairs"] == 0 and figures["accuracy"] is None and figures["length_correlation"] is None
    assert preference.calibration(p) == [] and not preference.length_explains(figures)


@functools.cache
def planted(prompts=20_000, scale=1.0, seed=0):
    """Pairs whose better one is drawn by Bradley-Terry from the very scores, which are reported times `scale`."""
    rng = np.random.default_rng(seed)
    scores = 2 * rng.standard_normal((prompts, 2))
    first_wins = rng.random(prompts) < 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    ranks = np.stack([~first_wins, first_wins], 1).astype(int)
    return preference.pairs(scale * scores, ranks, np.ones((prompts, 2)), *rng.integers(1, 50, (2, prompts, 2)))


def off_the_diagonal(bins):
    """Observed less predicted, in binomial standard errors."""
    return [
        (b["observed"] - b["predicted"]) / math.sqrt(b["predicted"] * (1 - b["predicted"]) / b["pairs"]) for b in bins
    ]


def test_planted_bradley_terry_scores_are_calibrated():
    bins = preference.calibration(planted())
    assert len(bins) == 10 and sum(b["pairs"] for b in bins) == 20_000
    assert np.abs(off_the_diagonal(bins)).max() < 3.5
    assert [b["margin"] for b in bins] == sorted(b["margin"] for b in bins)


def test_scores_of_three_times_the_scale_are_not():
    assert min(off_the_diagonal(preference.calibration(planted(scale=3.0)))) < -10


def test_the_accuracy_of_planted_scores_is_the_ceiling():
    p = planted()
    ceiling = (1 / (1 + np.exp(-np.abs(p.margin)))).mean()
    assert preference.agreement(p)["accuracy"] == pytest.approx(ceiling, abs=3 * 0.5 / math.sqrt(20_000))


@pytest.mark.parametrize("sign", [1, -1])
def test_length_explains_rankings_by_length_alone(sign):
    """Of a model that scores the length, the longer or the shorter the better."""
    rng = np.random.default_rng(0)
    lengths = np.argsort(rng.random((500, 4)), 1) * 10 + 5
    ranks = np.argsort(np.argsort(-sign * lengths, 1), 1)
    noise = rng.random((500, 4))
    figures = preference.agreement(preference.pairs(sign * 0.1 * lengths, ranks, np.ones((500, 4)), lengths, noise))
    assert figures["length_baseline"] == {"rule": "more tokens" if sign > 0 else "fewer tokens", "accuracy": 1}
    assert figures["accuracy"] == 1 and figures["longer_wins"] == (1 if sign > 0 else 0)
    assert figures["length_correlation"] == pytest.approx(sign)
    assert preference.length_explains(figures)


def test_length_does_not_explain_rankings_that_ignore_it():
    figures = preference.agreement(planted())
    assert abs(figures["length_correlation"]) < 0.03 and not preference.length_explains(figures)


def test_a_model_at_chance_has_not_learned_length():
    """Length orders every pair; the scores are noise."""
    rng = np.random.default_rng(0)
    lengths = np.argsort(rng.random((100, 2)), 1) + 1
    scores = rng.standard_normal((100, 2))
    figures = preference.agreement(preference.pairs(scores, -lengths, np.ones((100, 2)), lengths, lengths))
    assert abs(figures["accuracy"] - 0.5) < 0.1 and figures["length_baseline"]["accuracy"] == 1
    assert not preference.length_explains(figures)
    better = preference.agreement(preference.pairs(scores + lengths, -lengths, np.ones((100, 2)), lengths, lengths))
    assert better["accuracy"] > 0.65 and preference.length_explains(better)
