"""One iteration's experience: sample, score, and work out rewards and advantages.

    tokens, mask, sampled = sample(policy, prompts, lengths, key, n)
    judged = judge(policy, value, reference, reward, tokens, lengths, mask, n)
    rollout, metrics = finish(judged, score, kl_coefficient, ...)

Between judge and finish a Python callable may add to the score (rewards.py): that is why they are two.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gptjax.generation.decode import decode
from gptjax.generation.sampling import Sampling
from gptjax.objectives import ppo
from gptjax.parallel.mesh import batch_shards
from gptjax.rlhf import networks
from gptjax.rlhf.networks import Networks
from gptjax.training.precision import frozen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
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


def sample(policy, prompts, lengths, key, n: Networks):
    """Responses by pure sampling: temperature alone, or the log-probabilities would be another distribution's.

    Args:
        prompts: int [B, Q], padded on the left; lengths: int [B]; key: a typed PRNG key. Each row has noise of its own.
    Returns:
        (tokens int32 [B, Q + R], mask float32 [B, R], the sampler's own log-probabilities float32 [B, R]).
    """
    B = prompts.shape[0]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(B))
    response, counts, log_probs = decode(
        policy, n.policy, prompts, lengths, jnp.full(B, n.response), keys, new_tokens=n.response,
        sampling=Sampling(n.temperature), eot_id=n.eos_id, pad_id=n.pad_id, vocab=n.vocab, dtype=n.dtype, mesh=n.mesh,
    )  # fmt: skip
    mask = (jnp.arange(n.response)[None] < counts[:, None]).astype(jnp.float32)
    return jnp.concatenate([prompts, response], axis=1), mask, log_probs


def by_rows(function, rows: int | None, *arrays):
    """function over at most `rows` rows of the arrays at a time: what one forward pass holds is bounded. None = all."""
    batch = arrays[0].shape[0]
    if rows is None or rows >= batch:
        return function(*arrays)
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else batch_shards(mesh.shape)
    rows = next((n for n in range(rows, 0, -1) if batch % n == 0 and n % ways == 0), batch)
    split = tuple(a.reshape(batch // rows, rows, *a.shape[1:]) for a in arrays)
    out = jax.lax.map(lambda parts: function(*parts), split)
    return jax.tree.map(lambda a: a.reshape(batch, *a.shape[2:]), out)


def judge(policy, value, reference, reward, tokens, lengths, mask, n: Networks, rows: int | None = None) -> dict:
    """The four models over a batch of samples, dropout off.

    Policy and reference go through one compiled program, so that equal weights give equal bits and a KL of exactly 0.

    Args:
        value, reward: {'trunk', 'head'}; value may be {'head'} alone; reward may be None.
        rows: rows of one forward pass; None = all.
    Returns:
        tokens, real, mask, log_prob, entropy, ref_log_prob, value, all [B, ...], and score [B] with a reward model.
    """
    real = networks.real_tokens(lengths, mask, tokens.shape[1] - n.response)
    texts = tokens, real, mask
    if jnp.dtype(n.dtype) != jnp.float32:  # the same dtypes as the reference, or it would be another program
        policy = _as_frozen(policy, n.dtype)
    log_prob, entropy = _policy_view(policy, *texts, n, rows)
    result = {
        "tokens": tokens, "real": real, "mask": mask, "log_prob": log_prob, "entropy": entropy,
        "ref_log_prob": _policy_view(reference, *texts, n, rows)[0],
        "value": _values(value, policy if n.value is None else None, *texts, n, rows),
    }  # fmt: skip
    if reward is not None:
        result["score"] = _scores(reward, *texts, n, rows)
    return result


_as_frozen = jax.jit(frozen, static_argnums=1)


@functools.partial(jax.jit, static_argnames=("n", "rows"))
def _policy_view(policy, tokens, real, mask, n, rows):
    def forward(tokens, real, mask):
        states = networks.policy_states(policy, tokens, real, mask, n)
        log_prob, entropy = networks.log_probs_and_entropy(policy, states, tokens, n)
        return ppo.keep(log_prob, mask), ppo.keep(entropy, mask)

    return by_rows(forward, rows, tokens, real, mask)


@functools.partial(jax.jit, static_argnames=("n", "rows"))
def _values(value, policy, tokens, real, mask, n, rows):
    def forward(tokens, real, mask):
        states = None if n.value is not None else networks.policy_states(policy, tokens, real, mask, n)
        return ppo.keep(networks.values(value, states, tokens, real, mask, n), mask)

    return by_rows(forward, rows, tokens, real, mask)


@functools.partial(jax.jit, static_argnames=("n", "rows"))
def _scores(reward, tokens, real, mask, n, rows):
    return by_rows(lambda *texts: networks.scores(reward, *texts, n), rows, tokens, real, mask)


_FINISH_STATIC = ("eos_id", "missing_eos", "gamma", "lam", "whiten_rewards", "whiten_advantages")


@functools.partial(jax.jit, static_argnames=_FINISH_STATIC)
def finish(judged: dict, score, kl_coefficient, *, eos_id: int | None, missing_eos: float | None, gamma: float,
           lam: float, whiten_rewards=False, whiten_advantages=True) -> tuple[Rollout, dict]:  # fmt: skip
    """Rewards, advantages and returns, and the iteration's objective/ and response/ metrics.

    Args:
        judged: of `judge`. score: float [B], the whole reward of each response.
        missing_eos: the score of a response without an end-of-sequence token, in place of its own (Stiennon et al.
            2020; Ziegler et al. 2019); None = its own stands.
    """
    mask, log_prob, ref_log_prob, value = (judged[k] for k in ("mask", "log_prob", "ref_log_prob", "value"))
    ended = has_eos(judged["tokens"], mask, eos_id)
    score = score.astype(jnp.float32)
    if missing_eos is not None and eos_id is not None:
        score = jnp.where(ended, score, missing_eos)
    reward = ppo.token_rewards(score, log_prob, ref_log_prob, mask, kl_coefficient)
    used = ppo.whiten(reward, mask, shift_mean=False) if whiten_rewards else reward
    advantage, returns = ppo.gae(used, value, mask, gamma, lam)
    kl = ppo.k1(log_prob, ref_log_prob).sum(1)
    penalty = -kl_coefficient * kl
    metrics = {
        "objective/kl": kl.mean(),
        "objective/kl_se": kl.std() / mask.shape[0] ** 0.5,
        "objective/kl_k3": ppo.k3(log_prob, ref_log_prob).sum(1).mean(),
        "objective/score": score.mean(),
        "objective/score_std": score.std(),
        "objective/non_score_reward": penalty.mean(),
        "objective/rlhf_reward": (score + penalty).mean(),
        "objective/entropy": ppo.masked_mean(judged["entropy"], mask),
        "value/explained_var": ppo.explained_variance(value, returns, mask),
        "value/mean": ppo.masked_mean(value, mask),
        "response/length": mask.sum(1).mean(),
        "response/eos_rate": ended.mean(),
        "kl_coef": kl_coefficient,
    }
    if whiten_advantages:
        advantage = ppo.whiten(advantage, mask)
    arrays = {k: judged[k] for k in ("tokens", "real", "mask", "log_prob", "ref_log_prob", "value")}
    return Rollout(reward=reward, advantage=advantage, returns=returns, **arrays), metrics


def has_eos(tokens, mask, eos_id: int | None):
    """Whether each response ended by itself: bool [B]."""
    if eos_id is None:
        return jnp.ones(mask.shape[0], bool)
    return ((tokens[:, -mask.shape[1] :] == eos_id) & (mask > 0)).any(1)


@jax.jit
def sampler_difference(sampled, scored, mask):
    """Largest |difference| of the sampler's own log-probabilities (KV cache) and the scorer's: rounding, or a fault."""
    return jnp.abs(ppo.keep(sampled - scored, mask)).max()
