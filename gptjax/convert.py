"""Weights in from, and out to, Hugging Face's layout (GPT-1 and GPT-2, safetensors).

    python -m gptjax.convert --from=hf --input=DIR_OR_SAFETENSORS --workdir=runs/gpt2 [--tokenizer=DIR|none]
    python -m gptjax.convert --to=hf --output=DIR --workdir=runs/x [--step=N|best]

Into a workdir: sample, evaluate and every later stage open it as one of our own; train on from it with
--config.init_from. With --tokenizer=none it reads and writes no text: pre-training goes on from it with a tokenizer
of its own (--config.data.tokenizer), the other commands say what is missing. Out of one:
transformers.AutoModelForCausalLM and AutoTokenizer load the directory; what the format cannot keep is printed.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from absl import flags
from etils import epath

from gptjax import command_line, json_files, lock, paths, run_config
from gptjax import config as configs
from gptjax.data.corpus import DataConfig, isolates_documents
from gptjax.data.tokenizer import Tokenizer, make_tokenizer
from gptjax.errors import InputError
from gptjax.interop import huggingface
from gptjax.interop.hf_tokenizer import CHAT_TEMPLATE, read_json, read_token_ids
from gptjax.model.spec import parameter_count
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.rlhf.reward_model import load_reward_model
from gptjax.trained import Model, load_model
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.precision import PrecisionConfig

# What sampling would do by default there; here it is said on the command line.
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")


def import_weights(source, workdir, tokenizer_path: str | None = None):
    """A new workdir with the model, tokenizer and weights of a Hugging Face directory, as step 0.

    tokenizer_path: a directory with the tokenizer, 'none' to do without one, None = beside the weights. What of the
    directory is not used is printed, a line each.
    """
    workdir = paths.local(workdir)
    with lock.held(workdir):
        if (workdir / "config.json").exists():
            raise InputError(f"{workdir} already holds a run: give a new --workdir.")
        return _import(source, workdir, tokenizer_path)


def _import(source, workdir, tokenizer_path):
    source = paths.expand(str(source))
    config, params = huggingface.read(source)
    tokenizer = None if tokenizer_path == "none" else _find_tokenizer(source, tokenizer_path)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: they do not belong "
            "together. Give the model's own with --tokenizer=DIR."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(workdir / "tokenizer")
    checkpointer = Checkpointer(workdir)
    checkpointer.save_params(0, jax.tree.map(jax.numpy.asarray, params), {"imported_from": epath.Path(source).name})
    checkpointer.close()
    record = {
        "stage": "convert",
        "kind": "lm",
        "without_tokenizer": tokenizer is None,
        "seed": 0,
        "model": dataclasses.asdict(config),
        "data": configs.to_json(DataConfig()),
        "precision": configs.to_json(PrecisionConfig()),
    }
    settings = _settings(_directory(source), "tokenizer_config.json")
    if tokenizer is not None and settings.get("chat_template") == CHAT_TEMPLATE:
        record["template"] = "chat"  # an export of ours comes back as what it was
    json_files.write_json(workdir / "config.json", record)  # last: a workdir with a config is a whole one
    for note in _import_notes(_directory(source), config, tokenizer, record):
        print(f"note: {note}")
    return config


def _directory(source) -> Path:
    source = Path(source).expanduser()
    return source if source.is_dir() else source.parent


def _settings(directory: Path, name: str) -> dict:
    return read_json(directory / name) if (directory / name).exists() else {}


def _find_tokenizer(source, given: str | None) -> Tokenizer:
    """With the ids that end a text, begin one and pad, as the model's own files have them."""
    directory = _directory(source)
    if given:
        tokenizer = make_tokenizer(paths.expand(str(given)), list)
    else:
        try:
            tokenizer = make_tokenizer(str(directory), list)
        except InputError as error:
            raise InputError(
                f"No tokenizer beside the weights ({error}). Give the directory of the model's own with "
                "--tokenizer=DIR, or do without with --tokenizer=none."
            ) from error
    return tokenizer.for_model(**read_token_ids(directory))


