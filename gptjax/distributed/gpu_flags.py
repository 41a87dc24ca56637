"""Environment variables for NVIDIA GPUs: XLA flags that overlap communication with compute, and the memory fraction.

    gpu_flags.prepare()    # before JAX creates its backend: XLA reads the environment once. hosts.join calls it

The flags are off by default in jaxlib 0.10.2 and 0.11.0 (XLA_FLAGS=--help; its list is truncated, Findus23/guides has
the full one). NVIDIA's images set the first; its "Tips for High-Performance LLMs with JAX and XLA" gives all three, and
JAX_OPTIMIZATION_LEVEL=O1 turns on the same three there. All are marked [Stable] in XLA, which matters because XLA
aborts the process on an unknown flag. Not set because they are on by default: asynchronous collectives, pipelined
reduce-scatter, unrolling by two of loops with collectives (which subsumes double buffering), Speed-of-Light latency
estimates on Hopper and Blackwell. Not set because they were not measured here: combine thresholds (30 MiB), Triton
matmuls (the autotuner chooses between them and cuBLAS), command buffers.
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

FLAGS = {
    # Collectives and host copies start early and finish late, with computation in between.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # In a loop over layers: prefetch the next layer's parameters, reduce the previous layer's gradients.
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
}
# JAX preallocates 75 % of a GPU's memory by default. NVIDIA recommends 0.9 or 0.8: cuBLAS and NCCL need the rest.
MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
DEVICES = (Path("/dev/nvidia0"), Path("/dev/dxg"))  # where JAX itself looks; the second is WSL


def has_nvidia_gpu(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether JAX is going to run on NVIDIA GPUs, decided without starting it: a device file exists and JAX_PLATFORMS
    does not select another platform.

    If JAX lacks the CUDA plugin, the flags are harmless: only the GPU backend reads them.
    """
    platforms = environment.get("JAX_PLATFORMS", "").replace("gpu", "cuda").split(",")
    return any(device.exists() for device in DEVICES) and (platforms == [""] or "cuda" in platforms)


def missing_settings(environment: MutableMapping[str, str]) -> dict[str, str]:
    """{variable: value} to set. Flags that the user has set keep their value."""
    given = environment.get("XLA_FLAGS", "")
    named = {flag.lstrip("-").partition("=")[0] for flag in given.split()}
    flags = [f"--{name}={value}" for name, value in FLAGS.items() if name not in named]
    found = {"XLA_FLAGS": " ".join(flags)} if flags else {}
    if not any(name.startswith("XLA_PYTHON_CLIENT_") for name in environment):
        found[MEMORY[0]] = MEMORY[1]
    return found


def prepare(verbose: bool = True, environment: MutableMapping[str, str] = os.environ):
    """Sets the variables if there is an NVIDIA GPU, and reports them in one line on stderr if verbose."""
    if not has_nvidia_gpu(environment):
        return
    new = missing_settings(environment)
    given = environment.get("XLA_FLAGS", "")
    for name, value in new.items():
        environment[name] = f"{given} {value}".strip() if name == "XLA_FLAGS" else value
    if new and verbose:
        print(f"NVIDIA GPU: set {', '.join(f'{k}={v}' for k, v in new.items())}", file=sys.stderr)
