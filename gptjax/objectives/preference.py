"""Learning from comparisons: the K-ranked reward-model loss, its statistics, and DPO. Sums, not means.

Sources: Ouyang et al. 2022 §3.5 eq. 1 and appendix C.2; Ziegler et al. 2019 eq. 1; Rafailov et al. 2023 eq. 7.
"""

import jax
import jax.numpy as jnp


def pairs(ranks, valid):
    """Which ordered pairs (winner, loser) of each prompt count: bool [B, K, K].

    ranks: [B, K], lower is better, equal = a tie, which counts for nothing; valid: [B, K], 1 = a completion.
    """
    both = (valid[:, :, None] > 0) & (valid[:, None, :] > 0)
    return both & (ranks[:, :, None] < ranks[:, None, :])


def _margins(scores, valid):
    scores = jnp.where(valid > 0, scores, 0.0)  # the score of what is no completion may be anything
    return scores[:, :, None] - scores[:, None, :]


def ranking_loss(scores, ranks, valid):
    """-1/#pairs sum over a prompt's pairs of log sigmoid(r_winner - r_loser) (Ouyang et al. eq. 1).

    All C(K, 2) pairs of a prompt are one element of the batch and every prompt weighs the same, however many
    completions it has; each completion was forwarded once.

    Args:
        scores, ranks, valid: [B, K].
    Returns:
        (sum over prompts, number of prompts with at least one pair).
    """
    counted = pairs(ranks, valid)
    losses = jnp.where(counted, -jax.nn.log_sigmoid(_margins(scores, valid)), 0.0)
    n = counted.sum((1, 2))
    return (losses.sum((1, 2)) / jnp.maximum(n, 1)).sum(), (n > 0).sum().astype(jnp.float32)


def best_of_k_loss(scores, ranks, valid):
    """-log softmax(r)[best] (Ziegler et al. 2019 eq. 1, where a person picks one of K = 4). Ties for the best
    share the target. Returns (sum over prompts, number of prompts)."""
    any_valid = (valid > 0).any(1)
    logits = jnp.where(valid > 0, scores, -jnp.inf)
    logits = jnp.where(any_valid[:, None], logits, 0.0)  # or a row of padding would have the gradient NaN
    best = (valid > 0) & (ranks == jnp.where(valid > 0, ranks, jnp.inf).min(1, keepdims=True))
    log_probs = jnp.where(best, jax.nn.log_softmax(logits, axis=1), 0.0)
    losses = -log_probs.sum(1) / jnp.maximum(best.sum(1), 1)
    return jnp.where(any_valid, losses, 0.0).sum(), any_valid.sum().astype(jnp.float32)


def ranking_statistics(scores, ranks, valid):
    """Sums over pairs: {'pairs', 'correct' (equal scores count half), 'margin' (r_winner - r_loser)}."""
    counted = pairs(ranks, valid)
    margins = _margins(scores, valid)
    right = jnp.where(margins > 0, 1.0, jnp.where(margins == 0, 0.5, 0.0))
    return {
        "pairs": counted.sum().astype(jnp.float32),
        "correct": jnp.where(counted, right, 0.0).sum(),
        "margin": jnp.where(counted, margins, 0.0).sum(),
    }


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, weights, beta: float):
    """-log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))) (Rafailov et al. 2023 eq. 7).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: log-probability of the whole response (summed over its
            tokens) under the policy and the reference, [B]; weights: [B], 0 = not a pair.
    Returns:
        (sum, count, {'correct', 'margin'}: sums of the implicit rewards' accuracy and margin).
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    margin = jnp.where(weights > 0, margin, 0.0)
    statistics = {"correct": (weights * (margin > 0)).sum(), "margin": (weights * margin).sum()}
    return (weights * -jax.nn.log_sigmoid(margin)).sum(), weights.sum(), statistics
