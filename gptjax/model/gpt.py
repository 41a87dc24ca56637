"""GPT-1, GPT-2 and GPT-3 as one thin Flax module behind pure functions.

    params = init(config, key)                        a plain nested dict; blocks stacked [layer, ...]
    x_BTD  = hidden(params, config, tokens_BT)        after the last LayerNorm
    l_BTV  = logits(params, config, x_BTD)            [batch, time, vocab], float32

The names of the parameters are GPT-2's (wte, wpe, ln_1, attn/c_attn, ...), weights are [in, out], and
c_attn is [in, 3, out] so that a tensor-parallel shard holds whole heads of q, k and v.
Shape letters: B batch, T time, D d_model, H head, K d_head, F d_ff, V vocab, L layer, S cache slots.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gptjax.errors import InputError
from gptjax.model.attention import attention, cached_attention, causal_mask
from gptjax.model.layers import INIT_STD, LayerNorm, Linear, gelu, normal
from gptjax.model.spec import GPTConfig
from gptjax.parallel import pipeline
from gptjax.parallel.sharding import RESIDUAL, constrain, reshard
from gptjax.parallel.vocabulary import embed

# Between sub-layers the residual stream is cut up along time over the tensor axis, inside them the features are
# (Korthikanti et al. 2022): one all-gather in and one reduce-scatter out, forward and backward alike.
_INSIDE = ("batch", "time", "features")


def _enter(x):
    return reshard(x, _INSIDE, RESIDUAL)


def _leave(y):
    return reshard(y, RESIDUAL, _INSIDE)


class Mode(NamedTuple):
    """What is fixed when a forward pass is traced. `mesh` is for kernels that need a shard_map."""

    keep_kv: bool = False  # return the keys and values of every layer
    mesh: Any = None


class Attention(nn.Module):
    config: GPTConfig
    mode: Mode
    residual_std: float

    @nn.compact
    def __call__(self, x_BTD, cache, by_layer, shared):
        """Returns the output, the cache with this layer's new keys and values, and those themselves."""
        c = self.config
        B, T, _ = x_BTD.shape
        qkv = Linear((3, c.d_model), ("embed", "qkv", "heads"), name="c_attn")(_enter(x_BTD))
        qkv = constrain(qkv, "batch", "time", "qkv", "heads")
        q, k, v = (qkv[:, :, i].reshape(B, T, c.n_head, c.d_head) for i in range(3))
        if cache is None:
            y = self.over_itself(q, k, v, by_layer, shared)
        else:
            cache, y = self.over_cache(q, k, v, cache, by_layer, shared)
        y = y.reshape(B, T, c.d_model)
        self.sow("intermediates", "attn_out", y)
        y = _leave(Linear((c.d_model,), ("heads", "embed"), self.residual_std, name="c_proj")(y))
        return y, cache, (k, v) if self.mode.keep_kv else None

    def over_itself(self, q, k, v, by_layer, shared):
        c = self.config
        drop = c.dropout if shared["keys"] is not None and c.dropout_sites == "all" else 0.0
        keys = _fold(shared["keys"], 3 * by_layer["layer"]) if drop else None

        def attend(window):
            return lambda q, k, v: attention(
                q, k, v, path=c.attention, window=window, segment_ids=shared["segment_ids"],
                dropout=drop, dropout_keys=keys, mesh=self.mode.mesh,
            )  # fmt: skip

        if c.local_window is None or c.local_window >= q.shape[1]:
            return attend(None)(q, k, v)
        return lax.cond(by_layer["local"], attend(c.local_window), attend(None), q, k, v)

    def over_cache(self, q, k, v, cache, by_layer, shared):
        """Writes k, v at slot `shared['slot']` and attends to the slots the row has filled.

        cache: of this layer, [B, H, S, K], or of all of them, [L, B, H, S, K].
        """
        slot = shared["slot"]
        at = (by_layer["layer"],) if cache["k"].ndim == 5 else ()
        new = {name: jnp.swapaxes(a, 1, 2).astype(cache[name].dtype) for name, a in (("k", k), ("v", v))}
        cache = {
            name: lax.dynamic_update_slice(cache[name], a[(None,) * len(at)], (*at, 0, 0, slot, 0))
            for name, a in new.items()
        }
        keys, values = (lax.dynamic_index_in_dim(cache[n], *at, keepdims=False) if at else cache[n] for n in ("k", "v"))
        slots = jnp.arange(keys.shape[2])
        here = slot + jnp.arange(q.shape[1])
        mask = causal_mask(here, slots)
        if self.config.local_window is not None:
            mask = mask & (~by_layer["local"] | causal_mask(here, slots, self.config.local_window))
        mask = mask[None] & shared["filled"][:, None, :]  # [B, T, S]
        return cache, cached_attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask)


