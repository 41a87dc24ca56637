"""Language-model loss: -log p(next token), summed, never holding [batch, time, vocab].

Every function returns sums, not means: micro-batches, devices and hosts add up and the mean is taken once.
Source: GPT-1 eq. 1.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.model.matmul import dot_over_tokens
from gptjax.parallel.collectives import gather, maximum, scatter, total
from gptjax.parallel.vocabulary import ROWS, first_row, mesh_for, over_tokens


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


# On a mesh the functions below run on each device's part (parallel/vocabulary.py): x cut up over rows and time, w over
# the vocabulary. A chunk of x is gathered over the tensor axis, its logits never are. `vocab` is how many rows of w are
# real, counted over all devices; it is None on one device, where nothing is padded and nothing told.


_ABSENT = -1e30  # the logit of a padded row; finite: 0 * -inf is not 0


def _gathered(a, vocab):
    """A device's part of a chunk [batch, size, ...] -> the chunk."""
    return a if vocab is None else gather(a, "tensor", 1)


def _whole_w(w, dtype, vocab):
    w = w.astype(dtype)
    return w if vocab is None else lax.optimization_barrier(gather(w, "fsdp", 1))  # or each chunk gathers again


def _softmax(x, w, targets, temperature, vocab):
    """(logits, their maximum, exp(logits - maximum), its sum, the target's logit, where it is) of one chunk."""
    logits = jnp.einsum("btd,vd->btv", x, w, preferred_element_type=jnp.float32)
    logits = logits if temperature == 1 else logits / temperature
    ids = jnp.arange(w.shape[0])
    if vocab is None:
        top = logits.max(-1, keepdims=True)
        e = jnp.exp(logits - top)
        return logits, top, e, e.sum(-1, keepdims=True), jnp.take_along_axis(logits, targets[..., None], axis=-1), ids
    ids = ids + first_row(w.shape[0])
    logits = jnp.where(ids < vocab, logits, _ABSENT)
    top = maximum(lax.stop_gradient(logits.max(-1, keepdims=True)), "tensor")
    e = jnp.exp(logits - top)
    chosen = jnp.where(targets[..., None] == ids, logits, 0).sum(-1, keepdims=True)
    z, chosen = total((e.sum(-1, keepdims=True), chosen), "tensor")
    return logits, top, e, z, chosen, ids


def _d_x(d_logits, w, dtype, vocab):
    """A device's part of the gradient of a chunk of x."""
    d_x = jnp.einsum("btv,vd->btd", d_logits, w, preferred_element_type=jnp.float32)
    if vocab is not None:
        d_x = scatter(d_x, "tensor", 1)
    return d_x.astype(dtype)


def _d_w(d_w, vocab):
    """A device's part of the gradient of w, summed over all tokens."""
    if vocab is None:
        return d_w
    return total(scatter(d_w, "fsdp", 1), *(name for name in ROWS if name != "fsdp"), "seq")


