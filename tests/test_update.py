"""PPO's update: the gradient it takes, what leaves it unchanged, sharding, PPO-ptx, and the checks around it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numerics import approx, assert_close, model_terms, tolerance
from test_rollout import LENGTHS, MODEL, VOCAB, N, R, credit, policy, scalar_params, scored, without_padding

from experiments.ppo_exact import task as exact
from gptjax.errors import InputError
from gptjax.model import gpt, heads
from gptjax.objectives import ppo
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.sharding import batch_sharding
from gptjax.rlhf import rollout, sanity_checks
from gptjax.rlhf import update as updates
from gptjax.rlhf.config import UpdateConfig
from gptjax.rlhf.state import new_state, state_shardings
from gptjax.rlhf.update import make_update, ppo_gradients, ptx_gradient
from gptjax.training.optimizer import OptimizerConfig, make_optimizer

ROWS, MICRO = 8, 2
TERMS = model_terms(MODEL, ROWS)
ADAM = make_optimizer(OptimizerConfig(weight_decay=0.0))
SGD = optax.sgd(1.0)  # the step is the gradient
BASE = UpdateConfig(epochs=2, minibatches=2, ema_decay=0.9)
ONE_STEP = UpdateConfig(epochs=1, value_coefficient=0.3)
BY_SEQUENCE = dataclasses.replace(ONE_STEP, normalize="sequence")
RATES = np.float32(1e-3), np.float32(2e-3)
ZERO = np.float32(0), np.float32(0)


@functools.cache
def experience():
    """Eight ragged responses, scored 40 at a time: another shape than the update's."""
    part = {k: v[:ROWS] for k, v in scored().items()}
    return credit(part, np.linspace(-1.9, 0.7, ROWS, dtype=np.float32))[0]


@functools.cache
def stale():
    """Experience of some other policy, so that both clips bind somewhere."""
    e, rng = experience(), np.random.default_rng(0)
    noise = lambda: 0.3 * rng.standard_normal((ROWS, R)).astype(np.float32) * np.asarray(e.mask)
    return dataclasses.replace(e, log_prob=e.log_prob + noise(), value=e.value + noise())


def micro_batched(batch, rows):
    return jax.tree.map(lambda a: jnp.reshape(a, (-1, rows, *a.shape[1:])), batch)


def fresh(tx=ADAM, seed=0):
    return new_state(policy(), scalar_params(5), tx, tx, 0.1, seed)


@functools.cache
def jitted(config, tx="adam", limits=(1.0, 1.0)):
    tx = {"adam": ADAM, "sgd": SGD}[tx]
    return jax.jit(make_update(config, N, tx, tx, *limits), donate_argnums=0)


gradients = jax.jit(ppo_gradients, static_argnums=(0, 1))
of_text = jax.jit(ptx_gradient, static_argnums=(0, 1))


