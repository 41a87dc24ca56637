"""GPT-1, GPT-2 and GPT-3 as one Flax module behind pure functions.

    params     = init(config, key)                        a plain nested dict; blocks stacked [L, ...]
    x_BTD      = hidden(params, config, tokens_BT)        after the last LayerNorm
    logits_BTV = logits(params, config, x_BTD)            float32

plain.py has the same forward pass without sharding, dropout, scan or cache. Here, from top to bottom: the module (GPT,
Block, Attention, MLP), then the pure functions that the rest of the code calls. The names of the parameters are GPT-2's
(wte, wpe, ln_1, attn/c_attn, ...), weights are [in, out], and c_attn is [in, 3, out] so that a tensor-parallel shard
holds whole heads of q, k and v. Shape suffixes: model/__init__.py.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gptjax.errors import InputError
from gptjax.model.attention import attention, cached_attention, causal_mask, tree_attention
from gptjax.model.layers import INIT_STD, LayerNorm, Linear, drop, fold, gelu, normal, scaled
from gptjax.model.spec import GPTConfig
from gptjax.parallel import pipeline
from gptjax.parallel.sharding import RESIDUAL, constrain, reshard
from gptjax.parallel.vocabulary import embed


class Mode(NamedTuple):
    """Static options of a forward pass."""

    keep_kv: bool = False  # return the keys and values of every layer
    mesh: Any = None  # for kernels that need a shard_map


class PerLayer(NamedTuple):
    """Inputs that differ from layer to layer: [L] outside the scan over layers, scalars within a layer."""

    index: Any  # int: 0 .. n_layer - 1
    is_local: Any  # bool: banded attention


class Shared(NamedTuple):
    """Inputs that are the same for every layer."""

    dropout_keys: Any = None  # [B], a key for each row; None = no dropout
    segment_ids: Any = None  # int [B, T]
    tree: Any = None  # Tree; None = every row is one sequence, or isolated segments
    filled: Any = None  # bool [B, S]: slots of the cache that a row may attend to
    slot: Any = None  # int: slot of the cache where the new keys and values go


class Tree(NamedTuple):
    """Rows that are prefix trees (attention/tree.py), int [B, T] each."""

    visible_until: Any
    positions: Any


class KVCache(NamedTuple):
    """Keys and values, each [B, H, S, K], or [L, B, H, S, K] of all layers. Heads before slots: a head's slots are
    contiguous."""

    k: Any
    v: Any


class GPT(nn.Module):
    config: GPTConfig
    mode: Mode = Mode()
    dtype: Any = jnp.float32  # of activations; parameters are float32

    @nn.compact
    def __call__(
        self, tokens_BT, positions_BT, segment_ids=None, dropout_keys=None, cache=None, slot=None, filled=None,
        visible_until=None,
    ):  # fmt: skip
        """Returns (final hidden states [B, T, D], the updated cache, all layers' keys and values if mode.keep_kv).

        cache: None, a KVCache of [L, B, H, S, K], or a tuple with each layer's [B, H, S, K]. Keys and values are
        [L, B, T, H, K] each, in this call's own positions. The other arguments: `hidden` and `decode_step`.
        """
        c = self.config
        wte_VD = self.param("wte", normal(INIT_STD, "vocab", "embed"), (c.vocab_size, c.d_model))
        wpe_TD = self.param("wpe", normal(INIT_STD, "position", "embed"), (c.context_length, c.d_model))
        if not c.tied_head:
            self.param("lm_head", normal(INIT_STD, "vocab", "embed"), (c.vocab_size, c.d_model))
        x_BTD = embed(wte_VD, wpe_TD, tokens_BT, positions_BT, self.dtype)
        self.sow("intermediates", "embedding", x_BTD)
        if c.dropout_sites == "all":
            x_BTD = drop(x_BTD, c.dropout, dropout_keys, 3 * c.n_layer)
        x_BTD = constrain(x_BTD, *RESIDUAL)
        layers = PerLayer(jnp.arange(c.n_layer), jnp.array([c.is_local(layer) for layer in range(c.n_layer)]))
        tree = None if visible_until is None else Tree(visible_until, positions_BT)
        shared = Shared(dropout_keys, segment_ids, tree, filled, slot)
        kv = None
        if pipeline.stages() > 1 and cache is None and not self.mode.keep_kv and not self.is_initializing():
            x_BTD = self.pipelined_layers(x_BTD, layers, shared)
        elif cache is None or isinstance(cache, KVCache):
            x_BTD, cache, kv = self.scan_layers(x_BTD, cache, layers, shared)
        else:
            x_BTD, cache = self.unrolled_layers(x_BTD, cache, layers, shared)
        if c.norm == "pre":
            x_BTD = LayerNorm(name="ln_f")(x_BTD)
        return scaled(x_BTD, c.output_multiplier), cache, kv

    def scan_layers(self, x_BTD, cache, layers: PerLayer, shared: Shared):
        """One loop (lax.scan) over the stacked layers, so that the program does not grow with depth."""
        c = self.config
        block = Block if c.remat == "none" else nn.remat(Block, policy=_REMAT[c.remat], prevent_cse=False)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layer,
            unroll=_scan_unroll(c, self.mode.mesh),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.mode, name="blocks")
        (x_BTD, cache), kv = blocks((x_BTD, cache), layers, shared)
        return x_BTD, cache, kv

    def unrolled_layers(self, x_BTD, caches, layers: PerLayer, shared: Shared):
        """No loop: the parameters and the cache are tuples with one entry per layer (`unstack_layers`)."""
        block, updated = Block(self.config, self.mode, parent=None), []
        for i, (params, cache) in enumerate(zip(self.variables["params"]["blocks"], caches, strict=True)):
            layer = jax.tree.map(lambda a, i=i: a[i], layers)
            (x_BTD, cache), _ = block.apply({"params": params}, (x_BTD, cache), layer, shared)
            updated.append(cache)
        return x_BTD, tuple(updated)

    def pipelined_layers(self, x_BTD, layers: PerLayer, shared: Shared):
        """The layers sharded over the mesh axis `stage`, micro-batches flowing through them."""
        block = Block(self.config, self.mode, parent=None)
        layer = lambda params, x, *rest: block.apply({"params": params}, (x, None), *rest)[0][0]
        blocks = self.variables["params"]["blocks"]
        return pipeline.run(layer, blocks, x_BTD, layers, shared, self.config, _REMAT.get(self.config.remat))


class Block(nn.Module):
    """One layer, in the form that nn.scan takes: (carry, inputs of the layer, inputs of all) -> (carry, output).

    The carry is (x_BTD, cache), the output this layer's keys and values (mode.keep_kv)."""

    config: GPTConfig
    mode: Mode

    @nn.compact
    def __call__(self, carry, layer: PerLayer, shared: Shared):
        c = self.config
        x_BTD, cache = carry
        # Residual projections of pre-LN models are scaled down by the number of residual sums, 2 L (GPT-2 §2.3 as
        # Hugging Face and nanoGPT interpret it); GPT-1 has N(0, .02) throughout. Width multiplier: mup.py.
        std = INIT_STD / c.width_multiplier**0.5
        residual_std = std / (2 * c.n_layer) ** 0.5 if c.norm == "pre" else std
        ln_1, ln_2 = LayerNorm(name="ln_1"), LayerNorm(name="ln_2")
        attn = Attention(c, self.mode, std, residual_std, name="attn")
        mlp = MLP(c, std, residual_std, name="mlp")

        def dropout(h_BTD, site):
            return drop(h_BTD, c.dropout, shared.dropout_keys, 3 * layer.index + site)

        if c.norm == "pre":
            y_BTD, cache, kv = attn(ln_1(x_BTD), cache, layer, shared)
            x_BTD = x_BTD + dropout(y_BTD, 1)
            x_BTD = x_BTD + dropout(mlp(ln_2(x_BTD)), 2)
        else:
            y_BTD, cache, kv = attn(x_BTD, cache, layer, shared)
            x_BTD = ln_1(x_BTD + dropout(y_BTD, 1))
            x_BTD = ln_2(x_BTD + dropout(mlp(x_BTD), 2))
        x_BTD = constrain(x_BTD, *RESIDUAL)
        self.sow("intermediates", "block", x_BTD)
        return (x_BTD, cache), kv


class Attention(nn.Module):
    config: GPTConfig
    mode: Mode
    std: float
    residual_std: float

    @nn.compact
    def __call__(self, x_BTD, cache, layer: PerLayer, shared: Shared):
        """Returns (output [B, T, D], the cache with the new keys and values, these themselves if mode.keep_kv)."""
        c = self.config
        B, T, _ = x_BTD.shape
        qkv_BT3D = Linear((3, c.d_model), ("embed", "qkv", "heads"), self.std, name="c_attn")(to_tensor_parallel(x_BTD))
        qkv_BT3D = constrain(qkv_BT3D, "batch", "time", "qkv", "heads")
        q_BTHK, k_BTHK, v_BTHK = (qkv_BT3D[:, :, i].reshape(B, T, c.n_head, c.d_head) for i in range(3))
        q_BTHK = scaled(q_BTHK, c.attention_multiplier)
        self.sow("intermediates", "qk", (q_BTHK, k_BTHK))
        if cache is None:
            y_BTHK = self.self_attention(q_BTHK, k_BTHK, v_BTHK, layer, shared)
        else:
            y_BTHK, cache = self.cached_self_attention(q_BTHK, k_BTHK, v_BTHK, cache, layer, shared)
        y_BTD = y_BTHK.reshape(B, T, c.d_model)
        self.sow("intermediates", "attn_out", y_BTD)
        y_BTD = to_sequence_parallel(Linear((c.d_model,), ("heads", "embed"), self.residual_std, name="c_proj")(y_BTD))
        return y_BTD, cache, (k_BTHK, v_BTHK) if self.mode.keep_kv else None

    def self_attention(self, q_BTHK, k_BTHK, v_BTHK, layer: PerLayer, shared: Shared):
        """Without a cache: [B, T, H, K], dense or banded as this layer is."""
        c = self.config
        rate = c.dropout if shared.dropout_keys is not None and c.dropout_sites == "all" else 0.0
        keys = fold(shared.dropout_keys, 3 * layer.index) if rate else None

        def attend(window):
            if shared.tree is not None:
                return lambda q, k, v: tree_attention(q, k, v, *shared.tree, window, c.attention)
            return lambda q, k, v: attention(
                q, k, v, path=c.attention, window=window, segment_ids=shared.segment_ids,
                dropout=rate, dropout_keys=keys, mesh=self.mode.mesh,
            )  # fmt: skip

        if c.local_window is None or c.local_window >= q_BTHK.shape[1]:
            return attend(None)(q_BTHK, k_BTHK, v_BTHK)
        return lax.cond(layer.is_local, attend(c.local_window), attend(None), q_BTHK, k_BTHK, v_BTHK)

    def cached_self_attention(self, q_BTHK, k_BTHK, v_BTHK, cache: KVCache, layer: PerLayer, shared: Shared):
        """Writes the new keys and values at `shared.slot` and attends to the slots that each row has filled.

        Returns ([B, T, H, K], the updated cache).

        cache: of this layer, [B, H, S, K], or of all layers, [L, B, H, S, K], of which only this layer's is updated.
        """
        slot, of_layer = shared.slot, (layer.index,) if cache.k.ndim == 5 else ()
        new = KVCache(*(jnp.swapaxes(a, 1, 2).astype(cache.k.dtype) for a in (k_BTHK, v_BTHK)))

        def write(old, new_BHTK):
            return lax.dynamic_update_slice(old, new_BHTK[(None,) * len(of_layer)], (*of_layer, 0, 0, slot, 0))

        cache = jax.tree.map(write, cache, new)
        k_BHSK, v_BHSK = (lax.dynamic_index_in_dim(a, *of_layer, keepdims=False) if of_layer else a for a in cache)
        slots_S = jnp.arange(k_BHSK.shape[2])
        written_T = slot + jnp.arange(q_BTHK.shape[1])
        mask_TS = causal_mask(written_T, slots_S)
        if self.config.local_window is not None:
            mask_TS = mask_TS & (~layer.is_local | causal_mask(written_T, slots_S, self.config.local_window))
        mask_BTS = mask_TS[None] & shared.filled[:, None, :]
        return cached_attention(q_BTHK, k_BHSK.astype(q_BTHK.dtype), v_BHSK.astype(q_BTHK.dtype), mask_BTS), cache


class MLP(nn.Module):
    config: GPTConfig
    std: float
    residual_std: float

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        h_BTF = Linear((c.d_ff,), ("embed", "mlp"), self.std, name="c_fc")(to_tensor_parallel(x_BTD))
        h_BTF = constrain(h_BTF, "batch", "time", "mlp")
        self.sow("intermediates", "c_fc_out", h_BTF)
        y_BTD = Linear((c.d_model,), ("mlp", "embed"), self.residual_std, name="c_proj")(gelu(h_BTF))
        return to_sequence_parallel(y_BTD)


# Sequence parallelism (Korthikanti et al. 2022): over the mesh axis `tensor`, the residual stream is sharded along time
# between sub-layers (RESIDUAL), and the features are sharded inside them. One all-gather in and one reduce-scatter out,
# in the forward and in the backward pass.
_INSIDE = ("batch", "time", "features")


def to_tensor_parallel(x_BTD):
    """Into a sub-layer: all-gathers time."""
    return reshard(x_BTD, _INSIDE, RESIDUAL)


def to_sequence_parallel(y_BTD):
    """Out of a sub-layer: sums the partial results and shards time again (reduce-scatter)."""
    return reshard(y_BTD, RESIDUAL, _INSIDE)


_REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names("matmul"),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["matmul"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _scan_unroll(c: GPTConfig, mesh) -> int:
    """Layers per iteration of the scan: config.unroll. 1 where XLA:CPU fails on several in a loop ("Incorrect number of
    arguments passed to called function", jaxlib 0.10.2): with remat='full' and parameters sharded over fsdp."""
    sizes = jax.sharding.get_abstract_mesh().shape
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    fails = platform == "cpu" and c.remat == "full" and sizes.get("fsdp", 1) > 1
    return 1 if fails and c.unroll < c.n_layer else c.unroll


# --- The pure functions that the rest of the code calls ---------------------------------------------------


def abstract_params(config: GPTConfig):
    """The parameters as shapes with logical axis names attached (for sharding); nothing is computed."""
    zeros = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(GPT(config).init, jax.random.key(0), zeros, zeros)["params"]


def init(config: GPTConfig, key):
    """Parameters, float32: a nested dict with blocks stacked [L, ...]. Jit it with out_shardings to initialize them
    sharded."""
    zeros = jnp.zeros((1, 1), jnp.int32)
    return nn.meta.unbox(GPT(config).init(key, zeros, zeros)["params"])


def hidden(
    params,
    config: GPTConfig,
    tokens_BT,
    *,
    positions=None,
    segment_ids=None,
    visible_until=None,
    dropout_keys=None,
    dtype=jnp.float32,
    mesh=None,
):
    """Final hidden states. Where the current mesh has stages, rows go through the layers in micro-batches.

    Args:
        tokens_BT: int, T <= context_length.
        positions: int [B, T], or None for 0..T-1.
        segment_ids: int [B, T], or None; attention stays within a segment.
        visible_until: int [B, T], or None; rows are prefix trees (attention/tree.py), for which there is no gradient.
        dropout_keys: a key for each row, [B]; None means no dropout.
        dtype: of the activations and matmuls. mesh: for attention kernels that need a shard_map.
    Returns:
        [B, T, D] in dtype, after the final LayerNorm where the model has one, times muP's output multiplier.
    """
    if visible_until is None:  # a tree has more slots than its sequences have positions
        _check_time(tokens_BT, config)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    keys = dropout_keys if config.dropout else None
    return GPT(config, Mode(mesh=mesh), dtype).apply(
        {"params": params}, tokens_BT, positions, segment_ids, keys, visible_until=visible_until
    )[0]


def _check_time(tokens_BT, config: GPTConfig):
    """InputError: more tokens than position embeddings. JAX's gather would clamp the index and raise nothing."""
    if tokens_BT.shape[1] > config.context_length:
        raise InputError(
            f"Rows of {tokens_BT.shape[1]} tokens exceed the model's context of {config.context_length}: shorten them."
        )


def unembedding(params, config: GPTConfig):
    """[V, D]: the token embedding itself where the head is tied to it."""
    return params["wte"] if config.tied_head else params["lm_head"]


def readout(params, config: GPTConfig, x_BTD):
    """(x [B, T, D], w [V, D]) whose product x w^T is the logits."""
    return x_BTD, unembedding(params, config)


def logits(params, config: GPTConfig, x):
    """[..., D] -> [..., V], accumulated and returned in float32."""
    w_VD = unembedding(params, config).astype(x.dtype)
    return jnp.einsum("...d,vd->...v", x, w_VD, preferred_element_type=jnp.float32)


def prefill(params, config: GPTConfig, tokens_BT, positions_BT, segment_ids, *, dtype=jnp.float32, mesh=None):
    """Forward pass that keeps keys and values: (hidden [B, T, D], KVCache of [L, B, H, T, K])."""
    _check_time(tokens_BT, config)
    model = GPT(config, Mode(keep_kv=True, mesh=mesh), dtype)
    x_BTD, _, (k_LBTHK, v_LBTHK) = model.apply({"params": params}, tokens_BT, positions_BT, segment_ids)
    return x_BTD, KVCache(jnp.swapaxes(k_LBTHK, 2, 3), jnp.swapaxes(v_LBTHK, 2, 3))


def decode_step(params, config: GPTConfig, tokens_BT, positions_BT, cache, slot, filled_BS, *, dtype=jnp.float32):
    """One or more new tokens per row against the cache.

    Args:
        tokens_BT, positions_BT: int; the T new tokens go to slots slot .. slot+T-1, the same in every row.
        cache: KVCache of [L, B, H, S, K], or what `unstack_layers` made of it and of the parameters.
        filled_BS: bool, the slots that each row may attend to (the causal mask over slots is applied too).
    Returns:
        (hidden [B, T, D], the cache with the new keys and values).
    """
    return GPT(config, Mode(), dtype).apply(
        {"params": params}, tokens_BT, positions_BT, cache=cache, slot=slot, filled=filled_BS
    )[:2]


def unstack_layers(params, cache: KVCache, config: GPTConfig):
    """Parameters and cache with each layer's arrays by themselves, for decoding without a loop over layers.

    XLA:CPU copies a layer out of a stacked array before it multiplies by it, again for every token: half the time of a
    token at 6 layers, 384 wide. This copies once, so the layers take twice the memory.
    """
    unstack = lambda tree: tuple(jax.tree.map(lambda a, i=i: a[i], tree) for i in range(config.n_layer))
    return {**params, "blocks": unstack(params["blocks"])}, unstack(cache)
