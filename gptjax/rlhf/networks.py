"""The forward passes of PPO's four models over prompt + response: one code path for sampling's check, the old and the
new log-probabilities and the reference's, so that the ratio of the first minibatch is 1 and the first KL 0.

Prompts are padded on the left to Q slots, responses on the right to R; `real` [B, Q + R] is 1 on real tokens. Pads are
a segment of their own, which nothing else sees, and positions count from each row's first real token. The state before
response token t is position Q + t - 1.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.objectives.chunked import token_log_probs, token_log_probs_and_entropy
from gptjax.objectives.ppo import last_action


@dataclasses.dataclass(frozen=True)
class RLSpec:
    """What is static about the models and their texts.

    policy: also the reference's shape. value: None = a head on the policy's own trunk. reward: None = no reward model.
    group_size: samples of each prompt; more than 1 is GRPO, which has no critic (no values at all).
    response: R, slots of a response. temperature: divides the logits in every log-probability, and in sampling.
    vocab: ids that are sampled and normalized over are those below it. loss_chunk: time steps whose logits are held
    at once. dtype: of activations and matmuls.
    """

    policy: GPTConfig
    value: GPTConfig | None
    reward: GPTConfig | None
    response: int
    eos_id: int | None
    pad_id: int
    vocab: int
    temperature: float = 1.0
    loss_chunk: int = 128
    dtype: Any = jnp.float32
    mesh: Any = None
    group_size: int = 1

    @property
    def critic(self) -> bool:
        return self.group_size == 1


def real_tokens(lengths, mask, prompt_slots: int):
    """[B, Q + R]: 1 on the prompt's tokens (left-padded, `lengths` [B] of them) and on the response's (mask [B, R])."""
    prompt = jnp.arange(prompt_slots)[None] >= (prompt_slots - lengths)[:, None]
    return jnp.concatenate([prompt.astype(mask.dtype), mask], axis=1)


def _hidden(params, config, tokens, real, spec: RLSpec):
    real = real.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    tokens = jnp.where(real > 0, tokens, 0)  # a pad's id may lie outside this model's vocabulary
    return gpt.hidden(params, config, tokens, positions=positions, segment_ids=real, dtype=spec.dtype, mesh=spec.mesh)


def _states(x, mask, spec: RLSpec):
    """Hidden states before each response token [B, R, D]; 0 where there is no action."""
    before = x[:, -spec.response - 1 : -1]
    return jnp.where(mask[..., None] > 0, before, 0)


def policy_states(policy, tokens, real, mask, spec: RLSpec):
    return _states(_hidden(policy, spec.policy, tokens, real, spec), mask, spec)


def log_probs(policy, states, tokens, spec: RLSpec):
    """log pi(y_t | prompt, y_<t): float32 [B, R], differentiable."""
    return token_log_probs(states, *_head_and_targets(policy, tokens, spec), spec.temperature, spec.loss_chunk)


def log_probs_and_entropy(policy, states, tokens, spec: RLSpec):
    head, targets = _head_and_targets(policy, tokens, spec)
    return token_log_probs_and_entropy(states, head, targets, spec.temperature, spec.loss_chunk)


def _head_and_targets(policy, tokens, spec: RLSpec):
    targets = jnp.minimum(tokens[:, -spec.response :], spec.vocab - 1)  # a pad's id may lie outside
    return gpt.unembedding(policy, spec.policy)[: spec.vocab], targets


def values(value, states, tokens, real, mask, spec: RLSpec):
    """V of the state before each response token: float32 [B, R].

    value: {'trunk', 'head'}, or {'head'} alone on the policy's `states`.
    """
    if spec.value is not None:
        states = _states(_hidden(value["trunk"], spec.value, tokens, real, spec), mask, spec)
    return heads.scalar(value["head"], states)


def scores(reward, tokens, real, mask, spec: RLSpec):
    """The reward model's score at the last action, the end-of-sequence token where there is one: float32 [B]."""
    x = _hidden(reward["trunk"], spec.reward, tokens, real, spec)[:, -spec.response :]
    last = jnp.argmax(last_action(mask), axis=1)
    return heads.scalar(reward["head"], jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])
