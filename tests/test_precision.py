"""float16's loss scale, and float32 master weights under bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from gptjax.errors import InputError
from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig, initial_loss_scale, next_loss_scale
from gptjax.training.state import new_state
from gptjax.training.step import train_step

MODEL = GPTConfig(64, n_layer=2, n_head=4, d_model=32, context_length=16, attention="reference")
STEPS = 20


def half(scale=2.0**16, interval=2000):
    return PrecisionConfig("float16", scale, interval)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- the scale by itself ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def scales(c, finite):
    def one(state, ok):
        state = next_loss_scale(c, state, ok)
        return state, state

    return lax.scan(one, initial_loss_scale(c), finite)[1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([True, True, True, False]), min_size=40, max_size=40))
def test_the_scale_halves_and_grows(finite):
    scale, clean, expected = 8.0, 0, []
    for ok in finite:
        clean = clean + 1 if ok else 0
        if not ok:
            scale = max(scale / 2, 1.0)
        elif clean == 3:
            scale, clean = scale * 2, 0
        expected.append((scale, clean))
    got = scales(half(8.0, 3), np.array(finite))
    assert list(zip(got.scale.tolist(), got.clean_steps.tolist(), strict=True)) == expected


def test_it_grows_after_2000_clean_steps_and_not_before():
    got = scales(PrecisionConfig("float16"), np.ones(4001, bool)).scale
    assert got[1998] == 2.0**16 and got[1999] == 2.0**17 and got[3998] == 2.0**17 and got[3999] == 2.0**18


def test_it_never_falls_below_1():
    got = scales(half(8.0, 5), np.array([False] * 6 + [True] * 5))
    assert got.scale.tolist() == [4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_other_precisions_have_no_scale(compute):
    assert scales(PrecisionConfig(compute), np.array([True, False, True])).scale.tolist() == [1, 1, 1]


def test_unknown_precision():
    with pytest.raises(InputError, match="fp8.*float32, bfloat16, float16"):
        PrecisionConfig("fp8")


# --- in the train step ------------------------------------------------------------------------------------


def half_loss(params, batch, key):
    """w x for a float16 w, whose gradient overflows where scale x reaches 65,520."""
    return (params["kernel"].astype(jnp.float16).astype(jnp.float32) * batch["x"]).sum(), jnp.float32(1)


@pytest.fixture(scope="module")
def toy():
    """(jitted step, state) for a float16 model of one weight, with AdamW moments."""
    tx = make_optimizer(OptimizerConfig())
    step = jax.jit(train_step(Objective(half_loss), tx, 1.0, half(2.0**16, 3), seed=0, dropout=False))
    return step, new_state({"kernel": jnp.float32(0.5)}, tx, half(2.0**16, 3))


def toy_batch(x):
    return {"x": jnp.full((1, 1, 1), x), "weights": jnp.ones((1, 1, 1))}, jnp.float32(0.1)


def test_an_overflow_changes_nothing_but_the_step_and_halves_the_scale(toy):
    step, state = toy
    moved, _ = step(state, toy_batch(0.25))  # clean, so that there are moments to lose
    assert float(moved.params["kernel"]) != 0.5
    new, metrics = step(moved, toy_batch(1.0))  # 65,536 x 1 is float16's infinity; the loss itself is finite
    assert not bool(metrics["finite"]) and np.isfinite(float(metrics["loss_sum"]))
    assert_same(new.params, moved.params)
    assert_same(new.opt_state, moved.opt_state)
    assert int(new.step) == int(moved.step) + 1
    assert float(new.loss_scale.scale) == 2.0**15 and int(new.loss_scale.clean_steps) == 0
    assert float(metrics["loss_scale"]) == 2.0**16  # the one the step was taken with


def test_training_goes_on_at_half_the_scale_and_grows_again(toy):
    step, state = toy
    trail = []
    for _ in range(5):
        state, metrics = step(state, toy_batch(1.0))
        trail.append((bool(metrics["finite"]), float(state.loss_scale.scale)))
    assert trail == [(False, 2.0**15), (True, 2.0**15), (True, 2.0**15), (True, 2.0**16), (False, 2.0**15)]


@pytest.mark.parametrize("x", [float("nan"), float("inf")])
def test_input_that_is_not_finite_is_skipped_too(toy, x):
    step, state = toy
    new, metrics = step(state, toy_batch(x))
    assert not bool(metrics["finite"])
    assert_same(new.params, state.params)
    assert_same(new.opt_state, state.opt_state)


def test_the_gradient_does_not_depend_on_the_scale():
    descent = optax.scale(-1.0)
    step = jax.jit(train_step(Objective(half_loss), descent, 0.0, half(), seed=0, dropout=False))
    for scale in (1.0, 2.0**10, 2.0**15):
        new, metrics = step(new_state({"kernel": jnp.float32(0.5)}, descent, half(scale)), toy_batch(0.75))
        assert float(metrics["loss_scale"]) == scale
        assert float(metrics["grad_norm"]) == 0.75 and float(new.params["kernel"]) == pytest.approx(0.5 - 0.075)


# --- a GPT ------------------------------------------------------------------------------------------------


@functools.cache
def initial_params():
    return jax.device_get(jax.jit(gpt.init, static_argnums=0)(MODEL, jax.random.key(0)))


@functools.cache
def trainer(compute):
    """learning rate -> (state, metrics) of 20 steps of a GPT, jitted."""
    precision = PrecisionConfig(compute)
    tx = make_optimizer(OptimizerConfig(eps=1e-6))
    params = initial_params()
    step = train_step(Objective(causal_lm_loss(MODEL, precision.dtype, 16)), tx, 1.0, precision, seed=0, dropout=False)
    tokens = np.random.default_rng(1).integers(0, 8, (STEPS, 1, 4, 17))
    batches = {"tokens": tokens, "weights": np.ones((STEPS, 1, 4, 16), np.float32)}
    state = new_state(params, tx, precision)
    return jax.jit(lambda rate: lax.scan(step, state, (batches, jnp.full(STEPS, rate))))


@pytest.fixture(scope="module")
def runs():
    return {compute: trainer(compute)(1e-2) for compute in ("float32", "bfloat16", "float16")}


@pytest.mark.parametrize("compute, tolerance", [("float16", 0.01), ("bfloat16", 0.05)])
def test_training_tracks_float32(runs, compute, tolerance):
    loss = {k: np.asarray(m["loss_sum"] / m["count"]) for k, (_, m) in runs.items()}
    assert loss["float32"][0] > 4 and loss["float32"][-1] < 2.5  # ln 64, then towards ln 8
    assert np.asarray(runs[compute][1]["finite"]).all()  # none skipped: the runs can be compared step by step
    np.testing.assert_allclose(loss[compute], loss["float32"], atol=tolerance)
    assert not np.array_equal(loss[compute], loss["float32"])  # it was computed in another precision


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_parameters_and_moments_stay_float32(runs, compute):
    state, metrics = runs[compute]
    floats = [x for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_bfloat16_keeps_updates_smaller_than_its_own_resolution():
    """Steps of 1e-6 on gains of 1: bfloat16 would round each of them away."""
    state, _ = trainer("bfloat16")(1e-6)
    moved = np.abs(np.asarray(state.params["ln_f"]["scale"]) - 1)
    assert (moved > 1e-6).mean() > 0.9 and moved.max() < 3e-5