def host(tree):
    return jax.tree.map(np.array, tree)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any((np.asarray(x) != np.asarray(y)).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def close(a, b, stored=0.0):
    assert_close(a, b, terms=TERMS, stored=stored)


def rounding_of_log_probs():
    """How far the log-probabilities of two programs may lie apart, and so a ratio of them from 1."""
    return tolerance(TERMS) * float(jnp.abs(experience().log_prob).max())


# --- the first minibatch ----------------------------------------------------------------------------------


@functools.cache
def base_run():
    """(metrics, state) of one update of 2 epochs x 2 minibatches."""
    state, metrics = jitted(BASE)(fresh(), experience(), None, RATES)
    return host(metrics), host(state)


def test_the_first_ratio_is_1_and_later_ones_are_not():
    metrics, _ = base_run()
    assert metrics["policy/first_ratio_deviation"] < rounding_of_log_probs()
    assert metrics["policy/ratio_max"] > 1.001 > 0.999 > metrics["policy/ratio_min"]
    assert metrics["policy/approxkl"] > 0 and metrics["finite"] == 1


def test_the_first_ratio_of_other_experience_is_seen():
    _, metrics = jitted(BASE)(fresh(), stale(), None, ZERO)
    assert float(metrics["policy/first_ratio_deviation"]) > 0.2


def test_without_a_learning_rate_nothing_moves():
    """Bit for bit, and the ratio stays 1 in every epoch."""
    state, metrics = jitted(BASE)(fresh(), experience(), None, ZERO)
    same((state.policy, state.value), (policy(), scalar_params(5)))
    rounding = rounding_of_log_probs()
    assert max(float(metrics["policy/ratio_max"]) - 1, 1 - float(metrics["policy/ratio_min"])) < rounding
    assert float(metrics["policy/approxkl"]) < rounding**2 and float(metrics["policy/clipfrac"]) == 0
    assert float(metrics["policy/ratio_mean"]) == pytest.approx(1, abs=rounding)


def test_the_first_losses_are_closed_forms():
    """The policy's is minus the mean of whitened advantages, 0; the value's half the mean squared error."""
    _, found = gradients(ONE_STEP, N, policy(), scalar_params(5), micro_batched(experience(), MICRO))
    rounding = rounding_of_log_probs()
    assert float(found["loss/policy"]) == pytest.approx(0, abs=rounding)
    inside = np.asarray(experience().mask) > 0
    error = (np.asarray(experience().value) - np.asarray(experience().returns))[inside]
    assert float(found["loss/value"]) == approx((error**2).mean() / 2, terms=TERMS)
    assert float(found["policy/approxkl"]) < rounding**2 and float(found["policy/clipfrac"]) == 0


def test_each_learning_rate_is_its_own_networks():
    state, _ = jitted(BASE)(fresh(), experience(), None, (RATES[0], ZERO[0]))
    same(state.value, scalar_params(5))
    assert differ(state.policy, policy())
    state, _ = jitted(BASE)(fresh(), experience(), None, (ZERO[0], RATES[1]))
    same(state.policy, policy())
    assert differ(state.value, scalar_params(5))


def test_a_real_iteration_raises_no_alarm():
    """Of score, finish and update together, first and later."""
    part = {k: v[:ROWS] for k, v in scored().items()}
    _, figures = credit(part | {"ref_log_prob": part["log_prob"]}, np.zeros(ROWS, np.float32))
    line = {k: float(v) for k, v in (figures | base_run()[0]).items()} | {"policy/rollout_logp_diff": 1e-5}
    assert sanity_checks.sanity_checks(line, 0, jnp.float32) == []


# --- the gradient -----------------------------------------------------------------------------------------


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1))
def written_out(policy_, value, e):
    """PPO's loss by its formula, summed, on rows without padding: nothing of rlhf/ nor objectives/ is used."""
    rows, n = without_padding(stale().tokens, LENGTHS[:ROWS]), LENGTHS[:ROWS]
    at = n[:, None] + np.arange(R)[None] - 1
    targets = np.minimum(np.take_along_axis(rows, at + 1, 1), VOCAB - 1)
    logits = gpt.logits(policy_, MODEL, gpt.hidden(policy_, MODEL, rows))[..., :VOCAB]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), at[..., None], 1)
    log_p = jnp.take_along_axis(log_p, targets[..., None], 2)[..., 0]
    x = gpt.hidden(value["trunk"], MODEL, rows) @ value["head"]["kernel"] + value["head"]["bias"]
    v = jnp.take_along_axis(x, at, 1)
    ratio = jnp.exp(log_p - e.log_prob)
    surrogate = jnp.minimum(e.advantage * ratio, e.advantage * jnp.clip(ratio, 0.8, 1.2))
    near = e.value + jnp.clip(v - e.value, -0.2, 0.2)
    squares = jnp.maximum((v - e.returns) ** 2, (near - e.returns) ** 2)
    return (e.mask * (-surrogate + 0.3 * 0.5 * squares)).sum()


@functools.cache
def whole(c):
    """(gradients, statistics) of all eight rows, in ragged micro-batches (ONE_STEP) or at once."""
    return gradients(c, N, policy(), scalar_params(5), micro_batched(stale(), MICRO if c is ONE_STEP else ROWS))


