"""The chunked cross-entropy against the plain one, what it holds in memory, and bits per byte."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numerics import assert_close, model_terms, tolerance
from test_gpt import random_params

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.chunked import cross_entropy_sum, token_log_probs, token_log_probs_and_entropy
from gptjax.objectives.lm import bits_per_byte, causal_lm_loss, lm_loss, log_probs
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.sharding import parameter_shardings

B, T, D, V = 3, 10, 8, 29
# Roundings one after another: of the logits, the softmax, the product with the table, and the sum over all tokens of
# at most 8 rows.
TERMS = D + 2 * V + 8 * T
CHUNKS = [1, 4, 9, 10, 1000]  # 4 and 9 do not divide 10


def problem(batch=B, time=T, width=D, vocab=V, dtype=jnp.float32, seed=0):
    """x, w, targets, weights; the weights hold 0, 1 and fractions."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((batch, time, width)), dtype)
    w = jnp.asarray(rng.standard_normal((vocab, width)), jnp.float32)
    weights = rng.choice(np.array([0, 1, 0.25, 3.5], np.float32), (batch, time))
    return x, w, jnp.asarray(rng.integers(0, vocab, (batch, time))), jnp.asarray(weights)


def oracle(x, w, targets, weights):
    """Loss and gradients in x and w, numpy float64."""
    x, w, weights = (np.asarray(a).astype(np.float64) for a in (x, w, weights))
    logits = x @ w.T
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    one_hot = np.asarray(targets)[..., None] == np.arange(len(w))
    d_logits = (np.exp(log_p) - one_hot) * weights[..., None]
    return -(weights * log_p[one_hot].reshape(weights.shape)).sum(), d_logits @ w, np.einsum("btv,btd->vd", d_logits, x)


@functools.partial(jax.jit, static_argnames="chunk")
def chunked(x, w, targets, weights, chunk):
    return jax.value_and_grad(cross_entropy_sum, (0, 1))(x, w, targets, weights, chunk)


value_alone = jax.jit(cross_entropy_sum, static_argnums=4)  # without a gradient


@jax.jit
def plain(x, w, targets, weights):
    return jax.value_and_grad(lambda x, w: -(weights * log_probs(x, w, targets)).sum(), (0, 1))(x, w)


# --- equal to the plain loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunked_equals_plain_and_the_oracle(chunk):
    arguments = problem()
    value, (d_x, d_w) = chunked(*arguments, chunk)
    for expected, (e_x, e_w) in (plain(*arguments), (lambda o: (o[0], o[1:]))(oracle(*arguments))):
        assert_close((value, d_x, d_w), (expected, e_x, e_w), terms=TERMS)
    assert value.dtype == jnp.float32 and d_x.shape == (B, T, D) and d_w.shape == (V, D)
    assert_close(value_alone(*arguments, chunk), value, terms=TERMS)


@pytest.mark.parametrize("sizes", [None, (1, 2, 2, 2)], ids=str)
def test_the_trained_loss_equals_the_plain_one(sizes):
    """causal_lm_loss beside lm_loss, the model and its gradient in both: weights of 0 and more, documents packed into a
    row or a row of one document, one device or a mesh."""
    c = GPTConfig(vocab_size=61, n_layer=2, n_head=2, d_model=16, context_length=12, attention="xla", local_window=3)
    rng = np.random.default_rng(2)
    batch = {"tokens": rng.integers(0, 61, (8, 13)), "weights": rng.choice(np.array([0, 1, 0.5], np.float32), (8, 12))}
    segments = np.sort(rng.integers(0, 3, (8, 12)))
    starts = (segments[:, None] < segments[..., None]).sum(-1)
    packed = {**batch, "segment_ids": segments, "positions": np.arange(12) - starts}
    gradients = lambda loss: jax.jit(jax.value_and_grad(loss, has_aux=True))
    params = random_params(c)
    plain = gradients(lambda p, b: lm_loss(p, c, b))
    if sizes is None:
        run, context, placed = causal_lm_loss(c, jnp.float32, 5), contextlib.nullcontext(), params
    else:
        mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor", "seq"), sizes, strict=True))))
        run, context = causal_lm_loss(c, jnp.float32, 5, mesh), jax.set_mesh(mesh)
        placed = jax.device_put(params, parameter_shardings(gpt.abstract_params(c), mesh))
    for rows in (packed, batch) if sizes is None else (packed,):
        with context:
            found = gradients(lambda p, b: run(p, b, None))(placed, rows)
        (_, count), _ = found
        assert count == batch["weights"].sum()
        assert_close(found, plain(params, rows), terms=model_terms(c, 8))


