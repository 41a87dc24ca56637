"""Peak memory of a training step on one TPU chip, in bytes: an analytical estimate from shapes alone.

Always in memory: parameters and optimizer moments (float32), the batch, with several micro-batches the float32 sum of
their gradients, and the 16-bit copy of the matrices, cast once per step. The peak adds the largest of these phases of
one micro-batch:

    backward pass of a layer    saved activations, gradients of the micro-batch, temporaries of one layer
    loss chunk                  saved activations, a chunk of logits in float32 and in 16 bits, the gradient of the
                                token table
    embedding gradient          gradients of the micro-batch, one more unsharded copy of the token table's
    embedding                   with fsdp, the token table gathered in float32, its transposed copy for the lookup, and
                                its 16-bit copy for the loss; the compiler has already allocated the activations to be
                                saved and the table's gradient

Saved activations are those of JAX's trace of the forward pass, with the features of a head padded to 128 lanes
(`layer_arrays`). Symbols:

    u   bytes of [tokens of a chip, d_model] in the compute dtype
    h   bytes of [tokens of a chip, heads, d_head padded to 128]

Temporaries of a layer are the largest of

    MLP         4 u each for the features before and after GELU and their gradient (not counted again if remat saves
                them), q, k, v and the output of attention, 4 u of the residual stream
    attention   q, k, v, the output and the gradient of each (k and v of the whole context: mesh.seq times as many), 4 u
                of MLP features that their weight gradient still needs, 4 u of the residual stream
    projection  d_q, d_k, d_v while they are concatenated, 2 x 3 u, and h of the heads; 4 u + 4 u as above

and with fsdp 3 d_model x d_ff of the layer's matrices gathered in 16 bits and the gradient of one matrix in float32.
Not modeled are the compiler's choices: order of operations, prefetching, and recomputation when memory is short. With a
pipeline the saved activations are those of every tick, plus one tick's recomputed layers, gradients and matrices. The
estimate assumes the default mesh.rules. Compared with the compiler's figures in experiments/tpu_fit.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import batch_shards

KEPT = "kept for the backward pass"
# Only more chips make these smaller.
STATE = ("params", "optimizer", "gradients", "accumulated gradients", "16-bit matrices")
LANES = 128  # of a TPU's vector registers: the last axis of an array is padded to a multiple


def lanes(n: int) -> int:
    """n rounded up to a multiple of LANES."""
    return -(-n // LANES) * LANES


def cache_bytes(c: GPTConfig, tokens: int, dtype, platform: str = "tpu") -> int:
    """Bytes of the KV cache of all layers for `tokens` tokens over all rows; on a TPU heads are padded to lanes.

    Not included: when decoding starts, the prompts' values also exist outside the cache for a moment, because keys and
    values are copied into the longer cache one after the other.
    """
    head = lanes(c.d_head) if platform == "tpu" else c.d_head
    return 2 * c.n_layer * tokens * c.n_head * head * jnp.dtype(dtype).itemsize


def layer_arrays(c: GPTConfig, sizes, rows: int, dtype) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    """The layers' activations that the forward pass of `rows` rows saves for the backward pass, largest first.

    Returns:
        ((name, global shape [layer, rows, ...], bytes on one device), ...).
    Args:
        c: the model, with a resolved attention path. sizes: {mesh axis: size}. dtype: of the computation.
    """
    dropout = jax.random.split(jax.random.key(0), rows) if c.dropout else None

    def residuals(params, tokens, segments):
        run = lambda p: gpt.hidden(p, c, tokens, segment_ids=segments, dropout_keys=dropout, dtype=dtype)
        return jax.vjp(run, params)[1]

    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.value.shape, x.value.dtype), gpt.abstract_params(c),
                          is_leaf=lambda x: hasattr(x, "value"))  # fmt: skip
    tokens = jax.ShapeDtypeStruct((rows, c.context_length), jnp.int32)
    seen = {x.shape for x in jax.tree.leaves(params)}
    # Within a layer features or heads are sharded over tensor, between layers the time axis of the residual stream is.
    shards = sizes["data"] * sizes["fsdp"] * sizes["tensor"] * sizes["seq"]
    found = []
    for x in jax.tree.leaves(jax.eval_shape(residuals, params, tokens, None)):
        if (
            x.shape in seen
            or x.shape[:1] != (c.n_layer,)
            or rows not in x.shape[1:]
            or not hasattr(x.dtype, "itemsize")
        ):
            continue
        shape = (*x.shape[:-1], lanes(c.d_head)) if x.shape[-1] == c.d_head else x.shape
        found.append((_name(x.shape, c), x.shape, math.prod(shape) * x.dtype.itemsize // shards))
    return tuple(sorted(found, key=lambda a: -a[2]))


def _name(shape, c: GPTConfig) -> str:
    if c.d_ff in shape:
        return "MLP features"
    if shape[-2:] == (3, c.d_model) or shape[-1] == c.d_head:
        return "queries, keys, values"
    return "residual stream" if shape[-1] == c.d_model else "activations"


def training_peak(c: GPTConfig, sizes, *, rows: int, micro_batches: int, chunk: int, dtype, state: dict[str, int]):
    """Peak memory of one chip by parts, and the activations that the forward pass of a micro-batch saves.

    Args:
        c: the model, with a resolved attention path. sizes: {mesh axis: size}. rows: of a micro-batch, on all devices.
        chunk: time steps whose logits are computed at once. state: bytes on a chip of 'params', 'optimizer', 'batch'.
    Returns:
        ({part: bytes}, whose sum is the peak; bytes of saved activations; their `layer_arrays`, () with a pipeline).
    """
    plan = pipeline.make_plan(c, sizes, rows)
    rows_at_once = -(-rows // plan.microbatches)
    of = lambda remat: layer_arrays(dataclasses.replace(c, remat=remat), sizes, rows_at_once, dtype)
    # Offloaded activations are in host memory: the chip holds as much as with full remat.
    arrays = of("full" if c.remat == "offload" else c.remat)
    kept = sum(size for *_, size in arrays)
    staged, itemsize = plan.stages > 1, jnp.dtype(dtype).itemsize
    if staged:  # one group of layers per tick; full remat saves only the input of its first layer
        everything = sum(size for *_, size in of("none"))
        groups = plan.stages * plan.virtual_stages
        recomputed = everything / groups + (kept / groups if c.remat == "dots" else 0)
        kept = plan.ticks * kept / (c.n_layer if c.remat in ("full", "offload") else groups)
    params, full_table = state["params"], 4 * c.vocab_size * c.d_model // sizes["tensor"]
    # Gradients are sharded like the parameters, but the token table's is also sharded over tensor, as the loss leaves
    # it, and the micro-batch's is sharded over fsdp only after the layers.
    table_shard = 4 * c.vocab_size * c.d_model // sizes["fsdp"]
    summed = params - table_shard + table_shard // sizes["tensor"]
    gradients = {"gradients": summed, "unsharded token-table gradient": full_table - full_table // sizes["fsdp"]}
    base = state | {
        "accumulated gradients": summed if micro_batches > 1 else 0,
        "16-bit matrices": params // 2 if itemsize == 2 else 0,
    }
    backward = gradients | {KEPT: int(kept), "backward pass of a layer": int(_layer(c, sizes, rows_at_once, dtype))}
    if staged:
        # The gradients of a tick, its layers' matrices sliced out of the stacked ones and, with virtual stages, all
        # matrices of the stage after interleaving, both in the compute dtype.
        layers = params - 4 * (c.vocab_size * (1 if c.tied_head else 2) + c.context_length) * c.d_model // sizes["fsdp"]
        copies = itemsize / 4 * (1 / plan.virtual_stages + (plan.virtual_stages > 1))
        backward |= {"recomputed layers of a tick": int(recomputed), "gradients of a tick": int(layers * (1 + copies))}
    phases = [backward, {KEPT: int(kept), "loss chunk": int(_loss(c, sizes, rows, chunk, dtype))}]
    if math.prod(sizes.values()) > 1:
        phases.append(gradients | {"embedding gradient": full_table})
    if sizes["fsdp"] > 1:
        phases.append({KEPT: int(kept), "unsharded token table": full_table * (12 + itemsize) // 4})
    parts = base | max(phases, key=lambda phase: sum(phase.values()))
    return {k: v for k, v in parts.items() if v}, int(kept), () if staged else arrays


def _units(c: GPTConfig, sizes, rows: int, dtype):
    """(u, h) of the module's docstring."""
    tokens = rows * c.context_length / (sizes["data"] * sizes["fsdp"] * sizes["seq"] * sizes["tensor"])
    itemsize = jnp.dtype(dtype).itemsize
    return itemsize * tokens * c.d_model, itemsize * tokens * c.n_head * lanes(c.d_head)


