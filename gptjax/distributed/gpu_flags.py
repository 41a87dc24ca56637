"""What XLA and JAX are told on NVIDIA GPUs, before they start: flags that hide communication, and how much memory.

    gpu.prepare()    # before JAX makes its backend; XLA reads the environment once. hosts.join does it

jaxlib 0.10.2 has each of them off, and 0.11.0 too (XLA_FLAGS=--help; its list stops early, Findus23/guides has all of
them). NVIDIA's images set the first; its "Tips for High-Performance LLMs with JAX and XLA" gives all three, which are
also what JAX_OPTIMIZATION_LEVEL=O1 turns on there. All are marked [Stable] in XLA, for one that it does not know aborts
the process. Left alone, since they are on by default: asynchronous collectives, pipelined reduce-scatter, loops with
collectives unrolled by two (all that double buffering does), Speed-of-Light estimates of latency on Hopper and
Blackwell. Left alone, since nothing was measured here: combine thresholds (30 MiB), Triton matmuls (the autotuner
chooses between them and cuBLAS), command buffers.
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

FLAGS = {
    # Collectives (and copies to the host's memory) begin early and end late, with computation in between.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # In a loop over layers the next one's parameters are gathered, and the last one's gradients added, meanwhile.
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
}
# JAX takes three quarters of a GPU's memory unless told otherwise. NVIDIA's page: .9 or .8; cuBLAS and NCCL need some.
MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
DEVICES = (Path("/dev/nvidia0"), Path("/dev/dxg"))  # where JAX itself looks; the second is Windows' Linux


def is_there(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether JAX is going to run on NVIDIA GPUs, without starting it: a device file, and no word of another platform.

    With a GPU that JAX has no plugin for, the flags are set in vain: nothing but a GPU reads them.
    """
    platforms = environment.get("JAX_PLATFORMS", "").replace("gpu", "cuda").split(",")
    return any(device.exists() for device in DEVICES) and (platforms == [""] or "cuda" in platforms)


def additions(environment: MutableMapping[str, str]) -> dict[str, str]:
    """{variable: value} still to be set; what a user has set stands, flag by flag."""
    given = environment.get("XLA_FLAGS", "")
    named = {flag.lstrip("-").partition("=")[0] for flag in given.split()}
    flags = [f"--{name}={value}" for name, value in FLAGS.items() if name not in named]
    found = {"XLA_FLAGS": " ".join(flags)} if flags else {}
    if not any(name.startswith("XLA_PYTHON_CLIENT_") for name in environment):
        found[MEMORY[0]] = MEMORY[1]
    return found


def prepare(say: bool = True, environment: MutableMapping[str, str] = os.environ):
    """Sets them where there is an NVIDIA GPU, and says so in one line on stderr."""
    if not is_there(environment):
        return
    new = additions(environment)
    given = environment.get("XLA_FLAGS", "")
    for name, value in new.items():
        environment[name] = f"{given} {value}".strip() if name == "XLA_FLAGS" else value
    if new and say:
        print(f"NVIDIA GPU: {', '.join(f'{k}={v}' for k, v in new.items())} (gpu_flags.py)", file=sys.stderr)
