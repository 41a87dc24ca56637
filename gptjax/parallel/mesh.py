"""The device mesh: data x fsdp x tensor x stage x seq."""

import dataclasses
import math

import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from gptjax.errors import InputError
from gptjax.parallel.sharding import AXES, Rules
from gptjax.ranges import Axis, Count


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 on one axis = all the rest. `rules`: over which of these axes the model's arrays are
    sharded; `use_rules` of sharding.py makes them active.

    data: copies of the model, each with its rows of the batch.
    fsdp: devices that the rows of the batch, parameters, gradients and optimizer state are sharded over.
    tensor: devices that the heads and MLP features of every layer are sharded over.
    stage: pipeline stages: each has its layers, and micro-batches flow through (parallel/pipeline.py).
    seq: devices that the context is sharded over, for sequences whose activations do not fit on one device.
    dcn_data: slices of a multislice job, each of which has data / dcn_data copies of the model: between slices, over
        the data-center network, there are gradients to add once a step and nothing else.
    """

    data: Axis = -1
    fsdp: Axis = 1
    tensor: Axis = 1
    stage: Axis = 1
    seq: Axis = 1
    dcn_data: Count = 1
    rules: Rules = dataclasses.field(default=Rules(), repr=False)

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if self.dcn_data < 1:
            raise InputError(f"mesh.dcn_data={self.dcn_data}: it is the number of slices, at least 1.")
        if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
            raise InputError(f"Mesh sizes must be positive, with -1 on at most one axis; got {self}.")
        spread = [f.name for f in dataclasses.fields(Rules) if f.name != "batch" and "data" in self.rules.axes(f.name)]
        if self.dcn_data > 1 and spread:
            raise InputError(
                f"mesh.rules.{spread[0]} uses the axis data, but with mesh.dcn_data={self.dcn_data} only the batch may "
                "be sharded between slices: use fsdp instead."
            )

    def sizes(self, devices: int) -> dict[str, int]:
        """{axis: size} on this many devices. Raises InputError if the product of the sizes is not their number."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        fixed = math.prod(s for s in sizes.values() if s != -1)
        if -1 in sizes.values():
            if devices % fixed:
                raise InputError(
                    f"{devices} devices are not a multiple of {fixed}, the product of the mesh's other axes ({self}): "
                    "change one of them."
                )
            sizes = {k: devices // fixed if s == -1 else s for k, s in sizes.items()}
        elif fixed != devices:
            raise InputError(
                f"The mesh {' x '.join(f'{k}={s}' for k, s in sizes.items() if s > 1) or '1'} needs {fixed} devices "
                f"and there are {devices}: set one axis to -1 to use all of them."
            )
        if sizes["data"] % self.dcn_data:
            raise InputError(
                f"mesh.data={sizes['data']} is not a multiple of mesh.dcn_data={self.dcn_data}: every slice must "
                "have the same number of copies of the model."
            )
        return sizes


def slice_count(devices) -> int:
    """Number of TPU slices, connected by the data-center network, that the devices belong to."""
    return len({getattr(d, "slice_index", 0) for d in devices})


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A Mesh over all devices (or those given), with Auto axis types: jax.make_mesh defaults to Explicit ones.

    Raises InputError if the sizes do not fit the devices, or dcn_data is not the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    axis_types = (AxisType.Auto,) * len(AXES)
    slices = slice_count(devices)
    if config.dcn_data != slices and (config.dcn_data > 1 or devices[0].platform == "tpu"):
        raise InputError(
            f"mesh.dcn_data={config.dcn_data}, but the devices belong to {slices} slice{'s' * (slices > 1)}: "
            f"set it to {slices}."
        )
    shape = tuple(sizes[a] for a in AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    # On a TPU the mesh axes follow the physical ones; where none fits, a physical axis is split between two of them.
    split = {"allow_split_physical_axes": True}
    try:
        if slices == 1:
            return Mesh(create_device_mesh(shape, devices, **split), AXES, axis_types=axis_types)
        within = [n // slices if a == "data" else n for a, n in zip(AXES, shape, strict=True)]
        between = [slices if axis == "data" else 1 for axis in AXES]
        return Mesh(create_hybrid_device_mesh(within, between, devices, **split), AXES, axis_types=axis_types)
    except NotImplementedError as error:
        raise InputError(
            f"The mesh {' x '.join(f'{k}={s}' for k, s in sizes.items() if s > 1)} does not map onto this slice: "
            f"{error} Choose sizes that divide the slice's physical axes."
        ) from error


def batch_shards(sizes) -> int:
    """Number of shards of the rows of a batch: data x fsdp x stage. The stages of a pipeline divide the rows among them
    for everything outside the layers (embedding, loss, sampling), and each stage has at least one micro-batch.

    sizes: {mesh axis: size}.
    """
    return sizes["data"] * sizes["fsdp"] * sizes["stage"]


def check_fits(sizes, *, n_head: int, batch_size: int, microbatch_size: int, time: int | None = None):
    """Raises InputError if the heads, the batch or the time axis is not divisible over the mesh.

    Args:
        sizes: {mesh axis: size}.
        batch_size, microbatch_size: rows of an optimizer step and of one forward pass, over all devices.
        time: tokens of a row; None = rows of varying length, which are not sharded over seq where they do not divide.
            Where the time does not divide over tensor, the residual stream is replicated over it.
    """
    if n_head % sizes["tensor"]:
        raise InputError(
            f"model.n_head={n_head} is not divisible by mesh.tensor={sizes['tensor']}: every device needs the same "
            "number of heads. Change one of them."
        )
    if time is not None and time % sizes["seq"]:
        low, high = time // sizes["seq"] * sizes["seq"], -(-time // sizes["seq"]) * sizes["seq"]
        raise InputError(
            f"Rows of {time} tokens are not divisible over mesh.seq={sizes['seq']} devices: "
            f"use {f'{low} or ' if low else ''}{high}."
        )
    shards = batch_shards(sizes)
    for name, size in (("batch_size", batch_size), ("microbatch_size", microbatch_size)):
        if size % shards:
            low, high = size // shards * shards, -(-size // shards) * shards
            raise InputError(
                f"{name}={size} is not divisible over mesh.data x mesh.fsdp x mesh.stage = {shards} devices: "
                f"use {f'{low} or ' if low else ''}{high}."
            )
