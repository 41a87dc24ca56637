"""TPU topologies by name, and errors without the compiler."""

import math

import pytest

from experiments.launch import accelerators
from gptjax.cost import topology
from gptjax.cost.topology import CHIPS, Topology, parse, slices
from gptjax.errors import InputError
from gptjax.parallel.mesh import MeshConfig


@pytest.mark.parametrize("name, shape, chips, devices", [
    ("v5p:8x8x8", (8, 8, 8), 512, 512),
    ("v5p-1024", (8, 8, 8), 512, 512),  # Cloud's number counts cores, two per chip
    ("V5P-8", (2, 2, 1), 4, 4),
    ("v5litepod-16", (4, 4), 16, 16),
    ("v5e-16", (4, 4), 16, 16),
    ("v4-32", (2, 2, 4), 16, 16),
    ("v6e-256", (16, 16), 256, 256),
    ("v6e:1x1", (1, 1), 1, 1),
    ("tpu7x:2x2x1", (2, 2, 1), 4, 8),  # two JAX devices per chip
    ("v5p:8x8x12", (8, 8, 12), 768, 768),  # whole cubes
])  # fmt: skip
def test_names(name, shape, chips, devices):
    found = parse(name)
    assert (found.shape, found.chips, found.device_count) == (shape, chips, devices)


@pytest.mark.parametrize(
    "name", ["v5p", "v5p-7", "v5e:3x3", "v5p:8x8x5", "v5p:16x16x28", "v9-8", "", "8x8x8", "v5e:4x"]
)
def test_an_unknown_topology_lists_the_known(name):
    with pytest.raises(InputError, match="Unknown topology .*: use one of .*2x2.*v5p-1024"):
        parse(name)


def test_slices():
    assert [t.chips for t in slices("v5e")] == [1, 4, 8, 16, 32, 64, 128, 256]
    assert parse("v5e:2x2", num_slices=4).chips == 16
    assert str(parse("v5e-4", num_slices=2)) == "2 x v5e:2x2"
    with pytest.raises(InputError, match="num_slices=0: it must be at least 1"):
        parse("v5e:2x2", num_slices=0)


def test_every_chip_has_a_peak_and_a_bandwidth():
    for name, chip in CHIPS.items():
        assert chip.peak > 1e14 and chip.hbm_bandwidth > 5e11 and chip.hbm > 15 * 2**30, name
        assert sorted(math.prod(s) for s in chip.shapes) == [math.prod(s) for s in chip.shapes]


def test_the_launchers_know_the_same_slices():
    """experiments/launch/accelerators.py has its own names and sizes, because a launcher must not need JAX."""
    names = {parse(f"{name}-8").generation: name for name in accelerators.GENERATIONS if name not in ("v2", "v3")}
    assert names.keys() == CHIPS.keys()
    for generation, name in names.items():
        for here in slices(generation):
            there = accelerators.parse(f"{name}-{here.chips * here.chip.cores}")
            assert (there.chips, there.devices) == (here.chips, here.device_count), there.name
            assert parse(there.name) == here
        sizes = accelerators.GENERATIONS[name].sizes
        assert isinstance(sizes, int) or len(sizes) == len(slices(generation)), name


def test_without_libtpu(monkeypatch):
    from jax.experimental import topologies

    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r'needs its compiler, libtpu.*run `pip install "jax\[tpu\]"`'):
        topology.devices(parse("v5e-8"))


@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v4-8", "v5p-8", "v6e-4", "tpu7x:2x2x1"])
def test_the_compiler_agrees(name):
    """The compiler reports the same number of devices, of the kind whose peak we know."""
    pytest.importorskip("libtpu")
    slice_ = parse(name)
    found = topology.devices(slice_)
    assert len(found) == slice_.device_count
    assert {d.device_kind for d in found} == {slice_.chip.kind}
    assert topology.topology_mesh(MeshConfig(), slice_).shape["data"] == slice_.device_count


def test_only_data_crosses_slices():
    pytest.importorskip("libtpu")
    with pytest.raises(InputError, match="mesh.data=1 is not a multiple of mesh.dcn_data=2"):
        topology.topology_mesh(MeshConfig(data=1, fsdp=8), Topology("v5e", (2, 2), 2))


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("v5p:4x4x4", {"fsdp": 8, "tensor": 4, "stage": 2}),  # no axis of the slice is 8 or 2 long
        ("v5p-256", {"fsdp": 64, "tensor": 2}),
        ("v6e:8x8", {"fsdp": 32, "tensor": 2}),
        ("v4-128", {"data": 2, "fsdp": 32}),
    ],
)
def test_a_mesh_may_split_an_axis_of_the_slice(name, sizes):
    pytest.importorskip("libtpu")
    mesh = topology.topology_mesh(MeshConfig(**{"data": 1, **sizes}), parse(name))
    assert {k: v for k, v in mesh.shape.items() if v > 1} == sizes
    assert len({d.id for d in mesh.devices.flat}) == math.prod(sizes.values())
