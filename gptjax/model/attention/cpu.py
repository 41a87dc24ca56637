"""Attention for CPUs, with a custom VJP.

XLA:CPU's autodiff of attention spends most of its time transposing and rereading [time, time] arrays. Here each batch
row is computed by itself, so that its scores stay in the cache; queries are taken in blocks, and a block skips the keys
after its own end and before its band; the backward pass recomputes the probabilities from the log-sum-exp (Dao et al.
2022, flash attention).

T: the queries of a row or of a block; S: the keys that a block sees.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.model.attention.reference import NEG_INF, causal_mask

SHORT = 64  # up to here a row's scores fit the cache anyway, and storing them is faster than recomputing them
_QUERY_BLOCK = 64
_CACHE_BYTES = 2**20  # of scores held at a time: of small rows, several are computed at once


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cpu_attention(q_BTHK, k_BTHK, v_BTHK, segment_ids, window):
    """Causal attention; arguments and result as for `attention`."""
    return _forward(q_BTHK, k_BTHK, v_BTHK, segment_ids, window)[0]


def _forward(q, k, v, segment_ids, window):
    q, k, v = _swap_time_and_heads(q, k, v)  # [B, H, T, K]
    out_BHTK, lse_BHT1 = _map_rows(lambda row: _row_forward(*row, window), (q, k, v, segment_ids), *q.shape[1:3])
    return jnp.swapaxes(out_BHTK, 1, 2), (q, k, v, segment_ids, out_BHTK, lse_BHT1)


def _backward(window, residuals, d_out):
    (d_out,) = _swap_time_and_heads(d_out)
    d_q, d_k, d_v = _map_rows(lambda row: _row_backward(*row, window), (*residuals, d_out), *d_out.shape[1:3])
    return (*_swap_time_and_heads(d_q, d_k, d_v), None)


cpu_attention.defvjp(_forward, _backward)


def _row_forward(q_HTK, k_HTK, v_HTK, segments_T, window):
    """One batch row: the output [H, T, K] and the log-sum-exp of the scores [H, T, 1]."""
    outs, lses = [], []
    for start, end, first in _blocks(q_HTK.shape[1], window):
        q_block, k_HSK = q_HTK[:, start:end], k_HTK[:, first:end]
        s_HTS = _scores(q_block, k_HSK, _bias(start, end, first, window, segments_T))
        out_HTK, lse_HT1 = _weighted(s_HTS, v_HTK[:, first:end])
        outs.append(out_HTK.astype(q_HTK.dtype))
        lses.append(lse_HT1)
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)


def _weighted(s_HTS, v_HSK):
    """softmax(scores) v, float32 [H, T, K], and the log-sum-exp of the scores [H, T, 1]."""
    max_HT1 = s_HTS.max(-1, keepdims=True)
    exp_HTS = jnp.exp(s_HTS - max_HT1)
    sum_HT1 = exp_HTS.sum(-1, keepdims=True)
    out_HTK = jnp.einsum("hts,hsk->htk", exp_HTS.astype(v_HSK.dtype), v_HSK, preferred_element_type=jnp.float32)
    return out_HTK / sum_HT1, max_HT1 + jnp.log(sum_HT1)  # normalized after the product: fewer divisions


def cpu_tree_attention(q_BTHK, k_BTHK, v_BTHK, visible_until_BT, positions_BT, window):
    """Attention over a prefix tree (tree.py), forward only."""

    def row(arrays):
        q_HTK, k_HTK, v_HTK, visible_until_T, positions_T = arrays
        outs = []
        for start, end, _ in _blocks(q_HTK.shape[1], None):
            t, s = jnp.arange(start, end), jnp.arange(end)
            mask_TS = causal_mask(t, s) & (t[:, None] < visible_until_T[:end])
            if window is not None:
                mask_TS = mask_TS & causal_mask(positions_T[start:end], positions_T[:end], window)
            bias_TS = jnp.where(mask_TS, 0.0, NEG_INF)
            outs.append(_weighted(_scores(q_HTK[:, start:end], k_HTK[:, :end], bias_TS), v_HTK[:, :end])[0])
        return jnp.concatenate(outs, 1).astype(q_HTK.dtype)

    q, k, v = _swap_time_and_heads(q_BTHK, k_BTHK, v_BTHK)
    return jnp.swapaxes(_map_rows(row, (q, k, v, visible_until_BT, positions_BT), *q.shape[1:3]), 1, 2)


def _row_backward(q_HTK, k_HTK, v_HTK, segments_T, out_HTK, lse_HT1, d_out_HTK, window):
    """Gradients in q, k and v of one batch row."""
    T, scale = q_HTK.shape[1], q_HTK.shape[-1] ** -0.5
    delta_HT1 = jnp.sum(d_out_HTK.astype(jnp.float32) * out_HTK.astype(jnp.float32), -1, keepdims=True)
    d_q, d_k, d_v = [], 0.0, 0.0
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for start, end, first in _blocks(T, window):
        k_HSK, v_HSK, d_o_HTK = k_HTK[:, first:end], v_HTK[:, first:end], d_out_HTK[:, start:end]
        s_HTS = _scores(q_HTK[:, start:end], k_HSK, _bias(start, end, first, window, segments_T))
        p_HTS = jnp.exp(s_HTS - lse_HT1[:, start:end])
        d_s_HTS = p_HTS * (dot("htk,hsk->hts", d_o_HTK, v_HSK) - delta_HT1[:, start:end]) * scale
        d_s_HTS = d_s_HTS.astype(q_HTK.dtype)
        d_q.append(dot("hts,hsk->htk", d_s_HTS, k_HSK))
        padding = ((0, 0), (first, T - end), (0, 0))
        d_k += jnp.pad(dot("hts,htk->hsk", d_s_HTS, q_HTK[:, start:end]), padding)
        d_v += jnp.pad(dot("hts,htk->hsk", p_HTS.astype(v_HTK.dtype), d_o_HTK), padding)
    return jnp.concatenate(d_q, 1).astype(q_HTK.dtype), d_k.astype(k_HTK.dtype), d_v.astype(v_HTK.dtype)


def _scores(q_HTK, k_HSK, bias_TS):
    scores_HTS = jnp.einsum("htk,hsk->hts", q_HTK, k_HSK, preferred_element_type=jnp.float32)
    return scores_HTS * q_HTK.shape[-1] ** -0.5 + bias_TS


def _bias(start, end, first, window, segments_T):
    """What is added to the scores of a block: 0 or NEG_INF, float32 [T, S]."""
    mask_TS = causal_mask(jnp.arange(start, end), jnp.arange(first, end), window)
    if segments_T is not None:
        mask_TS = mask_TS & (segments_T[start:end, None] == segments_T[None, first:end])
    return jnp.where(mask_TS, 0.0, NEG_INF)


def _blocks(T, window):
    """(first query, end of queries, first key) of each block; its keys end where its queries end."""
    for start in range(0, T, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, T)
        first = 0 if window is None else max(0, start - window + 1)
        yield start, end, first


def _map_rows(function, arrays, H, T):
    """function over the batch rows of all arrays, as many rows at once as the cache holds."""
    B = arrays[0].shape[0]
    at_once = _rows_at_once(B, H, T)
    mesh = jax.sharding.get_abstract_mesh()
    if at_once == B or not (mesh.empty or mesh.size == 1):  # a loop over sharded rows would gather them
        return jax.vmap(function)(arrays)
    return lax.map(function, arrays, batch_size=None if at_once == 1 else at_once)


def _rows_at_once(B, H, T):
    rows = max(1, _CACHE_BYTES // (4 * H * min(T, _QUERY_BLOCK) * T))
    return next(n for n in range(min(rows, B), 0, -1) if B % n == 0)


def _swap_time_and_heads(*arrays):
    """[B, T, H, K] <-> [B, H, T, K]."""
    return tuple(jnp.swapaxes(a, 1, 2) for a in arrays)
