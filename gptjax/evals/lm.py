"""Language-model loss on held-out text."""

from collections.abc import Mapping

from gptjax.data.corpus import Text
from gptjax.data.lm import LmBatches
from gptjax.evals.base import evaluation_sums
from gptjax.objectives.lm import bits_per_byte
from gptjax.parallel.sharding import batch_sharding
from gptjax.training.stage import Evaluation
from gptjax.training.step import jit_eval_step


def text_loss(loss, text: Text, batches: Mapping[str, LmBatches], mesh):
    """Returns evaluate(state) -> Evaluation: 'loss' in nats per token, 'bits_per_byte' and 'tokens' of a validation
    split; for a mixture the weighted means, and 'loss/<name>' of each part.

    loss: of an Objective. batches: of text.validation_batches.
    """
    step, sharding = jit_eval_step(loss, mesh), batch_sharding(mesh, 0)

    def evaluate(state) -> Evaluation:
        return Evaluation(
            text.figures({k: evaluation_sums(step, state.params, v, sharding) for k, v in batches.items()})
        )

    return evaluate


def response_loss(loss, batches, mesh):
    """Returns evaluate(state) -> Evaluation: 'loss' in nats per response token, 'bits_per_byte' and 'tokens' over
    batches of demonstrations."""
    step, sharding = jit_eval_step(loss, mesh), batch_sharding(mesh, 0)

    def evaluate(state) -> Evaluation:
        total, count, more = evaluation_sums(step, state.params, batches, sharding)
        bits = float(bits_per_byte(total, max(more["target_bytes"], 1)))
        return Evaluation({"loss": total / max(count, 1), "bits_per_byte": bits, "tokens": int(count)})

    return evaluate
