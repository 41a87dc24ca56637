"""PPO's arrays: published numbers, GAE three ways, what a mask hides, clipping, KL estimators and their gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from numerics import approx, assert_close

from gptjax.objectives import ppo
from gptjax.objectives.finetune import auxiliary_weights
from gptjax.parallel.mesh import MeshConfig, make_mesh

B, R = 5, 7
LENGTHS = np.array([7, 1, 4, 0, 3])  # a full row, a single action, none at all
TERMS = 2 * B * R  # a mean of all, and the deviation from it
every_seed = settings(max_examples=40, deadline=None, derandomize=True)


def ragged(lengths, slots=R):
    return (np.arange(slots)[None] < np.asarray(lengths)[:, None]).astype(np.float32)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


gae, policy_loss, value_loss, grpo_loss = map(jax.jit, (ppo.gae, ppo.policy_loss, ppo.value_loss, ppo.grpo_loss))
token_rewards, explained_variance, k3 = map(jax.jit, (ppo.token_rewards, ppo.explained_variance, ppo.k3))
masked_mean, last_action = map(jax.jit, (ppo.masked_mean, ppo.last_action))
group_advantages = jax.jit(ppo.group_advantages, static_argnums=1)
whiten = jax.jit(ppo.whiten, static_argnames="shift_mean")
policy_gradient = jax.jit(jax.value_and_grad(lambda *a: ppo.policy_loss(*a)[0]))


# --- published numbers ------------------------------------------------------------------------------------


def test_gae_golden():
    one = lambda *x: jnp.array([x], jnp.float32)
    advantages, returns = gae(one(0, 0, 1), one(0.1, 0.2, 0.3), jnp.ones((1, 3)), 1.0, 0.95)
    assert_close((advantages, returns), (one(0.82675, 0.765, 0.7), one(0.92675, 0.965, 1.0)), terms=9)


@pytest.mark.parametrize(
    "advantage, difference, loss", [(1, 0.3, -1.2), (1, -0.3, -0.7408182), (-1, 0.3, 1.3498588), (-1, -0.3, 0.8)]
)
def test_clipped_loss_golden(advantage, difference, loss):
    one = lambda x: jnp.full((1, 1), x, jnp.float32)
    total, count, _ = policy_loss(one(difference - 2), one(-2), one(advantage), one(1), 0.2)
    assert float(total) == approx(loss, terms=4) and float(count) == 1


def test_whitening_golden():
    x = jnp.array([[1.0, 2, 3, 4]])
    expected = [[-1.3416408, -0.4472136, 0.4472136, 1.3416408]]
    assert_close(whiten(x, jnp.ones((1, 4))), np.array(expected), terms=9)


def test_whitening_of_rewards_golden():
    """The vector of "The N implementation details of RLHF with PPO": the mean is kept, the variance is biased."""
    x = jnp.array([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    expected = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
    np.testing.assert_allclose(whiten(x, jnp.ones((3, 3)), shift_mean=False), expected, atol=6e-5)


# --- GAE --------------------------------------------------------------------------------------------------


def gae_by_double_loop(rewards, values, lengths, gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, the definition, in float64."""
    advantages = np.zeros(rewards.shape)
    for b, n in enumerate(lengths):
        for t in range(n):
            for u in range(t, n):
                after = float(values[b, u + 1]) if u + 1 < n else 0.0
                delta = float(rewards[b, u]) + gamma * after - float(values[b, u])
                advantages[b, t] += (gamma * lam) ** (u - t) * delta
    return advantages


def gae_by_recursion(rewards, values, lengths, gamma, lam):
    """A_t = delta_t + gamma lambda A_{t+1}, row by row over the row's own actions alone."""
    advantages = np.zeros(rewards.shape)
    for b, n in enumerate(lengths):
        r, v = rewards[b, :n].astype(np.float64), np.append(values[b, :n].astype(np.float64), 0.0)
        running = 0.0
        for t in reversed(range(n)):
            running = r[t] + gamma * v[t + 1] - v[t] + gamma * lam * running
            advantages[b, t] = running
    return advantages


