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
from gptjax.parallel.sharding import shared


def response_log_probs(params, config: GPTConfig, tokens_BT, starts_B, lengths_B, *, dtype, chunk: int, mesh=None,
                       dropout_keys=None):  # fmt: skip
    """log pi(response | prompt), summed over the response's tokens: float32 [B].

    Args:
        tokens_BT: int, prompt and response, padded on the right. starts_B, lengths_B: int; the response of a row is
            tokens[start : length].
        chunk: time steps whose logits are held at once. dropout_keys: of the rows [B], or None.
    """
    # Over all T positions, the last of which predicts nothing: T divides over the mesh, T - 1 does not.
    x_BTD = gpt.hidden(params, config, tokens_BT, dtype=dtype, mesh=mesh, dropout_keys=dropout_keys)
    w_VD = gpt.unembedding(params, config)
    log_prob_BT = token_log_probs(x_BTD, w_VD, jnp.roll(tokens_BT, -1, axis=1), 1.0, chunk)
    place_T = jnp.arange(1, tokens_BT.shape[1] + 1)
    response_BT = (place_T >= starts_B[:, None]) & (place_T < lengths_B[:, None])
    return jnp.where(response_BT, log_prob_BT, 0.0).sum(1)


@shared
def dpo_objective(config: GPTConfig, beta: float, dtype, chunk: int, mesh=None):
    """The loss of an Objective, summed over prompts. Micro-batch: tokens [B, N, T], starts, lengths, ranks, valid, and
    reference, the reference's log-probability of each completion, [B, N]."""

    def loss(params, batch, dropout_keys_B) -> Sums:
        B, N, _ = batch["tokens"].shape
        keys = None
        if dropout_keys_B is not None:  # each completion's own
            keys = jax.vmap(lambda key: jax.random.split(key, N))(dropout_keys_B).reshape(B * N)
        flat = (batch[name].reshape(B * N, *batch[name].shape[2:]) for name in ("tokens", "starts", "lengths"))
        log_prob = response_log_probs(params, config, *flat, dtype=dtype, chunk=chunk, mesh=mesh, dropout_keys=keys)
        reward_BN = beta * (log_prob.reshape(B, N) - batch["reference"])
        total, count = ranking_loss(reward_BN, batch["ranks"], batch["valid"])
        return Sums(total, count, ranking_statistics(reward_BN, batch["ranks"], batch["valid"]))

    return loss
