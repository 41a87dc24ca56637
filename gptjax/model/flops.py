"""The one compute accounting: FLOPs per token, PF-days, chip peaks and MFU.

XLA's cost_analysis counts a scanned layer once and a Pallas kernel not at all, so nothing here asks it.
A multiply-add is 2 FLOPs; training costs 3 forwards (Kaplan et al. 2020 §2.1).
"""

import dataclasses

from gptjax.model.spec import GPTConfig, parameter_count

PF_DAY = 8.64e19  # FLOPs: 1e15 per second for a day


def visible_pairs(context_length: int, window: int | None) -> int:
    """(query, key) pairs that a causal mask, cut to the last `window` keys, leaves visible."""
    w = min(window or context_length, context_length)
    return w * (w + 1) // 2 + (context_length - w) * w


@dataclasses.dataclass(frozen=True)
class FlopsPerToken:
    """Training FLOPs per token at full context, by the three conventions in use.

    causal: matmuls with attention counted as the model needs it: half of T^2 in dense layers, the band in
        banded ones. palm: 6 N + 12 L H Q T with N less the position table (PaLM appendix B; nanoGPT's MFU),
        attention counted in full. six_n: 6 N, the law of the papers' compute tables. full: all matmuls
        with attention in full, without biases and gains.
    """

    causal: float
    palm: int
    six_n: int
    full: int


def flops_per_token(c: GPTConfig) -> FlopsPerToken:
    L, d, T, V = c.n_layer, c.d_model, c.context_length, c.vocab_size
    n = parameter_count(c)
    matmuls = 2 * (12 * L * d * d + V * d)
    full_attention = 4 * L * T * d
    n_local = sum(c.is_local(layer) for layer in range(L))
    # Keys a query sees on average, by the usual halving; a band sees fewer, and the exact count is used.
    dense_keys = T / 2
    local_keys = min(visible_pairs(T, c.local_window) / T, dense_keys)
    causal_attention = 4 * d * ((L - n_local) * dense_keys + n_local * local_keys)
    return FlopsPerToken(
        causal=3 * (matmuls + causal_attention),
        palm=6 * (n - T * d) + 12 * L * d * T,
        six_n=6 * n,
        full=3 * (matmuls + full_attention),
    )


# Dense bf16 peak FLOP/s of one JAX device, from the vendors' data sheets (no sparsity). Keys are prefixes of
# jax.Device.device_kind in lower case; a chip that is not listed gets no MFU rather than a wrong one.
PEAK_FLOPS = {
    "tpu v2": 22.5e12,  # a device is a core: half a chip
    "tpu v3": 61.5e12,  # likewise
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5p": 459e12,
    "tpu v5": 459e12,
    "tpu v6 lite": 918e12,
    "tpu v6e": 918e12,
    "tpu7x": 1153.5e12,  # a device is a core: half a chip
    "nvidia a100": 312e12,
    "nvidia h100 pcie": 756e12,
    "nvidia h100 nvl": 835e12,
    "nvidia h100": 989e12,
    "nvidia h200": 989e12,
    "nvidia b200": 2250e12,
    "nvidia l4": 121e12,
    "nvidia l40s": 362e12,
    "nvidia a10g": 70e12,
    "nvidia rtx 4090": 165e12,
    "nvidia geforce rtx 4090": 165e12,
    "tesla v100": 125e12,
    "tesla t4": 65e12,
}


# Bytes/s of one device's HBM (or GDDR), from the same sheets.
MEMORY_BANDWIDTH = {
    "tpu v2": 350e9,
    "tpu v3": 450e9,
    "tpu v4": 1200e9,
    "tpu v5 lite": 819e9,
    "tpu v5e": 819e9,
    "tpu v5p": 2765e9,
    "tpu v5": 2765e9,
    "tpu v6 lite": 1638e9,
    "tpu v6e": 1638e9,
    "tpu7x": 3690e9,  # a device is a core: half a chip
    "nvidia a100": 1555e9,  # 40 GB
    "nvidia a100 sxm4 80gb": 2039e9,
    "nvidia a100 80gb pcie": 1935e9,
    "nvidia h100 pcie": 2000e9,
    "nvidia h100 nvl": 3900e9,
    "nvidia h100": 3350e9,
    "nvidia h200": 4800e9,
    "nvidia b200": 8000e9,
    "nvidia l4": 300e9,
    "nvidia l40s": 864e9,
    "nvidia a10g": 600e9,
    "nvidia rtx 4090": 1008e9,
    "nvidia geforce rtx 4090": 1008e9,
    "tesla v100": 900e9,
    "tesla t4": 320e9,
}


def _of_kind(table: dict[str, float], device_kind: str) -> float | None:
    """The entry whose name is the longest prefix, in whole words, of the device's kind."""
    kind = f"{device_kind.lower().replace('-', ' ')} "
    matches = [name for name in table if kind.startswith(f"{name} ")]
    return table[max(matches, key=len)] if matches else None


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 (fp16 where there is no bf16) peak of one device in FLOP/s, or None if it is not known."""
    return _of_kind(PEAK_FLOPS, device_kind)


def memory_bandwidth(device_kind: str) -> float | None:
    """Bytes/s of one device's own memory, or None if it is not known."""
    return _of_kind(MEMORY_BANDWIDTH, device_kind)


def mfu(flops_per_second: float, device_kind: str, device_count: int) -> float | None:
    """Model FLOPs utilisation in [0, 1] of all devices together, or None on an unknown chip."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_second / (peak * device_count)
