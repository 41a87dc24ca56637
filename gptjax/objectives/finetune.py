"""Fine-tuning objectives on top of the language-model loss.

Source: GPT-1 (Radford et al. 2018) §3.2 eq. 5: L3 = L2 (the task) + lambda L1 (language modeling), lambda = .5.
"""

import jax.numpy as jnp


def auxiliary_weights(task_mask, lm_mask, lm_weight: float):
    """Token weights w under which one weighted sum is both terms of GPT-1 eq. 5.

        sum(w nll) / sum(task_mask) = mean of nll over the task's tokens + lambda x mean of nll over all tokens

    Args:
        task_mask, lm_mask: the tokens of either term, over the whole (global) batch, any shape.
    Returns:
        float32, the same shape. Divide the weighted sum by sum(task_mask).
    """
    ratio = task_mask.sum() / jnp.maximum(lm_mask.sum(), 1)
    return (task_mask + lm_weight * ratio * lm_mask).astype(jnp.float32)
