"""The train step: accumulation, padding, several steps a dispatch, dropout keys, what a NaN leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numerics import approx, assert_close, model_terms

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.training.loop import plan
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig
from gptjax.training.state import init_state, new_state, state_shardings
from gptjax.training.step import jit_eval_step, jit_train_step, memory_needed, train_step
from gptjax.training.supervised import Dispatch, micro_batches

MODEL = GPTConfig(64, n_layer=2, n_head=4, d_model=32, context_length=16, attention="reference")
DROPOUT = dataclasses.replace(MODEL, dropout=0.2)
F32 = PrecisionConfig()
KEEP = optax.GradientTransformation(  # an optimizer that moves nothing and whose state is the gradient
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params: (state, grads)
)
ROWS, TIME = 8, 16
TERMS = model_terms(MODEL, ROWS)


@pytest.fixture(scope="module")
def params():
    return jax.device_get(jax.jit(gpt.init, static_argnums=0)(MODEL, jax.random.key(0)))


@pytest.fixture(scope="module")
def batch():
    """Rows of very unequal weight; rows 6 and 7 are padding."""
    rng = np.random.default_rng(0)
    weights = (rng.random((ROWS, TIME)) < np.linspace(0.05, 1, ROWS)[:, None]).astype(np.float32)
    weights[2] *= 0.25
    weights[6:] = 0
    return {"tokens": rng.integers(0, 64, (ROWS, TIME + 1), np.int32), "weights": weights}


def gradient_step(loss, **kwargs):
    options = {"clip_norm": 0.0, "precision": F32, "seed": 0, "dropout": False} | kwargs
    return jax.jit(train_step(Objective(loss), KEEP, **options))


@pytest.fixture(scope="module")
def descend():
    return gradient_step(causal_lm_loss(MODEL, jnp.float32, 8))


def gradient(step, params, batch, rows):
    """(gradient, metrics) of a step over micro-batches of so many rows."""
    new, metrics = step(new_state(params, KEEP, F32), (micro_batches(batch, rows), np.float32(1)))
    return jax.device_get((new.opt_state, metrics))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- accumulation -----------------------------------------------------------------------------------------


def test_the_gradient_is_of_the_mean_over_all_weighted_tokens(descend, params, batch):
    """Against autodiff of the formula written out."""

    def mean(p):
        logits = gpt.logits(p, MODEL, gpt.hidden(p, MODEL, batch["tokens"][:, :-1]))
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        return (nll * batch["weights"]).sum() / batch["weights"].sum()

    loss, expected = jax.jit(jax.value_and_grad(mean))(params)
    got, metrics = gradient(descend, params, batch, ROWS)
    assert_close(got, expected, terms=TERMS)
    assert float(metrics["count"]) == batch["weights"].sum()
    assert float(metrics["loss_sum"] / metrics["count"]) == approx(float(loss), terms=TERMS)
    assert float(metrics["grad_norm"]) == approx(float(optax.tree.norm(expected)), terms=TERMS)


def test_micro_batches_are_one_big_batch_with_dropout_too(params, batch):
    """With as unequal weights as can be, one micro-batch having none, and the dropout noise of one big batch."""
    step = gradient_step(causal_lm_loss(DROPOUT, jnp.float32, 8), dropout=True)
    whole, big = gradient(step, params, batch, ROWS)
    parts, small = gradient(step, params, batch, 2)
    assert not micro_batches(batch, 2)["weights"][-1].any()
    assert_close(parts, whole, terms=TERMS)
    for name in ("loss_sum", "count", "grad_norm"):
        assert float(small[name]) == approx(float(big[name]), terms=TERMS)


def test_padded_rows_change_nothing(descend, params, batch):
    """Whatever is in them; that those of weight 0 do not count: test_the_gradient_is_of_the_mean..."""
    whole, metrics = gradient(descend, params, batch, ROWS)
    other = {**batch, "tokens": batch["tokens"].copy()}
    other["tokens"][6:] = 63 - other["tokens"][6:]
    assert_same(gradient(descend, params, other, ROWS), (whole, metrics))


def test_a_batch_without_any_weight_is_no_division_by_zero(descend, params, batch):
    got, metrics = gradient(descend, params, {**batch, "weights": np.zeros_like(batch["weights"])}, ROWS)
    assert bool(metrics["finite"]) and float(metrics["loss_sum"]) == 0
    assert all((g == 0).all() for g in jax.tree.leaves(got))


# --- dropout ----------------------------------------------------------------------------------------------


def test_every_step_and_row_has_its_own_dropout_key():
    """The same in micro-batches of any size: a row's key is of its place in the batch."""

    def loss(params, micro, keys):
        draws = jax.vmap(jax.random.uniform)(keys)
        more = {"draws": (micro["weights"][..., 0] * draws[:, None]).sum(0)}
        return params["a"] * 0 + draws.sum(), jnp.float32(1), more

    state = new_state({"a": np.float32(0)}, KEEP, F32)
    draws = {}
    for seed, n_micro in ((0, 1), (0, 2), (1, 2)):
        step = gradient_step(loss, seed=seed, dropout=True)
        s, one_hot = state, np.eye(4, dtype=np.float32).reshape(n_micro, 4 // n_micro, 4, 1)
        for t in range(2):
            s, metrics = step(s, ({"weights": one_hot}, np.float32(1)))
            draws[seed, n_micro, t] = np.asarray(metrics["sums"]["draws"]).tolist()
    for t in range(2):
        assert draws[0, 1, t] == draws[0, 2, t]
    assert len({d for found in draws.values() for d in found}) == 2 * 2 * 4
    several = jax.jit(lambda s, batches: jax.lax.scan(step, s, batches)[1]["sums"]["draws"])  # in a dispatch
    found = several(state, ({"weights": np.stack([one_hot] * 2)}, np.ones(2, np.float32)))
    assert found.tolist() == [draws[1, 2, 0], draws[1, 2, 1]]


def test_no_key_without_dropout():
    def loss(params, micro, key):
        assert key is None
        return params["a"], jnp.float32(1)

    step = gradient_step(loss)
    step(new_state({"a": jnp.float32(0)}, KEEP, F32), ({"weights": jnp.ones((2, 1, 1))}, jnp.float32(1)))


# --- several steps a dispatch -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def born():
    """(mesh, loss, jitted train step, fresh state maker) of the model, AdamW, on one device."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tx = make_optimizer(OptimizerConfig())
    _, shardings = state_shardings(gpt.abstract_params(MODEL), tx, F32, mesh)
    loss = causal_lm_loss(MODEL, jnp.float32, 8, mesh)
    step = train_step(Objective(loss), tx, 1.0, F32, seed=3, dropout=False)
    first = jax.device_get(init_state(MODEL, tx, F32, shardings, 0))
    return mesh, loss, jit_train_step(step, shardings), lambda: jax.device_put(first, shardings)


def stacked_batches(steps):
    tokens = np.random.default_rng(1).integers(0, 64, (steps, 1, 4, TIME + 1), np.int32)
    return {"tokens": tokens, "weights": np.ones((steps, 1, 4, TIME), np.float32)}


def test_several_steps_in_a_dispatch_are_the_same_steps(born):
    """To rounding, as one step is straight-line code and several are a loop."""
    mesh, _, run, fresh = born
    batches, rates = stacked_batches(6), np.linspace(1e-4, 1e-3, 6, dtype=np.float32)
    part = lambda a, b: (jax.tree.map(lambda x: x[a:b], batches), rates[a:b])
    results = {}
    with jax.set_mesh(mesh):
        for size in (1, 3):
            state, metrics = fresh(), []
            for a in range(0, 6, size):
                state, m = run(state, *part(a, a + size))
                metrics.append(m)
            results[size] = jax.device_get((state, jax.tree.map(lambda *x: np.concatenate(x), *metrics)))
    assert int(results[3][0].step) == 6
    with jax.set_mesh(mesh):
        begun = jax.device_get(fresh().params)

    def moved(state):
        found = jax.tree.map(lambda a, b: a - b, state.params, begun)
        found["blocks"]["attn"]["c_attn"]["bias"][:, 1] = 0  # the keys': a gradient of 0 but for rounding, and Adam
        return found

    assert_close(moved(results[1][0]), moved(results[3][0]), terms=TERMS, stored=begun)
    assert_close(results[1][1]["loss_sum"], results[3][1]["loss_sum"], terms=TERMS)


def test_the_state_is_donated_and_the_memory_told(born):
    mesh, _, run, fresh = born
    with jax.set_mesh(mesh):
        state, batch = fresh(), stacked_batches(1)
        said = []
        dispatch = Dispatch(run, say=said.append)
        new, _ = dispatch(state, batch, np.float32([1e-3]))
        dispatch(new, batch, np.float32([1e-3]))
        needed = memory_needed(run.lower(fresh(), batch, np.float32([1e-3])).compile())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert len(said) == 1 and "memory per device" in said[0]
    state_bytes = 3 * 4 * sum(x.size for x in jax.tree.leaves(new.params))
    assert state_bytes < needed["state and batch"] < 1.2 * state_bytes
    assert needed["outputs"] < state_bytes / 3  # the new state lies where the old one was


@pytest.mark.parametrize(
    "start, stop, size, boundaries", [(0, 25, 5, (10, 7)), (13, 25, 10, (5,)), (3, 4, 8, ()), (0, 9, 4, (0, 6))]
)
def test_chunks_cover_every_step_and_stop_at_boundaries(start, stop, size, boundaries):
    got = list(plan(start, stop, size, *boundaries))
    assert [s for first, n in got for s in range(first, first + n)] == list(range(start, stop))
    assert all(1 <= n <= size for _, n in got)
    ends = {first + n for first, n in got}
    assert all(b * k in ends for b in boundaries if b for k in range(start // b + 1, (stop - 1) // b + 1))


# --- what a NaN leaves alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_micro", [1, 3])
def test_a_loss_that_is_not_finite_changes_no_parameter(n_micro):
    def loss(params, micro, key):
        return (params["kernel"] * micro["x"]).sum(), jnp.float32(1)

    tx = make_optimizer(OptimizerConfig())
    step = jax.jit(train_step(Objective(loss), tx, 1.0, F32, seed=0, dropout=False))
    good = {"x": np.ones((n_micro, 1, 1), np.float32), "weights": np.ones((n_micro, 1, 1), np.float32)}
    state, metrics = step(new_state({"kernel": np.ones(3, np.float32)}, tx, F32), (good, np.float32(0.1)))
    assert bool(metrics["finite"])
    for bad in (np.nan, np.inf):
        x = good["x"].copy()
        x[-1] = bad
        new, metrics = step(state, ({**good, "x": x}, np.float32(0.1)))
        assert not bool(metrics["finite"])
        assert_same((new.params, new.opt_state, new.loss_scale), (state.params, state.opt_state, state.loss_scale))
        assert int(new.step) == 2


# --- it learns --------------------------------------------------------------------------------------------


def test_it_overfits_one_batch(born):
    mesh, loss, run, fresh = born
    one = stacked_batches(1)
    three = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), one)
    with jax.set_mesh(mesh):
        state = fresh()
        evaluate = jit_eval_step(loss, mesh)
        row = jax.tree.map(lambda x: x[0, 0], one)
        total, count, _ = evaluate(state.params, row)
        assert float(total / count) == pytest.approx(np.log(64), abs=0.15) and int(count) == 4 * TIME
        for _ in range(67):
            state, metrics = run(state, three, np.full(3, 1e-2, np.float32))
        total, count, _ = evaluate(state.params, row)
    assert float(total / count) < 0.05
    assert float(metrics["loss_sum"][-1] / metrics["count"][-1]) < 0.05