@every_seed
@given(
    seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, R), min_size=B, max_size=B),
    gamma=st.floats(0, 1), lam=st.floats(0, 1),
)  # fmt: skip
def test_gae_is_the_double_loop_and_the_recursion(seed, lengths, gamma, lam):
    rewards, values, mask = normal(seed, B, R), normal(seed + 1, B, R), ragged(lengths)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    loop, recursion = (f(rewards, values, lengths, gamma, lam) for f in (gae_by_double_loop, gae_by_recursion))
    np.testing.assert_allclose(loop, recursion, atol=1e-12)
    largest = R * float(max(np.abs(x).max() for x in (rewards, values)))  # the terms' sum, which may cancel
    assert_close([advantages, returns, values], [loop, loop + values * mask, values], terms=3 * R, scale=largest)


def test_without_discount_the_returns_are_the_rewards_to_go_whatever_the_values():
    rewards, mask = normal(0, B, R), ragged(LENGTHS)
    kept = np.where(mask > 0, rewards, 0)
    for values in (normal(1, B, R), np.zeros((B, R), np.float32)):
        _, returns = gae(rewards, values, mask, 1.0, 1.0)
        assert_close(returns, mask * np.cumsum(kept[:, ::-1], 1)[:, ::-1], terms=3 * R)


def test_at_lambda_0_the_advantage_is_the_one_step_error():
    rewards, values, mask = normal(0, B, R), normal(1, B, R), ragged(LENGTHS)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    v = values * mask
    after = np.concatenate([v[:, 1:], np.zeros((B, 1))], 1)
    assert_close(advantages, mask * (rewards + 0.9 * after - v), terms=4)


def test_returns_less_values_are_the_advantages():
    rewards, values, mask = normal(0, B, R), normal(1, B, R), ragged(LENGTHS)
    advantages, returns = gae(rewards, values, mask, 0.97, 0.8)
    assert_close(returns - values * mask, advantages, terms=4)
    assert (np.asarray(advantages)[mask == 0] == 0).all() and (np.asarray(returns)[mask == 0] == 0).all()


@pytest.mark.parametrize("lam, moved", [(1.0, "every action"), (0.0, "the last alone")])
def test_the_score_reaches(lam, moved):
    """With lambda 1 every action up to the last, with lambda 0 the last alone; nothing after it."""
    mask, zeros = ragged(LENGTHS), np.zeros((B, R), np.float32)
    values = normal(1, B, R)

    def advantages(score):
        rewards = token_rewards(score, zeros, zeros, mask, 0.1)
        return np.asarray(gae(rewards, values, mask, 1.0, lam)[0])

    moved_by = advantages(jnp.arange(1.0, B + 1)) - advantages(jnp.zeros(B))
    where = mask if moved == "every action" else np.asarray(last_action(mask))
    assert_close(moved_by, where * np.arange(1.0, B + 1)[:, None], terms=3 * R)


# --- the reward -------------------------------------------------------------------------------------------


def test_the_last_action_is_the_last_of_the_mask():
    expected = np.zeros((B, R))
    for b, n in enumerate(LENGTHS):
        if n:
            expected[b, n - 1] = 1
    np.testing.assert_array_equal(last_action(jnp.asarray(ragged(LENGTHS))), expected)


@pytest.mark.parametrize("score", [0.7, -1.9])
def test_a_fractional_score_arrives_exactly(score):
    zeros, mask = jnp.zeros((1, 3)), ragged([2], 3)
    reward = token_rewards(jnp.array([score]), zeros, zeros, mask, 0.3)
    np.testing.assert_array_equal(reward, np.array([[0, score, 0]], np.float32))


@pytest.mark.parametrize("score", [np.array([3, -2], np.int32), np.array([True, False])], ids=["int32", "bool"])
def test_scores_that_are_no_floats_truncate_nothing(score):
    """The penalty is a fraction: in the score's dtype it would be 0."""
    log_prob, mask = np.full((2, 3), -0.5, np.float32), ragged([3, 2], 3)
    reward = token_rewards(jnp.asarray(score), log_prob, np.full((2, 3), -1.25, np.float32), mask, 0.5)
    assert reward.dtype == jnp.float32
    expected = -0.375 * mask
    expected[0, 2] += score[0]
    expected[1, 1] += score[1]
    assert_close(reward, expected, terms=1)


