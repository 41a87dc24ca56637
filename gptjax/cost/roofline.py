"""Roofline model: a lower bound on the time of a step, and whether compute, HBM, ICI or DCN bounds it.

    compute  FLOPs / peak        of the model, and those that remat repeats
    hbm      bytes / bandwidth   of unavoidable traffic (`train_bytes`)
    ici      bytes / bandwidth   sent by the compiled program's collectives (cost/hlo.py), all links in use
    dcn      bytes / bandwidth   sent between slices

If all overlap perfectly, the step takes the longest of the four; if nothing overlaps, their sum. A real step takes
longer than the former and, since kernels never reach their peak, usually about as long as the latter or longer. Latency
is not modeled.
"""

import dataclasses

from gptjax.cost.topology import Chip
from gptjax.model.flops import flops_per_token
from gptjax.model.spec import GPTConfig, non_embedding_count


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one execution of a program. model_flops: with causal attention counted as half;
    palm_flops: counted as in PaLM and metrics.jsonl's mfu; flops: model_flops plus recomputation; 0 = not applicable.
    bubble: fraction of the time that the stages of a pipeline are idle."""

    model_flops: float
    palm_flops: float
    flops: float
    hbm_bytes: float
    bubble: float = 0.0


def bounds(work: Work, ici_bytes: float, dcn_bytes: float, chip: Chip) -> dict:
    """Lower bounds of a step.

    Args:
        ici_bytes, dcn_bytes: sent by one device, within a slice and between slices.
    Returns:
        'seconds' {'compute', 'hbm', 'ici', 'dcn': None if the bandwidth is unknown}, 'binding': the largest of them,
        'step_seconds' with and without overlap, upper bounds of MFU, and arithmetic intensities in FLOPs per byte.
    """
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
    """Forward FLOPs per token that the backward pass repeats: with remat 'dots' attention; with 'full' also a layer's
    matmuls except the last one, whose output no gradient needs."""
    if c.remat == "none":
        return 0.0
    attention = (flops_per_token(c).causal - 6 * (12 * c.n_layer * c.d_model**2 + c.vocab_size * c.d_model)) / 3
    return attention + (16 * c.n_layer * c.d_model**2 if c.remat == "full" else 0.0)


def train_work(c: GPTConfig, *, tokens: int, devices: int, micro_batches: int, ways: int, state_bytes: int,
               parameter_bytes: int, kept_bytes: float, bubble: float = 0.0) -> Work:  # fmt: skip
    """Work of one device in a training step of `tokens` tokens over all devices.

    Args:
        ways: number of shards of a matrix during its multiplication (tensor x stage).
        state_bytes, parameter_bytes: float32, of one device.
        kept_bytes: activations that one device saves in a micro-batch's forward pass.
        bubble: of the pipeline (parallel/pipeline.py).
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
    """Unavoidable HBM traffic of a training step on one device, in bytes, with M micro-batches and N parameters:

    2 state                                  parameters and moments, read and written
    + 2 M gradients                          the float32 sum over micro-batches, read and written for each
    + M passes (2 N / ways)                  16-bit matrices: forward, input gradient, and recomputation with 'full'
    + 2 M kept                               saved activations, written and read
    """
    passes = 3 if c.remat == "full" else 2
    matrices = 2 * (non_embedding_count(c) + c.vocab_size * c.d_model) / ways
    return 2 * state_bytes + 2 * micro_batches * parameter_bytes + micro_batches * (passes * matrices + 2 * kept_bytes)