def test_the_table_is_gathered_before_the_loop_over_chunks():
    """Behind a barrier, or a compiler may gather it again for each chunk. What a TPU's does: tests/test_aot.py."""
    c = GPTConfig(vocab_size=61, n_layer=2, n_head=2, d_model=16, context_length=12, attention="xla")
    batch, params = {"tokens": np.zeros((8, 13), np.int32), "weights": np.ones((8, 12), np.float32)}, random_params(c)
    barriers = {}
    for fsdp in (1, 8):
        mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp), jax.devices()[:fsdp])
        loss = causal_lm_loss(c, jnp.float32, 4, mesh)
        with jax.set_mesh(mesh):
            text = jax.jit(lambda p, b, loss=loss: loss(p, b, None)).lower(params, batch).as_text()
        barriers[fsdp] = text.count("stablehlo.optimization_barrier")
    assert barriers == {1: 0, 8: 1}


@pytest.mark.parametrize("chunk, temperature", [(3, 0.7), (1000, 1.0)])
def test_token_log_probs_equal_the_plain_ones(chunk, temperature):
    x, w, targets, weights = problem()
    run = lambda f: jax.jit(jax.value_and_grad(lambda x, w: (weights * f(x, w)).sum(), (0, 1)))(x, w)
    found = run(lambda x, w: token_log_probs(x, w, targets, temperature, chunk))
    expected = run(lambda x, w: log_probs(x, w, targets, temperature))
    assert_close(found, expected, terms=TERMS)
    plain = jax.jit(lambda targets: log_probs(x, w, targets, temperature))
    every = np.stack([plain(np.full((B, T), v)) for v in range(V)], -1)
    expected = plain(targets), -(np.exp(every) * every).sum(-1)
    found = jax.jit(lambda x, w: token_log_probs_and_entropy(x, w, targets, temperature, chunk))(x, w)
    # the entropy is a difference of what log-probabilities are sums of
    assert_close(found, expected, terms=TERMS, scale=float(np.abs(expected[0]).max()))


def test_the_gradient_scales_with_what_comes_after():
    """Not a loss that is always last: d(f(loss)) = f'(loss) d(loss)."""
    x, w, targets, weights = problem()
    value, grads = chunked(x, w, targets, weights, 4)
    square = lambda x, w: (cross_entropy_sum(x, w, targets, weights, 4) / 7) ** 2
    scaled = jax.jit(jax.grad(square, (0, 1)))(x, w)
    assert_close(scaled, jax.tree.map(lambda g: g * (2 * value / 49), grads), terms=TERMS)


@pytest.mark.parametrize("chunk", [4, 10])
def test_weights_multiply(chunk):
    """Weight 0 removes a position from the loss and its gradient; weight 2 counts it twice."""
    x, w, targets, _ = problem()
    base = np.ones((B, T), np.float32)
    base[0, 3] = base[2, 9] = 0
    value, (d_x, d_w) = chunked(x, w, targets, base, chunk)
    assert (d_x[0, 3] == 0).all() and (d_x[2, 9] == 0).all()
    doubled, (dd_x, dd_w) = chunked(x, w, targets, 2 * base, chunk)
    assert_close((doubled, dd_w), (2 * value, 2 * d_w), terms=TERMS)
    other = np.array(x)
    other[0, 3], other[2, 9] = 50.0, -3.0  # what stands in a removed position does not matter
    value_2, (_, d_w_2) = chunked(other, w, targets, base, chunk)
    assert value_2 == value
    np.testing.assert_array_equal(d_w_2, d_w)
    nothing, grads = chunked(x, w, targets, 0 * base, chunk)
    assert nothing == 0 and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("chunk", [4, 10])
def test_nan_in_a_position_of_weight_0_is_not_in_the_loss(chunk):
    """The value only: its gradient is 0 * NaN, and the train step then skips the whole step as not finite."""
    x, w, targets, weights = map(np.array, problem())
    weights[1, 4] = 0
    expected = value_alone(x, w, targets, weights, chunk)
    x[1, 4] = np.nan
    assert value_alone(x, w, targets, weights, chunk) == expected
    weights[1, 4] = 1
    assert np.isnan(value_alone(x, w, targets, weights, chunk))


