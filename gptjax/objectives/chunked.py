"""The losses of lm.py without ever holding [B, T, V]: the logits of `chunk` time steps at a time, on a mesh too.

    cross_entropy_sum              the loss that is trained; plain form: lm.lm_loss
    token_log_probs                log-probabilities of given tokens, for PPO; plain form: lm.log_probs
    token_log_probs_and_entropy    those, and the entropy of the distributions

On a mesh each device works on its part (parallel/vocabulary.py): x is sharded over rows and time, w over the vocabulary
and padded. A chunk of x is gathered over the tensor axis, its logits never are. `vocab` is the size of the vocabulary
without the padding; it is None on one device, where nothing is padded and nothing communicated.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.model.matmul import dot_over_tokens
from gptjax.parallel.collectives import gather, maximum, scatter, total
from gptjax.parallel.vocabulary import ROWS, first_row, mesh_for, over_tokens

# --- the cross-entropy ------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(x_BTD, w_VD, targets_BT, weights_BT, chunk: int):
    """Sum over the batch of weight * -log softmax(x w^T)[target], `chunk` time steps at a time.

    The gradients are computed in the forward pass, chunk by chunk, from the same logits, so the largest array is
    [B, chunk, V] and the logits are computed once.

    Args:
        targets_BT: int; weights_BT: float. Where the weight is 0, x may be NaN.
        chunk: time steps per chunk, static; T need not be a multiple.
    Returns:
        float32 scalar. Differentiable in x and w only.
    """
    return _cross_entropy(x_BTD, w_VD, targets_BT, weights_BT, chunk, with_gradients=False)[0]


def _cross_entropy_forward(x_BTD, w_VD, targets_BT, weights_BT, chunk):
    nll_sum, d_x, d_w = _cross_entropy(x_BTD, w_VD, targets_BT, weights_BT, chunk, with_gradients=True)
    return nll_sum, (d_x, d_w.astype(w_VD.dtype))


def _cross_entropy_backward(chunk, residuals, d_total):
    d_x, d_w = residuals
    return (d_x * d_total).astype(d_x.dtype), (d_w * d_total).astype(d_w.dtype), None, None


cross_entropy_sum.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _cross_entropy(x_BTD, w_VD, targets_BT, weights_BT, chunk, with_gradients):
    """(sum,), or (sum, d_x, d_w)."""
    mesh = mesh_for(x_BTD.shape[0], x_BTD.shape[2])
    if mesh is None:
        return _cross_entropy_local(x_BTD, w_VD, targets_BT, weights_BT, chunk, with_gradients, None)
    local = functools.partial(
        _cross_entropy_local, chunk=_local_chunk(chunk, mesh), with_gradients=with_gradients, vocab=w_VD.shape[0]
    )
    out = ("", "t", "w") if with_gradients else ("",)
    return over_tokens(local, mesh, x_BTD, w_VD, targets_BT, weights_BT, out=out)


def _cross_entropy_local(x_BTD, w_VD, targets_BT, weights_BT, chunk, with_gradients, vocab):
    n, C = _chunks(x_BTD.shape[1], chunk)
    chunks = tuple(_split(a, n, C) for a in (x_BTD, targets_BT, weights_BT))
    w_VD = _gather_table(w_VD, x_BTD.dtype, vocab)

    def one_chunk(carry, chunk):
        nll_sum, d_w_VD = carry
        x_BCD, targets_BC, weights_BC = (_gather_chunk(a, vocab) for a in chunk)
        x_BCD = jnp.where(weights_BC[..., None] != 0, x_BCD, 0)  # what does not count may be anything, NaN included
        p = _softmax(x_BCD, w_VD, targets_BC, 1, vocab)
        nll_BC = (jnp.log(p.sum_BC1) + p.max_BC1 - p.target_BC1)[..., 0]
        nll_sum = nll_sum + jnp.sum(weights_BC * nll_BC)
        if not with_gradients:
            return (nll_sum, d_w_VD), None
        one_hot_BCV = targets_BC[..., None] == p.ids_V
        d_logits_BCV = ((p.exp_BCV / p.sum_BC1 - one_hot_BCV) * weights_BC[..., None]).astype(x_BTD.dtype)
        d_x = _d_x(d_logits_BCV, w_VD, x_BTD.dtype, vocab)
        return (nll_sum, d_w_VD + dot_over_tokens(x_BCD, d_logits_BCV, 2).T), d_x

    d_w_VD = jnp.zeros(w_VD.shape, jnp.float32) if with_gradients else None
    start = (jnp.zeros((), jnp.float32), d_w_VD)
    if n == 1:
        (nll_sum, d_w_VD), d_x = one_chunk(start, jax.tree.map(lambda a: a[0], chunks))
        d_x = d_x if d_x is None else d_x[None]
    else:
        (nll_sum, d_w_VD), d_x = lax.scan(one_chunk, start, chunks)
    if vocab is not None:  # every device of `tensor` has the same sum
        nll_sum = total(nll_sum, *ROWS, "seq")
    return (nll_sum, _join(d_x, x_BTD.shape[1]), _d_w(d_w_VD, vocab)) if with_gradients else (nll_sum,)


# --- log-probabilities of given tokens --------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_log_probs(x_BTD, w_VD, targets_BT, temperature: float, chunk: int):
    """log softmax(x w^T / temperature)[target] of each token, `chunk` time steps' logits at a time.

    Args:
        targets_BT: int. temperature, chunk: static.
    Returns:
        float32 [B, T]. Differentiable in x and w; where there are several chunks or devices, the backward pass computes
        the logits again.
    """
    return token_log_probs_and_entropy(x_BTD, w_VD, targets_BT, temperature, chunk)[0]


def token_log_probs_and_entropy(x_BTD, w_VD, targets_BT, temperature: float, chunk: int):
    """token_log_probs, and the entropy of the distributions in nats: both float32 [B, T]."""
    mesh = mesh_for(x_BTD.shape[0], x_BTD.shape[2])
    if mesh is None:
        return _log_probs_local(x_BTD, w_VD, targets_BT, temperature, chunk, None)
    local = functools.partial(
        _log_probs_local, temperature=temperature, chunk=_local_chunk(chunk, mesh), vocab=w_VD.shape[0]
    )
    return over_tokens(local, mesh, x_BTD, w_VD, targets_BT, out="tt")


def _log_probs_local(x_BTD, w_VD, targets_BT, temperature, chunk, vocab):
    w_VD = _gather_table(w_VD, x_BTD.dtype, vocab)

    def one_chunk(x, targets):
        p = _softmax(_gather_chunk(x, vocab), w_VD, _gather_chunk(targets, vocab), temperature, vocab)
        weighted_BC1 = (p.exp_BCV * p.logits_BCV).sum(-1, keepdims=True)
        weighted_BC1 = weighted_BC1 if vocab is None else total(weighted_BC1, "tensor")
        log_probs_BC = (p.target_BC1 - p.max_BC1 - jnp.log(p.sum_BC1))[..., 0]
        entropy_BC = jnp.log(p.sum_BC1[..., 0]) + (p.max_BC1 - weighted_BC1 / p.sum_BC1)[..., 0]
        if vocab is None:
            return log_probs_BC, entropy_BC
        first = lax.axis_index("tensor") * x.shape[1]  # of this device's part of the chunk
        own = lambda a: lax.dynamic_slice_in_dim(a, first, x.shape[1], axis=1)
        return own(log_probs_BC), own(entropy_BC)

    n, C = _chunks(x_BTD.shape[1], chunk)
    if n == 1:
        return one_chunk(x_BTD, targets_BT)
    parts = lax.map(lambda chunk: one_chunk(*chunk), (_split(x_BTD, n, C), _split(targets_BT, n, C)))
    return jax.tree.map(lambda a: _join(a, x_BTD.shape[1]), parts)


def _token_log_probs_forward(x_BTD, w_VD, targets_BT, temperature, chunk):
    if _chunks(x_BTD.shape[1], chunk)[0] > 1 or mesh_for(x_BTD.shape[0], x_BTD.shape[2]):
        return token_log_probs(x_BTD, w_VD, targets_BT, temperature, chunk), (x_BTD, w_VD, targets_BT, None)
    p = _softmax(x_BTD, w_VD.astype(x_BTD.dtype), targets_BT, temperature, None)
    log_probs_BT = (p.target_BC1 - p.max_BC1 - jnp.log(p.sum_BC1))[..., 0]
    return log_probs_BT, (x_BTD, w_VD, targets_BT, (p.exp_BCV, p.sum_BC1))


def _token_log_probs_backward(temperature, chunk, residuals, d_out_BT):
    x_BTD, w_VD, targets_BT, saved = residuals
    mesh = mesh_for(x_BTD.shape[0], x_BTD.shape[2])
    if mesh is None:
        d_x, d_w = _log_probs_gradients(x_BTD, w_VD, targets_BT, d_out_BT, temperature, chunk, None, saved)
    else:
        local = functools.partial(
            _log_probs_gradients, temperature=temperature, chunk=_local_chunk(chunk, mesh), vocab=w_VD.shape[0]
        )
        d_x, d_w = over_tokens(local, mesh, x_BTD, w_VD, targets_BT, d_out_BT, out="tw")
    return d_x, d_w.astype(w_VD.dtype), None


token_log_probs.defvjp(_token_log_probs_forward, _token_log_probs_backward)


def _log_probs_gradients(x_BTD, w_VD, targets_BT, d_out_BT, temperature, chunk, vocab, saved=None):
    """saved: exp(logits - max) and its sum, where the forward pass saved them (one chunk on one device)."""
    n, C = _chunks(x_BTD.shape[1], chunk)
    w_VD = _gather_table(w_VD, x_BTD.dtype, vocab)

    def one_chunk(d_w_VD, chunk):
        x_BCD, targets_BC, d_out_BC = (_gather_chunk(a, vocab) for a in chunk)
        if saved:
            (exp_BCV, sum_BC1), ids_V = saved, jnp.arange(w_VD.shape[0])
        else:
            p = _softmax(x_BCD, w_VD, targets_BC, temperature, vocab)
            exp_BCV, sum_BC1, ids_V = p.exp_BCV, p.sum_BC1, p.ids_V
        one_hot_BCV = targets_BC[..., None] == ids_V
        d_logits_BCV = ((one_hot_BCV - exp_BCV / sum_BC1) * (d_out_BC / temperature)[..., None]).astype(x_BCD.dtype)
        d_x = _d_x(d_logits_BCV, w_VD, x_BCD.dtype, vocab)
        return d_w_VD + dot_over_tokens(x_BCD, d_logits_BCV, 2).T, d_x

    d_w_VD = jnp.zeros(w_VD.shape, jnp.float32)
    if n == 1:
        d_w_VD, d_x = one_chunk(d_w_VD, (x_BTD, targets_BT, d_out_BT))
    else:
        d_w_VD, d_x = lax.scan(one_chunk, d_w_VD, tuple(_split(a, n, C) for a in (x_BTD, targets_BT, d_out_BT)))
        d_x = _join(d_x, x_BTD.shape[1])
    return d_x, _d_w(d_w_VD, vocab)


# --- one chunk's softmax and gradients --------------------------------------------------------------------


class _Softmax(NamedTuple):
    logits_BCV: Any
    max_BC1: Any  # over the whole vocabulary, as are the sum and the target's logit
    exp_BCV: Any  # exp(logits - max)
    sum_BC1: Any  # of exp
    target_BC1: Any  # the target's logit
    ids_V: Any  # the tokens that this device's logits are of


_PADDED = -1e30  # the logit of a padded row; finite: 0 * -inf is NaN


def _softmax(x_BCD, w_VD, targets_BC, temperature, vocab) -> _Softmax:
    logits = jnp.einsum("bcd,vd->bcv", x_BCD, w_VD, preferred_element_type=jnp.float32)
    logits = logits if temperature == 1 else logits / temperature
    ids = jnp.arange(w_VD.shape[0])
    if vocab is None:
        top = logits.max(-1, keepdims=True)
        e = jnp.exp(logits - top)
        z = e.sum(-1, keepdims=True)
        return _Softmax(logits, top, e, z, jnp.take_along_axis(logits, targets_BC[..., None], axis=-1), ids)
    ids = ids + first_row(w_VD.shape[0])
    logits = jnp.where(ids < vocab, logits, _PADDED)
    top = maximum(lax.stop_gradient(logits.max(-1, keepdims=True)), "tensor")
    e = jnp.exp(logits - top)
    target = jnp.where(targets_BC[..., None] == ids, logits, 0).sum(-1, keepdims=True)
    z, target = total((e.sum(-1, keepdims=True), target), "tensor")
    return _Softmax(logits, top, e, z, target, ids)


def _d_x(d_logits_BCV, w_VD, dtype, vocab):
    """A device's part of the gradient of a chunk of x."""
    d_x_BCD = jnp.einsum("bcv,vd->bcd", d_logits_BCV, w_VD, preferred_element_type=jnp.float32)
    if vocab is not None:
        d_x_BCD = scatter(d_x_BCD, "tensor", 1)
    return d_x_BCD.astype(dtype)


