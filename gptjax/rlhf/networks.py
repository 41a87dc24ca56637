"""The forward passes of PPO's four models over prompt + response. Old, new and reference log-probabilities share one
code path, so that the ratio of the first minibatch is 1 and the first KL is 0.

Prompts are padded on the left to Q slots, responses on the right to R, and T = Q + R: tokens_BT is prompt and response.
`real_BT` is 1 on real tokens, mask_BR on those of the response. Pads are a segment of their own, which nothing else
sees, and positions count from each row's first real token. The state before response token t is position Q + t - 1.
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
    """Static configuration of the models and of the sequences that they read.

    policy: also the reference's shape. value: None = a head on the policy's own trunk. reward: None = no reward model.
    group_size: samples of each prompt; more than 1 is GRPO, which has no critic (no values at all).
    response: R, slots of a response. temperature: divides the logits in every log-probability, and in sampling.
    vocab: only ids below it are sampled and normalized over. loss_chunk: time steps whose logits are in memory at
    once. dtype: of activations and matmuls.
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


def real_tokens(lengths_B, mask_BR, prompt_slots: int):
    """[B, T]: 1 on the prompt's tokens (left-padded, lengths_B of them) and on the response's. prompt_slots: Q."""
    prompt_BQ = jnp.arange(prompt_slots)[None] >= (prompt_slots - lengths_B)[:, None]
    return jnp.concatenate([prompt_BQ.astype(mask_BR.dtype), mask_BR], axis=1)


def _hidden(params, config, tokens_BT, real_BT, spec: RLSpec):
    """Final hidden states of prompt and response: [B, T, D]."""
    real_BT = real_BT.astype(jnp.int32)
    positions_BT = jnp.maximum(jnp.cumsum(real_BT, axis=1) - 1, 0)
    tokens_BT = jnp.where(real_BT > 0, tokens_BT, 0)  # a pad's id may lie outside this model's vocabulary
    return gpt.hidden(
        params, config, tokens_BT, positions=positions_BT, segment_ids=real_BT, dtype=spec.dtype, mesh=spec.mesh
    )


def _states(x_BTD, mask_BR, spec: RLSpec):
    """Hidden states before each response token: [B, R, D], 0 where there is no action."""
    before_BRD = x_BTD[:, -spec.response - 1 : -1]
    return jnp.where(mask_BR[..., None] > 0, before_BRD, 0)


def policy_states(policy, tokens_BT, real_BT, mask_BR, spec: RLSpec):
    """The policy's hidden states before each response token: [B, R, D]."""
    return _states(_hidden(policy, spec.policy, tokens_BT, real_BT, spec), mask_BR, spec)


def log_probs(policy, states_BRD, tokens_BT, spec: RLSpec):
    """log pi(y_t | prompt, y_<t): float32 [B, R], differentiable."""
    return token_log_probs(states_BRD, *_head_and_targets(policy, tokens_BT, spec), spec.temperature, spec.loss_chunk)


def log_probs_and_entropy(policy, states_BRD, tokens_BT, spec: RLSpec):
    """`log_probs`, and the entropy of the distribution of each response token: float32 [B, R] both."""
    head_VD, targets_BR = _head_and_targets(policy, tokens_BT, spec)
    return token_log_probs_and_entropy(states_BRD, head_VD, targets_BR, spec.temperature, spec.loss_chunk)


def _head_and_targets(policy, tokens_BT, spec: RLSpec):
    targets_BR = jnp.minimum(tokens_BT[:, -spec.response :], spec.vocab - 1)  # a pad's id may lie outside
    return gpt.unembedding(policy, spec.policy)[: spec.vocab], targets_BR


def values(value, states_BRD, tokens_BT, real_BT, mask_BR, spec: RLSpec):
    """V of the state before each response token: float32 [B, R].

    value: {'trunk', 'head'}, or {'head'} alone on the policy's states_BRD.
    """
    if spec.value is not None:
        states_BRD = _states(_hidden(value["trunk"], spec.value, tokens_BT, real_BT, spec), mask_BR, spec)
    return heads.scalar(value["head"], states_BRD)


def scores(reward, tokens_BT, real_BT, mask_BR, spec: RLSpec):
    """The reward model's score at the last action, the end-of-sequence token where there is one: float32 [B]."""
    x_BRD = _hidden(reward["trunk"], spec.reward, tokens_BT, real_BT, spec)[:, -spec.response :]
    last_B = jnp.argmax(last_action(mask_BR), axis=1)
    x_B1D = jnp.take_along_axis(x_BRD, last_B[:, None, None], axis=1)
    return heads.scalar(reward["head"], x_B1D[:, 0])
