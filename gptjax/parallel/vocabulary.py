"""Vocabulary parallelism over the mesh's tensor axis, in computation only: embedding and loss on vocabulary shards.

The stored table [vocab, d_model] is sharded along d_model over fsdp like every matrix and replicated over tensor:
50,257 has no useful divisors, and for 175B with 64-way fsdp the replicas cost 0.1 GB per chip. In computation the table
is padded to a multiple of `tensor` and each device uses its rows [vocab / tensor, d_model], all-gathered over fsdp: for
the loss in the compute dtype, for the embedding in float32, in which tokens and positions are added, so that the sum
is rounded as on a single device. Logits are never gathered: devices exchange only a maximum, a sum and the target's
logit.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gptjax.parallel.collectives import gather, scatter, total
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.sharding import Rules

# The layout of this computation under any rules; of the rules it relies only on the one for the batch, which is fixed.
ROWS, TIME = Rules().axes("batch"), ("seq", "tensor")
TABLE = P("tensor", "fsdp")


def mesh_for(rows: int, width: int):
    """The current mesh; None if there is none, if it has one device, or if the rows or the width do not divide over it.

    rows: rows of the batch; width: d_model.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    return None if rows % batch_shards(mesh.shape) or width % mesh.shape["fsdp"] else mesh


def pad(a, axis: int, multiple: int):
    """Pads the end of an axis with zeros to a multiple of `multiple`."""
    more = -a.shape[axis] % multiple
    return a if more == 0 else jnp.pad(a, [(0, more if i == axis else 0) for i in range(a.ndim)])


def first_row(rows: int):
    """The token id of the first of this device's `rows` rows of the table."""
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
    # If the time axis divides, each device keeps its shard of the residual stream; one new token is replicated.
    divides = tokens.shape[1] % (mesh.shape["seq"] * tensor) == 0
    time = "seq" if divides else None

    def local(wte, wpe, tokens, positions):
        wte, wpe = (gather(table, "fsdp", 1) for table in (wte, wpe))
        row = tokens - first_row(wte.shape[0])
        mine = (row >= 0) & (row < wte.shape[0])
        x = wte[jnp.clip(row, 0, wte.shape[0] - 1)] + wpe[positions]
        x = jnp.where(mine[..., None], x, 0).astype(dtype)  # non-zero on one device only: the sum is exact in any dtype
        return scatter(x, "tensor", 1) if divides else total(x, "tensor")

    by_token = P(ROWS, time)
    return jax.shard_map(
        local,
        in_specs=(TABLE, P(None, "fsdp"), by_token, by_token),
        out_specs=P(ROWS, TIME if divides else None),
        check_vma=False,
    )(pad(wte, 0, tensor), wpe, tokens, positions)


def over_tokens(function, mesh, x, w, *by_token, out):
    """shard_map of function(x, w, *by_token). Time and vocabulary are padded with zeros to divide.

    Args:
        x: [batch, time, d_model], sharded over rows and time; so is each of by_token, [batch, time, ...].
        w: [vocab, d_model], sharded over both axes.
        out: for each output 't' = per token, [batch, time, ...]; 'w' = shaped and sharded like w; '' = a replicated
            scalar.
    Returns:
        The outputs, without the padding.
    """
    shards = mesh.shape["seq"] * mesh.shape["tensor"]
    specs = {"t": P(ROWS, TIME), "w": TABLE, "": P()}
    results = jax.shard_map(
        function,
        in_specs=(specs["t"], TABLE, *(specs["t"] for _ in by_token)),
        out_specs=tuple(specs[kind] for kind in out),
        check_vma=False,
    )(pad(x, 1, shards), pad(w, 0, mesh.shape["tensor"]), *(pad(a, 1, shards) for a in by_token))
    unpad = {"t": lambda a: a[:, : x.shape[1]], "w": lambda a: a[: w.shape[0]], "": lambda a: a}
    return tuple(unpad[kind](a) for kind, a in zip(out, results, strict=True))
