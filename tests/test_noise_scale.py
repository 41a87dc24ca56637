"""The gradient noise scale: known |G|^2 and tr(Sigma), averages that a resumed run continues, the step as it was."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import approx, assert_close, model_terms
from test_step import F32, KEEP, MODEL, ROWS, TIME, batch, params  # noqa: F401 (fixtures)

from gptjax.errors import InputError
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.pretrain import PretrainConfig
from gptjax.training.noise_scale import Averages, gradient_and_noise, squared_norm
from gptjax.training.state import new_state
from gptjax.training.step import train_step
from gptjax.training.supervised import micro_batches


def test_exact_mean_norms_give_both_parts_exactly():
    """|G|^2 + tr(Sigma) / n for micro-batches of unequal size, one of them without data."""
    squared, trace = 0.25, 40.0
    counts = np.array([2, 8, 32, 0, 22], np.float32)
    norms = np.where(counts > 0, squared + trace / np.maximum(counts, 1), 0).astype(np.float32)
    found = gradient_and_noise(counts, norms, counts.sum(), squared + trace / counts.sum())
    assert float(found[0]) == approx(squared, terms=8, scale=16) and float(found[1]) == approx(trace, terms=8, scale=80)


def test_one_micro_batch_gives_no_estimate():
    assert not np.isfinite(gradient_and_noise(np.float32([8, 0]), np.float32([1, 0]), 8.0, 1.0)).any()


def test_a_quadratic_of_known_noise():
    """The loss |theta - x|^2 / 2 of data x ~ N(0, diag(sigma^2)): G = theta and Sigma = diag(sigma^2), wherever theta
    is. Over 400 steps of 4 micro-batches of 8 rows within 5 %: what it is off is the draws' (1.4 % of the trace)."""
    rng = np.random.default_rng(0)
    theta, sigma = np.full(100, 0.3, np.float32), rng.uniform(0.5, 2.0, 100).astype(np.float32)

    def loss(p, data, keys):
        return 0.5 * ((p["theta"] - data["x"]) ** 2).sum(), data["weights"].sum()

    step = jax.jit(train_step(Objective(loss), KEEP, 0.0, F32, 0, False, noise_scale=True))
    state, found = new_state({"theta": theta}, KEEP, F32), []
    for _ in range(400):
        x = sigma * rng.standard_normal((4, 8, 1, 100), np.float32)
        _, metrics = step(state, ({"x": x, "weights": np.ones((4, 8, 1), np.float32)}, np.float32(1)))
        found.append(jax.device_get(metrics["noise"]))
    squared, trace = np.mean(found, axis=0)
    assert trace == pytest.approx((sigma**2).sum(), rel=0.05)
    assert squared == pytest.approx((theta**2).sum(), rel=0.05)
    assert trace / squared == pytest.approx((sigma**2).sum() / (theta**2).sum(), rel=0.05)


def test_it_leaves_the_step_as_it_is(params, batch):  # noqa: F811
    """The gradient and all other metrics, up to rounding: it is another program."""
    ended = []
    for on in (False, True):
        step = train_step(Objective(causal_lm_loss(MODEL, jnp.float32, 8)), KEEP, 0.0, F32, 0, False, noise_scale=on)
        state, metrics = jax.jit(step)(new_state(params, KEEP, F32), (micro_batches(batch, ROWS // 4), np.float32(1)))
        assert (metrics.pop("noise", None) is not None) == on
        ended.append(jax.device_get((state.opt_state, metrics)))
    assert_close(ended[1], ended[0], terms=model_terms(MODEL, ROWS, TIME))


def test_averages_are_means_at_first_and_go_on_where_they_were():
    values = np.random.default_rng(0).normal(1.0, 0.1, (300, 2))
    whole, part = Averages(), None
    for step, (squared, trace) in enumerate(values, 1):
        fields = whole.add(step, squared, trace)
        if step == 50:
            assert fields["noise/trace"] == pytest.approx(values[:50, 1].mean(), rel=1e-12)
            part = Averages(fields["noise/squared_gradient"], fields["noise/trace"])
        elif part is not None:
            assert part.add(step, squared, trace) == fields
    decayed = functools.reduce(lambda mean, x: 0.99 * mean + 0.01 * x, values[100:, 0], values[:100, 0].mean())
    assert fields["noise/squared_gradient"] == pytest.approx(decayed, rel=1e-12)


def test_what_is_not_finite_is_left_out_and_a_negative_square_gives_no_ratio():
    averages = Averages()
    assert math.isnan(averages.add(1, math.inf, 1.0)["noise_scale"])
    assert averages.add(2, -1.0, 4.0)["noise/trace"] == 4.0
    assert math.isnan(averages.add(3, math.nan, 1.0)["noise_scale"])


def test_squared_norm():
    assert float(squared_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])})) == 25


def test_a_batch_of_one_micro_batch_is_refused():
    with pytest.raises(InputError, match="set microbatch_size to a half"):
        PretrainConfig(model=MODEL, batch_size=8, noise_scale=True)
    PretrainConfig(model=MODEL, batch_size=8, microbatch_size=4, noise_scale=True)