@pytest.mark.parametrize("c", [ONE_STEP, BY_SEQUENCE], ids=["token", "sequence"])
def test_the_gradient_is_that_of_the_formula(c):
    """A mean over all actions, in ragged micro-batches whose sums are added up, not means of means; or over responses,
    all at once."""
    assert len(set(np.asarray(stale().mask).sum(1).tolist())) > 2
    found, statistics = whole(c)
    assert 0 < float(statistics["policy/clipfrac"]) < 1 and 0 < float(statistics["value/clipfrac"]) < 1
    count = np.asarray(stale().mask).sum() if c is ONE_STEP else ROWS
    expected = written_out(policy(), scalar_params(5), stale())
    close(found, jax.tree.map(lambda g: g / count, expected))


@pytest.mark.parametrize("garbage", [np.nan, 1e9])
def test_what_is_masked_out_changes_no_gradient(garbage):
    """Bit for bit, whatever stands in any array of the experience after the last action."""
    e = stale()
    gone = np.asarray(e.mask) == 0
    assert gone.any()
    dirty = {
        name: np.where(gone, garbage, np.asarray(getattr(e, name))).astype(np.float32)
        for name in ("log_prob", "ref_log_prob", "value", "reward", "advantage", "returns")
    }
    tokens = np.where(np.asarray(e.real) == 0, 3, np.asarray(e.tokens)).astype(np.int32)
    other = dataclasses.replace(e, tokens=tokens, **dirty)
    same(gradients(ONE_STEP, N, policy(), scalar_params(5), micro_batched(other, MICRO)), whole(ONE_STEP))


def test_dropout_plays_no_part_in_the_update():
    dropping = dataclasses.replace(MODEL, dropout=0.5)
    n = dataclasses.replace(N, policy=dropping, value=dropping, reward=None)
    same(gradients(ONE_STEP, n, policy(), scalar_params(5), micro_batched(stale(), MICRO)), whole(ONE_STEP))


# --- the gradient is that of the objective ----------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    """(task, a policy away from its reference, the gradient of J there by autodiff over all responses)."""
    task = exact.Task(0)
    rng = np.random.default_rng(0)
    here = jax.tree.map(lambda p: p + 0.05 * rng.standard_normal(p.shape).astype(np.float32), task.reference)
    inside = np.where(task.mask > 0, task.tokens[:, -exact.LENGTH :], 0)
    rows = np.where(task.tokens < exact.VOCAB, task.tokens, 0)

    def log_pi(p):  # by its definition: no response is padded on the left, and pads on the right are the future
        logits = gpt.logits(p, exact.MODEL, gpt.hidden(p, exact.MODEL, rows))[:, 2:-1, : exact.VOCAB]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), inside[..., None], 2)[..., 0]
        return (log_p * task.mask).sum(1).reshape(3, -1)

    def objective(p):
        log_p = log_pi(p)
        return task.objective(log_p), log_p

    expected, log_p = jax.jit(jax.grad(objective, has_aux=True))(here)
    assert_close(task.log_probs(here), log_p, terms=model_terms(exact.MODEL))
    return task, here, expected, np.exp(np.asarray(log_p, np.float64)).reshape(-1)


def estimate(problem):
    """The mean over all responses, each weighted by its probability, of PPO's policy gradient."""
    task, here, _, pi = problem
    n = dataclasses.replace(task.spec, value=None)
    value = {"head": heads.new_head(exact.MODEL.d_model, None)}
    lengths = np.full(len(task.tokens), 3, np.int32)
    j = rollout.score(here, value, task.reference, None, task.tokens, lengths, jnp.asarray(task.mask), n)
    e, _ = rollout.compute_advantages.__wrapped__(  # not the compiled one: it would not see another k1
        j, jnp.asarray(task.rewards).reshape(-1), task.c.beta, eos_id=exact.EOS, missing_eos=None, gamma=1.0, lam=1.0,
        whiten_advantages=False,
    )  # fmt: skip
    weights = (pi * len(pi) / 3)[:, None].astype(np.float32)
    e = dataclasses.replace(e, advantage=e.advantage * weights)
    (d_policy, _), _ = gradients(UpdateConfig(normalize="sequence"), n, here, value, jax.tree.map(lambda a: a[None], e))
    return jax.tree.map(jnp.negative, d_policy)