def _steps(chunk: int, mesh) -> int:
    """Time steps of a device's part of a chunk."""
    return chunk if mesh is None else max(1, chunk // mesh.shape["tensor"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_log_probs(x, w, targets, temperature: float, chunk: int):
    """log softmax(x w^T / temperature)[target] of each token, `chunk` time steps' logits at a time.

    Args:
        x: [batch, time, d_model]; w: [vocab, d_model]; targets: int [batch, time]. temperature, chunk: static.
    Returns:
        float32 [batch, time]. Differentiable in x and w; where there are several chunks or devices, the backward pass
        works the logits out again.
    """
    return token_log_probs_and_entropy(x, w, targets, temperature, chunk)[0]


def token_log_probs_and_entropy(x, w, targets, temperature: float, chunk: int):
    """token_log_probs, and the entropy of the distributions in nats: both float32 [batch, time]."""
    mesh = mesh_for(x.shape[0], x.shape[2])
    if mesh is None:
        return _log_probs_and_entropy(x, w, targets, temperature, chunk, None)
    local = functools.partial(
        _log_probs_and_entropy, temperature=temperature, chunk=_steps(chunk, mesh), vocab=w.shape[0]
    )
    return over_tokens(local, mesh, x, w, targets, out="tt")


def _log_probs_and_entropy(x, w, targets, temperature, chunk, vocab):
    w = _whole_w(w, x.dtype, vocab)

    def one(x, targets):
        logits, top, e, z, chosen, _ = _softmax(_gathered(x, vocab), w, _gathered(targets, vocab), temperature, vocab)
        weighted = (e * logits).sum(-1, keepdims=True)
        weighted = weighted if vocab is None else total(weighted, "tensor")
        both = (chosen - top - jnp.log(z))[..., 0], jnp.log(z[..., 0]) + (top - weighted / z)[..., 0]
        if vocab is None:
            return both
        own = lax.axis_index("tensor") * x.shape[1]
        return tuple(lax.dynamic_slice_in_dim(a, own, x.shape[1], axis=1) for a in both)

    n, size = _chunks(x.shape[1], chunk)
    if n == 1:
        return one(x, targets)
    parts = lax.map(lambda part: one(*part), (_split(x, n, size), _split(targets, n, size)))
    return jax.tree.map(lambda a: _join(a, x.shape[1]), parts)


def _token_log_probs_forward(x, w, targets, temperature, chunk):
    if _chunks(x.shape[1], chunk)[0] > 1 or mesh_for(x.shape[0], x.shape[2]):
        return token_log_probs(x, w, targets, temperature, chunk), (x, w, targets, None)
    _, top, e, z, chosen, _ = _softmax(x, w.astype(x.dtype), targets, temperature, None)
    return (chosen - top - jnp.log(z))[..., 0], (x, w, targets, (e, z))


def _token_log_probs_backward(temperature, chunk, residuals, d_out):
    x, w, targets, kept = residuals
    mesh = mesh_for(x.shape[0], x.shape[2])
    if mesh is None:
        d_x, d_w = _log_probs_gradients(x, w, targets, d_out, temperature, chunk, None, kept)
    else:
        local = functools.partial(
            _log_probs_gradients, temperature=temperature, chunk=_steps(chunk, mesh), vocab=w.shape[0]
        )
        d_x, d_w = over_tokens(local, mesh, x, w, targets, d_out, out="tw")
    return d_x, d_w.astype(w.dtype), None


def _log_probs_gradients(x, w, targets, d_out, temperature, chunk, vocab, kept=None):
    """kept: exp(logits - maximum) and its sum, where the forward pass kept them (one chunk on one device)."""
    n, size = _chunks(x.shape[1], chunk)
    w = _whole_w(w, x.dtype, vocab)

    def one(d_w, part):
        x, targets, d_out = (_gathered(a, vocab) for a in part)
        if kept:
            (e, z), ids = kept, jnp.arange(w.shape[0])
        else:
            _, _, e, z, _, ids = _softmax(x, w, targets, temperature, vocab)
        one_hot = targets[..., None] == ids
        d_logits = ((one_hot - e / z) * (d_out / temperature)[..., None]).astype(x.dtype)
        d_x = _d_x(d_logits, w, x.dtype, vocab)
        return d_w + dot_over_tokens(x, d_logits, 2).T, d_x

    d_w = jnp.zeros(w.shape, jnp.float32)
    if n == 1:
        d_w, d_x = one(d_w, (x, targets, d_out))
    else:
        d_w, d_x = lax.scan(one, d_w, tuple(_split(a, n, size) for a in (x, targets, d_out)))
        d_x = _join(d_x, x.shape[1])
    return d_x, _d_w(d_w, vocab)


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
    return _cross_entropy(x, w, targets, weights, chunk, with_gradients=False)[0]


def _cross_entropy(x, w, targets, weights, chunk, with_gradients):
    """(sum,), or (sum, d_x, d_w)."""
    mesh = mesh_for(x.shape[0], x.shape[2])
    if mesh is None:
        return _over_chunks(x, w, targets, weights, chunk, with_gradients, None)
    local = functools.partial(_over_chunks, chunk=_steps(chunk, mesh), with_gradients=with_gradients, vocab=w.shape[0])
    return over_tokens(local, mesh, x, w, targets, weights, out=("", "t", "w") if with_gradients else ("",))


def _over_chunks(x, w, targets, weights, chunk, with_gradients, vocab):
    n, size = _chunks(x.shape[1], chunk)
    xs = tuple(_split(a, n, size) for a in (x, targets, weights))
    w_compute = _whole_w(w, x.dtype, vocab)

    def one(carry, chunk_of):
        nll_sum, d_w = carry
        x_c, y_c, weight_c = (_gathered(a, vocab) for a in chunk_of)
        x_c = jnp.where(weight_c[..., None] != 0, x_c, 0)  # what does not count may be anything, NaN included
        _, top, e, z, chosen, ids = _softmax(x_c, w_compute, y_c, 1, vocab)
        nll = (jnp.log(z) + top - chosen)[..., 0]
        nll_sum = nll_sum + jnp.sum(weight_c * nll)
        if not with_gradients:
            return (nll_sum, d_w), None
        one_hot = y_c[..., None] == ids
        d_logits = ((e / z - one_hot) * weight_c[..., None]).astype(x.dtype)
        d_x = _d_x(d_logits, w_compute, x.dtype, vocab)
        return (nll_sum, d_w + dot_over_tokens(x_c, d_logits, 2).T), d_x

    d_w = jnp.zeros(w_compute.shape, jnp.float32) if with_gradients else None
    start = (jnp.zeros((), jnp.float32), d_w)
    if n == 1:
        (nll_sum, d_w), d_x = one(start, jax.tree.map(lambda a: a[0], xs))
        d_x = d_x if d_x is None else d_x[None]
    else:
        (nll_sum, d_w), d_x = lax.scan(one, start, xs)
    if vocab is not None:  # every device of `tensor` has the same sum
        nll_sum = total(nll_sum, *ROWS, "seq")
    return (nll_sum, _join(d_x, x.shape[1]), _d_w(d_w, vocab)) if with_gradients else (nll_sum,)


def _forward(x, w, targets, weights, chunk):
    nll_sum, d_x, d_w = _cross_entropy(x, w, targets, weights, chunk, with_gradients=True)
    return nll_sum, (d_x, d_w.astype(w.dtype))


def _backward(chunk, residuals, d_total):
    d_x, d_w = residuals
    return (d_x * d_total).astype(d_x.dtype), (d_w * d_total).astype(d_w.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward)
