"""One iteration's experience: sample, score, and work out rewards and advantages.

    experience, metrics, score = collect(models, prompts, lengths, key, kl_coefficient, spec, c)

is sample -> score -> compute_advantages, or compute_group_advantages for GRPO. A Python callable may add to the score
(rewards.py), which is why they are separate programs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.distributed import hosts
from gptjax.generation.decode import decode
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

    tokens: int32 [B, Q + R], prompts padded on the left, responses on the right; real: [B, Q + R], 1 on tokens.
    All others float32 [B, R]; mask is 1 up to and including the end-of-sequence token.
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
    """policy, value: parameters; value is {} for GRPO. frozen: () -> (reference, reward model or None), on the device.
    """

    policy: Any
    value: Any
    frozen: Callable[[], tuple]


def collect(models: Models, prompts, lengths, key, kl_coefficient, spec: RLSpec, c: RolloutConfig, *,
            rule: Callable | None = None, lap: Callable[[str, Any], None] = lambda phase, arrays: None):  # fmt: skip
    """Samples a response to each prompt, scores it, and works out advantages.

    Args:
        prompts, lengths, key: as `sample` has them; in GRPO the samples of a prompt are adjacent rows.
        rule: (tokens, lengths, mask) -> [B], added to the reward model's score, or the whole score without one.
        lap: told of each phase and its arrays, for timing.
    Returns:
        (Experience, metrics, score float32 [B] before the penalty for a missing end).
    """
    tokens, mask, sampled = sample(models.policy, prompts, lengths, key, spec)
    lap("rollout", mask)
    scored = score(models.policy, models.value, *models.frozen(), tokens, lengths, mask, spec, rows=c.forward_rows)
    total = scored.get("score")
    if rule is not None:
        by_rule = rule(tokens, lengths, mask)
        total = by_rule if total is None else hosts.whole(total) + by_rule
    if not spec.critic:
        experience, metrics = compute_group_advantages(
            scored, total, kl_coefficient, spec.group_size, eos_id=spec.eos_id, missing_eos=c.missing_eos
        )
    else:
        experience, metrics = compute_advantages(
            scored, total, kl_coefficient, eos_id=spec.eos_id, missing_eos=c.missing_eos, gamma=c.gamma, lam=c.lam,
            whiten_rewards=c.whiten_rewards, whiten_advantages=c.whiten_advantages,
        )  # fmt: skip
    metrics["policy/rollout_logp_diff"] = sampler_difference(sampled, scored["log_prob"], mask)
    lap("score", experience)
    return experience, metrics, total


def sample(policy, prompts, lengths, key, spec: RLSpec):
    """Responses by pure sampling: temperature alone, or the log-probabilities would be another distribution's.

    Args:
        prompts: int [B, Q], padded on the left; lengths: int [B]; key: a typed PRNG key. Each row has noise of its own.
    Returns:
        (tokens int32 [B, Q + R], mask float32 [B, R], the sampler's own log-probabilities float32 [B, R]).
    """
    B = prompts.shape[0]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(B))
    response, counts, log_probs = decode(
        policy, spec.policy, prompts, lengths, jnp.full(B, spec.response), keys, new_tokens=spec.response,
        sampling=Sampling(spec.temperature), eot_id=spec.eos_id, pad_id=spec.pad_id, vocab=spec.vocab,
        dtype=spec.dtype, mesh=spec.mesh,
    )  # fmt: skip
    mask = (jnp.arange(spec.response)[None] < counts[:, None]).astype(jnp.float32)
    return jnp.concatenate([prompts, response], axis=1), mask, log_probs


def by_rows(function, rows: int | None, *arrays):
    """function over at most `rows` rows of the arrays at a time: what one forward pass holds is bounded. None = all."""
    batch = arrays[0].shape[0]
    if rows is None or rows >= batch:
        return function(*arrays)
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else batch_shards(mesh.shape)
    rows = next((m for m in range(rows, 0, -1) if batch % m == 0 and m % ways == 0), batch)
    split = tuple(a.reshape(batch // rows, rows, *a.shape[1:]) for a in arrays)
    out = jax.lax.map(lambda parts: function(*parts), split)
    return jax.tree.map(lambda a: a.reshape(batch, *a.shape[2:]), out)


def score(policy, value, reference, reward, tokens, lengths, mask, spec: RLSpec, rows: int | None = None) -> dict:
    """The four models over a batch of samples, dropout off.

    Policy and reference go through one compiled program, so that equal weights give equal bits and a KL of exactly 0.

    Args:
        value, reward: {'trunk', 'head'}; value may be {'head'} alone, and is not read without a critic (spec); reward
            may be None.
        rows: rows of one forward pass; None = all.
    Returns:
        tokens, real, mask, log_prob, entropy, ref_log_prob, value, all [B, ...], and score [B] with a reward model.
    """
    real = networks.real_tokens(lengths, mask, tokens.shape[1] - spec.response)
    texts = tokens, real, mask
    if jnp.dtype(spec.dtype) != jnp.float32:  # the same dtypes as the reference, or it would be another program
        policy = _as_frozen(policy, spec.dtype)
    log_prob, entropy = _policy_view(policy, *texts, spec, rows)
    result = {
        "tokens": tokens, "real": real, "mask": mask, "log_prob": log_prob, "entropy": entropy,
        "ref_log_prob": _policy_view(reference, *texts, spec, rows)[0],
        "value": _values(value, policy if spec.value is None else None, *texts, spec, rows)
        if spec.critic else jnp.zeros_like(log_prob),
    }  # fmt: skip
    if reward is not None:
        result["score"] = _scores(reward, *texts, spec, rows)
    return result


_as_frozen = jax.jit(frozen, static_argnums=1)


@functools.partial(jax.jit, static_argnames=("spec", "rows"))
def _policy_view(policy, tokens, real, mask, spec, rows):
    def forward(tokens, real, mask):
        states = networks.policy_states(policy, tokens, real, mask, spec)
        log_prob, entropy = networks.log_probs_and_entropy(policy, states, tokens, spec)
        return ppo.keep(log_prob, mask), ppo.keep(entropy, mask)

    return by_rows(forward, rows, tokens, real, mask)


@functools.partial(jax.jit, static_argnames=("spec", "rows"))
def _values(value, policy, tokens, real, mask, spec, rows):
    def forward(tokens, real, mask):
        states = None if spec.value is not None else networks.policy_states(policy, tokens, real, mask, spec)
        return ppo.keep(networks.values(value, states, tokens, real, mask, spec), mask)

    return by_rows(forward, rows, tokens, real, mask)


@functools.partial(jax.jit, static_argnames=("spec", "rows"))
def _scores(reward, tokens, real, mask, spec, rows):
    return by_rows(lambda *texts: networks.scores(reward, *texts, spec), rows, tokens, real, mask)


_STATIC = ("eos_id", "missing_eos", "gamma", "lam", "whiten_rewards", "whiten_advantages")


@functools.partial(jax.jit, static_argnames=_STATIC)
def compute_advantages(scored: dict, score, kl_coefficient, *, eos_id: int | None, missing_eos: float | None,
                       gamma: float, lam: float, whiten_rewards=False,
                       whiten_advantages=True) -> tuple[Experience, dict]:  # fmt: skip
    """Rewards, advantages and returns, and the iteration's objective/ and response/ metrics.

    Args:
        scored: of `score`. score: float [B], the whole reward of each response.
        missing_eos: the score of a response without an end-of-sequence token, in place of its own (Stiennon et al.
            2020; Ziegler et al. 2019); None = its own stands.
    """
    mask, log_prob, ref_log_prob, value = (scored[k] for k in ("mask", "log_prob", "ref_log_prob", "value"))
    score, metrics = _penalized(scored, score, kl_coefficient, eos_id, missing_eos)
    reward = ppo.token_rewards(score, log_prob, ref_log_prob, mask, kl_coefficient)
    used = ppo.whiten(reward, mask, shift_mean=False) if whiten_rewards else reward
    advantage, returns = ppo.gae(used, value, mask, gamma, lam)
    metrics |= {
        "value/explained_var": ppo.explained_variance(value, returns, mask),
        "value/mean": ppo.masked_mean(value, mask),
    }
    if whiten_advantages:
        advantage = ppo.whiten(advantage, mask)
    return _experience(scored, reward, advantage, returns), metrics


@functools.partial(jax.jit, static_argnames=("group_size", "eos_id", "missing_eos"))
def compute_group_advantages(scored: dict, score, kl_coefficient, group_size: int, *, eos_id: int | None,
                             missing_eos: float | None) -> tuple[Experience, dict]:  # fmt: skip
    """GRPO (Shao et al. 2024 §4.1.2): every token of a response gets its score against the others of its prompt. There
    is no value network, and the KL penalty is in the loss (update.py), not in the reward.

    Args: as compute_advantages; the group_size samples of a prompt are adjacent rows.
    """
    mask = scored["mask"]
    score, metrics = _penalized(scored, score, kl_coefficient, eos_id, missing_eos)
    advantage = ppo.group_advantages(score, group_size)[:, None] * mask
    groups = score.reshape(-1, group_size)
    metrics["objective/group_std"] = groups.std(1).mean()
    return _experience(scored, score[:, None] * ppo.last_action(mask), advantage, jnp.zeros_like(mask)), metrics


def _penalized(scored: dict, score, kl_coefficient, eos_id, missing_eos):
    """(score float32 [B] with the penalty for a missing end, metrics of scores, KL and lengths)."""
    mask, log_prob, ref_log_prob = (scored[k] for k in ("mask", "log_prob", "ref_log_prob"))
    ended = has_eos(scored["tokens"], mask, eos_id)
    score = score.astype(jnp.float32)
    if missing_eos is not None and eos_id is not None:
        score = jnp.where(ended, score, missing_eos)
    kl = ppo.k1(log_prob, ref_log_prob).sum(1)
    penalty = -kl_coefficient * kl
    return score, {
        "objective/kl": kl.mean(),
        "objective/kl_se": kl.std() / mask.shape[0] ** 0.5,
        "objective/kl_k3": ppo.k3(log_prob, ref_log_prob).sum(1).mean(),
        "objective/score": score.mean(),
        "objective/score_std": score.std(),
        "objective/non_score_reward": penalty.mean(),
        "objective/rlhf_reward": (score + penalty).mean(),
        "objective/entropy": ppo.masked_mean(scored["entropy"], mask),
        "response/length": mask.sum(1).mean(),
        "response/eos_rate": ended.mean(),
        "kl_coef": kl_coefficient,
    }


def _experience(scored: dict, reward, advantage, returns) -> Experience:
    arrays = {k: scored[k] for k in ("tokens", "real", "mask", "log_prob", "ref_log_prob", "value")}
    return Experience(reward=reward, advantage=advantage, returns=returns, **arrays)


def has_eos(tokens, mask, eos_id: int | None):
    """Whether each response ended by itself: bool [B]."""
    if eos_id is None:
        return jnp.ones(mask.shape[0], bool)
    return ((tokens[:, -mask.shape[1] :] == eos_id) & (mask > 0)).any(1)


@jax.jit
def sampler_difference(sampled, scored, mask):
    """Largest |difference| of the sampler's own log-probabilities (KV cache) and the scorer's: rounding, or a fault."""
    return jnp.abs(ppo.keep(sampled - scored, mask)).max()
