"""Sharding rules: which mesh axes each logical axis of a parameter or activation is sharded over.

The model names the axes of its arrays ('embed', 'heads', ...). The rules map those names to mesh axes, and a config can
change them (mesh.rules). A name without a rule is an error rather than silent replication.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.errors import InputError

AXES = ("data", "fsdp", "tensor", "stage", "seq")

RESIDUAL = ("batch", "residual", "features")  # the residual stream, [batch, time, d_model]

# The logical axes of the model's arrays. In none of these arrays may a mesh axis appear twice.
ARRAYS = {
    "the residual stream": RESIDUAL,
    "queries, keys and values": ("batch", "time", "qkv", "heads"),
    "the MLP's features": ("batch", "time", "mlp"),
    "attn/c_attn/kernel": ("layers", "embed", "qkv", "heads"),
    "attn/c_proj/kernel": ("layers", "heads", "embed"),
    "mlp/c_fc/kernel": ("layers", "embed", "mlp"),
    "mlp/c_proj/kernel": ("layers", "mlp", "embed"),
    "attn/c_attn/bias": ("layers", "qkv", "heads"),
    "mlp/c_fc/bias": ("layers", "mlp"),
    "gains and biases": ("layers", "norm"),
    "wte": ("vocab", "embed"),
    "wpe": ("position", "embed"),
}

# Rules that other code relies on, and why.
_FIXED = {
    "batch": "hosts load the rows of a batch by it, and the loss is summed over it",
    "time": "attention gathers keys and values over seq",
    "features": "a matmul's inputs are gathered along it, layer by layer",
    "layers": "the pipeline splits the layers into stages along it",
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of each axis of the model's arrays: one, several with commas ('fsdp,seq'), or 'none' (not sharded).

    mesh.rules of a config. They decide where arrays are, never what is computed: a run may be resumed under others. The
    vocabulary is sharded over tensor in embedding and loss whatever they say (vocabulary.py).

    batch: rows of the batch; within a pipeline's layers, where stage is manual, data and fsdp alone. Fixed.
    time: positions of the activations inside attention and MLP. Fixed.
    residual: positions of the residual stream; without tensor every tensor-parallel device would hold all of it.
    heads: attention heads.
    mlp: features of the MLP.
    features: width of the residual stream. Fixed.
    layers: the stacked layers. Fixed.
    embed: width d_model of the parameters, which are gathered just before use, layer by layer.
    vocab: rows of the token embedding.
    position: rows of the position embedding.
    qkv: which of query, key and value.
    norm: gains and biases of width d_model, too small to shard.
    """

    # activations
    batch: str = "data,fsdp,stage"  # within a pipeline's layers, where stage is manual: data, fsdp
    time: str = "seq"
    residual: str = "seq,tensor"  # time of the residual stream: else every tensor-parallel device held all of it
    heads: str = "tensor"
    mlp: str = "tensor"
    features: str = "none"  # the residual stream's width
    # parameters
    layers: str = "stage"
    embed: str = "fsdp"  # gathered just before use, layer by layer
    vocab: str = "none"
    position: str = "none"
    qkv: str = "none"
    norm: str = "none"  # gains and biases of width d_model: too small to shard

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if not isinstance(value, str):
                raise InputError(f"mesh.rules.{name}={value!r}: give mesh axes, as 'fsdp' or 'fsdp,seq', or 'none'.")
            for axis in self.axes(name):
                if axis not in AXES:
                    raise InputError(
                        f"mesh.rules.{name}={value!r}: there is no mesh axis {axis!r}. Use some of {', '.join(AXES)}, "
                        "or 'none' alone."
                    )
            if name in _FIXED and self.axes(name) != _split(field.default):
                raise InputError(f"mesh.rules.{name} must stay {field.default!r}: {_FIXED[name]}.")
        for array, names in ARRAYS.items():
            found = {}
            for name in names:
                for axis in self.axes(name):
                    if axis in found:
                        one, other = found[axis], name
                        raise InputError(
                            f"mesh.rules shards {array} [{', '.join(names)}] twice over {axis}: "
                            f"{one}={getattr(self, one)}"
                            + (f" and {other}={getattr(self, other)}" if one != other else "")
                            + ". Use it once."
                        )
                    found[axis] = name

    def axes(self, name: str) -> tuple[str, ...]:
        """Mesh axes that a logical axis is sharded over. Raises InputError if it has no rule."""
        if name not in Rules.__dataclass_fields__:
            raise InputError(f"No sharding rule covers the logical axis {name!r}: add it to parallel/sharding.py.")
        return _split(getattr(self, name))