def _d_w(d_w_VD, vocab):
    """A device's part of the gradient of w, summed over all tokens."""
    if vocab is None:
        return d_w_VD
    return total(scatter(d_w_VD, "fsdp", 1), *(name for name in ROWS if name != "fsdp"), "seq")


# --- chunks -----------------------------------------------------------------------------------------------


def _chunks(T: int, chunk: int) -> tuple[int, int]:
    """(number of chunks, time steps of each): even chunks, so that there is less padding."""
    n = -(-T // chunk)
    return n, -(-T // n)


def _local_chunk(chunk: int, mesh) -> int:
    """Time steps of a device's part of a chunk."""
    return max(1, chunk // mesh.shape["tensor"])


def _split(a, n, C):
    """[B, T, ...] -> [n, B, C, ...], padded with zeros."""
    a = jnp.pad(a, ((0, 0), (0, n * C - a.shape[1]), *((0, 0),) * (a.ndim - 2)))
    return jnp.moveaxis(a.reshape(a.shape[0], n, C, *a.shape[2:]), 1, 0)


def _join(a, T):
    """[n, B, C, ...] -> [B, T, ...]."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :T]


def _gather_chunk(a, vocab):
    """A device's part of a chunk [B, C, ...] -> the chunk."""
    return a if vocab is None else gather(a, "tensor", 1)


def _gather_table(w_VD, dtype, vocab):
    w_VD = w_VD.astype(dtype)
    return w_VD if vocab is None else lax.optimization_barrier(gather(w_VD, "fsdp", 1))  # or each chunk gathers again
