"""Autoregressive generation: one prefill over the prompts, then a while_loop over a KV cache.

Prompts of unequal length are padded on the left, so that every row writes the same cache slot; pads form a
segment of their own, which nothing else sees, and positions count from each row's first real token.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.generation.sampling import Sampling, sample
from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import batch_shards

_STATIC = ("config", "new_tokens", "sampling", "eot_id", "pad_id", "vocab", "dtype", "mesh")


@functools.partial(jax.jit, static_argnames=_STATIC)
def decode(params, config: GPTConfig, prompts, lengths, limits, key, *, new_tokens: int, sampling: Sampling,
           eot_id: int | tuple[int, ...] | None = None, pad_id: int | None = None, vocab: int | None = None,
           dtype=jnp.float32, mesh=None):  # fmt: skip
    """Continues every prompt.

    Args:
        prompts: int [batch, slots], padded on the left; lengths: int [batch], real tokens of each row.
        limits: int [batch], at most so many new tokens per row.
        key: one key per row, typed [batch], so that a row's text does not depend on its neighbors.
        new_tokens: static; slots + new_tokens is the size of the cache.
        eot_id: a row ends once it has produced this token, or one of these; None = no such token. pad_id: what
            follows it; None = the (first) eot_id again, or 0.
        vocab: only ids below it are produced (a tokenizer smaller than the model); None = all.
    Returns:
        (tokens int32 [batch, new_tokens], how many of each row are real int32 [batch], their log-probabilities
        float32 [batch, new_tokens]); the end-of-text token is counted. The log-probabilities are those of the
        distribution at this temperature before top-k and top-p (at temperature 0: of temperature 1).
    """
    B, P = prompts.shape
    pad = P - lengths
    positions = jnp.maximum(jnp.arange(P)[None] - pad[:, None], 0)
    real = jnp.arange(P)[None] >= pad[:, None]
    x, kv = gpt.prefill(params, config, prompts, positions, real.astype(jnp.int32), dtype=dtype, mesh=mesh)
    cache = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, new_tokens), (0, 0))), kv)
    step_params = params
    if _unstacks_layers(mesh):
        step_params, cache = gpt.unstack_layers(params, cache, config)
    filled = jnp.concatenate([real, jnp.ones((B, new_tokens), bool)], axis=1)  # causality hides the rest
    stops = stop_tokens(eot_id)
    fill = next(i for i in (pad_id, *stops, 0) if i is not None)

    def choose(hidden, i):
        logits = gpt.logits(params, config, hidden)[:, :vocab]
        keys = jax.vmap(jax.random.fold_in, (0, None))(key, i)
        token = jax.vmap(lambda logit, k: sample(logit, k, sampling))(logits, keys)
        logits = logits / (1.0 if sampling.greedy else sampling.temperature)
        log_prob = jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        return token, log_prob

    def emit(chosen, i, out, log_probs, count, done):
        token = jnp.where(done, fill, chosen[0])
        out = lax.dynamic_update_slice(out, token[:, None], (0, i))
        log_probs = lax.dynamic_update_slice(log_probs, jnp.where(done, 0.0, chosen[1])[:, None], (0, i))
        count = count + ~done
        for stop in stops:
            done = done | (token == stop)
        return token, out, log_probs, count, done | (count >= limits)

    def body(carry):
        i, token, cache, *rest = carry
        at = (lengths + i - 1)[:, None]
        h, cache = gpt.decode_step(
            step_params, config, token[:, None], jnp.minimum(at, config.context_length - 1), cache, P + i - 1, filled,
            dtype=dtype,
        )  # fmt: skip
        token, *rest = emit(choose(h[:, 0], i), i, *rest)
        return i + 1, token, cache, *rest

    out, log_probs = jnp.full((B, new_tokens), fill, jnp.int32), jnp.zeros((B, new_tokens), jnp.float32)
    token, *rest = emit(choose(x[:, -1], 0), 0, out, log_probs, jnp.zeros(B, jnp.int32), limits <= 0)
    carry = (jnp.int32(1), token, cache, *rest)
    *_, out, log_probs, count, _ = lax.while_loop(lambda c: (c[0] < new_tokens) & ~jnp.all(c[-1]), body, carry)
    return out, count, log_probs


def _unstacks_layers(mesh) -> bool:
    """On a CPU: see gpt.unstack_layers. Stages keep their layers to themselves."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return platform == "cpu" and (mesh is None or mesh.shape["stage"] == 1)


def stop_tokens(eot_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end a row, of `decode`'s and `generate`'s eot_id."""
    return () if eot_id is None else (eot_id,) if isinstance(eot_id, int) else tuple(eot_id)


def bucket(n: int, limit: int) -> int:
    """Sizes are rounded up, so that few shapes are compiled."""
    size = 16
    while size < n:
        size *= 2
    return min(size, limit)


def _batch_ways() -> int:
    """Over how many devices of the mesh in force the rows of a batch are cut up."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh.shape)


def generate(params, config: GPTConfig, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling,
             seed: int = 0, eot_id: int | tuple[int, ...] | None = None, keep_eot: bool = False,
             vocab: int | None = None, dtype=jnp.float32, mesh=None) -> list[list[int]]:  # fmt: skip
    """Token lists in, token lists out: new tokens only, without the end-of-text token unless keep_eot.

    The same seed gives the same text for a row, whatever the other rows are. A row stops at end-of-text, after
    max_new_tokens, or when the context is full. Raises InputError for an empty prompt or one longer than the
    context.
    """
    if max_new_tokens < 1:
        raise InputError("max_new_tokens must be at least 1.")
    if not len(prompts):
        return []
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"Prompt {i} has no tokens: give it at least one.")
        if len(prompt) > config.context_length:
            raise InputError(
                f"Prompt {i} has {len(prompt)} tokens and the model's context is {config.context_length}: shorten it."
            )
        if wrong := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise InputError(f"Prompt {i} has token {wrong[0]}; the model's vocabulary is 0..{config.vocab_size - 1}.")
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = bucket(int(lengths.max()), config.context_length)
    # The last context position can still predict: a prompt of the full context gets one new token.
    limits = np.minimum(max_new_tokens, config.context_length - lengths + 1).astype(np.int32)
    rows = -(-len(prompts) // _batch_ways()) * _batch_ways()  # rows beyond the prompts are done from the start
    tokens = np.zeros((rows, width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[width - len(prompt) :] = prompt
    spare = rows - len(prompts)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(rows))
    out, counts, _ = decode(
        params, config, tokens, np.pad(lengths, (0, spare), constant_values=1), np.pad(limits, (0, spare)), keys,
        new_tokens=bucket(int(limits.max()), config.context_length), sampling=sampling, eot_id=eot_id,
        vocab=vocab, dtype=dtype, mesh=mesh,
    )  # fmt: skip
    out, counts = (hosts.whole(a)[: len(prompts)] for a in (out, counts))
    texts = []
    for row, count in zip(out, counts, strict=True):
        text = row[:count].tolist()
        texts.append(text[:-1] if not keep_eot and text and text[-1] in stop_tokens(eot_id) else text)
    return texts