def error(found, expected):
    norm = optax.tree.norm
    return float(norm(jax.tree.map(jnp.subtract, found, expected)) / norm(expected))


def test_the_expected_policy_gradient_is_the_gradient_of_the_objective(problem):
    assert float(optax.tree.norm(problem[2])) > 0.1
    assert error(estimate(problem), problem[2]) < 1e-4


@pytest.mark.parametrize("k", ["k2", "k3"])
def test_with_another_estimator_in_the_reward_it_is_not(problem, k, monkeypatch):
    monkeypatch.setattr(ppo, "k1", getattr(ppo, k))
    assert error(estimate(problem), problem[2]) > 0.02


# --- sharding ---------------------------------------------------------------------------------------------


@functools.cache
def text_gradient():
    """(gradient, loss) of eight sequences."""
    return of_text(UpdateConfig(), N, policy(), {"tokens": text()[0]})


def text(seed=0):
    """int [1 minibatch, 2 micro-batches, 4 rows, 9]."""
    return np.random.default_rng(seed).integers(0, MODEL.vocab_size, (1, 2, 4, 9), np.int32)


@pytest.mark.slow
def test_the_step_on_eight_devices_is_down_the_cut_sum_of_ppos_gradient_and_gamma_times_the_texts():
    """One step of plain gradient descent, set up as gptjax/ppo.py does, in micro-batches of both: the gradients of one
    device, each network's cut to a norm of its own."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, seq=2))
    rows = 4  # of a micro-batch
    c = dataclasses.replace(ONE_STEP, ptx_coefficient=3.0, microbatch_size=rows)
    n = dataclasses.replace(N, mesh=mesh)
    boxed = gpt.abstract_params(MODEL), heads.abstract_scalar_model(MODEL)
    _, shardings = state_shardings(*boxed, SGD, SGD, mesh)
    limits = 0.01, 0.02
    update = jax.jit(make_update(c, n, SGD, SGD, *limits), donate_argnums=0, out_shardings=(shardings, None))
    with jax.set_mesh(mesh):
        state = jax.device_put(fresh(SGD), shardings)
        batch = jax.device_put(stale(), batch_sharding(mesh, 0))
        ptx = jax.device_put({"tokens": text().reshape(1, -1, rows, 9)}, batch_sharding(mesh, 2))
        state, metrics = host(update(state, batch, ptx, (np.float32(10), np.float32(20))))
    ((g_ppo, g_value), figures), (g_ptx, loss) = whole(ONE_STEP), text_gradient()
    g_policy, norm = jax.tree.map(lambda a, b: a + 3 * b, g_ppo, g_ptx), lambda g: float(optax.tree.norm(g))
    for new, old, g, limit, rate in (
        (state.policy, policy(), g_policy, 0.01, 10), (state.value, scalar_params(5), g_value, 0.02, 20)
    ):  # fmt: skip
        assert norm(g) > limit
        scale = rate * limit / norm(g)
        down = jax.tree.map(lambda x, scale=scale: scale * x, g)
        close(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), old, new), down, stored=old)
    cosine = float(optax.tree.vdot(g_ppo, g_ptx)) / norm(g_ppo) / norm(g_ptx)
    assert metrics["grad_norm/cosine"] == approx(cosine, terms=TERMS, scale=1)
    for name, expected in (
        ("loss/ptx", float(loss)), ("grad_norm/ppo", norm(g_ppo)), ("grad_norm/ptx", 3 * norm(g_ptx)),
        ("grad_norm/policy", norm(g_policy)), ("grad_norm/value", norm(g_value)),
    ):  # fmt: skip
        assert metrics[name] == approx(expected, terms=TERMS), name
    for name, value in figures.items():
        assert metrics[name] == approx(float(value), terms=TERMS, scale=0.01), name


def test_optimizer_moments_lie_where_their_parameters_do():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    boxed = gpt.abstract_params(MODEL), heads.abstract_scalar_model(MODEL)
    abstract, shardings = state_shardings(*boxed, ADAM, ADAM, mesh)
    assert shardings.policy["wte"].spec[1] == "fsdp" and shardings.value["trunk"]["wte"].spec[1] == "fsdp"
    moments = [s for s in jax.tree.leaves(shardings.policy_opt) if "fsdp" in str(s.spec)]
    parameters = [s for s in jax.tree.leaves(shardings.policy) if "fsdp" in str(s.spec)]
    assert len(moments) == 2 * len(parameters) > 0
    assert jax.tree.structure(abstract) == jax.tree.structure(fresh())
    assert shardings.average["wte"].spec == shardings.policy["wte"].spec


# --- PPO-ptx ----------------------------------------------------------------------------------------------


@jax.jit
@functools.partial(jax.value_and_grad, argnums=0)
def text_loss(p, weights):
    """Sum over all tokens of -log p, each sequence's times its weight: written out."""
    x = text().reshape(-1, 9)
    log_p = jax.nn.log_softmax(gpt.logits(p, MODEL, gpt.hidden(p, MODEL, x[:, :-1])))
    return -(jnp.take_along_axis(log_p, x[:, 1:, None], -1).sum((1, 2)) * weights).sum()


