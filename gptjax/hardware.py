"""Peak FLOP/s and memory bandwidth of the chips that JAX runs on."""

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
