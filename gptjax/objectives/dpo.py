"""DPO: the policy itself as a reward model, r(x, y) = beta log(pi(y|x) / ref(y|x)) (Rafailov et al. 2023 eq. 5 and 7).

With K ranked completions the loss is InstructGPT's over all pairs of a prompt (preference.ranking_loss) of these
implicit rewards; for K = 2 that is preference.dpo_loss, Rafailov et al.'s eq. 7.
"""

import jax
import jax.numpy as jnp

from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.objectives.base import Sums
from gptjax.objectives.chunked import token_log_probs
from gptjax.objectives.preference import ranking_loss, ranking_statistics


def response_log_probs(params, config: GPTConfig, tokens, starts, lengths, *, dtype, chunk: int, mesh=None,
                       dropout_keys=None):  # fmt: skip
    """log pi(response | prompt), summed over the response's tokens: float32 [rows].

    Args:
        tokens: int [rows, time], prompt and response, padded on the right. starts, lengths: int [rows]; the response is
            tokens[starts : lengths].
        chunk: time steps whose logits are held at once. dropout_keys: of the rows [rows], or None.
    """
    x = gpt.hidden(params, config, tokens[:, :-1], dtype=dtype, mesh=mesh, dropout_keys=dropout_keys)
    log_prob = token_log_probs(x, gpt.unembedding(params, config), tokens[:, 1:], 1.0, chunk)
    place = jnp.arange(1, tokens.shape[1])
    response = (place >= starts[:, None]) & (place < lengths[:, None])
    return jnp.where(response, log_prob, 0.0).sum(1)


def dpo_objective(config: GPTConfig, beta: float, dtype, chunk: int, mesh=None):
    """The loss of an Objective, summed over prompts. Micro-batch: tokens [rows, K, time], starts, lengths, ranks,
    valid, and reference, the reference's log-probability of each completion, [rows, K]."""

    def loss(params, batch, dropout_keys) -> Sums:
        rows, k, time = batch["tokens"].shape
        if dropout_keys is not None:  # each completion's own
            dropout_keys = jax.vmap(lambda key: jax.random.split(key, k))(dropout_keys).reshape(rows * k)
        flat = (batch[name].reshape(rows * k, *batch[name].shape[2:]) for name in ("tokens", "starts", "lengths"))
        log_prob = response_log_probs(
            params, config, *flat, dtype=dtype, chunk=chunk, mesh=mesh, dropout_keys=dropout_keys
        )
        reward = beta * (log_prob.reshape(rows, k) - batch["reference"])
        total, count = ranking_loss(reward, batch["ranks"], batch["valid"])
        return Sums(total, count, ranking_statistics(reward, batch["ranks"], batch["valid"]))

    return loss
