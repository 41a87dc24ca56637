"""Attention over a prefix tree: sequences that begin alike are one row, with what they share stored once.

A row is the tree's tokens in depth-first order, so that the tokens after t that continue t's sequences are exactly the
slots t + 1 .. visible_until[t] - 1. A slot sees the slots before it on its own path from the root:

    mask[t, s] = s <= t < visible_until[s]

Isolated segments are trees that share nothing. Forward pass only: evaluation scores with it, nothing trains.
"""

import jax
import jax.numpy as jnp

from gptjax.model.attention.cpu import cpu_tree_attention
from gptjax.model.attention.reference import causal_mask
from gptjax.parallel.sharding import constrain


def tree_mask(visible_until_BT, positions_BT, window=None):
    """bool [B, T, T]: which slots each slot sees.

    Args:
        visible_until_BT: int; one past the last slot that sees this one.
        positions_BT: int; the depth of each slot in its tree, which a band (window) is measured in.
    """
    t = jnp.arange(visible_until_BT.shape[1])
    mask_BTS = causal_mask(t, t)[None] & (t[None, :, None] < visible_until_BT[:, None, :])
    return mask_BTS if window is None else mask_BTS & causal_mask(positions_BT, positions_BT, window)


def tree_attention(q_BTHK, k_BTHK, v_BTHK, visible_until_BT, positions_BT, window, path):
    """softmax(q k^T / sqrt(d_head)) v over the slots that each slot sees. Arguments as for `attention` and `tree_mask`;
    path: 'cpu', or any other for XLA's attention with the mask written out."""
    if path == "cpu" and q_BTHK.dtype != jnp.float16:
        return cpu_tree_attention(q_BTHK, k_BTHK, v_BTHK, visible_until_BT, positions_BT, window)
    mask_B1TS = constrain(tree_mask(visible_until_BT, positions_BT, window)[:, None], "batch", None, None, None)
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask=mask_B1TS)