def test_a_row_of_rewards_sums_to_the_score_less_the_penalty():
    log_prob, ref, mask, score = -(normal(0, B, R) ** 2), -(normal(1, B, R) ** 2), ragged(LENGTHS), normal(2, B)
    reward = token_rewards(jnp.asarray(score), log_prob, ref, mask, 0.2)
    kl = ((log_prob - ref) * mask).sum(1)
    assert_close(reward.sum(1), np.where(LENGTHS > 0, score, 0) - 0.2 * kl, terms=3 * R)


def test_the_penalty_is_against_leaving_the_reference():
    """A token likelier than under the reference costs."""
    mask = np.ones((1, 2), np.float32)
    reward = token_rewards(jnp.zeros(1), np.float32([[-1, -3]]), np.float32([[-2, -2]]), mask, 0.5)
    np.testing.assert_allclose(reward, [[-0.5, 0.5]])


# --- what the mask hides ----------------------------------------------------------------------------------

FUNCTIONS = {  # of three arrays [B, R] and a mask; every output is compared
    "masked_mean": lambda a, b, c, m: ppo.masked_mean(a, m),
    "masked_variance": lambda a, b, c, m: ppo.masked_variance(a, m),
    "whiten": lambda a, b, c, m: ppo.whiten(a, m),
    "whiten_keeping_the_mean": lambda a, b, c, m: ppo.whiten(a, m, shift_mean=False),
    "token_rewards": lambda a, b, c, m: ppo.token_rewards(jnp.arange(float(B)), a, b, m, 0.3),
    "gae": lambda a, b, c, m: ppo.gae(a, b, m, 0.9, 0.8),
    "policy_loss": lambda a, b, c, m: ppo.policy_loss(a, b, c, m, 0.2),
    "value_loss": lambda a, b, c, m: ppo.value_loss(a, b, c, m, 0.2),
    "grpo_loss": lambda a, b, c, m: ppo.grpo_loss(a, b, 0.5 * a + b, c, m, 0.2, 0.1),
    "grpo_loss_reference": lambda a, b, c, m: ppo.grpo_loss(a, b, c, a, m, 0.2, 0.1),
    "explained_variance": lambda a, b, c, m: ppo.explained_variance(a, b, m),
}


@jax.jit
def with_gradients(arrays, mask):
    """{name: ((a random combination of the outputs, the outputs), its gradients in the three arrays)}."""

    def scalar(arrays, name):
        out = FUNCTIONS[name](*arrays, mask)
        leaves = jax.tree.leaves(out)
        weights = [np.random.default_rng(i).standard_normal(x.shape) for i, x in enumerate(leaves)]
        return sum((jnp.float32(w) * x).sum() for w, x in zip(weights, leaves, strict=True)), out

    return {name: jax.value_and_grad(scalar, has_aux=True)(arrays, name) for name in FUNCTIONS}


@functools.cache
def with_garbage(garbage):
    """What with_gradients has without garbage where the mask is 0, with it in one of the arrays each, and in all."""
    mask = ragged(LENGTHS)
    clean = [normal(i, B, R) * mask for i in range(3)]
    dirty = [np.where(mask > 0, x, garbage).astype(np.float32) for x in clean]
    found = [with_gradients(clean, mask)]
    for where in ([0], [1], [2], [0, 1, 2]):
        found.append(with_gradients([dirty[i] if i in where else clean[i] for i in range(3)], mask))
    return jax.device_get(found)


@pytest.mark.parametrize("garbage", [np.nan, 1e9, -np.inf])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_masked_out_changes_no_value_and_no_gradient(name, garbage):
    clean, *dirty = (x[name] for x in with_garbage(garbage))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(clean))
    for found in dirty:
        jax.tree.map(np.testing.assert_array_equal, found, clean)


