"""The vocabulary cut up over the mesh's tensor axis, in computation only: embedding and loss of each device's part.

At rest the table is [vocab, d_model], cut up along d_model over fsdp like every matrix: 50,257 is divisible by
nothing, and at 175B on 64-way fsdp the copies over `tensor` are 0.1 GB of a chip. In computation it is padded to a
multiple of `tensor` and each device takes its rows [vocab / tensor, d_model], gathered over fsdp: for the loss in the
dtype of the computation, for the embedding in float32, in which tokens and positions are added, so that the sum is the
one that a single device rounds. Logits are never gathered: what devices tell each other is a maximum, a sum and the
target's logit.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gptjax.parallel.collectives import gather, scatter, total
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.sharding import Rules

# The layout of what is computed here, whatever rules are in force: of those, the batch's alone is taken for granted.
ROWS, TIME = Rules().axes("batch"), ("seq", "tensor")
TABLE = P("tensor", "fsdp")


def mesh_for(rows: int, width: int):
    """The mesh in force, or None: without one, on one device, and for rows or a width that do not divide over it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    return None if rows % batch_shards(mesh.shape) or width % mesh.shape["fsdp"] else mesh


def pad(a, axis: int, ways: int):
    """Zeros at the end of an axis up to a multiple of `ways`."""
    more = -a.shape[axis] % ways
    return a if more == 0 else jnp.pad(a, [(0, more if i == axis else 0) for i in range(a.ndim)])


def first_row(rows: int):
    """Which token the first of this device's `rows` rows of the table is."""
    return lax.axis_index("tensor") * rows


def embed(wte, wpe, tokens, positions, dtype):
    """Token plus position embedding: [batch, time, d_model] in dtype, added in float32.

    Args:
        wte: float32 [vocab, d_model]; wpe: [context, d_model]; tokens, positions: int [batch, time].
    """
    mesh = mesh_for(tokens.shape[0], wte.shape[1])
    if mesh is None:
        return (wte[tokens] + wpe[positions]).astype(dtype)
    tensor = mesh.shape["tensor"]
    # Where the time divides, every device ends with its part of the residual stream; one new token is everyone's.
    divides = tokens.shape[1] % (mesh.shape["seq"] * tensor) == 0
    time = "seq" if divides else None

    def local(wte, wpe, tokens, positions):
        wte, wpe = (gather(table, "fsdp", 1) for table in (wte, wpe))
        row = tokens - first_row(wte.shape[0])
        mine = (row >= 0) & (row < wte.shape[0])
        x = wte[jnp.clip(row, 0, wte.shape[0] - 1)] + wpe[positions]
        x = jnp.where(mine[..., None], x, 0).astype(dtype)  # one device's is not 0: the sum is exact in any dtype
        return scatter(x, "tensor", 1) if divides else total(x, "tensor")

    by_token = P(ROWS, time)
    return jax.shard_map(
        local,
        in_specs=(TABLE, P(None, "fsdp"), by_token, by_token),
        out_specs=P(ROWS, TIME if divides else None),
        check_vma=False,
    )(pad(wte, 0, tensor), wpe, tokens, positions)


def over_tokens(function, mesh, x, w, *by_token, out):
    """function(x, w, *by_token) on each device's part: x [batch, time, d_model] and what goes with it cut up over rows
    and time, w over the vocabulary and d_model. Time and vocabulary are padded with zeros.

    out: for each output 't' = by token [batch, time, ...], cut to x's time again; 'w' = like w; '' = a scalar, whole.
    """
    ways = mesh.shape["seq"] * mesh.shape["tensor"]
    specs = {"t": P(ROWS, TIME), "w": TABLE, "": P()}
    results = jax.shard_map(
        function,
        in_specs=(specs["t"], TABLE, *(specs["t"] for _ in by_token)),
        out_specs=tuple(specs[kind] for kind in out),
        check_vma=False,
    )(pad(x, 1, ways), pad(w, 0, mesh.shape["tensor"]), *(pad(a, 1, ways) for a in by_token))
    cut = {"t": lambda a: a[:, : x.shape[1]], "w": lambda a: a[: w.shape[0]], "": lambda a: a}
    return tuple(cut[kind](a) for kind, a in zip(out, results, strict=True))
