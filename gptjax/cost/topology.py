"""TPU topologies by name, without a TPU: chip specifications, slice shapes, and devices for ahead-of-time compilation.

    topology = parse("v5p-1024")          # or "v5p:8x8x8": 512 chips
    mesh = topology_mesh(config.mesh, topology)

Figures are from Google Cloud's page on each TPU (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x; v4's links from
Jouppi et al. 2023). HBM is what the compiler lets a program use, as stated in its out-of-memory message.
"""

import dataclasses
import math
import os
import re

from jax.sharding import Mesh

from gptjax.errors import InputError
from gptjax.hardware import memory_bandwidth, peak_flops
from gptjax.parallel.mesh import MeshConfig, make_mesh

_GIB = 2**30
_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_3D = (
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16),
    (16, 16, 16), (16, 16, 24),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation. kind: its jax.Device.device_kind, whose peak and bandwidth hardware.py knows.
    hbm: bytes that a program may use. ici: bytes/s over all its links, one way. dcn: bytes/s, its share of the host's;
    None = not published. shapes: of the slices. per_chip: JAX devices per chip. cores: per chip, as counted by the
    number in a Cloud name. options: extra options for libtpu."""

    kind: str
    hbm: int
    ici: float
    dcn: float | None
    shapes: tuple[tuple[int, ...], ...]
    per_chip: int = 1
    cores: int = 1
    options: tuple[tuple[str, str], ...] = ()

    @property
    def peak(self) -> float:
        """bf16 FLOP/s."""
        return peak_flops(self.kind)

    @property
    def hbm_bandwidth(self) -> float:
        """Bytes/s."""
        return memory_bandwidth(self.kind)


CHIPS = {
    "v4": Chip("TPU v4", int(30.75 * _GIB), 300e9, None, _3D[:-1], cores=2,
               options=(("chip_config_name", "megacore"),)),
    "v5e": Chip("TPU v5 lite", int(15.75 * _GIB), 200e9, 25e9 / 8, _2D),
    "v5p": Chip("TPU v5", int(95.74 * _GIB), 600e9, 50e9 / 8, _3D, cores=2),
    "v6e": Chip("TPU v6 lite", int(31.25 * _GIB), 400e9, 100e9 / 8, _2D),
    # a device is half a chip, which has 600 GB/s and 100 Gb/s
    "tpu7x": Chip("TPU7x", int(94.75 * _GIB), 300e9, 50e9 / 8, _3D, per_chip=2, cores=2),
}  # fmt: skip
_CLOUD = {"v5litepod": "v5e", "v5lite": "v5e", "v5e": "v5e", "v6e": "v6e", "v4": "v4", "v5p": "v5p", "tpu7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """num_slices slices of one shape, connected by the data-center network."""

    generation: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def device_count(self) -> int:
        return self.chips * self.chip.per_chip

    def __str__(self):
        slices = f"{self.num_slices} x " if self.num_slices > 1 else ""
        return f"{slices}{self.generation}:{'x'.join(map(str, self.shape))}"


def parse(name: str, num_slices: int = 1) -> Topology:
    """A Topology from libtpu's name (v5e:4x4) or Cloud's (v5litepod-16, v5p-1024, whose number counts cores).

    InputError: an unknown generation or slice shape; the message lists the known ones.
    """
    if num_slices < 1:
        raise InputError(f"num_slices={num_slices}: it must be at least 1.")
    generation, separator, rest = re.match(r"([a-z0-9]*)([:-]?)(.*)", name.strip().lower()).groups()
    generation = _CLOUD.get(generation)
    chip = CHIPS.get(generation)
    if chip and separator == ":" and re.fullmatch(r"\d+(x\d+)*", rest):
        shape = tuple(map(int, rest.split("x")))
        # slices made of 4 x 4 x 4 cubes come in more shapes than are listed
        cubes = len(shape) == 3 == len(chip.shapes[0]) and all(s and s % 4 == 0 for s in shape)
        if shape in chip.shapes or (cubes and math.prod(shape) <= math.prod(chip.shapes[-1])):
            return Topology(generation, shape, num_slices)
    if chip and separator == "-" and rest.isdigit():
        for shape in chip.shapes:
            if math.prod(shape) * chip.cores == int(rest):
                return Topology(generation, shape, num_slices)
    known = "; ".join(
        f"{g}:{' '.join('x'.join(map(str, s)) for s in c.shapes)}" for g, c in CHIPS.items() if not chip or c is chip
    )
    raise InputError(f"Unknown topology {name!r}: use one of {known}, or a Cloud name such as v5p-1024.")


def slices(generation: str) -> list[Topology]:
    """All listed slices of a generation, smallest first."""
    return [Topology(generation, shape) for shape in CHIPS[generation].shapes]


def devices(topology: Topology):
    """Devices of a topology as the TPU compiler describes them, for compilation only.

    InputError: libtpu is not installed, or does not know the topology.
    """
    # Compilation does not hold a TPU, so several processes may load libtpu; there is no metadata server to query.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    options = dict(topology.chip.options)
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    name = f"{topology.generation}:{'x'.join(map(str, topology.shape))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (RuntimeError, ImportError, NotImplementedError) as error:
        if "not installed" not in str(error) and "libtpu" not in str(error):
            raise InputError(
                f"The TPU compiler does not support {topology} ({error}): use another topology, or update libtpu."
            ) from error
        raise InputError(
            'Compiling for a TPU needs its compiler, libtpu, but no TPU: run `pip install "jax[tpu]"`.'
        ) from error


def topology_mesh(config: MeshConfig, topology: Topology) -> Mesh:
    """The mesh of a config on a topology, with dcn_data = number of slices. InputError: as make_mesh and devices."""
    return make_mesh(dataclasses.replace(config, dcn_data=topology.num_slices), devices(topology))
