"""How many bytes of a TPU chip a training step has in use when it has the most: our own count, from shapes alone.

In memory whatever the order of the operations: parameters and moments (float32), the batch, where there are several
micro-batches the float32 sum of their gradients, and the matrices in 16 bits, cast once for all layers and rows. On top
of that comes the fullest of these moments, all of one micro-batch:

    a layer's backward pass   what the forward pass keeps, the micro-batch's own gradients, one layer worked on
    a chunk of the loss       what the forward pass keeps, a chunk of logits in float32 and 16 bits, the gradient of
                              the token table
    the embedding's gradient  the micro-batch's gradients, the token table's once more, whole
    the embedding             under fsdp the token table, gathered in float32, once more as it is turned to be looked
                              up in, and in 16 bits for the loss; beside it the compiler has set aside already what
                              the layers will keep and the table's gradient

What is kept is what JAX's trace of the forward pass says, a head's features padded to 128 lanes (`layer_arrays`). With
u for a chip's tokens x d_model in the compute dtype and h for the same cut into padded heads, a layer worked on is the
most of

    MLP         4 u each for the features before and after GELU and their gradient (those that remat has kept are not
                counted twice), the heads q, k, v and the output, 4 u of the residual stream
    kernel      q, k, v, the output and the gradient of each (k and v of all the context: mesh.seq times as many), 4 u
                of the MLP's features waiting for their weight's gradient, 4 u of the residual stream
    projection  d_q, d_k, d_v as they are put into one array, twice 3 u, and h, the heads, and as before 4 u + 4 u

and with fsdp three times d_model x d_ff of the layer's matrices gathered in 16 bits and the gradient of one such matrix
in float32. The rest is the compiler's choice: in which order it takes the operations, what it prefetches, and what it
computes again where memory is short. A pipeline keeps that of every tick, and beside it a turn's layers computed again,
its gradients and its matrices. Under other mesh.rules the count is still that of the default ones. Beside the
compiler's: experiments/tpu_fit.
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
# What no setting but more chips makes smaller.
STATE = ("params", "optimizer", "gradients", "gradients summed", "matrices in 16 bits")
LANES = 128  # of a TPU's registers: the last axis of an array is padded to it


def lanes(n: int) -> int:
    return -(-n // LANES) * LANES


def cache_bytes(c: GPTConfig, tokens: int, dtype, platform: str = "tpu") -> int:
    """Keys and values of all layers for so many tokens of all rows, on a TPU with heads padded to lanes. As decoding
    begins there lie beside them for a moment the prompts' values alone: first the keys, then they are put into the
    longer cache."""
    head = lanes(c.d_head) if platform == "tpu" else c.d_head
    return 2 * c.n_layer * tokens * c.n_head * head * jnp.dtype(dtype).itemsize


def layer_arrays(c: GPTConfig, sizes, rows: int, dtype) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    """What the forward pass of `rows` rows keeps of its layers for the backward pass, largest first: ((name, shape
    [layer, rows, ...] over all devices, bytes on one), ...). The attention path must be resolved."""
    dropout = jax.random.split(jax.random.key(0), rows) if c.dropout else None

    def residuals(params, tokens, segments):
        run = lambda p: gpt.hidden(p, c, tokens, segment_ids=segments, dropout_keys=dropout, dtype=dtype)
        return jax.vjp(run, params)[1]

    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.value.shape, x.value.dtype), gpt.abstract_params(c),
                          is_leaf=lambda x: hasattr(x, "value"))  # fmt: skip
    tokens = jax.ShapeDtypeStruct((rows, c.context_length), jnp.int32)
    seen = {x.shape for x in jax.tree.leaves(params)}
    # Within a layer features or heads are cut up over tensor, between layers the residual stream's time is.
    cut = sizes["data"] * sizes["fsdp"] * sizes["tensor"] * sizes["seq"]
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
        found.append((_name(x.shape, c), x.shape, math.prod(shape) * x.dtype.itemsize // cut))
    return tuple(sorted(found, key=lambda a: -a[2]))


def _name(shape, c: GPTConfig) -> str:
    if c.d_ff in shape:
        return "MLP features"
    if shape[-2:] == (3, c.d_model) or shape[-1] == c.d_head:
        return "queries, keys, values"
    return "residual stream" if shape[-1] == c.d_model else "activations"


def training_peak(c: GPTConfig, sizes, *, rows: int, micro_batches: int, chunk: int, dtype, state: dict[str, int]):
    """Parts of the peak of one chip, what is kept of a micro-batch's forward pass, and which arrays those are.

    Args:
        c: the model, its attention path resolved. sizes: of the mesh's axes. rows: of a micro-batch, on all devices.
        chunk: time steps whose logits are held at once. state: bytes on a chip of 'params', 'optimizer' and 'batch'.
    Returns:
        ({what: bytes}, whose sum is the peak; bytes; `layer_arrays`, none of a pipeline).
    """
    plan = pipeline.make_plan(c, sizes, rows)
    rows_at_once = -(-rows // plan.microbatches)
    of = lambda remat: layer_arrays(dataclasses.replace(c, remat=remat), sizes, rows_at_once, dtype)
    # What is offloaded is the host's: on the chip there is as much as with full remat.
    arrays = of("full" if c.remat == "offload" else c.remat)
    kept = sum(size for *_, size in arrays)
    staged, itemsize = plan.stages > 1, jnp.dtype(dtype).itemsize
    if staged:  # for each tick the layers of one turn, of which full remat keeps the first one's input alone
        everything = sum(size for *_, size in of("none"))
        turns = plan.stages * plan.virtual_stages
        again = everything / turns + (kept / turns if c.remat == "dots" else 0)
        kept = plan.ticks * kept / (c.n_layer if c.remat in ("full", "offload") else turns)
    params, whole_table = state["params"], 4 * c.vocab_size * c.d_model // sizes["tensor"]
    # They lie like the parameters, but that of the table of the loss is cut up over tensor as well, as the loss leaves
    # it, and the micro-batch's is cut up over fsdp only after the layers.
    parts_of_table = 4 * c.vocab_size * c.d_model // sizes["fsdp"]
    summed = params - parts_of_table + parts_of_table // sizes["tensor"]
    gradients = {"gradients": summed, "the table's gradient, whole": whole_table - whole_table // sizes["fsdp"]}
    base = state | {
        "gradients summed": summed if micro_batches > 1 else 0,
        "matrices in 16 bits": params // 2 if itemsize == 2 else 0,
    }
    backward = gradients | {KEPT: int(kept), "a layer's backward pass": int(_layer(c, sizes, rows_at_once, dtype))}
    if staged:
        # A tick's own gradients, its layers' matrices as they are cut out of the stacked ones, and, where there are
        # rounds, all of a stage's as they were dealt, both in the compute dtype.
        layers = params - 4 * (c.vocab_size * (1 if c.tied_head else 2) + c.context_length) * c.d_model // sizes["fsdp"]
        copies = itemsize / 4 * (1 / plan.virtual_stages + (plan.virtual_stages > 1))
        backward |= {"a turn's layers again": int(again), "a turn's gradients": int(layers * (1 + copies))}
    moments = [backward, {KEPT: int(kept), "a chunk of the loss": int(_loss(c, sizes, rows, chunk, dtype))}]
    if math.prod(sizes.values()) > 1:
        moments.append(gradients | {"the embedding's gradient": whole_table})
    if sizes["fsdp"] > 1:
        moments.append({KEPT: int(kept), "the table whole": whole_table * (12 + itemsize) // 4})
    parts = base | max(moments, key=lambda m: sum(m.values()))
    return {k: v for k, v in parts.items() if v}, int(kept), () if staged else arrays


def _units(c: GPTConfig, sizes, rows: int, dtype):
    """(u, h): bytes on a chip of [tokens, d_model] and of [tokens, heads, padded d_head]."""
    tokens = rows * c.context_length / (sizes["data"] * sizes["fsdp"] * sizes["seq"] * sizes["tensor"])
    itemsize = jnp.dtype(dtype).itemsize
    return itemsize * tokens * c.d_model, itemsize * tokens * c.n_head * lanes(c.d_head)


def _layer(c: GPTConfig, sizes, rows: int, dtype) -> float:
    """One layer's backward pass, by the module's docstring."""
    u, h = _units(c, sizes, rows, dtype)
    seq, tensor, remat = sizes["seq"], sizes["tensor"], c.remat != "none"
    heads = (2 + 2 * seq) * h if remat else 2 * (seq - 1) * h
    wide = {"none": 1, "dots": 2}.get(c.remat, 3)
    most = max(
        wide * 4 * u + heads + 4 * u + (2 * tensor * u if tensor > 1 else 0),  # the residual stream gathered, twice
        4 * u + heads + (2 + 2 * seq) * h + 4 * u,
        4 * u + heads + 6 * u + h + 4 * u,
    )
    if sizes["fsdp"] > 1:
        matrix = 4 * c.d_model * c.d_model / tensor
        most += 3 * matrix * jnp.dtype(dtype).itemsize + 4 * matrix
    return most


def _loss(c: GPTConfig, sizes, rows: int, chunk: int, dtype) -> float:
    """A chunk of logits in float32, their gradient in the compute dtype, the table and its gradient, the residual
    stream three times: as it is, cut into chunks, and its gradient."""
    u, _ = _units(c, sizes, rows, dtype)
    itemsize, alone = jnp.dtype(dtype).itemsize, math.prod(sizes.values()) == 1
    vocab = c.vocab_size / sizes["tensor"]
    logits = rows / batch_shards(sizes) * min(chunk, c.context_length // sizes["seq"]) * vocab
    table = vocab * c.d_model * (4 + (0 if alone else itemsize))
    return logits * (4 + itemsize) + table + 3 * u / sizes["stage"]
