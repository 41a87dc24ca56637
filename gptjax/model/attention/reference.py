"""Attention as the papers write it.

The other implementations (__init__.py) are tested equal to it in value and gradient (tests/test_attention.py), except
cuDNN's, which has not been run yet.
"""

import jax
import jax.numpy as jnp

NEG_INF = -1e30  # finite, so that a row that is masked everywhere gives no NaN


def causal_mask(q_positions, k_positions, window=None):
    """Which keys a query sees: those up to its own position, the last `window` of them if one is given (a band).

    Args:
        q_positions: int [..., T]; k_positions: int [..., S].
    Returns:
        bool [..., T, S].
    """
    distance = q_positions[..., :, None] - k_positions[..., None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def reference_attention(q_BTHK, k_BSHK, v_BSHK, *, window=None, segment_ids=None, dropout=0.0, dropout_keys=None):
    """softmax(q k^T / sqrt(d_head)) v over the keys that each query sees (Vaswani et al. 2017 eq. 1); the softmax is in
    float32.

    Arguments and result as for `attention` (__init__.py), with S = T. The only implementation with dropout on the
    attention weights (GPT-1).
    """
    t = jnp.arange(q_BTHK.shape[1])
    mask = causal_mask(t, t, window)[None, None]  # [1, 1, T, S], [B, 1, T, S] with segments
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    scores_BHTS = scores_BHTS * q_BTHK.shape[-1] ** -0.5
    probs_BHTS = jax.nn.softmax(jnp.where(mask, scores_BHTS, NEG_INF), axis=-1)
    if dropout > 0.0 and dropout_keys is not None:
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - dropout, probs_BHTS.shape[1:]))(dropout_keys)
        probs_BHTS = jnp.where(keep, probs_BHTS / (1.0 - dropout), 0.0)
    return jnp.einsum("bhts,bshk->bthk", probs_BHTS.astype(v_BSHK.dtype), v_BSHK)


def cached_attention(q_BTHK, k_BHSK, v_BHSK, mask_BTS):
    """Attention of a few new positions to the slots of a KV cache.

    Args:
        k_BHSK, v_BHSK: heads before slots, unlike above, so that a head's slots are contiguous.
        mask_BTS: bool; the slots that each new position sees.
    Returns:
        [B, T, H, K].
    """
    scores_BHTS = jnp.einsum("bthk,bhsk->bhts", q_BTHK, k_BHSK, preferred_element_type=jnp.float32)
    scores_BHTS = scores_BHTS * q_BTHK.shape[-1] ** -0.5
    probs_BHTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BHTS, NEG_INF), axis=-1)
    return jnp.einsum("bhts,bhsk->bthk", probs_BHTS.astype(v_BHSK.dtype), v_BHSK)
