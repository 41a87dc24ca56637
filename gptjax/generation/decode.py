"""Autoregressive generation: one prefill over the prompts, then a while_loop over a KV cache. Plain form: plain.py.

Prompts of unequal length are padded on the left, so that every row writes the same cache slot; pads form a
segment of their own, which nothing else sees, and positions count from each row's first real token.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.generation.sampling import Sampling, sample
from gptjax.model import architecture
from gptjax.model.architecture import ModelConfig
from gptjax.parallel.mesh import batch_shards


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What decodes: the model without its parameters, and how it computes.

    vocab: only ids below it are produced (a tokenizer smaller than the model); None = all.
    dtype: of activations and cache. mesh: of the parameters; None = a single device.
    """

    config: ModelConfig
    vocab: int | None = None
    dtype: Any = jnp.float32
    mesh: jax.sharding.Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Stop:
    """When a row ends: after max_new_tokens, or once it has produced eot_id, or one of them; None = no such token.

    pad_id: what fills the rest of the row; None = the (first) eot_id again, or 0.
    """

    max_new_tokens: int
    eot_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that end a row."""
        return () if self.eot_id is None else (self.eot_id,) if isinstance(self.eot_id, int) else tuple(self.eot_id)

    @property
    def fill(self) -> int:
        return next(i for i in (self.pad_id, *self.ids, 0) if i is not None)


@functools.partial(jax.jit, static_argnames=("decoder", "stop", "sampling"))
def decode(params, decoder: Decoder, prompts_BQ, lengths_B, limits_B, keys_B, stop: Stop, sampling: Sampling):
    """Continues every prompt.

    Args:
        prompts_BQ: int, padded on the left; lengths_B: int, real tokens of each row.
        limits_B: int, at most so many new tokens per row.
        keys_B: typed keys, one per row, so that a row's text does not depend on its neighbors.
        stop: its max_new_tokens is R; Q + R is the size of the cache.
    Returns:
        (tokens int32 [B, R], how many of each row are real int32 [B], their log-probabilities float32 [B, R]); the
        end-of-text token is counted. The log-probabilities are those of the distribution at this temperature before
        top-k and top-p (at temperature 0: of temperature 1).
    """
    config, dtype, mesh = decoder.config, decoder.dtype, decoder.mesh
    (B, Q), R = prompts_BQ.shape, stop.max_new_tokens
    pad_B = Q - lengths_B
    positions_BQ = jnp.maximum(jnp.arange(Q)[None] - pad_B[:, None], 0)
    real_BQ = jnp.arange(Q)[None] >= pad_B[:, None]
    segments_BQ = real_BQ.astype(jnp.int32)
    step_params, x_BQD, cache = architecture.prefill(
        params, config, prompts_BQ, positions_BQ, segments_BQ, new_tokens=R, unstacked=_unstacks_layers(mesh),
        dtype=dtype, mesh=mesh,
    )  # fmt: skip
    # Slots of new tokens count as filled from the start: causality hides those that are not written yet.
    filled_BS = jnp.concatenate([real_BQ, jnp.ones((B, R), bool)], axis=1)

    def choose(x_BD, i):
        """The i-th new token of each row, and its log-probability."""
        logits_BV = architecture.logits(params, config, x_BD)[:, : decoder.vocab]
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)
        token_B = jax.vmap(lambda logits_V, key: sample(logits_V, key, sampling))(logits_BV, keys)
        logits_BV = logits_BV / (1.0 if sampling.greedy else sampling.temperature)
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], 1)[:, 0]
        return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)

    def emit(token_B, log_prob_B, i, out_BR, log_probs_BR, count_B, done_B):
        """Writes a token of each row, or the filler where the row is done."""
        token_B = jnp.where(done_B, stop.fill, token_B)
        out_BR = lax.dynamic_update_slice(out_BR, token_B[:, None], (0, i))
        log_prob_B = jnp.where(done_B, 0.0, log_prob_B)
        log_probs_BR = lax.dynamic_update_slice(log_probs_BR, log_prob_B[:, None], (0, i))
        count_B = count_B + ~done_B
        for end in stop.ids:
            done_B = done_B | (token_B == end)
        return token_B, out_BR, log_probs_BR, count_B, done_B | (count_B >= limits_B)

    def body(carry):
        i, token_B, cache, *rest = carry
        position_B1 = (lengths_B + i - 1)[:, None]
        x_B1D, cache = architecture.decode_step(
            step_params, config, token_B[:, None], jnp.minimum(position_B1, config.context_length - 1), cache,
            Q + i - 1, filled_BS, dtype=dtype,
        )  # fmt: skip
        token_B, *rest = emit(*choose(x_B1D[:, 0], i), i, *rest)
        return i + 1, token_B, cache, *rest

    out_BR, log_probs_BR = jnp.full((B, R), stop.fill, jnp.int32), jnp.zeros((B, R), jnp.float32)
    first = choose(x_BQD[:, -1], 0)
    token_B, *rest = emit(*first, 0, out_BR, log_probs_BR, jnp.zeros(B, jnp.int32), limits_B <= 0)
    carry = (jnp.int32(1), token_B, cache, *rest)
    *_, out_BR, log_probs_BR, count_B, _ = lax.while_loop(lambda c: (c[0] < R) & ~jnp.all(c[-1]), body, carry)
    return out_BR, count_B, log_probs_BR


def _unstacks_layers(mesh) -> bool:
    """On a CPU: see gpt.unstack_layers. Stages keep their layers to themselves."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return platform == "cpu" and (mesh is None or mesh.shape["stage"] == 1)