def _import_notes(directory: Path, config, tokenizer: Tokenizer | None, record: dict) -> list[str]:
    notes = []
    if tokenizer is None:
        notes.append("without a tokenizer this workdir reads and writes no text")
    elif tokenizer.vocab_size < config.vocab_size:
        notes.append(
            f"the model has {config.vocab_size:,} rows and the tokenizer {tokenizer.vocab_size:,} ids: the other rows "
            "are taken for padding and never sampled"
        )
    chat = _settings(directory, "tokenizer_config.json").get("chat_template")
    if "template" not in record and (chat or (directory / "chat_template.jinja").exists()):
        notes.append(
            "its chat template is not used: sample continues a prompt as text, and SFT puts the template of "
            "gptjax/data/chat.py around it"
        )
    generation = _settings(directory, "generation_config.json")
    unused = [f"{key}={generation[key]}" for key in _SAMPLING if generation.get(key) is not None]
    if unused:
        notes.append(f"generation_config.json's {', '.join(unused)} not kept: give sample the flags of that name")
    return notes


def export_weights(workdir, output, step: int | str | None = None):
    """A directory that transformers loads, from a workdir's newest good checkpoint, a given step or the 'best' one.

    What the format cannot keep is printed, a line each.
    """
    run = run_config.read_config(workdir)
    if run["kind"] == "scalar":
        model, head = _reward_model(workdir, step)
    else:
        model, head = load_model(workdir, step=step, needs_tokenizer=False), None
    huggingface.write(
        output, model.config, jax.tree.map(np.asarray, model.params), model.tokenizer, template=model.template,
        generation=_generation(run), head=head,
    )  # fmt: skip
    for note in _export_notes(run, model, isolates_documents(workdir)):
        print(f"note: {note}")
    return model


def _reward_model(workdir, step: int | None) -> tuple[Model, dict]:
    """(trunk, head) of a reward model, normalized."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    judge = load_reward_model(workdir, mesh=mesh)
    if step not in (None, judge.step):
        raise InputError(f"--step={step}: a reward model is exported as it was normalized, at step {judge.step}.")
    trunk, head = judge.params["trunk"], jax.tree.map(np.asarray, judge.params["head"])
    return Model(judge.config, trunk, judge.tokenizer, judge.dtype, judge.step, mesh, judge.template), head


def _generation(run: dict) -> dict:
    """How a policy was sampled in training: what it is to be sampled like. Other models have no such setting."""
    rollout = run.get("rollout")
    if not rollout:
        return {}
    # top_k: transformers would take 50.
    return {"do_sample": True, "temperature": rollout["temperature"], "top_k": 0, "top_p": 1.0,
            "max_new_tokens": rollout["max_new_tokens"]}  # fmt: skip


def _export_notes(run: dict, model: Model, isolated: bool) -> list[str]:
    notes, tokenizer = [], model.tokenizer
    if "rollout" in run:
        notes.append("exported is the policy's moving average; its value network and PPO's state are not")
    elif run["kind"] == "scalar":
        notes.append(
            "exported is a sequence classifier of one label, whose logit is the normalized score (its bias is in the "
            "last LayerNorm's); reward.json's accuracies are not in the format"
        )
    elif "optimizer" in run:
        notes.append("the optimizer's state is not exported: training is resumed in the workdir")
    if tokenizer is None:
        return [*notes, "the workdir has no tokenizer, so none is exported"]
    if tokenizer.vocab_size < model.config.vocab_size:
        notes.append(
            f"config.json says vocab_size {model.config.vocab_size:,} and the tokenizer has {tokenizer.vocab_size:,} "
            "ids: there is no token for the others, which transformers may sample"
        )
    if tokenizer.kind == "gpt1":
        notes.append("transformers' OpenAIGPTTokenizer has no ftfy and no spaCy: words at punctuation may differ")
    if model.template == "chat":
        notes.append(
            "the chat template is in tokenizer_config.json; transformers turns a '<|user|>' that stands in a text into "
            "that token, which does not happen here"
        )
    elif model.template:
        notes.append(f"the template {model.template!r} puts nothing around a prompt: there is no chat template")
    if isolated:
        notes.append("that the model was pre-trained on documents isolated from each other (data.isolate_documents) is "
                     "not in the format")  # fmt: skip
    return notes


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
        beside = "" if model.tokenizer is None else ", with the tokenizer"
        print(f"{FLAGS.output}: {parameter_count(model.config):,} parameters of step {model.step}{beside}")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_enum("from", None, ["hf"], "Where the weights come from.")
    flags.DEFINE_enum("to", None, ["hf"], "Where the weights go.")
    command_line.define_path("input", None, "Hugging Face directory or .safetensors file.")
    command_line.define_path("output", None, "Directory to write.")
    command_line.define_path("workdir", None, "Our workdir: made with --from, read with --to.")
    command_line.define_path("tokenizer", None, "Tokenizer directory, if the input has none; 'none' to do without one.")
    command_line.define_step()
    flags.mark_flag_as_required("workdir")
    command_line.run(main)