def _layer(c: GPTConfig, sizes, rows: int, dtype) -> float:
    """Temporaries of one layer's backward pass, as in the module's docstring."""
    u, h = _units(c, sizes, rows, dtype)
    seq, tensor, remat = sizes["seq"], sizes["tensor"], c.remat != "none"
    heads = (2 + 2 * seq) * h if remat else 2 * (seq - 1) * h
    wide = {"none": 1, "dots": 2}.get(c.remat, 3)
    most = max(
        wide * 4 * u + heads + 4 * u + (2 * tensor * u if tensor > 1 else 0),  # two gathered residual streams
        4 * u + heads + (2 + 2 * seq) * h + 4 * u,
        4 * u + heads + 6 * u + h + 4 * u,
    )
    if sizes["fsdp"] > 1:
        matrix = 4 * c.d_model * c.d_model / tensor
        most += 3 * matrix * jnp.dtype(dtype).itemsize + 4 * matrix
    return most


def _loss(c: GPTConfig, sizes, rows: int, chunk: int, dtype) -> float:
    """A chunk of logits in float32, their gradient in the compute dtype, the token table and its gradient, and three
    residual streams: the output of the layers, its chunks and its gradient."""
    u, _ = _units(c, sizes, rows, dtype)
    itemsize, one_device = jnp.dtype(dtype).itemsize, math.prod(sizes.values()) == 1
    vocab = c.vocab_size / sizes["tensor"]
    logits = rows / batch_shards(sizes) * min(chunk, c.context_length // sizes["seq"]) * vocab
    table = vocab * c.d_model * (4 + (0 if one_device else itemsize))
    return logits * (4 + itemsize) + table + 3 * u / sizes["stage"]