class MLP(nn.Module):
    config: GPTConfig
    residual_std: float

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        h = Linear((c.d_ff,), ("embed", "mlp"), name="c_fc")(_enter(x_BTD))
        h = constrain(h, "batch", "time", "mlp")
        self.sow("intermediates", "c_fc_out", h)
        return _leave(Linear((c.d_model,), ("mlp", "embed"), self.residual_std, name="c_proj")(gelu(h)))


class Block(nn.Module):
    """One layer, in the form nn.scan takes: (carry, what differs by layer, what all layers share)."""

    config: GPTConfig
    mode: Mode

    @nn.compact
    def __call__(self, carry, by_layer, shared):
        c = self.config
        x, cache = carry
        # Residual projections of pre-LN models are scaled down by the number of residual sums, 2 L
        # (GPT-2 §2.3 read as Hugging Face and nanoGPT read it); GPT-1 has N(0, .02) throughout.
        residual_std = INIT_STD / (2 * c.n_layer) ** 0.5 if c.norm == "pre" else INIT_STD
        ln_1, ln_2 = LayerNorm(name="ln_1"), LayerNorm(name="ln_2")
        attn = Attention(c, self.mode, residual_std, name="attn")
        mlp = MLP(c, residual_std, name="mlp")

        def dropout(h, site):
            return _dropout(h, c.dropout, shared["keys"], 3 * by_layer["layer"] + site)

        if c.norm == "pre":
            a, cache, kv = attn(ln_1(x), cache, by_layer, shared)
            x = x + dropout(a, 1)
            x = x + dropout(mlp(ln_2(x)), 2)
        else:
            a, cache, kv = attn(x, cache, by_layer, shared)
            x = ln_1(x + dropout(a, 1))
            x = ln_2(x + dropout(mlp(x), 2))
        x = constrain(x, *RESIDUAL)
        self.sow("intermediates", "block", x)
        return (x, cache), kv


def _fold(keys, site):
    """Every row has its key, every place with dropout its number (3 to a layer, the embedding's last): a mask depends
    on nothing else, so neither on the other rows nor on the stage or micro-batch the row is computed in."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, site)


def _dropout(x, rate, keys, site):
    if keys is None or not rate:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(_fold(keys, site))
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)


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


def _unroll(c: GPTConfig, mesh) -> int:
    """Layers of an iteration of the scan. One where XLA:CPU fails on several ("Incorrect number of arguments passed to
    called function", jaxlib 0.10.2): within a loop, fully recomputed, of parameters cut over fsdp."""
    sizes = jax.sharding.get_abstract_mesh().shape
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    fails = platform == "cpu" and c.remat == "full" and sizes.get("fsdp", 1) > 1
    return 1 if fails and c.unroll < c.n_layer else c.unroll


class GPT(nn.Module):
    config: GPTConfig
    mode: Mode = Mode()
    dtype: Any = jnp.float32  # of activations; parameters are float32

    @nn.compact
    def __call__(self, tokens, positions, segment_ids=None, keys=None, cache=None, slot=None, filled=None):
        c = self.config
        wte = self.param("wte", normal(INIT_STD, "vocab", "embed"), (c.vocab_size, c.d_model))
        wpe = self.param("wpe", normal(INIT_STD, "position", "embed"), (c.context_length, c.d_model))
        if not c.tied_head:
            self.param("lm_head", normal(INIT_STD, "vocab", "embed"), (c.vocab_size, c.d_model))
        x = embed(wte, wpe, tokens, positions, self.dtype)
        self.sow("intermediates", "embedding", x)
        if c.dropout_sites == "all":
            x = _dropout(x, c.dropout, keys, 3 * c.n_layer)
        x = constrain(x, *RESIDUAL)
        by_layer = {
            "layer": jnp.arange(c.n_layer),
            "local": jnp.array([c.is_local(layer) for layer in range(c.n_layer)]),
        }
        by_row = {"segment_ids": segment_ids, "keys": keys}
        if pipeline.stages() > 1 and not (cache or self.mode.keep_kv or self.is_initializing()):
            block = Block(c, self.mode, parent=None)
            layer = lambda params, x, *rest: block.apply({"params": params}, (x, None), *rest)[0][0]
            blocks = self.variables["params"]["blocks"]
            x, kv = pipeline.run(layer, blocks, x, by_layer, by_row, c, _REMAT.get(c.remat)), None
        else:
            x, cache, kv = self.in_one(x, cache, by_layer, {**by_row, "slot": slot, "filled": filled})
        if c.norm == "pre":
            x = LayerNorm(name="ln_f")(x)
        return x, cache, kv

    def in_one(self, x, cache, by_layer, shared):
        """All layers, one after the other, with the cache of each if there is one."""
        c = self.config
        if isinstance(cache, tuple):
            return self.apart(x, cache, by_layer, shared)
        block = Block if c.remat == "none" else nn.remat(Block, policy=_REMAT[c.remat], prevent_cse=False)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layer,
            unroll=_unroll(c, self.mode.mesh),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.mode, name="blocks")
        (x, cache), kv = blocks((x, cache), by_layer, shared)
        return x, cache, kv

    def apart(self, x, caches, by_layer, shared):
        """Layers whose parameters and caches are arrays of their own (`taken_apart`)."""
        block, new = Block(self.config, self.mode, parent=None), []
        for i, (params, cache) in enumerate(zip(self.variables["params"]["blocks"], caches, strict=True)):
            own = jax.tree.map(lambda a, i=i: a[i], by_layer)
            (x, cache), _ = block.apply({"params": params}, (x, cache), own, shared)
            new.append(cache)
        return x, tuple(new), None