@pytest.mark.parametrize("chunk", [4, 10])
def test_bfloat16_activations(chunk):
    """Products are rounded to 8 bits, sums are not; the loss and the head's gradient stay float32."""
    x, w, targets, weights = problem(dtype=jnp.bfloat16)
    value, (d_x, d_w) = chunked(x, w, targets, weights, chunk)
    assert (value.dtype, d_x.dtype, d_w.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    rounded = w.astype(jnp.bfloat16)
    expected, e_x, e_w = oracle(x, rounded, targets, weights)
    assert_close(value, expected, terms=TERMS)  # the head is rounded, the logits are summed in float32
    np.testing.assert_allclose(np.asarray(d_x, np.float32), e_x, rtol=2**-7, atol=0.1)
    np.testing.assert_allclose(d_w, e_w, rtol=2**-8, atol=0.1)


def test_large_logits_do_not_overflow():
    x, w, targets, weights = problem()
    arguments = 100 * x, 10 * w, targets, weights
    value, grads = chunked(*arguments, 4)
    expected, *e_grads = oracle(*arguments)
    assert_close(value, expected, terms=TERMS)
    rounding = tolerance(D) * float(jnp.abs(arguments[0] @ arguments[1].T).max())  # of a logit: relative, of exp(logit)
    for a, b in zip(grads, e_grads, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=rounding * np.abs(b).max())


@pytest.mark.parametrize("vocab", [2, 50257])
def test_uniform_logits_cost_ln_v(vocab):
    x, w = np.zeros((1, 4, 5), np.float32), np.ones((vocab, 5), np.float32)
    value = value_alone(x, w, np.array([[0, 1, 0, vocab - 1]]), np.ones((1, 4), np.float32), 4)
    assert value / 4 == np.float32(math.log(vocab))


def test_log_probs():
    x, w, targets, _ = problem()
    run = jax.jit(log_probs)
    found = run(x, w, targets)
    assert found.shape == (B, T) and found.dtype == jnp.float32
    every = np.stack([run(x, w, np.full((B, T), v)) for v in range(V)], -1)
    assert_close(np.exp(every).sum(-1), np.ones((B, T)), terms=TERMS)
    assert_close(-found.sum(), oracle(x, w, targets, jnp.ones((B, T)))[0], terms=TERMS)


# --- memory -----------------------------------------------------------------------------------------------


def float32_sizes(compiled):
    """Elements of every float32 array in the compiled program."""
    shapes = re.findall(r"\bf32\[([\d,]*)\]", compiled.as_text())
    return {math.prod(map(int, s.split(","))) if s else 1 for s in shapes}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_array_of_all_logits_is_ever_held(dtype):
    batch, time, vocab, chunk = 4, 32, 1024, 8
    arguments = problem(batch, time, 16, vocab, dtype)
    sizes = float32_sizes(chunked.lower(*arguments, chunk).compile())
    assert max(sizes) == batch * chunk * vocab  # the largest is one chunk's logits
    for whole in (plain.lower(*arguments), chunked.lower(*arguments, time)):
        assert batch * time * vocab in float32_sizes(whole.compile())  # the reading of shapes does see it


# --- sharding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, chunk", [((8, 1, 1, 1), 3), ((2, 2, 2, 1), 1000), ((1, 2, 2, 2), 3)], ids=str)
def test_sharded_over_eight_devices(sizes, chunk):
    """Neither the vocabulary nor the time divides."""
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor", "seq"), sizes, strict=True))))
    arguments = problem(batch=8)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    head = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    placed = jax.device_put(arguments, (rows, head, rows, rows))
    with jax.set_mesh(mesh):
        value, (d_x, d_w) = chunked(*placed, chunk)
    expected, (e_x, e_w) = chunked(*arguments, chunk)
    assert_close((value, d_x, d_w), (expected, e_x, e_w), terms=TERMS)


def test_token_log_probs_and_entropy_over_eight_devices(chunk=3):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, seq=2))
    x, w, targets, weights = problem(batch=8)

    @jax.jit
    def found(x, w):
        log_prob, pull = jax.vjp(lambda x, w: token_log_probs(x, w, targets, 0.7, chunk), x, w)
        return log_prob, *token_log_probs_and_entropy(x, w, targets, 0.7, chunk), *pull(weights)

    expected = found(x, w)
    with jax.set_mesh(mesh):
        placed = jax.device_put((x, w), NamedSharding(mesh, PartitionSpec(None, None)))
        compiled = found.lower(*placed).compile()
    # the entropy is a difference of what log-probabilities are sums of
    assert_close(compiled(*placed), expected, terms=TERMS, scale=float(np.abs(expected[0]).max()))


@pytest.mark.parametrize("chunk", [8, 64])
def test_logits_are_never_gathered(chunk):
    """Of 4 x 64 tokens and 1,021 ids over tensor 4: the largest array is a device's part of one chunk's logits, and
    what is gathered is a chunk of x and the table's rows of this device, once."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    batch, time, width, vocab = 4, 64, 16, 1021
    with jax.set_mesh(mesh):
        compiled = chunked.lower(*problem(batch, time, width, vocab), chunk).compile()
    own = -(-vocab // 4)
    assert max(float32_sizes(compiled)) == max(batch // 2 * chunk * own, vocab * width + 3 * width)
    gathered = re.findall(r"f32\[([\d,]+)\][^=]* all-gather(?:-start)?\(", compiled.as_text())
    sizes = sorted(math.prod(map(int, shape.split(","))) for shape in gathered)
    # and the table's gradient over the tensor axis, where at rest every device has all rows of its features
    assert set(sizes) <= {batch // 2 * chunk, batch // 2 * chunk * width, own * width, 4 * own * width // 2}
    assert sizes.count(own * width) == 1


# --- bits per byte ----------------------------------------------------------------------------------------


def test_bits_per_byte():
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8, rel=1e-12)  # uniform bytes
    assert bits_per_byte(7 * math.log(2), 14) == pytest.approx(0.5, rel=1e-12)
    assert bits_per_byte(1.4697 * 1000, 1000) == pytest.approx(2.1203, abs=5e-5)  # nanoGPT's Shakespeare
