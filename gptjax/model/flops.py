"""The one compute accounting: FLOPs per token, PF-days and MFU.

XLA's cost_analysis counts a scanned layer once and a Pallas kernel not at all, so it is not used.
A multiply-add is 2 FLOPs; training costs 3 forwards (Kaplan et al. 2020 §2.1).
"""

import dataclasses

from gptjax.hardware import peak_flops
from gptjax.model.spec import GPTConfig, parameter_count

PF_DAY = 8.64e19  # FLOPs: 1e15 per second for a day


def six_nd(parameters: float, tokens: float) -> float:
    """Training FLOPs by C = 6 N D (Kaplan et al. 2020 §2.1; Brown et al. 2020, appendix D)."""
    return 6 * parameters * tokens


def pf_days(flops: float) -> float:
    """FLOPs in PF-days."""
    return flops / PF_DAY


def visible_pairs(context_length: int, window: int | None) -> int:
    """(query, key) pairs that a causal mask, cut to the last `window` keys, leaves visible."""
    w = min(window or context_length, context_length)
    return w * (w + 1) // 2 + (context_length - w) * w


@dataclasses.dataclass(frozen=True)
class FlopsPerToken:
    """Training FLOPs per token at full context, by the conventions in use.

    causal: matmuls with attention counted as the model needs it: half of T^2 in dense layers, the band in
        banded ones. palm: 6 N + 12 L H Q T with N less the position table (PaLM appendix B; nanoGPT's MFU),
        attention counted in full. six_n: 6 N, the law of the papers' compute tables. full: all matmuls
        with attention in full, without biases and gains. kaplan: 6 N + 6 L T D, N the matrices of the blocks (Kaplan
        et al. 2020, eq. 2.2). chinchilla: Hoffmann et al. 2022, appendix F, with embeddings and logits. The last two
        are of GPTs only.
    """

    causal: float
    palm: int
    six_n: int
    full: int
    kaplan: int | None = None
    chinchilla: float | None = None


def flops_per_token(c: GPTConfig) -> FlopsPerToken:
    L, D, T, V = c.n_layer, c.d_model, c.context_length, c.vocab_size
    n = parameter_count(c)
    matmuls = 2 * (12 * L * D * D + V * D)
    full_attention = 4 * L * T * D
    n_local = sum(c.is_local(layer) for layer in range(L))
    # Keys a query sees on average, by the usual halving; a band sees fewer, and the exact count is used.
    dense_keys = T / 2
    local_keys = min(visible_pairs(T, c.local_window) / T, dense_keys)
    causal_attention = 4 * D * ((L - n_local) * dense_keys + n_local * local_keys)
    return FlopsPerToken(
        causal=3 * (matmuls + causal_attention),
        palm=6 * (n - T * D) + 12 * L * D * T,
        six_n=6 * n,
        full=3 * (matmuls + full_attention),
        kaplan=3 * (2 * 12 * L * D * D + 2 * L * T * D),
        chinchilla=3 * sum(appendix_f(L, D, c.d_ff, c.n_head, c.d_head, T, V).values()) / T,
    )


def appendix_f(layers: int, d_model: int, d_ff: int, heads: int, d_head: int, length: int, vocabulary: int) -> dict:
    """{part: forward FLOPs of a sequence} as Hoffmann et al. 2022 count them, appendix F; the backward pass is twice
    that. All layers together."""
    width = heads * d_head
    return {
        "embeddings": 2 * length * vocabulary * d_model,
        "qkv": layers * 2 * 3 * length * d_model * width,
        "scores": layers * 2 * length * length * width,
        "softmax": layers * 3 * heads * length * length,
        "values": layers * 2 * length * length * width,
        "projection": layers * 2 * length * width * d_model,
        "mlp": layers * 2 * length * 2 * d_model * d_ff,
        "logits": 2 * length * d_model * vocabulary,
    }


def mfu(flops_per_second: float, device_kind: str, device_count: int) -> float | None:
    """Model FLOPs utilization in [0, 1] of all devices together, or None on an unknown chip."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_second / (peak * device_count)
