"""Train steps as pretrain.py makes them, in 16 bits: tokens/s, MFU, memory; the smallest beside torch."""

import dataclasses
import functools
import time

import jax
import numpy as np

from experiments.benchmarks._peer import quartiles
from experiments.benchmarks.gpu.common import Scale, half, seconds_of
from experiments.benchmarks.setup import as_batch, make_step, random_tokens
from gptjax.model.flops import flops_per_token, mfu
from gptjax.training.step import memory_needed


def run(scale: Scale, name: str, torch=None) -> dict:
    """torch: the Peer of torch_peer.py, or None; asked for a step of the same rows."""
    model, settings = scale.train[name]
    compute, device = half(jax.devices()[0]).compute, jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    tried = {}
    for rows, remat in settings:
        shaped = dataclasses.replace(model, remat=remat)
        state, jitted = make_step(shaped, compute)
        batch = jax.device_put(as_batch(random_tokens(model.vocab_size, rows, model.context_length)))
        rates = np.array([1e-4], np.float32)
        began = time.perf_counter()
        compiled = jitted.lower(state, batch, rates).compile()
        seconds = time.perf_counter() - began
        need = sum((memory_needed(compiled) or {}).values())
        tried[f"{rows} rows, remat {remat}"] = need
        if limit is None or need < 0.97 * limit:
            break
        state = compiled = None
    else:
        return {"left out": f"no setting fits {limit} bytes", "bytes needed": tried}

    def step():
        nonlocal state
        state, metrics = compiled(state, batch, rates)
        return metrics

    for _ in range(3):
        metrics = jax.block_until_ready(step())
    ours, theirs = [], []
    for _ in range(scale.rounds):
        ours.append(seconds_of(step, scale.steps) / scale.steps)
        if torch:
            theirs.append(torch.iterate(f"train {rows} {scale.steps}")["of_one"])
    tokens = rows * model.context_length
    per_token, speed = flops_per_token(model), tokens / quartiles(ours)[1]
    share = functools.partial(mfu, device_kind=device.device_kind, device_count=1)
    result = {
        "rows": rows, "remat": remat, "compute": compute, "context": model.context_length,
        "seconds_quartiles": quartiles(ours), "tokens_per_second": speed,
        "mfu_causal": share(speed * per_token.causal), "mfu_palm": share(speed * per_token.palm),
        "compile_seconds": seconds, "bytes needed": tried, "loss": float(metrics["loss_sum"][0] / metrics["count"][0]),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }  # fmt: skip
    if torch:
        result["torch"] = {"seconds_quartiles": quartiles(theirs), "about": torch.about}
        result["ratio_quartiles"] = quartiles([t / o for t, o in zip(theirs, ours, strict=True)])
    return result
