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
    return gpt.init(MODEL, jax.random.key(0))


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
    state = new_state(params, KEEP, F32)
    new, metrics = step(state, (jax.tree.map(jnp.asarray, micro_batches(batch, rows)), jnp.float32(1)))
    return new.opt_state, metrics


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


@pytest.mark.parametrize("rows", [2, 1])
def test_micro_batches_are_one_big_batch(descend, params, batch, rows):
    """With as unequal weights as can be: one micro-batch has none."""
    whole, big = gradient(descend, params, batch, ROWS)
    parts, small = gradient(descend, params, batch, rows)
    assert not micro_batches(batch, rows)["weights"][-1].any()
    assert_close(parts, whole, terms=TERMS)
    for name in ("loss_sum", "count", "grad_norm"):
        assert float(small[name]) == approx(float(big[name]), terms=TERMS)


def test_padded_rows_change_nothing(descend, params, batch):
    whole, metrics = gradient(descend, params, batch, ROWS)
    other = {**batch, "tokens": batch["tokens"].copy()}
    other["tokens"][6:] = 63 - other["tokens"][6:]
    assert_same(gradient(descend, params, other, ROWS)[0], whole)
    without, fewer = gradient(descend, params, {k: v[:6] for k, v in batch.items()}, 6)
    assert_close(without, whole, terms=TERMS)
    assert float(fewer["count"]) == float(metrics["count"])


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

    state = new_state({"a": jnp.float32(0)}, KEEP, F32)
    draws = {}
    for seed in (0, 1):
        step = gradient_step(loss, seed=seed, dropout=True)
        for n_micro in (1, 2, 4):
            s, one_hot = state, jnp.eye(4).reshape(n_micro, 4 // n_micro, 4, 1)
            for t in range(2):
                s, metrics = step(s, ({"weights": one_hot}, jnp.float32(1)))
                draws[seed, n_micro, t] = tuple(np.asarray(metrics["sums"]["draws"]).tolist())
    for (seed, _, t), found in draws.items():
        assert found == draws[seed, 1, t]
    assert len({d for found in draws.values() for d in found}) == 2 * 2 * 4


def test_dropout_is_the_same_in_micro_batches_of_any_size(params, batch):
    step = gradient_step(causal_lm_loss(DROPOUT, jnp.float32, 8), dropout=True)
    whole, metrics = gradient(step, params, batch, ROWS)
    parts, of_parts = gradient(step, params, batch, ROWS // 4)
    assert_close(of_parts["loss_sum"], metrics["loss_sum"], terms=TERMS)
    assert_close(parts, whole, terms=TERMS)


def test_no_key_without_dropout():
    def loss(params, micro, key):
        assert key is None
        return params["a"], jnp.float32(1)

    step = gradient_step(loss)
    step(new_state({"a": jnp.float32(0)}, KEEP, F32), ({"weights": jnp.ones((2, 1, 1))}, jnp.float32(1)))


# --- several steps a dispatch -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def born():
    """(mesh, shardings, jitted train step, fresh state maker) of the model with dropout, AdamW, on one device."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tx = make_optimizer(OptimizerConfig())
    _, shardings = state_shardings(gpt.abstract_params(DROPOUT), tx, F32, mesh)
    step = train_step(Objective(causal_lm_loss(DROPOUT, jnp.float32, 8, mesh)), tx, 1.0, F32, seed=3, dropout=True)
    return mesh, shardings, jit_train_step(step, shardings), lambda: init_state(DROPOUT, tx, F32, shardings, 0)


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
    moved = lambda state: jax.tree.map(lambda a, b: a - b, state.params, begun)
    assert_close(moved(results[1][0]), moved(results[3][0]), terms=TERMS, stored=begun)
    assert_close(results[1][1]["loss_sum"], results[3][1]["loss_sum"], terms=TERMS)


def test_the_state_is_donated_and_the_memory_told(born):
    mesh, _, run, fresh = born
    with jax.set_mesh(mesh):
        state, batch = fresh(), stacked_batches(1)
        said = []
        dispatch = Dispatch(run, said.append)
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n_micro", [1, 3])
def test_a_loss_that_is_not_finite_changes_no_parameter(bad, n_micro):
    def loss(params, micro, key):
        return (params["kernel"] * micro["x"]).sum(), jnp.float32(1)

    tx = make_optimizer(OptimizerConfig())
    step = jax.jit(train_step(Objective(loss), tx, 1.0, F32, seed=0, dropout=False))
    good = {"x": jnp.ones((n_micro, 1, 1)), "weights": jnp.ones((n_micro, 1, 1))}
    state, metrics = step(new_state({"kernel": jnp.ones(3)}, tx, F32), (good, jnp.float32(0.1)))
    assert bool(metrics["finite"])
    new, metrics = step(state, ({**good, "x": good["x"].at[-1].set(bad)}, jnp.float32(0.1)))
    assert not bool(metrics["finite"])
    assert_same((new.params, new.opt_state, new.loss_scale), (state.params, state.opt_state, state.loss_scale))
    assert int(new.step) == 2


# --- it learns --------------------------------------------------------------------------------------------


def test_it_overfits_one_batch():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tx = make_optimizer(OptimizerConfig(weight_decay=0.0))
    _, shardings = state_shardings(gpt.abstract_params(MODEL), tx, F32, mesh)
    loss = causal_lm_loss(MODEL, jnp.float32, 16, mesh)
    run = jit_train_step(train_step(Objective(loss), tx, 1.0, F32, seed=0, dropout=False), shardings)
    one = stacked_batches(1)
    fifty = jax.tree.map(lambda x: np.repeat(x, 50, axis=0), one)
    with jax.set_mesh(mesh):
        state = init_state(MODEL, tx, F32, shardings, 0)
        evaluate = jit_eval_step(loss, mesh)
        row = jax.tree.map(lambda x: x[0, 0], one)
        total, count, _ = evaluate(state.params, row)
        assert float(total / count) == pytest.approx(np.log(64), abs=0.15) and int(count) == 4 * TIME
        for _ in range(4):
            state, metrics = run(state, fifty, np.full(50, 1e-2, np.float32))
        total, count, _ = evaluate(state.params, row)
    assert float(total / count) < 0.05
    assert float(metrics["loss_sum"][-1] / metrics["count"][-1]) < 0.05
