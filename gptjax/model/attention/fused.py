"""jax.nn.dot_product_attention: XLA's attention on every platform, and cuDNN's flash attention on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from gptjax.model.attention.reference import causal_mask
from gptjax.parallel.sharding import constrain


def fused_attention(q_BTHK, k_BSHK, v_BSHK, window, segment_ids, implementation):
    """Causal attention; arguments and result as for `attention`. implementation: 'xla' or 'cudnn'."""
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, T, S]
        if implementation == "cudnn":
            # A mask is a bias to cuDNN, and before 9.10.2 it takes a band or a bias: "Left and right bounds are only
            # supported with is_dropout=False, is_bias=False" (cudnn-frontend). So the band goes into the mask.
            if window is not None:
                t = jnp.arange(q_BTHK.shape[1])
                mask, window = mask & causal_mask(t, t, window), None
            mask = constrain(mask, "batch", None, None, None)  # its partitioner wants the rows of q, or all
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSHK, v_BSHK, mask=mask, is_causal=True, local_window_size=local, implementation=implementation
    )


def cudnn_supports(q_BTHK) -> bool:
    """Whether jax takes these shapes to cuDNN's flash attention: 16 bits, d_head a multiple of 8 up to 128, even T."""
    # jax's message says that only masked attention needs an even T; its check (0.10.2) asks for it without a bias too.
    half, d_head = q_BTHK.dtype in (jnp.bfloat16, jnp.float16), q_BTHK.shape[-1]
    return half and d_head % 8 == 0 and d_head <= 128 and q_BTHK.shape[1] % 2 == 0


def gpu_has_flash_attention() -> bool:
    """cuDNN's flash attention needs Ampere (compute capability 8.0) or newer; T4 and V100 are older."""
    try:
        capability = jax.devices("gpu")[0].compute_capability
        return tuple(int(n) for n in str(capability).split(".")) >= (8, 0)
    except (RuntimeError, AttributeError, ValueError):
        return True  # no GPU here: compiling for one elsewhere