@functools.cache
def narrow_and_wide():
    """The outputs of all functions, and those of arrays with three more columns that the mask hides."""
    of_all = jax.jit(lambda arrays, mask: {name: f(*arrays, mask) for name, f in FUNCTIONS.items()})
    mask = ragged(LENGTHS)
    arrays = [normal(i, B, R) * mask for i in range(3)]
    wider = [np.pad(x, ((0, 0), (0, 3)), constant_values=7.0) for x in arrays]
    return of_all(arrays, mask), of_all(wider, np.pad(mask, ((0, 0), (0, 3))))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_columns_of_padding_change_nothing(name):
    def same(a, b):
        if np.ndim(a) == 2:
            assert (np.asarray(b)[:, R:] == 0).all()
            b = b[:, :R]
        assert_close(a, b, terms=TERMS)

    jax.tree.map(same, *(x[name] for x in narrow_and_wide()))


def test_no_action_at_all_is_no_division_by_zero():
    zeros, x = jnp.zeros((2, 3)), normal(0, 2, 3)
    assert float(masked_mean(x, zeros)) == 0
    assert (whiten(x, zeros) == 0).all()
    assert float(policy_loss(x, x, x, zeros, 0.2)[0]) == 0
    assert np.isfinite(explained_variance(x, x, zeros))


# --- statistics -------------------------------------------------------------------------------------------


def test_whitened_actions_have_mean_0_and_deviation_1():
    mask = ragged(LENGTHS)
    white = np.asarray(whiten(3 + 5 * normal(0, B, R), mask))
    inside = white[mask > 0]
    assert inside.mean() == approx(0, terms=TERMS, scale=1) and inside.std() == approx(1, terms=TERMS)
    assert (white[mask == 0] == 0).all()


def test_statistics_are_of_all_devices_together():
    """Rows of very different scale on each of eight devices: per-device statistics would differ."""
    mask = ragged(np.arange(8) % R + 1)
    x = normal(0, 8, R) * 10.0 ** np.arange(-4, 4)[:, None].astype(np.float32)
    rows = NamedSharding(make_mesh(MeshConfig(data=8)), PartitionSpec("data"))
    assert_close(whiten(*jax.device_put((x, mask), rows)), whiten(x, mask), terms=2 * mask.size)


def test_explained_variance():
    mask, returns = ragged(LENGTHS), normal(0, B, R)
    mean = returns[mask > 0].mean()
    assert float(explained_variance(returns, returns, mask)) == 1
    assert float(explained_variance(np.full((B, R), mean), returns, mask)) == approx(0, terms=TERMS, scale=1)
    values = normal(1, B, R)
    expected = 1 - ((returns - values)[mask > 0] ** 2).mean() / returns[mask > 0].var()
    assert float(explained_variance(values, returns, mask)) == approx(expected, terms=TERMS, scale=1 - expected)


@pytest.mark.parametrize("n", [1, 4, 100])
def test_kl_of_best_of_n_is_the_integral(n):
    """The best of n scores of quantile u has the density n u^(n-1): KL = integral of n u^(n-1) log(n u^(n-1))."""
    nodes, weights = np.polynomial.legendre.leggauss(100)
    u = (nodes + 1) / 2
    density = n * u ** (n - 1)
    integral = (weights / 2 * density * (math.log(n) + (n - 1) * np.log(u))).sum()
    assert float(ppo.best_of_n_kl(n)) == pytest.approx(integral, abs=1e-4)


def test_the_moving_average_is_the_closed_form():
    """(1 - a) sum of a^k theta, the newest with k = 0, and what it began with with a^steps."""
    thetas, decay = normal(0, 6, 4), 0.9
    average, update = {"x": jnp.asarray(thetas[0])}, jax.jit(ppo.exponential_moving_average)
    for theta in thetas[1:]:
        average = update(average, {"x": theta}, decay)
    expected = decay**5 * thetas[0] + sum((1 - decay) * decay ** (5 - k) * thetas[k] for k in range(1, 6))
    assert_close(average["x"], expected, terms=3 * 6)


