"""Beam search over the KV cache: the likeliest continuation, by its log-probability divided by a penalty of its length.

In every step each of a prompt's `width` beams is continued by every token. Of the `width` likeliest continuations,
those that end (in end-of-text, or at the limit of new tokens) are finished; the `width` likeliest that do not end go
on. A prompt is done when `width` continuations have finished, or when no beam can become better than the best of them,
which is the answer. With one beam that is greedy decoding.

GPT-3 (Brown et al. 2020, section 2.4) decodes free-form answers so, with 4 beams and alpha = .6 "as in" T5 (Raffel et
al. 2020), whose penalty is that of Wu et al. 2016, equation 14: `gnmt_penalty`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.generation.decode import bucket, stop_tokens
from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import batch_shards


def gnmt_penalty(length: int, alpha: float = 0.6) -> float:
    """((5 + length) / 6)^alpha, the length with its end-of-text (Wu et al. 2016, equation 14). transformers and fairseq
    divide by length^alpha instead."""
    return ((5 + length) / 6) ** alpha


class Hypothesis(NamedTuple):
    """tokens: the new ones, without the end-of-text; score: log P(tokens | prompt) / penalty(length)."""

    tokens: list[int]
    score: float


class State(NamedTuple):
    """Of the search, for each prompt: its beams (N), and the best continuation that has finished."""

    log_probs_BN: Any  # of the beams, in order; -inf: no beam
    texts_BNR: Any
    best_B: Any  # its score, -inf while there is none
    best_BR: Any
    count_B: Any  # its tokens
    finished_B: Any  # how many have
    done_B: Any


@functools.partial(jax.jit, static_argnames=("config", "width", "eot_id", "vocab", "dtype", "mesh"))
def search(params, config: GPTConfig, prompts_BQ, lengths_B, limits_B, penalties_R, *, width: int,
           eot_id: int | tuple[int, ...] | None = None, vocab: int | None = None, dtype=jnp.float32,
           mesh=None):  # fmt: skip
    """The best continuation of every prompt. Arguments as decode's.

    penalties_R: float, of the lengths 1 to R; R new tokens at most, and Q + R slots of the cache.
    Returns (tokens int32 [B, R], how many of each row are real int32 [B], with the end-of-text, scores float32 [B]).
    """
    (B, Q), R, N = prompts_BQ.shape, len(penalties_R), width
    stops = jnp.array(stop_tokens(eot_id), jnp.int32)
    beams = functools.partial(jnp.repeat, repeats=N, axis=0)  # a prompt's row -> its beams' rows
    pad_B = Q - lengths_B
    positions_BQ = jnp.maximum(jnp.arange(Q)[None] - pad_B[:, None], 0)
    real_BQ = jnp.arange(Q)[None] >= pad_B[:, None]
    x_BQD, kv = gpt.prefill(
        params, config, prompts_BQ, positions_BQ, real_BQ.astype(jnp.int32), dtype=dtype, mesh=mesh
    )  # fmt: skip
    cache = jax.tree.map(lambda a: jnp.pad(jnp.repeat(a, N, 1), ((0, 0), (0, 0), (0, 0), (0, R), (0, 0))), kv)
    filled = beams(jnp.concatenate([real_BQ, jnp.ones((B, R), bool)], axis=1))
    reach_R = lax.cummax(jnp.asarray(penalties_R, jnp.float32), reverse=True)  # log-probabilities are negative

    def advance(x, i, s: State):
        """The i-th token of every beam, from x [B N, D]: (its parent [B, N], the token [B, N], the state)."""
        log_probs = jax.nn.log_softmax(gpt.logits(params, config, x)[:, :vocab]).reshape(B, N, -1)
        V = log_probs.shape[-1]
        totals = (s.log_probs_BN[..., None] + log_probs).reshape(B, N * V)
        # So many that N of them go on, even where all others end. J of them, the likeliest first.
        totals_BJ, index_BJ = lax.top_k(totals, min(N * V, (1 + len(stops)) * N))
        parent_BJ, token_BJ = index_BJ // V, index_BJ % V
        ends_BJ = jnp.isin(token_BJ, stops)
        last_B = i + 1 >= limits_B

        finishes_BJ = (ends_BJ | last_B[:, None]).at[:, N:].set(False) & jnp.isfinite(totals_BJ) & ~s.done_B[:, None]
        scores_BJ = jnp.where(finishes_BJ, totals_BJ / penalties_R[i], -jnp.inf)
        first_B1 = jnp.argmax(scores_BJ, axis=1, keepdims=True)
        score_B, parent_B, token_B = (
            jnp.take_along_axis(a, first_B1, 1)[:, 0] for a in (scores_BJ, parent_BJ, token_BJ)
        )
        better_B = score_B > s.best_B
        text_BR = s.texts_BNR[jnp.arange(B), parent_B].at[:, i].set(token_B)

        live_BN, kept_BN = lax.top_k(jnp.where(ends_BJ, -jnp.inf, totals_BJ), N)
        parent_BN, token_BN = (jnp.take_along_axis(a, kept_BN, 1) for a in (parent_BJ, token_BJ))
        texts_BNR = jnp.take_along_axis(s.texts_BNR, parent_BN[..., None], 1).at[:, :, i].set(token_BN)
        best_B = jnp.where(better_B, score_B, s.best_B)
        finished_B = s.finished_B + finishes_BJ.sum(1)
        beaten_B = best_B >= live_BN[:, 0] / reach_R[jnp.minimum(i + 1, R - 1)]
        return parent_BN, token_BN, State(
            live_BN, texts_BNR, best_B, jnp.where(better_B[:, None], text_BR, s.best_BR),
            jnp.where(better_B, i + 1, s.count_B), finished_B, s.done_B | last_B | beaten_B | (finished_B >= N),
        )  # fmt: skip

    def reordered(cache, parent_BN):
        """The cache of each beam's parent. Beams of a prompt have the same prompt, so only what follows it moves."""
        rows = (N * jnp.arange(B)[:, None] + parent_BN).reshape(-1)
        return jax.tree.map(lambda a: a.at[:, :, :, Q:].set(a[:, rows, :, Q:]), cache)

    def body(carry):
        i, parent_BN, token_BN, cache, state = carry
        positions = jnp.minimum(beams(lengths_B + i - 1), config.context_length - 1)
        x, cache = gpt.decode_step(
            params, config, token_BN.reshape(-1, 1), positions[:, None], reordered(cache, parent_BN), Q + i - 1, filled,
            dtype=dtype,
        )  # fmt: skip
        parent_BN, token_BN, state = advance(x[:, 0], i, state)
        return i + 1, parent_BN, token_BN, cache, state

    nothing_BR, none_B = jnp.zeros((B, R), jnp.int32), jnp.full(B, -jnp.inf)
    one_beam_BN = jnp.where(jnp.arange(N) == 0, 0.0, jnp.full((B, N), -jnp.inf))
    state = State(
        one_beam_BN, jnp.zeros((B, N, R), jnp.int32), none_B, nothing_BR, jnp.zeros(B, jnp.int32),
        jnp.zeros(B, jnp.int32), limits_B <= 0,
    )  # fmt: skip
    parent_BN, token_BN, state = advance(beams(x_BQD[:, -1]), 0, state)
    *_, state = lax.while_loop(
        lambda c: (c[0] < R) & ~jnp.all(c[-1].done_B), body, (jnp.int32(1), parent_BN, token_BN, cache, state)
    )
    return state.best_BR, state.count_B, state.best_B


