"""Collectives inside a shard_map that are no-ops over an axis of size 1, which not every compiler optimizes away."""

from jax import lax


def gather(a, name: str, axis: int):
    """All-gather over the mesh axis `name`: all shards concatenated along `axis`."""
    return a if lax.axis_size(name) == 1 else lax.all_gather(a, name, axis=axis, tiled=True)


def scatter(a, name: str, axis: int):
    """Reduce-scatter over the mesh axis `name`: the sum over devices, of which each keeps its shard along `axis`."""
    return a if lax.axis_size(name) == 1 else lax.psum_scatter(a, name, scatter_dimension=axis, tiled=True)


def maximum(a, name: str):
    """All-reduce of the maximum over the mesh axis `name`."""
    return a if lax.axis_size(name) == 1 else lax.pmax(a, name)


def total(a, *names: str):
    """All-reduce of the sum over the mesh axes `names`."""
    names = tuple(name for name in names if lax.axis_size(name) > 1)
    return lax.psum(a, names) if names else a
