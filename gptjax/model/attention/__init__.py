"""Causal self-attention: one function, and a file for each way to compute it.

    attention(q_BTHK, k_BTHK, v_BTHK, path=...) -> [B, T, H, K]

The paths, all tested equal to `reference` in value and gradient (tests/test_attention.py), except cudnn, which has not
been run yet:

    reference  reference.py  softmax(q k^T / sqrt(d_head)) v with the mask written out: read this one first
    cpu        cpu.py        a custom VJP: blocks of queries, one batch row at a time, probabilities recomputed
    splash     splash.py     the Pallas kernel for TPUs, banded and segmented masks included
    xla        fused.py      jax.nn.dot_product_attention, on every platform
    cudnn      fused.py      the same function with cuDNN's flash attention, in bf16 and fp16

Context parallelism: where the mesh shards the context (axis `seq`), each device keeps its queries and all-gathers the
keys and values. That is exact, for dropout too, since masks go by position. A device's part of the context is
contiguous, so the last device has most of the causal work.

Dropout on the probabilities (GPT-1) exists in `reference` only: with dropout every path uses it.
"""

import jax
import jax.numpy as jnp

from gptjax.model.attention.cpu import SHORT, cpu_attention
from gptjax.model.attention.fused import cudnn_supports, fused_attention, gpu_has_flash_attention
from gptjax.model.attention.reference import cached_attention, causal_mask, reference_attention
from gptjax.model.attention.splash import splash_attention, splash_supports
from gptjax.model.attention.tree import tree_attention
from gptjax.parallel.sharding import constrain

__all__ = ["attention", "cached_attention", "causal_mask", "reference_attention", "resolve", "tree_attention"]


def resolve(path: str, platform: str) -> str:
    """The path that 'auto' means on a platform ('cpu', 'tpu', 'gpu', ...)."""
    if path != "auto":
        return path
    if platform in ("gpu", "cuda"):
        return "cudnn" if gpu_has_flash_attention() else "xla"
    return {"cpu": "cpu", "tpu": "splash"}.get(platform, "xla")


def attention(
    q_BTHK, k_BTHK, v_BTHK, *, path, window=None, segment_ids=None, dropout=0.0, dropout_keys=None, mesh=None
):
    """Causal attention of each position to itself and those before it.

    Args:
        q_BTHK, k_BTHK, v_BTHK: of one dtype. Scores are scaled by 1/sqrt(d_head).
        path: 'reference', 'xla', 'cpu', 'splash' or 'cudnn'; 'auto' asks `resolve` for the default backend, which is
            wrong when compiling for another platform: resolve it for that one first. Shapes and dtypes that a path
            does not support go to 'xla'.
        window: None, or how many positions back a query sees, its own included (a band).
        segment_ids: None, or int [B, T]; a position sees its own segment only.
        dropout, dropout_keys: probability of dropping an attention weight, and a key for each row, [B].
        mesh: the mesh that they are sharded over; needed by 'splash' on more than one device.
    Returns:
        [B, T, H, K] in the dtype of q.
    """
    path, T = resolve(path, jax.default_backend()), q_BTHK.shape[1]
    if window is not None and window >= T:
        window = None
    shards = _context_shards()
    if path == "splash" and not splash_supports(T, shards):
        path = "xla"
    if shards > 1 and (dropout > 0.0 or path != "splash"):
        # All keys and values of the context with a part of its queries. The blocks of `cpu` and cuDNN's causal
        # mask start at query 0, so both become `xla`, whose mask is sharded like any array.
        k_BTHK, v_BTHK = (constrain(a, "batch", None, "heads", None) for a in (k_BTHK, v_BTHK))
        path = "xla" if path in ("cpu", "cudnn") else path
    qkv = q_BTHK, k_BTHK, v_BTHK
    if dropout > 0.0 and dropout_keys is not None:
        return reference_attention(
            *qkv, window=window, segment_ids=segment_ids, dropout=dropout, dropout_keys=dropout_keys
        )
    if path == "cpu" and (T > SHORT or q_BTHK.dtype == jnp.float16):  # XLA:CPU's has no float16
        return cpu_attention(*qkv, segment_ids, window)
    if path == "splash":
        return splash_attention(*qkv, window, segment_ids, mesh)
    if path == "cudnn" and cudnn_supports(q_BTHK):
        return fused_attention(*qkv, window, segment_ids, "cudnn")
    if path in ("xla", "cpu", "cudnn"):
        return fused_attention(*qkv, window, segment_ids, "xla")
    return reference_attention(*qkv, window=window, segment_ids=segment_ids)


def _context_shards() -> int:
    """Over how many devices the current mesh (jax.set_mesh) shards the context."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["seq"]