# --- the clipped losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage, ratio, alive",
    [
        (2, 1.3, False), (2, 1.19, True), (2, 0.81, True), (2, 0.5, True),
        (-2, 0.7, False), (-2, 0.81, True), (-2, 1.19, True), (-2, 1.3, True), (-2, 5.0, True),
    ],
)  # fmt: skip
def test_the_gradient_is_exactly_0_where_the_clip_binds_and_whole_elsewhere(advantage, ratio, alive):
    one = lambda x: jnp.full((1, 1), x, jnp.float32)
    _, gradient = policy_gradient(one(math.log(ratio)), one(0), one(advantage), one(1), 0.2)
    if alive:
        assert float(gradient[0, 0]) == approx(-advantage * ratio, terms=4)
    else:
        assert float(gradient[0, 0]) == 0


def test_policy_statistics():
    ratio = np.float32([[1.0, 1.19, 1.21, 0.5], [0.79, 0.81, 3.0, 9.0]])
    mask = ragged([4, 3], 4)
    _, count, found = policy_loss(np.log(ratio), np.zeros((2, 4), np.float32), normal(0, 2, 4), mask, 0.2)
    assert float(count) == 7
    assert float(found["clipped"]) == 4  # 1.21, .5, .79, 3
    assert float(found["ratio"]) == approx(ratio[mask > 0].sum(), terms=TERMS)
    assert float(found["approx_kl"]) == approx((np.log(ratio[mask > 0]) ** 2 / 2).sum(), terms=TERMS)


def test_at_ratio_1_the_gradient_is_reinforce():
    """-sum A grad log pi, through a softmax."""
    logits, actions, advantages, mask = normal(0, B, R, 6), normal(1, B, R), normal(2, B, R), ragged(LENGTHS)
    actions = np.random.default_rng(1).integers(0, 6, (B, R))[..., None]
    log_prob = lambda x: jnp.take_along_axis(jax.nn.log_softmax(x), actions, -1)[..., 0]

    @jax.jit
    def gradients(logits):
        old = log_prob(logits)
        loss = lambda x: ppo.policy_loss(log_prob(x), old, advantages, mask, 0.2)[0]
        return jax.grad(loss)(logits), jax.grad(lambda x: -(mask * advantages * log_prob(x)).sum())(logits)

    assert_close(*gradients(logits), terms=4 * 6)


@pytest.mark.parametrize("loss", ["policy_loss", "value_loss"])
def test_finite_differences_in_float64(loss):
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        x, old, third = (rng.normal(0, 0.4, (B, R)) for _ in range(3))
        mask = ragged(LENGTHS).astype(np.float64)
        f = jax.jit(lambda x: getattr(ppo, loss)(x, old, third, mask, 0.2)[0])
        gradient, h = np.asarray(jax.jit(jax.grad(f))(x)), 1e-6
        assert gradient.dtype == np.float64
        numeric = np.zeros((B, R))
        for i in np.ndindex(B, R):
            step = np.zeros((B, R))
            step[i] = h
            numeric[i] = (f(x + step) - f(x - step)) / (2 * h)
    assert (gradient != 0).sum() > 5 and (gradient[mask > 0] == 0).any()  # both sides of the clip are seen
    np.testing.assert_allclose(gradient, numeric, atol=1e-7)


def test_within_the_clip_the_value_loss_is_half_the_squared_error():
    old, returns, mask = normal(0, B, R), normal(1, B, R), ragged(LENGTHS)
    values = old + np.clip(normal(2, B, R), -0.19, 0.19)
    total, count, found = value_loss(values, old, returns, mask, 0.2)
    error = ((values - returns) ** 2)[mask > 0].sum()
    assert float(total) == approx(error / 2, terms=TERMS) and float(count) == LENGTHS.sum()
    assert float(found["error"]) == approx(error, terms=TERMS) and float(found["clipped"]) == 0


