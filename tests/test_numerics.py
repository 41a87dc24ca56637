"""The bound of every comparison of two computations: sums in any order keep within it, an error of 1e-4 does not."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import SAFETY, approx, assert_close, model_terms, tolerance, unit_roundoff
from test_gpt import TINY, numpy_forward, random_params, random_tokens

from gptjax.model import gpt
from gptjax.objectives import chunked
from gptjax.parallel.mesh import MeshConfig, make_mesh

FAULT = 1 + 1e-4
MAGNITUDES = [1e-20, 1e-3, 1.0, 7.28, 1e6]


def sums(x, rng):
    """The sum of float32 numbers in the orders that processors take: one after another, permuted, backwards, pairwise,
    over vectors of several widths, over parts as devices have them."""
    yield "one by one", np.cumsum(x, dtype=np.float32)[-1]
    yield "backwards", np.cumsum(x[::-1], dtype=np.float32)[-1]
    yield "permuted", np.cumsum(rng.permutation(x), dtype=np.float32)[-1]
    yield "sorted", np.cumsum(np.sort(x), dtype=np.float32)[-1]
    yield "pairwise", np.sum(x, dtype=np.float32)
    for width in (4, 8, 16, 64):
        padded = np.pad(x, (0, -len(x) % width)).reshape(-1, width)
        yield f"vectors of {width}", np.sum(np.cumsum(padded, axis=0, dtype=np.float32)[-1], dtype=np.float32)
    for parts in (2, 8):
        each = [np.cumsum(part, dtype=np.float32)[-1] for part in np.array_split(x, parts) if len(part)]
        yield f"{parts} devices", np.cumsum(each, dtype=np.float32)[-1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 4000), magnitude=st.sampled_from(MAGNITUDES),
    kind=st.sampled_from(["normal", "positive", "one large"]),
)  # fmt: skip
def test_sums_in_any_order_are_close(seed, n, magnitude, kind):
    """Of numbers that cancel, the magnitude is that of the numbers' sum without signs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n)
    if kind == "positive":
        x = np.abs(x)
    if kind == "one large":
        x[0] *= 1000
    x = (magnitude * x).astype(np.float32)
    exact, scale = np.sum(x, dtype=np.float64), np.sum(np.abs(x), dtype=np.float64)
    if kind == "positive":
        scale = 0.0  # the result is the magnitude
    for name, found in sums(x, rng):
        # beside it a sum that does not cancel, without which the comparison would be refused as blind
        assert_close([found, np.float32(scale or exact)], [exact, scale or exact], terms=n, scale=scale, err_msg=name)


@pytest.mark.parametrize("n, error", [(n, e) for n in (1, 30, 1000, 10_000) for e in (1e-4, -1e-4)] + [(100, 1e-5)])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_a_planted_error_is_seen(n, error, magnitude):
    """1e-4 at every length that is not refused; 1e-5 where sums are short."""
    x = (magnitude * np.random.default_rng(0).random((7, n))).astype(np.float32)
    exact = x.astype(np.float64).sum(1)
    found = x.sum(1)
    assert_close(found, exact, terms=n)
    with pytest.raises(AssertionError, match="times the bound"):
        assert_close(found * np.float32(1 + error), exact, terms=n)
    one = found.copy()
    one[np.abs(exact).argmax()] *= 1 + error
    with pytest.raises(AssertionError, match="times the bound"):  # in the largest entry alone
        assert_close({"a": x, "b": one}, {"a": x, "b": exact}, terms=n)
    assert float(found[0]) == approx(exact[0], terms=n) != float(found[0]) * (1 + error)


@pytest.mark.parametrize("dtype, bits", [(jnp.float32, 24), (jnp.bfloat16, 8), (jnp.float16, 11), (jnp.float64, 53)])
def test_the_roundoff_is_that_of_the_dtype(dtype, bits):
    assert unit_roundoff(dtype) == 2.0**-bits
    assert tolerance(9, dtype) == SAFETY * 3 * 2.0**-bits


