"""PPO and GRPO for language models, as formulas on arrays: per-token reward, advantages, clipped losses.

All arrays are action-aligned, [B, R]: slot t belongs to the t-th response token y_t, the action, and to the state
before it.

    mask      1 on the actions up to and including the end-of-sequence token, 0 after it
    log_prob  log pi(y_t | prompt, y_<t)
    value     V of the state before y_t; the value after the last action is 0
    reward    -beta (log pi - log ref) on every action, and the score on the last one

Where the mask is 0 an array may hold anything, NaN included. Losses are (sum, count) pairs. Names without a suffix are
for arrays of any shape, the mask having the same one.
Sources: Schulman et al. 2017 (PPO), Schulman et al. 2016 (GAE), Ziegler et al. 2019 and its code, Stiennon et al.
2020, Ouyang et al. 2022 §3.5 and appendix C.4.
"""

import jax
import jax.numpy as jnp
from jax import lax

# --- masked statistics, over the whole (global) array --------------------------------------------------------


def keep(x, mask):
    """x where the mask is 1, else 0: what is masked out may be NaN."""
    return jnp.where(mask > 0, x, 0.0)


def masked_mean(x, mask):
    """Mean over the slots of mask 1; 0 if there are none."""
    return keep(x, mask).sum() / jnp.maximum(mask.sum(), 1)


def masked_variance(x, mask):
    """Biased variance over the slots of mask 1."""
    x = keep(x, mask)  # before it is squared: the gradient of a masked NaN would be NaN
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask, shift_mean: bool = True):
    """(x - mean) / sqrt(variance + 1e-8) over the slots of mask 1; 0 elsewhere.

    shift_mean False: the mean is added back, as Ziegler et al. whiten rewards. The variance is biased, as theirs.
    """
    x = keep(x, mask)
    mean = masked_mean(x, mask)
    white = (x - mean) * lax.rsqrt(masked_variance(x, mask) + 1e-8)
    return keep(white if shift_mean else white + mean, mask)


# --- KL --------------------------------------------------------------------------------------------------


def k1(log_prob, ref_log_prob):
    """log pi - log ref with y ~ pi: unbiased for KL(pi || ref). The one of the three that belongs in the reward: its
    expectation as a (detached) reward has the gradient of the KL. As a loss its gradient is 0 in expectation."""
    return log_prob - ref_log_prob


def k2(log_prob, ref_log_prob):
    """(log pi - log ref)^2 / 2: biased; differentiated as an on-policy loss it has the gradient of KL(pi || ref)."""
    return 0.5 * (log_prob - ref_log_prob) ** 2


def k3(log_prob, ref_log_prob):
    """exp(-d) - 1 + d with d = log pi - log ref: unbiased, never negative. A metric, and a term of GRPO's loss, with
    the gradient of KL(ref || pi). Never a reward: there it has the gradient of KL(pi || ref) - KL(ref || pi), no
    restoring force near ref."""
    d = log_prob - ref_log_prob
    return jnp.expm1(-d) + d


MOST_KL_ERROR = 0.2  # the largest relative error, of either sign, that the adaptive coefficient responds to


def adaptive_kl_coefficient(coefficient, kl, episodes: int, target: float, horizon: float):
    """beta (1 + clip(KL / target - 1, -.2, .2) episodes / horizon), once an iteration (Ziegler et al. 2019 §2.2).

    kl: nats per sequence, mean over the iteration. The result is positive if episodes < 5 horizon, which PPO's config
    checks (rlhf/config.py).
    """
    error = jnp.clip(kl / target - 1.0, -MOST_KL_ERROR, MOST_KL_ERROR)
    return coefficient * (1.0 + error * episodes / horizon)


# --- reward and credit -------------------------------------------------------------------------------------


def last_action(mask_BR):
    """1 on each row's last action, else 0: [B, R]."""
    next_BR = jnp.pad(mask_BR[:, 1:], ((0, 0), (0, 1)))
    return mask_BR * (1 - next_BR)


def token_rewards(score_B, log_prob_BR, ref_log_prob_BR, mask_BR, kl_coefficient):
    """R_t = -beta k1_t, plus the score on the last action (Ouyang et al. 2022 eq. 2, first term).

    Integer scores are converted to float32, so that the penalty is not truncated.
    Returns:
        float32 [B, R]; a row sums to score - beta KL of its sequence.
    """
    penalty_BR = -kl_coefficient * keep(k1(log_prob_BR, ref_log_prob_BR), mask_BR)
    return penalty_BR.astype(jnp.float32) + score_B.astype(jnp.float32)[:, None] * last_action(mask_BR)


def gae(rewards_BR, values_BR, mask_BR, gamma: float, lam: float):
    """Generalized advantage estimation (Schulman et al. 2016 eq. 16), backwards over the actions.

        delta_t = R_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lambda A_{t+1},  V and A after the last action: 0

    Returns:
        (advantages, returns = advantages + values), float32 [B, R], 0 where the mask is 0.
    """
    rewards_BR, values_BR = keep(rewards_BR, mask_BR), keep(values_BR, mask_BR)
    next_values_BR = jnp.pad(values_BR[:, 1:], ((0, 0), (0, 1)))
    deltas_BR = rewards_BR + gamma * next_values_BR - values_BR

    def backward(next_advantage_B, slot):
        delta_B, mask_B = slot
        advantage_B = mask_B * (delta_B + gamma * lam * next_advantage_B)
        return advantage_B, advantage_B

    zeros_B = jnp.zeros(rewards_BR.shape[0], jnp.float32)
    _, advantages_RB = lax.scan(backward, zeros_B, (deltas_BR.T, mask_BR.T), reverse=True)
    return advantages_RB.T, keep(advantages_RB.T + values_BR, mask_BR)


