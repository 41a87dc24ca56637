"""Communication of compiled programs with a known closed form: on eight CPU devices and for eight TPU chips."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.cost import topology
from gptjax.cost.hlo import Collective, Traffic, _groups, array_bytes, traffic
from gptjax.parallel.mesh import MeshConfig

pytestmark = pytest.mark.optimized

BYTES = 4 * 1024 * 256  # of one device's shard of x


@pytest.fixture(scope="module", params=["cpu", "tpu"])
def mesh(request):
    """2 x 4 devices named a and b: groups over a are strided."""
    if request.param == "cpu":
        found = jax.devices()
    else:
        pytest.importorskip("libtpu", reason="needs libtpu, the TPU compiler: pip install 'jax[tpu]'")
        found = topology.devices(topology.parse("v5e-8"))
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=found)


def compiled(mesh, function, out, *, scan=()):
    """function(x of one device [1024, 256]) under shard_map, inside loops of these lengths, as HLO."""

    for length in scan:
        function = lambda x, inner=function, n=length: lax.scan(lambda c, _: (inner(c), None), x, length=n)[0]
    x = jax.ShapeDtypeStruct((8 * 1024, 256), jnp.float32, sharding=NamedSharding(mesh, P(("a", "b"))))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(("a", "b")), out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(x).compile().as_text()


RING = [(0, 1), (1, 2), (2, 3), (3, 0)]
CASES = {  # function of a shard, its output's spec, bytes that a chip sends
    "all-gather over b": (lambda x: lax.all_gather(x, "b", tiled=True), P("a"), 3 * BYTES),
    "all-gather over a": (lambda x: lax.all_gather(x, "a", tiled=True), P("b"), BYTES),
    "all-reduce over all": (lambda x: lax.psum(x, ("a", "b")), P(), 2 * BYTES * 7 / 8),
    "all-reduce over a": (lambda x: lax.psum(x, "a"), P("b"), 2 * BYTES / 2),
    "reduce-scatter over b": (
        lambda x: lax.psum_scatter(x, "b", scatter_dimension=0, tiled=True), P(("a", "b")), BYTES * 3 / 4
    ),
    "all-to-all over b": (
        lambda x: lax.all_to_all(x, "b", split_axis=1, concat_axis=0, tiled=True), P(("a", "b")), BYTES * 3 / 4
    ),
    "collective-permute over b": (lambda x: lax.ppermute(x, "b", RING), P(("a", "b")), BYTES),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_collective(mesh, case):
    function, out, expected = CASES[case]
    found = traffic(compiled(mesh, function, out))
    assert found.sent() == expected, found
    assert {c.kind for c in found.collectives} == {case.split(" ")[0]} and not found.endless


@pytest.mark.parametrize("scan", [(3, 7)])
def test_loops_multiply(mesh, scan):
    """A ring step in nested loops: the trip counts multiply."""
    step = lambda x: lax.ppermute(jnp.sin(x), "b", RING)
    found = traffic(compiled(mesh, step, P(("a", "b")), scan=scan))
    times = functools.reduce(lambda a, b: a * b, scan)
    assert found.sent() == times * BYTES
    assert sum(c.times for c in found.collectives) == times and not found.endless


def test_a_bounded_while_loop_counts_as_its_bound(mesh):
    """Like that of sampling, which may stop early, when every row has ended."""

    def loop(x):
        go_on = lambda carry: (carry[0] < 9) & jnp.any(carry[1] > 0)
        return lax.while_loop(go_on, lambda c: (c[0] + 1, lax.ppermute(c[1] - 1, "b", RING)), (0, x))[1]

    found = traffic(compiled(mesh, loop, P(("a", "b"))))
    assert found.sent() == 9 * BYTES and not found.endless


def test_a_loop_without_a_bound_is_named(mesh):
    loop = lambda x: lax.while_loop(lambda x: jnp.any(x > 0), lambda x: lax.ppermute(x - 1, "b", RING), x)
    found = traffic(compiled(mesh, loop, P(("a", "b"))))
    assert len(found.endless) == 1


def test_the_costlier_branch_is_counted(mesh):
    cheap, costly = lambda x: x * 2, lambda x: lax.ppermute(x, "b", RING)
    branch = lambda x: lax.cond(x[0, 0] > 0, cheap, costly, x)
    assert traffic(compiled(mesh, branch, P(("a", "b")))).sent() == BYTES


@pytest.mark.slow
def test_the_sharded_matmul_of_fsdp(mesh):
    """Rows of x and of w sharded over all eight: w is gathered once, its gradient reduce-scattered on a TPU; the CPU's
    partitioner all-reduces it, which sends twice as much, and slices."""
    spec = NamedSharding(mesh, P(("a", "b")))
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=spec)
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=spec)
    step = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w) ** 2)), out_shardings=spec)
    found = traffic(step.lower(w, x).compile().as_text())
    times = {"cpu": 1 + 2, "tpu": 1 + 1}[mesh.devices.flat[0].platform]
    assert found.sent() == times * 4 * 1024 * 1024 * 7 / 8


# --- notation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['x'=2,'y'=4] {'x'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}, x", [list(range(8))]),
    ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
])  # fmt: skip
def test_groups(text, groups):
    assert _groups(text) == groups


def test_array_bytes():
    assert array_bytes("(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0}, u32[]{:S(2)})") == 24 + 8 + 4


def test_traffic_between_slices_is_separate():
    found = Traffic(
        (Collective("all-reduce", 4, 10.0, 3, True, "x"), Collective("all-gather", 2, 5.0, 2, False, "y")), ()
    )
    assert (found.sent(), found.sent(crosses=True), found.sent(crosses=False)) == (40, 30, 10)
    assert found.by_kind() == {
        "all-reduce": {"ops": 1, "executions": 3, "bytes": 30}, "all-gather": {"ops": 1, "executions": 2, "bytes": 10}
    }  # fmt: skip


@pytest.mark.slow
def test_two_slices():
    """Data parallelism over two v5e-4 slices: fsdp gathers and reduces inside a slice, and each chip's shard of the
    gradient is all-reduced over the network."""
    pytest.importorskip("libtpu")
    mesh = topology.topology_mesh(MeshConfig(data=2, fsdp=4), topology.parse("v5e:2x2", num_slices=2))
    assert [d.slice_index for d in mesh.devices.flat] == [0] * 4 + [1] * 4
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    step = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w) ** 2)), out_shardings=w.sharding)
    found = traffic(step.lower(w, x).compile().as_text(), num_slices=2)
    shard = 4 * 1024 * 1024 / 4
    assert found.sent(crosses=True) == 2 * shard * 1 / 2
    assert found.sent(crosses=False) == 3 * shard + 4 * shard * 3 / 4