def _split(value: str) -> tuple[str, ...]:
    return () if value.strip() in ("", "none") else tuple(axis.strip() for axis in value.split(","))


# The active rules. Part of the key of jit's cache, like the mesh of jax.set_mesh.
_ACTIVE = jax.make_user_context(Rules())

# The caches of the functions that `shared` decorates.
_SHARED: list = []


def use_rules(rules: Rules):
    """Context manager that makes these the active rules."""
    return _ACTIVE(rules)


def shared(make):
    """Decorates a function that makes a device program or its loss: equal, hashable arguments under equal rules give
    the same one, so that a process which runs a stage several times, as a sweep does, traces and compiles it once.
    `forget` drops what has been made."""

    @functools.lru_cache(maxsize=16)
    def under(rules, args, options):
        return make(*args, **dict(options))

    _SHARED.append(under)
    return functools.wraps(make)(
        lambda *args, **options: under(_ACTIVE.value, args, tuple(sorted(options.items())))
    )


def forget():
    """Drops every program that `shared` has made, and its memory once no run uses it."""
    for made in _SHARED:
        made.cache_clear()


def num_shards(sizes, *names: str) -> int:
    """Number of shards of an array with these logical axes under the active rules. sizes: {mesh axis: size}."""
    return math.prod(sizes[axis] for name in names for axis in _ACTIVE.value.axes(name))


def partition_spec(names: tuple) -> PartitionSpec:
    """PartitionSpec of an array whose axes have these logical names, under the active rules. None = not sharded."""
    mesh_axes = [() if name is None else _ACTIVE.value.axes(name) for name in names]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in mesh_axes))


def parameter_shardings(boxed, mesh):
    """NamedSharding of every parameter, under the active rules.

    Args:
        boxed: the abstract parameters as the model's init returns them, with logical names attached.
        mesh: a Mesh or AbstractMesh.
    Returns:
        A tree like the parameters.
    Raises:
        InputError: an axis is not divisible by its number of shards, or a parameter has no logical axis names.
    """

    def place(path, leaf):
        name = "/".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise InputError(f"The parameter {name} has no logical axis names: add them in model/gpt.py.")
        spec = partition_spec(leaf.names)
        for size, axis in zip(leaf.value.shape, spec, strict=True):
            axes = (axis,) if isinstance(axis, str) else (axis or ())
            shards = math.prod(mesh.shape[a] for a in axes)
            if size % shards:
                raise InputError(
                    f"{name} has an axis of {size}, which is not divisible by mesh.{' x '.join(axes)} = {shards}. "
                    "Change the model's size or that mesh axis."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def constrain(x, *names):
    """Constrains the sharding of an activation by logical axis names; a no-op without a mesh (jax.set_mesh).

    An axis is sharded over as many of its mesh axes as divide it: in decoding a single new token is replicated where a
    long sequence is sharded over time. Inside a shard_map its manual axes are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = partition_spec(names)
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
    """constrain(x, *forward) whose cotangent is constrained to `backward`; constrain alone uses `forward` for both."""
    return constrain(x, *forward)


reshard.defvjp(
    lambda x, forward, backward: (constrain(x, *forward), None),
    lambda forward, backward, _, d_x: (constrain(d_x, *backward),),
)


def batch_sharding(mesh, leading: int) -> NamedSharding:
    """Sharding of a batch: rows over data and fsdp, after `leading` axes that are not sharded.

    The rows are split over stage only inside the program: a host loads the rows of all its stages (4 bytes per token),
    so data loading does not depend on pipelining.
    """
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ("data", "fsdp")))
