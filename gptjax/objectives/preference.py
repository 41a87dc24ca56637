"""Learning from comparisons: the K-ranked reward-model loss, its statistics, and DPO. Sums, not means.

A prompt has N completions (the papers' K), padded: valid is 1 on a completion, 0 elsewhere.
Sources: Ouyang et al. 2022 §3.5 eq. 1 and appendix C.2; Ziegler et al. 2019 eq. 1; Rafailov et al. 2023 eq. 7.
"""

import jax
import jax.numpy as jnp


def pairs(ranks_BN, valid_BN):
    """Which ordered pairs (winner, loser) of each prompt count: bool [B, N, N].

    ranks_BN: lower is better; equal ranks are a tie, which does not count.
    """
    valid_BNN = (valid_BN[:, :, None] > 0) & (valid_BN[:, None, :] > 0)
    return valid_BNN & (ranks_BN[:, :, None] < ranks_BN[:, None, :])


def _margins(scores_BN, valid_BN):
    """r_winner - r_loser of every pair: [B, N, N]."""
    scores_BN = jnp.where(valid_BN > 0, scores_BN, 0.0)  # the score of padding may be anything
    return scores_BN[:, :, None] - scores_BN[:, None, :]


def ranking_loss(scores_BN, ranks_BN, valid_BN):
    """-1/#pairs sum over a prompt's pairs of log sigmoid(r_winner - r_loser) (Ouyang et al. eq. 1).

    All C(N, 2) pairs of a prompt are one element of the batch and every prompt weighs the same, however many
    completions it has; each completion was forwarded once.
    Returns:
        (sum over prompts, number of prompts with at least one pair).
    """
    pairs_BNN = pairs(ranks_BN, valid_BN)
    losses_BNN = jnp.where(pairs_BNN, -jax.nn.log_sigmoid(_margins(scores_BN, valid_BN)), 0.0)
    n_pairs_B = pairs_BNN.sum((1, 2))
    return (losses_BNN.sum((1, 2)) / jnp.maximum(n_pairs_B, 1)).sum(), (n_pairs_B > 0).sum().astype(jnp.float32)


def best_of_k_loss(scores_BN, ranks_BN, valid_BN):
    """-log softmax(r)[best] (Ziegler et al. 2019 eq. 1, where a person picks one of K = 4). Ties for the best
    share the target. Returns (sum over prompts, number of prompts)."""
    any_valid_B = (valid_BN > 0).any(1)
    logits_BN = jnp.where(valid_BN > 0, scores_BN, -jnp.inf)
    logits_BN = jnp.where(any_valid_B[:, None], logits_BN, 0.0)  # or a row of padding would have the gradient NaN
    best_BN = (valid_BN > 0) & (ranks_BN == jnp.where(valid_BN > 0, ranks_BN, jnp.inf).min(1, keepdims=True))
    log_probs_BN = jnp.where(best_BN, jax.nn.log_softmax(logits_BN, axis=1), 0.0)
    losses_B = -log_probs_BN.sum(1) / jnp.maximum(best_BN.sum(1), 1)
    return jnp.where(any_valid_B, losses_B, 0.0).sum(), any_valid_B.sum().astype(jnp.float32)


def ranking_statistics(scores_BN, ranks_BN, valid_BN):
    """Sums over pairs: {'pairs', 'correct' (equal scores count half), 'margin' (r_winner - r_loser)}."""
    pairs_BNN = pairs(ranks_BN, valid_BN)
    margins_BNN = _margins(scores_BN, valid_BN)
    correct_BNN = jnp.where(margins_BNN > 0, 1.0, jnp.where(margins_BNN == 0, 0.5, 0.0))
    return {
        "pairs": pairs_BNN.sum().astype(jnp.float32),
        "correct": jnp.where(pairs_BNN, correct_BNN, 0.0).sum(),
        "margin": jnp.where(pairs_BNN, margins_BNN, 0.0).sum(),
    }


def dpo_loss(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, weights_B, beta: float):
    """-log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))) (Rafailov et al. 2023 eq. 7).

    Args:
        chosen_B, rejected_B, ref_chosen_B, ref_rejected_B: log-probability of the whole response (summed over its
            tokens) under the policy and the reference.
        weights_B: 0 = not a pair.
    Returns:
        (sum, count, {'correct', 'margin'}: sums of the implicit rewards' accuracy and margin).
    """
    margin_B = beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))
    margin_B = jnp.where(weights_B > 0, margin_B, 0.0)
    statistics = {"correct": (weights_B * (margin_B > 0)).sum(), "margin": (weights_B * margin_B).sum()}
    return (weights_B * -jax.nn.log_sigmoid(margin_B)).sum(), weights_B.sum(), statistics
