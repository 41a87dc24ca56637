"""Cloud TPU slices by the names that gcloud takes."""

import dataclasses
import re

from experiments.launch.job import nearest
from gptjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Generation:
    """The number in a name counts `unit`s: of v5e and v6e chips, of the others TensorCores, two to a chip.

    runtime: the software version that TPU VMs of it are made with; None = GKE alone has it. sizes: the numbers there
    are, or the largest one, where multiples of the smallest slice up to it may exist. devices: a chip, as JAX sees it.
    """

    runtime: str | None
    unit: str
    sizes: tuple[int, ...] | int
    devices: int = 1


_CHIPS = (1, 4, 8, 16, 32, 64, 128, 256)
GENERATIONS = {
    "v2": Generation("tpu-ubuntu2204-base", "cores", (8, 32, 128, 256, 512), devices=2),
    "v3": Generation("tpu-ubuntu2204-base", "cores", (8, 32, 64, 128, 256, 512, 1024, 2048), devices=2),
    "v4": Generation("tpu-ubuntu2204-base", "cores", 8192),
    "v5litepod": Generation("v2-alpha-tpuv5-lite", "chips", _CHIPS),
    "v5p": Generation("v2-alpha-tpuv5", "cores", 12288),
    "v6e": Generation("v2-alpha-tpuv6e", "chips", _CHIPS),
    "tpu7x": Generation(None, "cores", 18432, devices=2),
}
_ALSO = {"v5e": "v5litepod", "v5lite": "v5litepod", "v5": "v5p", "v6": "v6e", "v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Slice:
    """devices: as jax.device_count() on this slice alone. hosts: TPU VMs, one process each (GKE may give v5e-8 two)."""

    name: str
    runtime: str | None
    chips: int
    hosts: int
    devices: int


def parse(name: str) -> Slice:
    """The slice that gcloud calls `name`, as v5litepod-16 or v5p-1024. Raises InputError for any other."""
    match = re.fullmatch(r"([a-z0-9]+)-([0-9]+)", name)
    if not match or match[1] not in GENERATIONS:
        right = f"{_ALSO[match[1]]}-{match[2]}" if match and match[1] in _ALSO else None
        hint = f"did you mean {right}?" if right else nearest(name.split("-")[0], GENERATIONS)
        raise InputError(f"Unknown accelerator type {name!r}: {hint} It is GENERATION-NUMBER, as v5litepod-16.")
    kind, size = GENERATIONS[match[1]], int(match[2])
    if isinstance(kind.sizes, int):
        good, there = 0 < size <= kind.sizes and size % 8 == 0, f"multiples of 8 up to {kind.sizes}"
    else:
        good, there = size in kind.sizes, ", ".join(map(str, kind.sizes))
    if not good:
        raise InputError(f"There is no {name}: {match[1]} comes in {kind.unit} of {there}.")
    chips = size if kind.unit == "chips" else size // 2
    hosts = 1 if kind.unit == "chips" and chips <= 8 else chips // 4
    return Slice(name, kind.runtime, chips, hosts, chips * kind.devices)