# --- The pure functions the rest of the code sees ---------------------------------------------------------


def abstract_params(config: GPTConfig):
    """The parameters as shapes with logical axis names attached (for sharding); nothing is computed."""
    zeros = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(GPT(config).init, jax.random.key(0), zeros, zeros)["params"]


def init(config: GPTConfig, key):
    """Parameters, float32: a nested dict with blocks stacked [layer, ...]. Jit it to have them born sharded."""
    zeros = jnp.zeros((1, 1), jnp.int32)
    return nn.meta.unbox(GPT(config).init(key, zeros, zeros)["params"])


def hidden(
    params,
    config: GPTConfig,
    tokens,
    *,
    positions=None,
    segment_ids=None,
    dropout_keys=None,
    dtype=jnp.float32,
    mesh=None,
):
    """Final hidden states. Where the mesh in force has stages, rows go through the layers in micro-batches.

    Args:
        tokens: int [batch, time], time <= context_length.
        positions: int [batch, time], or None for 0..time-1.
        segment_ids: int [batch, time], or None; attention stays within a segment.
        dropout_keys: a key for each row, [batch]; None means no dropout.
        dtype: of the activations and matmuls.
        mesh: for attention kernels that need a shard_map.
    Returns:
        [batch, time, d_model] in dtype, after the final LayerNorm where the model has one.
    """
    _check_time(tokens, config)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    keys = dropout_keys if config.dropout else None
    return GPT(config, Mode(mesh=mesh), dtype).apply({"params": params}, tokens, positions, segment_ids, keys)[0]


def _check_time(tokens, config: GPTConfig):
    """InputError: more time steps than positions; a gather would give all beyond the last one its embedding."""
    if tokens.shape[1] > config.context_length:
        raise InputError(f"{tokens.shape[1]} tokens don't fit the model's context of {config.context_length}.")


def unembedding(params, config: GPTConfig):
    """[vocab, d_model]: the token embedding itself where the head is tied to it."""
    return params["wte"] if config.tied_head else params["lm_head"]


def logits(params, config: GPTConfig, x):
    """[..., d_model] -> [..., vocab], accumulated and returned in float32."""
    w = unembedding(params, config).astype(x.dtype)
    return jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)


def prefill(params, config: GPTConfig, tokens, positions, segment_ids, *, dtype=jnp.float32, mesh=None):
    """Forward pass that keeps keys and values: (hidden [B, T, D], {'k', 'v'} each [L, B, H, T, K])."""
    _check_time(tokens, config)
    model = GPT(config, Mode(keep_kv=True, mesh=mesh), dtype)
    x, _, (k, v) = model.apply({"params": params}, tokens, positions, segment_ids)
    return x, {"k": jnp.swapaxes(k, 2, 3), "v": jnp.swapaxes(v, 2, 3)}


def taken_apart(params, cache, config: GPTConfig):
    """Parameters and cache for decoding without a loop over layers, each layer's arrays apart.

    XLA:CPU copies a layer out of a stacked array before it multiplies by it, every token anew: half the time of a
    token at 6 layers of 384. This copies once, so it takes the memory of the layers twice.
    """
    layers = lambda tree: tuple(jax.tree.map(lambda a, i=i: a[i], tree) for i in range(config.n_layer))
    return {**params, "blocks": layers(params["blocks"])}, layers(cache)


def decode_step(params, config: GPTConfig, tokens, positions, cache, slot, filled, *, dtype=jnp.float32):
    """One or more new tokens per row against the cache.

    Args:
        tokens, positions: int [B, T]; the T new tokens go to slots slot .. slot+T-1, the same in every row.
        cache: {'k', 'v'} [L, B, H, S, K], or what `taken_apart` made of it and of the parameters.
        filled: bool [B, S], the slots each row may look at (the causal mask over slots is applied besides).
    Returns:
        (hidden [B, T, D], the cache with the new keys and values).
    """
    x, cache, _ = GPT(config, Mode(), dtype).apply(
        {"params": params}, tokens, positions, cache=cache, slot=slot, filled=filled
    )
    return x, cache
