"""Faults that PPO implementations have shipped, planted one at a time: what the tests must notice.

plant(name) replaces functions of gptjax for the rest of the process, before anything is compiled. With the environment
variable GPTJAX_MUTATION=name the whole test suite runs on the faulty code (tests/conftest.py), and
tests/test_mutations.py asserts that it goes red for every one. Sources: the table in each docstring line.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gptjax.errors import InputError
from gptjax.objectives import ppo
from gptjax.rlhf import networks, rollout, state, update


def logits_off_by_one():
    """Log-probabilities read at the position of the token itself, old and new alike: ratio 1 and KL 0 still hold."""
    networks._states = lambda x, mask, n: jnp.where(mask[..., None] > 0, x[:, -n.response :], 0)


def k3_in_reward():
    """The low-variance estimator in the reward: no restoring force near the reference."""
    ppo.k1 = ppo.k3


def k2_in_reward():
    """Half the squared log-ratio in the reward."""
    ppo.k1 = ppo.k2


def eos_as_pad():
    """PAD = EOS: the end-of-sequence token is masked like padding, so ending is never learned."""
    sample = rollout.sample

    def without_eos(policy, prompts, lengths, key, n):
        tokens, mask, log_probs = sample(policy, prompts, lengths, key, n)
        return tokens, mask * (tokens[:, -n.response :] != n.eos_id), log_probs

    rollout.sample = without_eos


def value_after_the_end():
    """The value after the last action is not 0: the last advantage bootstraps from a state that does not exist."""

    def gae(rewards, values, mask, gamma, lam):
        rewards, values = ppo.keep(rewards, mask), ppo.keep(values, mask)
        after = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
        shifted = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
        deltas = rewards + gamma * jnp.where(after > 0, shifted, values) - values
        out, running = [], jnp.zeros(rewards.shape[0])
        for t in reversed(range(rewards.shape[1])):
            running = mask[:, t] * (deltas[:, t] + gamma * lam * running)
            out.append(running)
        advantages = jnp.stack(out[::-1], 1)
        return advantages, ppo.keep(advantages + values, mask)

    ppo.gae = gae


def min_for_max():
    """The optimistic of the two surrogates in place of the pessimistic."""

    def policy_loss(log_prob, old_log_prob, advantages, mask, clip):
        log_ratio = ppo.keep(log_prob - old_log_prob, mask)
        ratio, advantages = jnp.exp(log_ratio), ppo.keep(advantages, mask)
        losses = jnp.minimum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip))
        statistics = {
            "clipped": ppo.keep(jnp.abs(ratio - 1) > clip, mask).sum(),
            "approx_kl": 0.5 * ppo.keep(log_ratio**2, mask).sum(),
            "ratio": ppo.keep(ratio, mask).sum(),
        }
        return ppo.keep(losses, mask).sum(), mask.sum(), statistics

    ppo.policy_loss = policy_loss


def integer_rewards():
    """Scores added into an integer array: .7 arrives as 0 and -1.9 as -1."""
    token_rewards = ppo.token_rewards
    ppo.token_rewards = lambda score, *rest: token_rewards(jnp.trunc(score), *rest)


def temperature_mismatch():
    """Sampled at temperature .7, scored at 1 (top-p does the same)."""
    sample = rollout.sample
    rollout.sample = lambda policy, prompts, lengths, key, n: sample(
        policy, prompts, lengths, key, dataclasses.replace(n, temperature=0.7)
    )


def fixed_key():
    """One key for every iteration: the same noise and the same minibatches each time."""
    keys = lambda _: tuple(jax.random.split(jax.random.key(0), 3))
    state.phase_keys = update.phase_keys = keys
    _replace_where_imported("phase_keys", keys)


def score_one_slot_late():
    """The score on the slot after the last action, where the value is not trained."""
    token_rewards, gae = ppo.token_rewards, ppo.gae

    def late(score, log_prob, ref_log_prob, mask, coefficient):
        on_time = token_rewards(score, log_prob, ref_log_prob, mask, coefficient)
        scores = score[:, None] * ppo.last_action(mask)
        room = jnp.pad(scores[:, :-1], ((0, 0), (1, 0))).at[:, -1].add(scores[:, -1])
        return on_time - scores + room

    def longer(rewards, values, mask, gamma, lam):
        one_more = jnp.maximum(mask, jnp.pad(mask[:, :-1], ((0, 0), (1, 0))))
        advantages, returns = gae(rewards, ppo.keep(values, mask), one_more, gamma, lam)
        return ppo.keep(advantages, mask), ppo.keep(returns, mask)

    ppo.token_rewards, ppo.gae = late, longer


def missing_loss_mask():
    """The losses count padding as actions (its advantage is 0 already)."""
    policy_loss, value_loss = ppo.policy_loss, ppo.value_loss
    ppo.policy_loss = lambda new, old, advantages, mask, clip: policy_loss(new, old, advantages, mask * 0 + 1, clip)
    ppo.value_loss = lambda v, old, returns, mask, clip: value_loss(v, old, returns, mask * 0 + 1, clip)


def whitening_over_pads():
    """Mean and variance of the advantages taken over padding too."""
    whiten = ppo.whiten
    ppo.whiten = lambda x, mask, shift_mean=True: ppo.keep(whiten(ppo.keep(x, mask), mask * 0 + 1, shift_mean), mask)


def positions_count_padding():
    """Position ids from the start of the row: a prompt means something else for each amount of left padding."""

    def hidden(params, config, tokens, real, n):
        real = real.astype(jnp.int32)
        return networks.gpt.hidden(
            params, config, jnp.where(real > 0, tokens, 0), segment_ids=real, dtype=n.dtype, mesh=n.mesh
        )

    networks._hidden = hidden


def mean_of_means():
    """Each micro-batch divided by its own count of actions, then averaged."""
    gradients = update.ppo_gradients

    def averaged(c, spec, policy, value, batch, *rest):
        parts = [
            gradients(c, spec, policy, value, jax.tree.map(lambda a, i=i: a[i : i + 1], batch), *rest)
            for i in range(batch.mask.shape[0])
        ]
        return jax.tree.map(lambda *xs: functools.reduce(jnp.add, xs) / len(xs), *parts)

    update.ppo_gradients = averaged


def value_not_clipped_against_the_old():
    """The value is clipped around the return in place of the old value."""
    value_loss = ppo.value_loss
    ppo.value_loss = lambda v, old, returns, mask, clip: value_loss(v, returns, returns, mask, clip)


def missing_eos_forgiven():
    """The penalty for a response that never ends is not applied."""
    compute_advantages = rollout.compute_advantages
    rollout.compute_advantages = lambda *args, missing_eos, **rest: compute_advantages(*args, missing_eos=None, **rest)


def _replace_where_imported(name, new):
    import sys

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("gptjax.", "experiments.")) and hasattr(module, name):
            setattr(module, name, new)


MUTATIONS = {
    f.__name__: f
    for f in (
        logits_off_by_one, k3_in_reward, k2_in_reward, eos_as_pad, value_after_the_end, min_for_max, integer_rewards,
        temperature_mismatch, fixed_key, score_one_slot_late, missing_loss_mask, whitening_over_pads,
        positions_count_padding, mean_of_means, value_not_clipped_against_the_old, missing_eos_forgiven,
    )
}  # fmt: skip


def plant(name: str):
    """Makes the fault. Call it before anything of gptjax is compiled."""
    if name not in MUTATIONS:
        raise InputError(f"There is no mutation {name!r}: there are {', '.join(MUTATIONS)}.")
    MUTATIONS[name]()