def bucket(n: int, limit: int) -> int:
    """n rounded up, so that few shapes are compiled: to 16, 32, 64, ..., or the limit."""
    size = 16
    while size < n:
        size *= 2
    return min(size, limit)


def _batch_shards() -> int:
    """Over how many devices the current mesh (jax.set_mesh) shards the rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh.shape)


class Batch(NamedTuple):
    """Prompts as `decode` takes them, padded to few shapes and to the shards of the current mesh."""

    prompts_BQ: np.ndarray
    lengths_B: np.ndarray
    limits_B: np.ndarray
    stop: Stop


def padded(prompts: Sequence[Sequence[int]], config: ModelConfig, stop: Stop) -> Batch:
    """Raises InputError for an empty prompt, one longer than the context, or one with an unknown token."""
    if stop.max_new_tokens < 1:
        raise InputError("max_new_tokens must be at least 1.")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"Prompt {i} has no tokens: give it at least one.")
        if len(prompt) > config.context_length:
            raise InputError(
                f"Prompt {i} has {len(prompt)} tokens and the model's context is {config.context_length}: shorten it."
            )
        if wrong := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise InputError(f"Prompt {i} has token {wrong[0]}; the model's vocabulary is 0..{config.vocab_size - 1}.")
    lengths_B = np.array([len(p) for p in prompts], np.int32)
    Q = bucket(int(lengths_B.max()), config.context_length)
    # The last context position can still predict: a prompt of the full context gets one new token.
    limits_B = np.minimum(stop.max_new_tokens, config.context_length - lengths_B + 1).astype(np.int32)
    B = -(-len(prompts) // _batch_shards()) * _batch_shards()
    tokens_BQ = np.zeros((B, Q), np.int32)
    for row, prompt in zip(tokens_BQ, prompts, strict=False):
        row[Q - len(prompt) :] = prompt
    padding = (0, B - len(prompts))  # rows beyond the prompts, whose limit is 0: they are done from the start
    stop = dataclasses.replace(stop, max_new_tokens=bucket(int(limits_B.max()), config.context_length))
    return Batch(tokens_BQ, np.pad(lengths_B, padding, constant_values=1), np.pad(limits_B, padding), stop)


def row_keys(seed: int, rows_B: np.ndarray):
    """Typed keys [B]: of each row's own noise, whatever batch it is decoded in."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(rows_B)


def generate(params, decoder: Decoder, prompts: Sequence[Sequence[int]], stop: Stop, sampling: Sampling, *,
             seed: int = 0, keys=None, keep_eot: bool = False) -> list[list[int]]:  # fmt: skip
    """Token lists in, token lists out: new tokens only, without the end-of-text token unless keep_eot.

    The same seed gives the same text for a row, whatever the other rows are. keys: a typed key for each prompt, in
    place of those of the seed and its row. A row stops where `stop` says, or when the context is full. InputError:
    `padded`.
    """
    if not len(prompts):
        return []
    tokens_BQ, lengths_B, limits_B, stop = padded(prompts, decoder.config, stop)
    rows_B = np.arange(len(tokens_BQ))
    if keys is None:
        keys_B = row_keys(seed, rows_B)
    else:
        keys_B = keys[np.minimum(rows_B, len(prompts) - 1)]
    out_BR, count_B, _ = decode(params, decoder, tokens_BQ, lengths_B, limits_B, keys_B, stop, sampling)
    out_BR, count_B = (hosts.whole(a)[: len(prompts)] for a in (out_BR, count_B))
    texts = []
    for row, count in zip(out_BR, count_B, strict=True):
        text = row[:count].tolist()
        texts.append(text[:-1] if not keep_eot and text and text[-1] in stop.ids else text)
    return texts
