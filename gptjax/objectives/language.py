"""Language-model loss: -log p(next token), summed, never holding [batch, time, vocab].

Every function returns sums, not means: micro-batches, devices and hosts add up and the mean is taken once.
Source: GPT-1 eq. 1.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax


def log_probs(x, w, targets):
    """log p(target | x) under softmax(x w^T), the plain way: the logits are materialised.

    Args:
        x: [..., d_model]; w: [vocab, d_model]; targets: int [...].
    Returns:
        float32 [...].
    """
    logits = jnp.einsum("...d,vd->...v", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def dot_over_tokens(x, d_y, lead: int):
    """The gradient of a weight: x [tokens..., in], d_y [tokens..., out...] -> float32 [in, out...], summed over the
    `lead` leading axes. XLA:CPU multiplies a left operand that lies the wrong way round at half speed: there the
    narrower of the two is turned first."""
    tokens = tuple(range(lead))
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)

    def turned(x, d_y):
        x2, y2 = (a.reshape(math.prod(a.shape[:lead]), -1) for a in (x, d_y))
        rows = lambda a, b: dot(lax.optimization_barrier(a.T), b, (((1,), (0,)), ((), ())))
        d_w = rows(x2, y2) if x2.shape[1] <= y2.shape[1] else rows(y2, x2).T
        return d_w.reshape(x.shape[-1], *d_y.shape[lead:])

    plain = lambda x, d_y: dot(x, d_y, ((tokens, tokens), ((), ())))
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.size == 1):
        return plain(x, d_y)
    return lax.platform_dependent(x, d_y, cpu=turned, default=plain)


def _chunks(time: int, chunk: int) -> tuple[int, int]:
    """(number of chunks, time steps of each): even chunks, so that there is less padding."""
    n = -(-time // chunk)
    return n, -(-time // n)


def _split(a, n, size):
    """[batch, time, ...] -> [n, batch, size, ...], padded with zeros."""
    a = jnp.pad(a, ((0, 0), (0, n * size - a.shape[1]), *((0, 0),) * (a.ndim - 2)))
    return jnp.moveaxis(a.reshape(a.shape[0], n, size, *a.shape[2:]), 1, 0)


def _join(a, time):
    """[n, batch, size, ...] -> [batch, time, ...]."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :time]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_log_probs(x, w, targets, temperature: float, chunk: int):
    """log softmax(x w^T / temperature)[target] of each token, `chunk` time steps' logits at a time.

    Args:
        x: [batch, time, d_model]; w: [vocab, d_model]; targets: int [batch, time]. temperature, chunk: static.
    Returns:
        float32 [batch, time]. Differentiable in x and w; where there are several chunks, the backward pass works the
        logits out again.
    """
    return token_log_probs_and_entropy(x, w, targets, temperature, chunk)[0]


def token_log_probs_and_entropy(x, w, targets, temperature: float, chunk: int):
    """token_log_probs, and the entropy of the distributions in nats: both float32 [batch, time]."""

    def one(x, targets):
        logits, e, z, log_prob = _log_probs(x, w, targets, temperature)
        return log_prob, jnp.log(z[..., 0]) + (logits.max(-1) - (e * logits).sum(-1) / z[..., 0])

    n, size = _chunks(x.shape[1], chunk)
    if n == 1:
        return one(x, targets)
    parts = lax.map(lambda part: one(*part), (_split(x, n, size), _split(targets, n, size)))
    return jax.tree.map(lambda a: _join(a, x.shape[1]), parts)


