"""The loss of SFT: the language-model loss of the responses, with GPT-1's auxiliary term on the prompts if wanted."""

import functools

from gptjax.model.spec import GPTConfig
from gptjax.objectives.finetune import auxiliary_weights
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.sharding import shared


@shared
def sft_loss(model: GPTConfig, dtype, chunk: int, mesh=None):
    """The loss of an Objective: the language-model loss under the batch's token weights. The count is that of the
    task's tokens: `task` if there is an auxiliary term (weigher), else `weights`."""
    language_model = causal_lm_loss(model, dtype, chunk, mesh)

    def loss(params, batch, dropout_keys):
        total, _ = language_model(params, batch, dropout_keys)
        return total, batch.get("task", batch["weights"]).sum()

    return loss


@functools.cache
def weigher(lm_weight: float):
    """Returns the `prepare` of an Objective, which adds GPT-1's auxiliary term (eq. 5) to the token weights of a whole
    batch, [M, B, T]; the identity if lm_weight is 0."""
    if not lm_weight:
        return lambda batch: batch

    def weigh(batch):
        task = batch["weights"]
        return batch | {"task": task, "weights": auxiliary_weights(task, batch["lm_weights"], lm_weight)}

    return weigh