def beam_search(params, config: GPTConfig, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, width: int = 4,
                penalty: Callable[[int], float] = gnmt_penalty, eot_id: int | tuple[int, ...] | None = None,
                vocab: int | None = None, dtype=jnp.float32, mesh=None) -> list[Hypothesis]:  # fmt: skip
    """Token lists in, the best continuation of each out, whatever the other rows are. Arguments as generate's.

    width: beams. penalty: what the log-probability is divided by, of the length; positive. Raises InputError for these
    out of range, and for an empty prompt, one longer than the context, or one with an unknown token.
    """
    lengths_B = _checked_lengths(prompts, config)
    if max_new_tokens < 1 or width < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} and width={width} must be at least 1.")
    if not len(prompts):
        return []
    Q = bucket(int(lengths_B.max()), config.context_length)
    limits_B = np.minimum(max_new_tokens, config.context_length - lengths_B + 1).astype(np.int32)
    penalties_R = [penalty(n + 1) for n in range(bucket(int(limits_B.max()), config.context_length))]
    if not all(0 < value < math.inf for value in penalties_R):
        raise InputError("A length penalty must be positive and finite, for every length up to max_new_tokens.")
    mesh_now = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh_now.empty else batch_shards(mesh_now.shape)
    padding = (0, -len(prompts) % shards)  # rows whose limit is 0: they are done from the start
    tokens_BQ = np.zeros((len(prompts) + padding[1], Q), np.int32)
    for row, prompt in zip(tokens_BQ, prompts, strict=False):
        row[Q - len(prompt) :] = prompt
    found = search(
        params, config, tokens_BQ, np.pad(lengths_B, padding, constant_values=1), np.pad(limits_B, padding),
        np.array(penalties_R, np.float32), width=width, eot_id=eot_id, vocab=vocab, dtype=dtype, mesh=mesh,
    )  # fmt: skip
    out = []
    for text_R, count, score in zip(*(hosts.whole(a)[: len(prompts)] for a in found), strict=True):
        text = text_R[:count].tolist()
        out.append(Hypothesis(text[:-1] if text[-1] in stop_tokens(eot_id) else text, float(score)))
    return out


def _checked_lengths(prompts: Sequence[Sequence[int]], config: GPTConfig) -> np.ndarray:
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= config.context_length:
            raise InputError(f"Prompt {i} has {len(prompt)} tokens: give it 1 to {config.context_length}.")
        if wrong := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise InputError(f"Prompt {i} has token {wrong[0]}; the model's vocabulary is 0..{config.vocab_size - 1}.")
    return np.array([len(prompt) for prompt in prompts], np.int32)