def _log_probs(x, w, targets, temperature):
    """(logits, exp(logits - max), its sum [..., 1], log p(target)) of one chunk."""
    logits = jnp.einsum("btd,vd->btv", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    logits = logits if temperature == 1 else logits / temperature
    top = logits.max(-1, keepdims=True)
    e = jnp.exp(logits - top)
    z = e.sum(-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return logits, e, z, (chosen - top - jnp.log(z))[..., 0]


def _token_log_probs_forward(x, w, targets, temperature, chunk):
    if _chunks(x.shape[1], chunk)[0] > 1:
        return token_log_probs(x, w, targets, temperature, chunk), (x, w, targets, None)
    _, e, z, log_prob = _log_probs(x, w, targets, temperature)
    return log_prob, (x, w, targets, (e, z))


def _token_log_probs_backward(temperature, chunk, residuals, d_out):
    x, w, targets, kept = residuals
    n, size = _chunks(x.shape[1], chunk)

    def one(d_w, part, kept=None):
        x, targets, d_out = part
        e, z = kept or _log_probs(x, w, targets, temperature)[1:3]
        one_hot = targets[..., None] == jnp.arange(w.shape[0])
        d_logits = ((one_hot - e / z) * (d_out / temperature)[..., None]).astype(x.dtype)
        d_x = jnp.einsum("btv,vd->btd", d_logits, w.astype(x.dtype), preferred_element_type=jnp.float32)
        d_w = d_w + dot_over_tokens(x, d_logits, 2).T
        return d_w, d_x.astype(x.dtype)

    d_w = jnp.zeros(w.shape, jnp.float32)
    if n == 1:
        d_w, d_x = one(d_w, (x, targets, d_out), kept)
    else:
        d_w, d_x = lax.scan(one, d_w, tuple(_split(a, n, size) for a in (x, targets, d_out)))
        d_x = _join(d_x, x.shape[1])
    return d_x, d_w.astype(w.dtype), None


token_log_probs.defvjp(_token_log_probs_forward, _token_log_probs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(x, w, targets, weights, chunk: int):
    """Sum over the batch of weight * -log softmax(x w^T)[target], `chunk` time steps at a time.

    The gradients are worked out in the forward pass, chunk by chunk, while the logits are at hand, so the
    largest array is [batch, chunk, vocab] and the logits are computed once.

    Args:
        x: [batch, time, d_model]; w: [vocab, d_model]; targets: int [batch, time]; weights: float [batch, time].
        chunk: time steps per chunk, static; time need not be a multiple. Where the weight is 0, x may be NaN.
    Returns:
        float32 scalar. Differentiable in x and w only.
    """
    return _over_chunks(x, w, targets, weights, chunk, with_gradients=False)[0]


def _over_chunks(x, w, targets, weights, chunk, with_gradients):
    n, size = _chunks(x.shape[1], chunk)
    xs = tuple(_split(a, n, size) for a in (x, targets, weights))
    w_compute = w.astype(x.dtype)

    def one(carry, chunk_of):
        total, d_w = carry
        x_c, y_c, weight_c = chunk_of
        x_c = jnp.where(weight_c[..., None] != 0, x_c, 0)  # what does not count may be anything, NaN included
        logits = jnp.einsum("btd,vd->btv", x_c, w_compute, preferred_element_type=jnp.float32)
        top = logits.max(-1, keepdims=True)
        e = jnp.exp(logits - top)
        z = e.sum(-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, y_c[..., None], axis=-1)
        nll = (jnp.log(z) + top - chosen)[..., 0]
        total = total + jnp.sum(weight_c * nll)
        if not with_gradients:
            return (total, d_w), None
        one_hot = y_c[..., None] == jnp.arange(w.shape[0])
        d_logits = ((e / z - one_hot) * weight_c[..., None]).astype(x.dtype)
        d_x = jnp.einsum("btv,vd->btd", d_logits, w_compute, preferred_element_type=jnp.float32)
        d_w = d_w + dot_over_tokens(x_c, d_logits, 2).T
        return (total, d_w), d_x.astype(x.dtype)

    d_w = jnp.zeros(w.shape, jnp.float32) if with_gradients else None
    start = (jnp.zeros((), jnp.float32), d_w)
    if n == 1:
        (total, d_w), d_x = one(start, jax.tree.map(lambda a: a[0], xs))
        d_x = d_x if d_x is None else d_x[None]
    else:
        (total, d_w), d_x = lax.scan(one, start, xs)
    if with_gradients:
        d_x = _join(d_x, x.shape[1])
    return total, d_x, d_w


def _forward(x, w, targets, weights, chunk):
    total, d_x, d_w = _over_chunks(x, w, targets, weights, chunk, with_gradients=True)
    return total, (d_x, d_w.astype(w.dtype))


def _backward(chunk, residuals, d_total):
    d_x, d_w = residuals
    return (d_x * d_total).astype(d_x.dtype), (d_w * d_total).astype(d_w.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward)


def bits_per_byte(nats, n_bytes):
    """Total nats over text of n_bytes UTF-8 bytes -> bits per byte: comparable between tokenizers."""
    return nats / (n_bytes * 0.6931471805599453)
