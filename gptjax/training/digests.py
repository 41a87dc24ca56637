"""A digest of every array of a checkpoint, computed on the device and independent of how the array is sharded."""

import hashlib
import json

import jax
import jax.numpy as jnp
from jax import lax


@jax.jit
def _digests(leaves):
    """uint32 per leaf: the sum over elements of mix(bits + index x odd) mod 2^32.

    The mix (MurmurHash3's finalizer) is a bijection, so any change of one element is detected; swaps and changes of
    several elements are missed with probability 2^-32. Integer sums do not depend on the sharding."""

    def one(x):
        x = jax.device_put(x, jax.memory.Space.Device)  # moments may be in host memory
        x = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        index, stride = jnp.zeros((), jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            index = index + lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        h = bits + index * jnp.uint32(0x9E3779B9)
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)

    return [one(x) for x in leaves]


def digests(tree) -> dict[str, int]:
    """{path of the leaf: digest}."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    values = jax.device_get(_digests(list(leaves)))
    return {jax.tree_util.keystr(p): int(v) for p, v in zip(paths, values, strict=True)}


def combined(digests: dict) -> str:
    """sha256 (hex) of the digests of a checkpoint's parameters, to identify its weights."""
    of_params = {path: value for path, value in digests.items() if path.startswith("['params']")}
    return hashlib.sha256(json.dumps(of_params, sort_keys=True).encode()).hexdigest()