@pytest.mark.parametrize("rows", [8, 6])
@pytest.mark.parametrize("normalize, of_a_row", [("token", 8), ("sequence", 1)])
def test_the_gradient_of_the_text_is_that_of_its_mean_loss(normalize, of_a_row, rows):
    """Over tokens or sequences, in two micro-batches; rows that fill one count for nothing."""
    tokens = text().copy()
    tokens.reshape(-1, 9)[rows:] = -1
    gradient, value = of_text(UpdateConfig(ptx_normalize=normalize), N, policy(), {"tokens": tokens[0]})
    expected, d_expected = text_loss(policy(), np.float32(np.arange(8) < rows))
    assert float(value) == approx(float(expected) / (rows * of_a_row), terms=TERMS)
    close(gradient, jax.tree.map(lambda g: g / (rows * of_a_row), d_expected))


def two_texts():
    return np.concatenate([text(), text(seed=1)])


@pytest.mark.slow
def test_at_gamma_0_the_run_is_the_run_without_text():
    """Bit for bit, over 2 epochs x 2 minibatches of AdamW."""
    state, metrics = jitted(BASE)(fresh(), experience(), {"tokens": two_texts()}, RATES)
    figures, expected = base_run()
    same((state.policy, state.value, state.average), (expected.policy, expected.value, expected.average))
    same(state.policy_opt, expected.policy_opt)
    assert float(metrics["grad_norm/ptx"]) == 0 and float(metrics["loss/ptx"]) > 0
    assert float(metrics["grad_norm/policy"]) == figures["grad_norm/policy"]


@pytest.mark.slow
def test_each_minibatch_has_text_of_its_own():
    """At learning rates of 0, the loss of the two texts is their mean."""
    state, metrics = jitted(BASE)(fresh(), experience(), {"tokens": two_texts()}, ZERO)
    each = [float(of_text(UpdateConfig(), N, policy(), {"tokens": tokens})[1]) for tokens in two_texts()]
    assert abs(each[0] - each[1]) > 0.01
    assert float(metrics["loss/ptx"]) == approx(sum(each) / 2, terms=TERMS)
    assert int(state.ptx_position) == 2 * 8 and int(state.prompt_position) == ROWS and int(state.step) == 1


# --- minibatches, the average, what a NaN leaves alone ----------------------------------------------------