@pytest.mark.parametrize(
    "value, old, target, loss, clipped",
    [(1.0, 0.0, 1.0, 0.5 * 0.64, 1), (1.0, 0.0, -1.0, 0.5 * 4.0, 0), (-1.0, 0.0, -1.0, 0.5 * 0.64, 1)],
)
def test_the_value_loss_is_the_larger_of_clipped_and_not(value, old, target, loss, clipped):
    one = lambda x: jnp.full((1, 1), x, jnp.float32)
    total, _, found = value_loss(one(value), one(old), one(target), one(1), 0.2)
    assert float(total) == approx(loss, terms=4) and float(found["clipped"]) == clipped


# --- KL ---------------------------------------------------------------------------------------------------

ARMS = 20


def softmax_problem(distance=1.0):
    rng = np.random.default_rng(0)
    theta = rng.normal(size=ARMS)
    return jnp.asarray(theta), jax.nn.log_softmax(jnp.asarray(theta + distance * rng.normal(size=ARMS)))


@jax.jit
def kl(log_p, log_q):
    return (jnp.exp(log_p) * (log_p - log_q)).sum()


def test_k1_and_k3_are_unbiased():
    with jax.enable_x64(True):
        theta, ref = softmax_problem()
        log_p = jax.nn.log_softmax(theta)
        exact = float(kl(log_p, ref))
        expected = jax.jit(lambda log_p: [(jnp.exp(log_p) * k(log_p, ref)).sum() for k in (ppo.k1, ppo.k2, ppo.k3)])
        k1, k2, k3 = map(float, expected(log_p))
        assert (k1, k3) == (approx(exact, terms=3 * ARMS, dtype=jnp.float64),) * 2
        assert abs(k2 - exact) > 0.01


@every_seed
@given(st.floats(-30, 30), st.floats(-30, 30))
def test_k3_is_never_negative(a, b):
    assert float(k3(np.float32(a), np.float32(b))) >= 0


def test_k2_and_k3_agree_to_the_third_order():
    with jax.enable_x64(True):
        for d in (1e-2, -1e-2, 1e-3, -1e-3):
            difference = float(ppo.k2(jnp.asarray(d), 0.0) - ppo.k3(jnp.asarray(d), 0.0))
            assert difference == pytest.approx(d**3 / 6, rel=0.01)


stop = jax.lax.stop_gradient


@functools.partial(jax.jit, static_argnums=0)
def reward_gradient(k, theta, ref):
    """E_pi[grad log pi x k] with k detached, as a reward has it."""
    log_p = jax.nn.log_softmax(theta)
    weight = stop(jnp.exp(log_p) * k(log_p, ref))
    return jax.grad(lambda t: (weight * jax.nn.log_softmax(t)).sum())(theta)


@functools.partial(jax.jit, static_argnums=0)
def loss_gradient(k, theta, ref):
    """E_pi[grad k], the samples' distribution held, as an on-policy loss has it."""
    p = stop(jax.nn.softmax(theta))
    return jax.grad(lambda t: (p * k(jax.nn.log_softmax(t), ref)).sum())(theta)


@pytest.mark.parametrize("distance", [0.01, 1.0])
def test_the_exact_gradients_of_the_estimators(distance):
    with jax.enable_x64(True):
        theta, ref = softmax_problem(distance)
        log_p = jax.nn.log_softmax(theta)
        reverse = jax.jit(jax.grad(lambda t: kl(jax.nn.log_softmax(t), ref)))(theta)
        forward = jax.jit(jax.grad(lambda t: kl(ref, jax.nn.log_softmax(t))))(theta)
        second = jax.grad(lambda t: (stop(jnp.exp(log_p) * (log_p - ref) ** 2 / 2) * jax.nn.log_softmax(t)).sum())
        second = jax.jit(second)
        same = functools.partial(assert_close, terms=4 * ARMS, scale=1.0, dtype=jnp.float64)
        same(reward_gradient(ppo.k1, theta, ref), reverse)
        same(reward_gradient(ppo.k2, theta, ref), second(theta))
        same(reward_gradient(ppo.k3, theta, ref), reverse - forward)
        same(loss_gradient(ppo.k1, theta, ref), np.zeros(ARMS))
        same(loss_gradient(ppo.k2, theta, ref), reverse)
        same(loss_gradient(ppo.k3, theta, ref), forward)