def group_advantages(score, group_size: int):
    """GRPO (Shao et al. 2024 §4.1.2): each score relative to those of the same prompt, (r - mean) / (std + 1e-4).

    score: [B x N], the N = group_size samples of a prompt in adjacent rows. Returns the same shape: one advantage per
    response, for all of its tokens.
    """
    score_BN = score.reshape(-1, group_size)
    centered_BN = score_BN - score_BN.mean(1, keepdims=True)
    return (centered_BN / (score_BN.std(1, keepdims=True) + 1e-4)).reshape(-1)


# --- losses ------------------------------------------------------------------------------------------------


def clipped_surrogate(ratio_BR, advantages_BR, clip: float):
    """-min(A ratio, A clip(ratio, 1 - eps, 1 + eps)) of each action (Schulman et al. 2017 eq. 7): [B, R]."""
    # -min(a, b) = max(-a, -b)
    return jnp.maximum(-advantages_BR * ratio_BR, -advantages_BR * jnp.clip(ratio_BR, 1 - clip, 1 + clip))


def policy_loss(log_prob_BR, old_log_prob_BR, advantages_BR, mask_BR, clip: float):
    """`clipped_surrogate`, summed over the actions.

    Returns:
        (sum, count, statistics as sums over the actions: clipped, approx_kl (k2 of new against old), ratio).
    """
    log_ratio_BR = keep(log_prob_BR - old_log_prob_BR, mask_BR)
    ratio_BR = jnp.exp(log_ratio_BR)
    losses_BR = clipped_surrogate(ratio_BR, keep(advantages_BR, mask_BR), clip)
    statistics = {
        "clipped": keep(jnp.abs(ratio_BR - 1) > clip, mask_BR).sum(),
        "approx_kl": 0.5 * keep(log_ratio_BR**2, mask_BR).sum(),
        "ratio": keep(ratio_BR, mask_BR).sum(),
    }
    return keep(losses_BR, mask_BR).sum(), mask_BR.sum(), statistics


def value_loss(values_BR, old_values_BR, returns_BR, mask_BR, clip: float):
    """1/2 max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of the old value; summed over the actions.

    Returns (sum, count, {'clipped': in how many slots the clipped error is larger, 'error': sum of (V - R)^2}).
    """
    values_BR, old_values_BR, returns_BR = (keep(x, mask_BR) for x in (values_BR, old_values_BR, returns_BR))
    clipped_BR = old_values_BR + jnp.clip(values_BR - old_values_BR, -clip, clip)
    error_BR, clipped_error_BR = (values_BR - returns_BR) ** 2, (clipped_BR - returns_BR) ** 2
    statistics = {
        "clipped": keep(clipped_error_BR > error_BR, mask_BR).sum(),
        "error": keep(error_BR, mask_BR).sum(),
    }
    return 0.5 * keep(jnp.maximum(error_BR, clipped_error_BR), mask_BR).sum(), mask_BR.sum(), statistics


def grpo_loss(
    log_prob_BR, old_log_prob_BR, ref_log_prob_BR, advantages_BR, mask_BR, clip: float, kl_coefficient: float
):
    """GRPO (Shao et al. 2024 eq. 3): the clipped loss plus beta k3 against the reference, as a loss term.

    Every response weighs the same: its token losses are averaged over its length first. As a loss k3 has the gradient
    of KL(ref || pi), not of KL(pi || ref), which k2 would have.
    Returns:
        (sum over responses, number of responses).
    """
    ratio_BR = jnp.exp(keep(log_prob_BR - old_log_prob_BR, mask_BR))
    surrogate_BR = clipped_surrogate(ratio_BR, keep(advantages_BR, mask_BR), clip)
    kl_BR = k3(keep(log_prob_BR, mask_BR), keep(ref_log_prob_BR, mask_BR))
    losses_BR = keep(surrogate_BR + kl_coefficient * kl_BR, mask_BR)
    length_B = mask_BR.sum(1)
    return (losses_BR.sum(1) / jnp.maximum(length_B, 1)).sum(), (length_B > 0).sum().astype(jnp.float32)


def explained_variance(values, returns, mask):
    """1 - mean((R - V)^2) / variance(R): 1 is perfect, 0 no better than a constant."""
    values, returns = keep(values, mask), keep(returns, mask)
    error = masked_mean((returns - values) ** 2, mask)
    return 1.0 - error / jnp.maximum(masked_variance(returns, mask), 1e-8)


def best_of_n_kl(n):
    """log n - (n - 1)/n: KL of best-of-n from the policy that it samples (exact without ties, else an upper bound)."""
    n = jnp.asarray(n, jnp.float32)
    return jnp.log(n) - (n - 1) / n


def exponential_moving_average(average, new, decay: float):
    """decay * average + (1 - decay) * new of every leaf (Ouyang et al. 2022 C.4: decay .992 per iteration)."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average, new)