def test_the_coarser_dtype_decides_and_float32_at_least():
    one = np.ones(3)
    assert_close(jnp.asarray(1.004 * one, jnp.bfloat16), one, terms=1)
    for found in (1.004 * one, np.float32(1.004 * one)):
        with pytest.raises(AssertionError):
            assert_close(found, one, terms=1)
    assert_close(one + 1e-7, one, terms=1)  # figures from a file, computed in float32
    assert_close({"a": 1 + 1e-7, "b": np.arange(3)}, {"a": 1.0, "b": np.arange(3)}, terms=1)
    with pytest.raises(AssertionError):
        assert_close(one + 1e-7, one, terms=1, dtype=np.float64)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_close(bad):
    for pair in ((np.array([1.0, bad]), np.ones(2)), (np.ones(2), np.array([1.0, bad]))):
        with pytest.raises(AssertionError, match="times the bound"):
            assert_close(*pair, terms=4)
    assert_close(np.array([1.0, -np.inf]), np.array([1.0, -np.inf]), terms=4)  # a masked score
    with pytest.raises(AssertionError, match="shapes"):
        assert_close(np.ones((2, 1)), np.ones(2), terms=4)


def test_a_comparison_that_sees_nothing_is_refused():
    with pytest.raises(ValueError, match="hides a relative error"):
        tolerance(11_000)
    with pytest.raises(ValueError, match="hides a relative error"):
        approx(1.0, terms=11_000)
    with pytest.raises(ValueError, match="would pass"):
        assert_close(np.ones(2), np.ones(2), terms=4, scale=1e4)
    with pytest.raises(ValueError, match="would pass"):
        assert_close(np.ones(2), np.ones(2), terms=4, stored=1e4)


def test_differences_of_rounded_arrays():
    """Parameters of magnitude 4 moved by 0.1: each was rounded where it is stored."""
    rng = np.random.default_rng(0)
    before, step = rng.uniform(2, 4, 500).astype(np.float32), rng.uniform(-0.1, 0.1, 500)
    moved = (before + step.astype(np.float32)) - before
    for stored in (before, 4.0):
        assert_close(moved, step, terms=1, stored=stored)
        with pytest.raises(AssertionError, match="times the bound"):
            assert_close(FAULT * moved, step, terms=1, stored=stored)
    with pytest.raises(AssertionError, match="times the bound"):
        assert_close(moved, step, terms=1)


# --- faults planted in the code under test ------------------------------------------------------------------


def forward():
    params, tokens = random_params(TINY), random_tokens(TINY)
    x = jax.jit(lambda p, t: gpt.hidden(p, TINY, t))(params, tokens)  # compiled anew: what was planted is in it
    assert_close(x, numpy_forward(params, TINY, tokens)[0], terms=model_terms(TINY, 3))


def loss(mesh=None):
    import test_language as here

    arguments = here.problem(batch=8)
    f = lambda x, w: chunked.cross_entropy_sum(x, w, *arguments[2:], 4)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        value, (d_x, d_w) = jax.jit(jax.value_and_grad(f, (0, 1)))(*arguments[:2])
    assert_close([value, d_x, d_w], list(here.oracle(*arguments)), terms=here.TERMS)


def sharded_loss():
    loss(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


@pytest.mark.parametrize(
    "check, module, name",
    [(forward, gpt, "attention"), (forward, gpt, "gelu"), (loss, chunked, "_d_x"), (sharded_loss, chunked, "_d_w")],
)
def test_a_fault_in_the_code_is_seen(check, module, name, monkeypatch):
    """One part of the model or the loss too large by 1e-4."""
    check()
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: jax.tree.map(lambda x: FAULT * x, real(*a, **k)))
    with pytest.raises(AssertionError, match="times the bound"):
        check()
