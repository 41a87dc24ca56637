"""Loss, perplexity and bits per byte of a trained model on any text.

    python -m gptjax.evaluate --workdir=runs/x [--source=PATH] [--json]

Without --source: the validation split the run held out. With it: every document of the source, joined by
end-of-text and cut into consecutive windows of the context; each token is scored once.
"""

import json
import math

import jax
import numpy as np
from absl import flags

from gptjax import config as configs
from gptjax.console import progress
from gptjax.data import lm, sources
from gptjax.data.corpus import pretraining_split
from gptjax.errors import InputError
from gptjax.objectives.language import bits_per_byte
from gptjax.parallel.mesh import batch_ways
from gptjax.training.loop import evaluation_sums
from gptjax.training.step import batch_sharding, causal_lm_loss, jit_eval_step
from gptjax.workdir import Model, load_model


def score(model: Model, batches, loss_chunk: int = 128) -> dict:
    """{'loss' nats/token, 'perplexity', 'bits_per_byte', 'tokens', 'bytes', 'step'} over batches of lm.LmBatches."""
    loss = causal_lm_loss(model.config, model.dtype, loss_chunk, model.mesh)
    step, sharding = jit_eval_step(loss, model.mesh), batch_sharding(model.mesh, 0)
    with jax.set_mesh(model.mesh):
        total, count, more = evaluation_sums(step, model.params, batches, sharding)
    mean, n_bytes = total / count, more["target_bytes"]
    return {
        "loss": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": float(bits_per_byte(total, n_bytes)),
        "tokens": int(count),
        "bytes": int(n_bytes),
        "step": model.step,
    }


def main(_):
    model = load_model(FLAGS.workdir, step=FLAGS.step)
    run = configs.read_config(FLAGS.workdir)
    data = run.get("data") or {}
    rows = -(-FLAGS.batch_size // batch_ways(model.mesh.shape)) * batch_ways(model.mesh.shape)
    if FLAGS.source is None:
        try:
            shards = pretraining_split(FLAGS.workdir, "validation")[0][0]
        except InputError as error:
            raise InputError(f"This workdir was not trained on text here ({error}): give --source=PATH.") from error
    else:
        shards = tokenised(FLAGS.source, model.tokenizer, FLAGS.text_field)
    isolate = data.get("isolate_documents", False) and model.tokenizer.eot_id is not None
    batches = lm.validation_batches(
        shards, model.config.context_length, rows,
        byte_lengths=model.tokenizer.byte_lengths, isolate_documents=isolate,
    )  # fmt: skip
    result = score(model, batches)
    if FLAGS.json:
        print(json.dumps(configs.json_safe(result), allow_nan=False))
    else:
        for name, value in result.items():
            print(f"{name:>14}  {value:,.4f}" if isinstance(value, float) else f"{name:>14}  {value:,}")


class tokenised:
    """A source's documents, tokenised in memory, with the interface of TokenShards that lm.py reads."""

    def __init__(self, source: str, tokenizer, text_field: str):
        ids: list[int] = []
        for document in progress(sources.documents(source, text_field=text_field), desc="tokenising", unit="doc"):
            ids += tokenizer.encode(document.text)
            if tokenizer.eot_id is not None:
                ids.append(tokenizer.eot_id)
        self._ids = np.array(ids, np.int32)
        self.eot_id, self.vocab_size = tokenizer.eot_id, tokenizer.vocab_size

    def __len__(self):
        return len(self._ids)

    def read(self, starts, length):
        return self._ids[np.asarray(starts)[:, None] + np.arange(length)]


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "A training run's workdir.")
    flags.DEFINE_string("source", None, "Text to score: a file, a directory, JSONL, Parquet, ...")
    flags.DEFINE_string("text_field", "text", "Field of JSONL and Parquet rows.")
    flags.DEFINE_integer("batch_size", 16, "Sequences at a time.", lower_bound=1)
    flags.DEFINE_integer("step", None, "A checkpoint's step; the newest good one if not given.")
    flags.DEFINE_bool("json", False, "One JSON object.")
    flags.mark_flag_as_required("workdir")
    configs.run(main)
