"""Weights in from, and out to, Hugging Face's layout (GPT-1 and GPT-2, safetensors).

    python -m gptjax.convert --from=hf --input=DIR_OR_SAFETENSORS --workdir=runs/gpt2 [--tokenizer=DIR]
    python -m gptjax.convert --to=hf --output=DIR --workdir=runs/x [--step=N|best]

Into a workdir: sample, evaluate and every later stage open it as one of our own; train on from it with
--config.init_from. Out of one: transformers.AutoModelForCausalLM and AutoTokenizer load the directory.
"""

import dataclasses

import jax
import numpy as np
from absl import flags
from etils import epath

from gptjax import config as configs
from gptjax import lock, paths
from gptjax.data.corpus import DataConfig
from gptjax.data.tokenizer import Tokenizer, make_tokenizer
from gptjax.errors import InputError
from gptjax.interop import huggingface
from gptjax.model.spec import parameter_count
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.precision import PrecisionConfig
from gptjax.workdir import load_model


def import_weights(source, workdir, tokenizer_path: str | None = None):
    """A new workdir with the model, tokenizer and weights of a Hugging Face directory, as step 0."""
    workdir = paths.local(workdir)
    if (workdir / "config.json").exists():
        raise InputError(f"{workdir} already holds a run: give a new --workdir.")
    with lock.held(workdir):
        return _import(source, workdir, tokenizer_path)


def _import(source, workdir, tokenizer_path):
    source = paths.expand(str(source))
    config, params = huggingface.read(source)
    tokenizer = _find_tokenizer(source, tokenizer_path)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: they do not belong "
            "together. Give the model's own with --tokenizer=DIR."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(workdir / "tokenizer")
    checkpointer = Checkpointer(workdir)
    checkpointer.save_params(0, jax.tree.map(jax.numpy.asarray, params), {"imported_from": epath.Path(source).name})
    checkpointer.close()
    record = {
        "stage": "convert",
        "seed": 0,
        "model": dataclasses.asdict(config),
        "data": configs.to_json(DataConfig()),
        "precision": configs.to_json(PrecisionConfig()),
    }
    configs.write_json(workdir / "config.json", record)  # last: a workdir with a config is a whole one
    return config


def _find_tokenizer(source, given: str | None) -> Tokenizer:
    if given:
        given = paths.expand(str(given))
        return make_tokenizer(given, list)
    source = epath.Path(source)
    try:
        return make_tokenizer(str(source if source.is_dir() else source.parent), list)
    except InputError as error:
        raise InputError(f"No tokenizer beside the weights ({error}); give one with --tokenizer=DIR.") from error


def export_weights(workdir, output, step: int | str | None = None):
    """A directory that transformers loads, from a workdir's newest good checkpoint, a given step or the 'best' one."""
    model = load_model(workdir, step=step)
    huggingface.write(output, model.config, jax.tree.map(np.asarray, model.params), model.tokenizer)
    return model


def main(_):
    origin, target = FLAGS["from"].value, FLAGS["to"].value
    if (origin is None) == (target is None):
        raise InputError("Give --from=hf with --input and --workdir, or --to=hf with --workdir and --output.")
    if origin:
        if not FLAGS.input:
            raise InputError("--from=hf needs --input=DIR, a directory with config.json and model.safetensors.")
        config = import_weights(FLAGS.input, FLAGS.workdir, FLAGS.tokenizer)
        print(f"{FLAGS.workdir}: {parameter_count(config):,} parameters from {FLAGS.input}")
    else:
        if not FLAGS.output:
            raise InputError("--to=hf needs --output=DIR, a directory to be made.")
        model = export_weights(FLAGS.workdir, FLAGS.output, FLAGS.step)
        print(f"{FLAGS.output}: {parameter_count(model.config):,} parameters of step {model.step}, with the tokenizer")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_enum("from", None, ["hf"], "Where the weights come from.")
    flags.DEFINE_enum("to", None, ["hf"], "Where the weights go.")
    configs.define_path("input", None, "Hugging Face directory or .safetensors file.")
    configs.define_path("output", None, "Directory to write.")
    configs.define_path("workdir", None, "Our workdir: made with --from, read with --to.")
    configs.define_path("tokenizer", None, "Tokenizer directory, if the input has none.")
    configs.define_step()
    flags.mark_flag_as_required("workdir")
    configs.run(main)
