"""How long a step must take at least, and what bounds it: compute, HBM, the links between chips, or the network.

    compute  FLOPs / peak        the model's and those that remat computes again
    hbm      bytes / bandwidth   what no order of the operations avoids, from `train_bytes`
    ici      bytes / bandwidth   what the compiled program's collectives send (cost/hlo.py), all links busy
    dcn      bytes / bandwidth   those that cross slices

If all overlap perfectly the step takes the longest of them; if nothing does, their sum. A real step lies above the
first and, as kernels are never at their peak, usually near the second or above it. Latency is not counted.
"""

import dataclasses

from gptjax.cost.topology import Chip
from gptjax.model.flops import flops_per_token
from gptjax.model.spec import GPTConfig, non_embedding_count


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one run of a program. model_flops: attention as the causal mask leaves it;
    palm_flops: as PaLM and metrics.jsonl's mfu count it; flops: model_flops and what is computed again; 0 = no such.
    bubble: the share of the time that a pipeline's stages wait."""

    model_flops: float
    palm_flops: float
    flops: float
    hbm_bytes: float
    bubble: float = 0.0


def bounds(work: Work, ici_bytes: float, dcn_bytes: float, chip: Chip) -> dict:
    """Seconds of each, the binding one, and the MFU that is left if all else is perfect."""
    seconds = {
        "compute": work.flops / chip.peak / (1 - work.bubble),
        "hbm": work.hbm_bytes / chip.hbm_bandwidth,
        "ici": ici_bytes / chip.ici,
    }
    if dcn_bytes:
        seconds["dcn"] = dcn_bytes / chip.dcn if chip.dcn else None
    known = {k: v for k, v in seconds.items() if v is not None}
    binding = max(known, key=known.get)
    overlapped, serial = known[binding], sum(known.values())
    return {
        "seconds": seconds,
        "binding": binding,
        "step_seconds": overlapped,
        "step_seconds_without_overlap": serial,
        "mfu_bound": work.palm_flops / chip.peak / overlapped,
        "mfu_bound_causal": work.model_flops / chip.peak / overlapped,
        "mfu_without_overlap": work.palm_flops / chip.peak / serial,
        "collective_share": (known["ici"] + known.get("dcn", 0)) / serial,
        "flops_per_hbm_byte": work.flops / work.hbm_bytes,
        "flops_per_collective_byte": work.flops / (ici_bytes + dcn_bytes) if ici_bytes + dcn_bytes else None,
    }


def recomputed_flops_per_token(c: GPTConfig) -> float:
    """Forward FLOPs that the backward pass repeats: under 'dots' attention; under 'full' also a layer's matmuls but the
    last one, whose output no gradient needs."""
    if c.remat == "none":
        return 0.0
    attention = (flops_per_token(c).causal - 6 * (12 * c.n_layer * c.d_model**2 + c.vocab_size * c.d_model)) / 3
    return attention + (16 * c.n_layer * c.d_model**2 if c.remat == "full" else 0.0)


def train_work(c: GPTConfig, *, tokens: int, devices: int, micro_batches: int, ways: int, state_bytes: int,
               parameter_bytes: int, kept_bytes: float, bubble: float = 0.0) -> Work:  # fmt: skip
    """One training step of `tokens` tokens over all devices.

    ways: over how many devices a matrix stays cut up while it is multiplied (tensor x stage). state_bytes,
    parameter_bytes: of one device, float32. kept_bytes: what one device keeps of a micro-batch's forward pass.
    """
    f, share = flops_per_token(c), tokens / devices
    return Work(
        model_flops=f.causal * share,
        palm_flops=f.palm * share,
        flops=(f.causal + recomputed_flops_per_token(c)) * share,
        hbm_bytes=train_bytes(c, micro_batches, ways, state_bytes, parameter_bytes, kept_bytes),
        bubble=bubble,
    )


def train_bytes(c, micro_batches, ways, state_bytes, parameter_bytes, kept_bytes) -> float:
    """HBM bytes that a training step cannot avoid on one device:

    2 state                                  parameters and moments, read and written
    + 2 M gradients                          the float32 sum over M micro-batches, read and written; M = 1: once each
    + M passes (2 N / ways)                  16-bit matrices: forward, gradient of the input, and again under 'full'
    + 2 M kept                               what the forward pass keeps, written and read
    """
    passes = 3 if c.remat == "full" else 2
    matrices = 2 * (non_embedding_count(c) + c.vocab_size * c.d_model) / ways
    return 2 * state_bytes + 2 * micro_batches * parameter_bytes + micro_batches * (passes * matrices + 2 * kept_bytes)
