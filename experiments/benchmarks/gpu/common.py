"""What the parts of the GPU benchmark share: the device, timed rounds, and both sizes of everything."""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp

from experiments.benchmarks._peer import quartiles
from gptjax.model.spec import GPT2, GPT3, GPTConfig
from gptjax.training.precision import PrecisionConfig


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything: `rounds` timed rounds of `steps`; models by name; (rows, remat) of each, the fastest
    first: the first that fits is taken."""

    rounds: int
    steps: int
    train: dict[str, tuple[GPTConfig, tuple[tuple[int, str], ...]]]
    small: GPTConfig  # for checks, against the CPU
    decode: dict[str, GPTConfig]
    batches: tuple[int, ...]
    prompt: int
    new_tokens: int
    episodes: int
    response: int
    microbatch: int
    attention: dict[str, tuple[int, int, int, int, int | None, bool]]  # rows, time, heads, width, band, packed


FULL = Scale(
    rounds=5, steps=5,
    train={
        "gpt2-124m": (GPT2["124m"], ((32, "none"), (16, "none"), (8, "dots"))),
        "gpt2-1558m": (GPT2["1558m"], ((8, "none"), (8, "dots"), (8, "full"), (4, "full"))),
        "gpt3-1.3b": (GPT3["1.3b"], ((4, "none"), (4, "dots"), (4, "full"), (2, "full"))),
    },
    small=GPTConfig(512, n_layer=4, n_head=4, d_model=256, context_length=256, local_window=64),
    decode={"gpt2-124m": GPT2["124m"], "gpt2-1558m": GPT2["1558m"]},
    batches=(1, 8, 64), prompt=128, new_tokens=256, episodes=64, response=256, microbatch=32,
    attention={
        "dense 8x1024, 12x64": (8, 1024, 12, 64, None, False),
        "dense 4x2048, 16x128": (4, 2048, 16, 128, None, False),
        "band 256, 4x2048, 16x128": (4, 2048, 16, 128, 256, False),
        "packed 4x2048, 16x128": (4, 2048, 16, 128, None, True),
        "band 256, packed 4x2048, 16x128": (4, 2048, 16, 128, 256, True),
    },
)  # fmt: skip
_TOY = GPTConfig(128, n_layer=2, n_head=2, d_model=32, context_length=64)
TINY = Scale(
    rounds=2, steps=1, train={"toy": (_TOY, ((2, "none"),))}, small=dataclasses.replace(_TOY, local_window=16),
    decode={"toy": _TOY}, batches=(1, 2), prompt=8, new_tokens=8, episodes=4, response=8, microbatch=2,
    attention={"dense": (2, 64, 2, 16, None, False), "band, packed": (2, 64, 2, 16, 16, True)},
)  # fmt: skip


def half(device) -> PrecisionConfig:
    """bfloat16, or float16 on GPUs older than Ampere, which have none."""
    capability = getattr(device, "compute_capability", "8.0")
    return PrecisionConfig("bfloat16" if float(capability) >= 8 else "float16")


def about() -> dict:
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind, "platform": device.platform, "count": jax.device_count(),
        "compute_capability": getattr(device, "compute_capability", None), "memory": stats.get("bytes_limit"),
        "jax": jax.__version__, "runtime": jax.extend.backend.get_backend().platform_version.splitlines()[0],
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }  # fmt: skip


def seconds_of(run, steps: int = 1) -> float:
    """Of `steps` calls of run(), the last one waited for."""
    began = time.perf_counter()
    for _ in range(steps):
        out = run()
    jax.block_until_ready(out)
    return time.perf_counter() - began


def in_turns(sides: dict, rounds: int, steps: int = 1) -> dict[str, list[float]]:
    """{side: quartiles of the seconds of one call}, the sides in turns; each is warmed up first."""
    for run in sides.values():
        seconds_of(run)
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            seconds[name].append(seconds_of(run, steps) / steps)
    return {name: quartiles(s) for name, s in seconds.items()}


def some_segments(rows: int, time: int):
    """int32 [rows, time]: documents of different lengths, cut at other places in each row."""
    breaks = jax.random.uniform(jax.random.key(1), (rows, time)) < 4 / time
    return jnp.cumsum(breaks, axis=1).astype(jnp.int32)