def test_near_the_reference_k3_as_a_reward_restrains_nothing():
    with jax.enable_x64(True):
        theta, ref = softmax_problem(0.01)
        g1, g3 = (np.linalg.norm(reward_gradient(k, theta, ref)) for k in (ppo.k1, ppo.k3))
    assert g3 < 0.02 * g1


@pytest.mark.parametrize(
    "measured, factor", [(0.0, 1 - 0.2 * 0.0512), (5.4, 1 - 0.1 * 0.0512), (6.0, 1.0), (6.6, 1 + 0.1 * 0.0512),
                         (60.0, 1 + 0.2 * 0.0512)],
)  # fmt: skip
def test_the_adaptive_coefficient(measured, factor):
    """Ziegler et al.'s own numbers: target 6, horizon 10,000, 512 episodes, beta .15."""
    found = ppo.adaptive_kl_coefficient(0.15, measured, 512, 6.0, 10_000)
    assert float(found) == approx(0.15 * factor, terms=9)


# --- GRPO and GPT-1's auxiliary loss ----------------------------------------------------------------------


def test_group_advantages():
    """Neighbors are a group; the deviation is biased; equal scores give 0."""
    found = group_advantages(jnp.array([1.0, 2, 3, 10, 10, 10, -5, 0, 5]), 3)
    d = math.sqrt(2 / 3)
    assert_close(found[:3], np.array([-1, 0, 1]) / (d + 1e-4), terms=9)
    np.testing.assert_array_equal(found[3:6], 0)
    assert_close(found[6:], np.array([-5, 0, 5]) / (5 * d + 1e-4), terms=9)


def test_grpo_without_kl_is_the_clipped_loss_where_lengths_are_equal():
    log_prob, old, advantages, mask = normal(0, B, R), normal(1, B, R), normal(2, B, R), ragged([4] * B)
    total, count = grpo_loss(log_prob, old, normal(3, B, R), advantages, mask, 0.2, 0.0)
    expected, actions, _ = policy_loss(log_prob, old, advantages, mask, 0.2)
    assert float(count) == B
    assert float(total / count) == approx(float(expected / actions), terms=TERMS)


def test_grpo_weighs_responses_the_same_whatever_their_length():
    mask, zeros = ragged(LENGTHS), np.zeros((B, R), np.float32)
    advantages = np.broadcast_to(np.arange(1.0, B + 1, dtype=np.float32)[:, None], (B, R))
    total, count = grpo_loss(zeros, zeros, zeros, advantages, mask, 0.2, 0.3)
    assert float(count) == (LENGTHS > 0).sum()
    assert float(total) == approx(-np.arange(1.0, B + 1)[LENGTHS > 0].sum(), terms=TERMS)


def test_the_gradient_of_grpos_penalty():
    """beta (1 - ref/pi) / length: k3 differentiated."""
    log_prob, ref, mask = normal(0, B, R), normal(1, B, R), ragged(LENGTHS)
    loss = lambda x: grpo_loss(x, log_prob, ref, np.zeros((B, R), np.float32), mask, 0.2, 0.7)[0]
    expected = 0.7 * (1 - np.exp(ref - log_prob)) * mask / np.maximum(LENGTHS, 1)[:, None]
    assert_close(jax.jit(jax.grad(loss))(log_prob), expected, terms=TERMS)


def test_auxiliary_weights_are_both_terms_of_gpt1():
    rng = np.random.default_rng(0)
    nll = rng.random((4, 6))
    lm = ragged([6, 3, 5, 2], 6)
    task = lm * (np.arange(6) > 2)
    weights = np.asarray(auxiliary_weights(jnp.asarray(task), jnp.asarray(lm), 0.5))
    expected = (task * nll).sum() / task.sum() + 0.5 * (lm * nll).sum() / lm.sum()
    assert (weights * nll).sum() / task.sum() == approx(expected, terms=TERMS)
