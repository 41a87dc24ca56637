"""Which logical axis of a parameter or activation lies on which mesh axis.

The model names the axes of its arrays ('embed', 'heads', ...); these rules alone say where they go, so a
new layout is a change here and nowhere else. A name without a rule is an error, never a silent copy on
every device.
"""

import functools
import math

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.errors import InputError

# logical axis -> mesh axis, axes, or None (whole on every device)
RULES = {
    # activations
    "batch": ("data", "fsdp", "stage"),  # within a pipeline's layers, where stage is manual: data, fsdp
    "time": "seq",
    "residual": ("seq", "tensor"),  # time of the residual stream: else every tensor-parallel device held all of it
    "heads": "tensor",
    "mlp": "tensor",
    "features": None,  # the residual stream's width
    # parameters
    "layers": "stage",
    "embed": "fsdp",  # gathered just before use, layer by layer
    "vocab": None,
    "position": None,
    "qkv": None,
    "norm": None,  # gains and biases of width d_model: too small to shard
}

RESIDUAL = ("batch", "residual", "features")  # the residual stream, [batch, time, d_model]


def partition_spec(names: tuple, rules=RULES) -> PartitionSpec:
    """PartitionSpec of an array whose axes have these logical names."""
    for name in names:
        if name is not None and name not in rules:
            raise InputError(f"No sharding rule covers the logical axis {name!r}: add it to parallel/rules.py.")
    return PartitionSpec(*(None if name is None else rules[name] for name in names))


def parameter_shardings(boxed, mesh, rules=RULES):
    """NamedSharding of every parameter.

    Args:
        boxed: the abstract parameters as the model's init returns them, with logical names attached.
        mesh: a Mesh or AbstractMesh.
    Returns:
        A tree like the parameters. Raises InputError where an axis does not divide, naming the parameter.
    """

    def place(path, leaf):
        name = "/".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise InputError(f"The parameter {name} has no logical axis names: give it some in model/gpt.py.")
        spec = partition_spec(leaf.names, rules)
        for size, axis in zip(leaf.value.shape, spec, strict=True):
            axes = (axis,) if isinstance(axis, str) else (axis or ())
            ways = math.prod(mesh.shape[a] for a in axes)
            if size % ways:
                raise InputError(
                    f"{name} has an axis of {size}, which mesh.{' x '.join(axes)} = {ways} does not divide. "
                    "Change the model's size or that mesh axis."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def constrain(x, *names, rules=RULES):
    """Say how an activation is sharded, by logical names; a no-op without a mesh (jax.set_mesh). An axis is cut up
    over as many of its mesh axes as divide it: one new token is on every device, the residual stream of many is not.
    Within a shard_map, the axes that it has made manual are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = partition_spec(names, rules)
    return jax.lax.with_sharding_constraint(
        x, PartitionSpec(*(_dividing(size, axes, mesh) for size, axes in zip(x.shape, spec, strict=True)))
    )


def _dividing(size: int, axes, mesh):
    axes = (axes,) if isinstance(axes, str) else (axes or ())
    axes = tuple(a for a in axes if a not in mesh.manual_axes)
    while size % math.prod(mesh.shape[a] for a in axes):
        axes = axes[:-1]
    return axes or None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reshard(x, forward: tuple, backward: tuple):
    """constrain(x, *forward), and its cotangent to `backward`: constrain alone would ask `forward` of both."""
    return constrain(x, *forward)


reshard.defvjp(
    lambda x, forward, backward: (constrain(x, *forward), None),
    lambda forward, backward, _, d_x: (constrain(d_x, *backward),),
)