def test_epochs_go_through_all_rows_in_orders_of_their_own(monkeypatch):
    """3 epochs x 2 minibatches x 2 micro-batches of 2, and again in the next iteration."""
    seen = []

    def spy(c, n, policy, value, batch, *_):
        jax.debug.callback(lambda rows: seen.append(np.array(rows)), batch.returns[..., 0], ordered=True)
        one = jnp.float32(1)
        zeros = jax.tree.map(jnp.zeros_like, (policy, value))
        return zeros, {"policy/ratio_max": one, "policy/ratio_min": one}

    monkeypatch.setattr(updates, "ppo_gradients", spy)
    c = UpdateConfig(epochs=3, minibatches=2, microbatch_size=2)
    numbered = dataclasses.replace(experience(), returns=jnp.broadcast_to(jnp.arange(float(ROWS))[:, None], (ROWS, R)))
    small = {"head": heads.new_head(16, None)}
    state = new_state(small, small, SGD, SGD, 0.1, 0)
    update = jax.jit(make_update(c, N, SGD, SGD, 0.0, 0.0))
    for _ in range(2):
        state, _ = update(state, numbered, None, RATES)
    jax.effects_barrier()
    orders = np.array(seen)
    assert orders.shape == (2 * 3 * 2, 2, 2)  # iterations x epochs x minibatches, micro-batches, rows
    epochs = orders.reshape(6, ROWS)
    assert all(sorted(order) == list(range(ROWS)) for order in epochs.tolist())
    assert len({tuple(order) for order in epochs.tolist()}) == 6


def test_the_same_seed_gives_the_same_update_and_another_one_another():
    a, b = (host(jitted(BASE)(fresh(seed=s), experience(), None, RATES)[0]) for s in (0, 1))
    same(a, base_run()[1])
    assert differ(a.policy, b.policy)


def test_the_average_of_three_updates_is_the_closed_form():
    state, thetas = fresh(), [host(policy())]
    for _ in range(3):
        state, _ = jitted(BASE)(state, experience(), None, RATES)
        thetas.append(host(state.policy))
    decay = BASE.ema_decay
    expected = jax.tree.map(
        lambda t0, t1, t2, t3: decay**3 * t0 + (1 - decay) * (decay**2 * t1 + decay * t2 + t3), *thetas
    )
    assert_close(host(state.average), expected, terms=12)
    assert differ(thetas[3], state.average) and differ(thetas[0], state.average)


def test_the_models_an_iteration_begins_with_outlive_it():
    """The update donates its state; the reference and the reward model are not in it."""
    reference, reward = (jax.tree.map(jnp.asarray, x) for x in (policy(), scalar_params(5)))
    state = new_state(reference, reward, ADAM, ADAM, 0.1, 0)
    for _ in range(2):
        old = state
        state, _ = jitted(BASE)(state, experience(), None, RATES)
        assert all(x.is_deleted() for x in jax.tree.leaves(old.policy))
    same((reference, reward), (policy(), scalar_params(5)))


def poisoned(name, rows):
    array = np.array(getattr(experience(), name))
    array[rows] = np.nan
    return dataclasses.replace(experience(), **{name: array})


@pytest.mark.parametrize("name", ["advantage", "returns"])
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    """Neither network: of the advantages the policy's is NaN, of the returns the value's."""
    before = fresh()
    expected = host((before.policy, before.policy_opt, before.value, before.value_opt))
    state, metrics = jitted(BASE)(before, poisoned(name, slice(None)), None, RATES)
    same((state.policy, state.policy_opt, state.value, state.value_opt), expected)
    assert float(metrics["finite"]) == 0 and int(state.step) == 1


def test_one_bad_row_costs_its_own_minibatches():
    state, metrics = jitted(BASE)(fresh(), poisoned("advantage", 0), None, RATES)
    assert float(metrics["finite"]) == 0
    assert differ(state.policy, policy())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert int(state.policy_opt[0].count) == 2  # of 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epochs": 0}, "epochs"), ({"minibatches": 0}, "minibatches"), ({"clip": 0.0}, "clip"),
        ({"ptx_coefficient": -1.0}, "ptx_coefficient"), ({"ema_decay": 1.0}, "ema_decay"),
        ({"normalize": "row"}, "token or sequence"), ({"ptx_normalize": "row"}, "token or sequence"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        UpdateConfig(**settings)
