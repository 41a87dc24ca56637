"""One iteration's experience: sample, score, and compute rewards and advantages.

    experience, metrics, score_B = collect(models, prompts_BQ, lengths_B, key, kl_coefficient, spec, c)

is sample -> score -> compute_advantages, or compute_group_advantages for GRPO. They are separate programs because a
Python callable may add to the score in between (rewards.py). tokens_BT is prompt and response, T = Q + R (networks.py);
`spec` is the static configuration of the models (networks.RLSpec).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.distributed import hosts
from gptjax.generation.decode import Decoder, Stop, decode
from gptjax.generation.sampling import Sampling
from gptjax.objectives import ppo
from gptjax.parallel.mesh import batch_shards
from gptjax.rlhf import networks
from gptjax.rlhf.config import RolloutConfig
from gptjax.rlhf.networks import RLSpec
from gptjax.training.precision import frozen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """Action-aligned arrays: slot t is response token t and the state before it (objectives/ppo.py).

    tokens: int32 [B, T], prompts padded on the left, responses on the right; real: [B, T], 1 on tokens, 0 on padding.
    All others are float32 [B, R]; mask is 1 up to and including the end-of-sequence token.
    """

    tokens: jax.Array
    real: jax.Array
    mask: jax.Array
    log_prob: jax.Array
    ref_log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    advantage: jax.Array
    returns: jax.Array


class Models(NamedTuple):
    """policy, value: parameters; value is {} in GRPO. frozen: () -> (reference, reward model or None) on device."""

    policy: Any
    value: Any
    frozen: Callable[[], tuple]


def collect(models: Models, prompts_BQ, lengths_B, key, kl_coefficient, spec: RLSpec, c: RolloutConfig, *,
            rule: Callable | None = None, lap: Callable[[str, Any], None] = lambda phase, arrays: None):  # fmt: skip
    """Samples a response to each prompt, scores it, and computes advantages.

    Args:
        prompts_BQ, lengths_B, key: as in `sample`; in GRPO the samples of a prompt are adjacent rows.
        models: parameters. spec: static configuration of the models. c: the config's `rollout`.
        kl_coefficient: beta, scalar.
        rule: (tokens_BT, lengths_B, mask_BR) -> [B], added to the reward model's score; without a reward model it is
            the score.
        lap: called after each phase with its name and its arrays, for timing.
    Returns:
        (Experience, metrics, score float32 [B], before missing_eos replaces any).
    """
    tokens_BT, mask_BR, sampled_BR = sample(models.policy, prompts_BQ, lengths_B, key, spec)
    lap("rollout", mask_BR)
    scored = score(
        models.policy, models.value, *models.frozen(), tokens_BT, lengths_B, mask_BR, spec, rows=c.forward_rows
    )
    score_B = scored.get("score")
    if rule is not None:
        rule_B = rule(tokens_BT, lengths_B, mask_BR)
        score_B = rule_B if score_B is None else hosts.whole(score_B) + rule_B
    if not spec.critic:
        experience, metrics = compute_group_advantages(
            scored, score_B, kl_coefficient, spec.group_size, eos_id=spec.eos_id, missing_eos=c.missing_eos
        )
    else:
        experience, metrics = compute_advantages(
            scored, score_B, kl_coefficient, eos_id=spec.eos_id, missing_eos=c.missing_eos, gamma=c.gamma, lam=c.lam,
            whiten_rewards=c.whiten_rewards, whiten_advantages=c.whiten_advantages,
        )  # fmt: skip
    metrics["policy/rollout_logp_diff"] = sampler_difference(sampled_BR, scored["log_prob"], mask_BR)
    lap("score", experience)
    return experience, metrics, score_B


def sample(policy, prompts_BQ, lengths_B, key, spec: RLSpec):
    """Samples responses with temperature alone: with top-k or top-p the log-probabilities that the update computes
    would be those of another distribution.

    Args:
        prompts_BQ: int, padded on the left; lengths_B: int; key: a typed PRNG key, folded with the row's index.
    Returns:
        (tokens int32 [B, T], mask float32 [B, R], the sampler's own log-probabilities float32 [B, R]).
    """
    B = prompts_BQ.shape[0]
    keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(B))
    decoder = Decoder(spec.policy, spec.vocab, spec.dtype, spec.mesh)
    stop = Stop(spec.response, spec.eos_id, spec.pad_id)
    response_BR, count_B, log_prob_BR = decode(
        policy, decoder, prompts_BQ, lengths_B, jnp.full(B, spec.response), keys_B, stop, Sampling(spec.temperature)
    )
    mask_BR = (jnp.arange(spec.response)[None] < count_B[:, None]).astype(jnp.float32)
    return jnp.concatenate([prompts_BQ, response_BR], axis=1), mask_BR, log_prob_BR


def by_rows(function, rows: int | None, *arrays):
    """Maps a function over chunks of the arrays [B, ...], which bounds the memory of a forward pass. A chunk has the
    largest number of rows, at most `rows`, that divides B and is divisible over the mesh. rows: None = all."""
    B = arrays[0].shape[0]
    if rows is None or rows >= B:
        return function(*arrays)
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else batch_shards(mesh.shape)
    rows = next((m for m in range(rows, 0, -1) if B % m == 0 and m % shards == 0), B)
    chunks = tuple(a.reshape(B // rows, rows, *a.shape[1:]) for a in arrays)
    out = jax.lax.map(lambda chunk: function(*chunk), chunks)
    return jax.tree.map(lambda a: a.reshape(B, *a.shape[2:]), out)


def score(
    policy, value, reference, reward, tokens_BT, lengths_B, mask_BR, spec: RLSpec, rows: int | None = None
) -> dict:
    """Forward passes of the four models over a batch of samples, without dropout.

    Policy and reference go through one compiled program, so that equal weights give equal bits and a KL of exactly 0.

    Args:
        value, reward: {'trunk', 'head'}; value may be {'head'} alone, and is not read without a critic (spec); reward
            may be None.
        rows: the maximum number of rows of a forward pass; None = all.
    Returns:
        {tokens, real: [B, T]; mask, log_prob, entropy, ref_log_prob, value: [B, R]; score: [B], with a reward model}.
    """
    real_BT = networks.real_tokens(lengths_B, mask_BR, tokens_BT.shape[1] - spec.response)
    texts = tokens_BT, real_BT, mask_BR
    if jnp.dtype(spec.dtype) != jnp.float32:  # the same dtypes as the reference, or it would be another program
        policy = frozen(policy, spec.dtype)
    log_prob_BR, entropy_BR = _policy_view(policy, *texts, spec, rows)
    result = {
        "tokens": tokens_BT, "real": real_BT, "mask": mask_BR, "log_prob": log_prob_BR, "entropy": entropy_BR,
        "ref_log_prob": _policy_view(reference, *texts, spec, rows)[0],
        "value": _values(value, policy if spec.value is None else None, *texts, spec, rows)
        if spec.critic else jnp.zeros_like(log_prob_BR),
    }  # fmt: skip
    if reward is not None:
        result["score"] = _scores(reward, *texts, spec, rows)
    return result


@functools.partial(jax.jit, static_argnames=("spec", "rows"))
def _policy_view(policy, tokens_BT, real_BT, mask_BR, spec, rows):
    """(log-probabilities of the responses, entropies): float32 [B, R], 0 where the mask is 0."""
    def forward(tokens_BT, real_BT, mask_BR):
        states_BRD = networks.policy_states(policy, tokens_BT, real_BT, mask_BR, spec)
        log_prob_BR, entropy_BR = networks.log_probs_and_entropy(policy, states_BRD, tokens_BT, spec)
        return ppo.keep(log_prob_BR, mask_BR), ppo.keep(entropy_BR, mask_BR)

    return by_rows(forward, rows, tokens_BT, real_BT, mask_BR)


@functools.partial(jax.jit, static_argnames=("spec", "rows"))
def _values(value, policy, tokens_BT, real_BT, mask_BR, spec, rows):
    """Values: float32 [B, R], 0 where the mask is 0. policy: read only if it shares its trunk (spec.value is None)."""
    def forward(tokens_BT, real_BT, mask_BR):
        shared_trunk = spec.value is None
        states_BRD = networks.policy_states(policy, tokens_BT, real_BT, mask_BR, spec) if shared_trunk else None
        return ppo.keep(networks.values(value, states_BRD, tokens_BT, real_BT, mask_BR, spec), mask_BR)

    return by_rows(forward, rows, tokens_BT, real_BT, mask_BR)


@functools.partial(jax.jit, static_argnames=("spec", "rows"))
def _scores(reward, tokens_BT, real_BT, mask_BR, spec, rows):
    """The reward model's scores: float32 [B]."""
    return by_rows(lambda *texts: networks.scores(reward, *texts, spec), rows, tokens_BT, real_BT, mask_BR)


_STATIC = ("eos_id", "missing_eos", "gamma", "lam", "whiten_rewards", "whiten_advantages")


@functools.partial(jax.jit, static_argnames=_STATIC)
def compute_advantages(scored: dict, score_B, kl_coefficient, *, eos_id: int | None, missing_eos: float | None,
                       gamma: float, lam: float, whiten_rewards=False,
                       whiten_advantages=True) -> tuple[Experience, dict]:  # fmt: skip
    """Rewards, advantages and returns, and the iteration's objective/ and response/ metrics.

    Args:
        scored: returned by `score`. score_B: float, the total score of each response, a rule's included.
        missing_eos: replaces the score of a response without an end-of-sequence token (Stiennon et al. 2020; Ziegler
            et al. 2019); None = no replacement.
    """
    mask_BR, log_prob_BR, ref_log_prob_BR, value_BR = (scored[k] for k in ("mask", "log_prob", "ref_log_prob", "value"))
    score_B, metrics = _penalized(scored, score_B, kl_coefficient, eos_id, missing_eos)
    reward_BR = ppo.token_rewards(score_B, log_prob_BR, ref_log_prob_BR, mask_BR, kl_coefficient)
    used_BR = ppo.whiten(reward_BR, mask_BR, shift_mean=False) if whiten_rewards else reward_BR
    advantage_BR, returns_BR = ppo.gae(used_BR, value_BR, mask_BR, gamma, lam)
    metrics |= {
        "value/explained_var": ppo.explained_variance(value_BR, returns_BR, mask_BR),
        "value/mean": ppo.masked_mean(value_BR, mask_BR),
    }
    if whiten_advantages:
        advantage_BR = ppo.whiten(advantage_BR, mask_BR)
    return _experience(scored, reward_BR, advantage_BR, returns_BR), metrics


@functools.partial(jax.jit, static_argnames=("group_size", "eos_id", "missing_eos"))
def compute_group_advantages(scored: dict, score_B, kl_coefficient, group_size: int, *, eos_id: int | None,
                             missing_eos: float | None) -> tuple[Experience, dict]:  # fmt: skip
    """GRPO (Shao et al. 2024 §4.1.2): the advantage of every token of a response is the response's score relative to
    those of the same prompt. There is no value network, and the KL penalty is in the loss (update.py), not in the
    reward.

    Args: as compute_advantages; the group_size samples of a prompt are adjacent rows.
    """
    mask_BR = scored["mask"]
    score_B, metrics = _penalized(scored, score_B, kl_coefficient, eos_id, missing_eos)
    advantage_BR = ppo.group_advantages(score_B, group_size)[:, None] * mask_BR
    score_BN = score_B.reshape(-1, group_size)
    metrics["objective/group_std"] = score_BN.std(1).mean()
    reward_BR = score_B[:, None] * ppo.last_action(mask_BR)
    return _experience(scored, reward_BR, advantage_BR, jnp.zeros_like(mask_BR)), metrics


def _penalized(scored: dict, score_B, kl_coefficient, eos_id, missing_eos):
    """(score float32 [B], missing_eos in place of that of a response without end-of-sequence; metrics of scores, KL and
    lengths)."""
    mask_BR, log_prob_BR, ref_log_prob_BR = (scored[k] for k in ("mask", "log_prob", "ref_log_prob"))
    ended_B = has_eos(scored["tokens"], mask_BR, eos_id)
    score_B = score_B.astype(jnp.float32)
    if missing_eos is not None and eos_id is not None:
        score_B = jnp.where(ended_B, score_B, missing_eos)
    kl_B = ppo.k1(log_prob_BR, ref_log_prob_BR).sum(1)
    penalty_B = -kl_coefficient * kl_B
    return score_B, {
        "objective/kl": kl_B.mean(),
        "objective/kl_se": kl_B.std() / mask_BR.shape[0] ** 0.5,
        "objective/kl_k3": ppo.k3(log_prob_BR, ref_log_prob_BR).sum(1).mean(),
        "objective/score": score_B.mean(),
        "objective/score_std": score_B.std(),
        "objective/non_score_reward": penalty_B.mean(),
        "objective/rlhf_reward": (score_B + penalty_B).mean(),
        "objective/entropy": ppo.masked_mean(scored["entropy"], mask_BR),
        "response/length": mask_BR.sum(1).mean(),
        "response/eos_rate": ended_B.mean(),
        "kl_coef": kl_coefficient,
    }


def _experience(scored: dict, reward_BR, advantage_BR, returns_BR) -> Experience:
    """The Experience of what `score` returned."""
    arrays = {k: scored[k] for k in ("tokens", "real", "mask", "log_prob", "ref_log_prob", "value")}
    return Experience(reward=reward_BR, advantage=advantage_BR, returns=returns_BR, **arrays)


def has_eos(tokens_BT, mask_BR, eos_id: int | None):
    """Whether each response contains the end-of-sequence token: bool [B]."""
    if eos_id is None:
        return jnp.ones(mask_BR.shape[0], bool)
    return ((tokens_BT[:, -mask_BR.shape[1] :] == eos_id) & (mask_BR > 0)).any(1)


@jax.jit
def sampler_difference(sampled_BR, scored_BR, mask_BR):
    """Scalar: the largest |difference| between the log-probabilities of the sampler (KV cache) and of `score`. More
    than rounding is a bug."""
    return jnp.abs(ppo.keep(sampled_BR - scored_BR, mask_BR)).max()
