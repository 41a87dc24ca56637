"""Imports weights of Hugging Face (GPT-1, GPT-2), nanoGPT and OpenAI's GPT-1; exports them for Hugging Face.

    python -m gptjax.convert --from=hf --input=DIR_OR_SAFETENSORS --workdir=runs/gpt2 [--tokenizer=DIR|none]
    python -m gptjax.convert --from=nanogpt --input=out/ckpt.pt --workdir=runs/nano [--tokenizer=DIR|meta.pkl|none]
    python -m gptjax.convert --from=gpt1 --input=finetune-transformer-lm/model --workdir=runs/gpt1
    python -m gptjax.convert --to=hf --output=DIR --workdir=runs/x [--step=N|best] [--max_shard_size=5GB]

Import makes a workdir that sample, evaluate and every later stage use like any other; continue training from it with
--config.init_from. Imported with --tokenizer=none it cannot read or write text: only pre-training can start from it,
with its own tokenizer (--config.data.tokenizer). Export makes a directory that transformers.AutoModelForCausalLM and
AutoTokenizer load. safetensors are read and written in shards too; nanoGPT's pickles are read without executing
anything in them. Whatever is not preserved is printed.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from absl import flags
from etils import epath

from gptjax import command_line, json_files, lock, paths, run_config
from gptjax import config as configs
from gptjax.data.bpe import make_tokenizer
from gptjax.data.corpus import DataConfig
from gptjax.data.records import isolates_documents
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.interop import gpt1, huggingface, nanogpt
from gptjax.interop.hf_tokenizer import CHAT_TEMPLATE, read_json, read_token_ids
from gptjax.model.architecture import require_gpt
from gptjax.model.spec import GPTConfig, parameter_count
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.rlhf.reward_model import load_reward_model
from gptjax.trained import Model, load_model
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.precision import PrecisionConfig

# Sampling defaults of generation_config.json, which are command-line flags here.
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")


def import_weights(source, workdir, tokenizer_path: str | None = None, form: str = "hf"):
    """Makes a workdir with the model, tokenizer and weights of a checkpoint, as step 0.

    Args:
        source: the directory or file: as huggingface.read, nanogpt.read or gpt1.read.
        workdir: to be made; it must not hold a run.
        tokenizer_path: directory of the tokenizer, 'none' = import none, None = next to the weights. For nanoGPT also
            its data set's meta.pkl.
        form: 'hf', 'nanogpt' or 'gpt1'.
    Returns:
        The model's GPTConfig. What is not imported is printed, one line each.
    Raises:
        InputError: as those; no tokenizer, or one that does not fit the model; the workdir holds a run.
    """
    workdir = paths.local(workdir)
    with lock.held(workdir):
        if (workdir / "config.json").exists():
            raise InputError(f"{workdir} already holds a run: give a new --workdir.")
        return _import(paths.expand(str(source)), workdir, tokenizer_path, form)


def _read(source, form: str) -> tuple[GPTConfig, dict, list[str]]:
    """(config, params, notes) of a checkpoint."""
    if form == "nanogpt":
        return nanogpt.read(source)
    return *(gpt1 if form == "gpt1" else huggingface).read(source), []


def _import(source, workdir, tokenizer_path, form):
    config, params, notes = _read(source, form)
    tokenizer = None if tokenizer_path == "none" else _find_tokenizer(source, tokenizer_path, form)
    if form == "nanogpt":
        rows = config.vocab_size
        config, params = nanogpt.without_padding(config, params, tokenizer and tokenizer.vocab_size)
        if config.vocab_size < rows:
            notes.append(f"Of the {rows:,} vocabulary rows the last {rows - config.vocab_size} stand for no token and "
                         "are cut.")  # fmt: skip
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}, so it is not the "
            "model's: give that with --tokenizer=DIR."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(workdir / "tokenizer")
    checkpointer = Checkpointer(workdir)
    checkpointer.save_params(0, _to_device(params), {"imported_from": epath.Path(source).name})
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
        record["template"] = "chat"  # exported by gptjax from a model with this template
    json_files.write_json(workdir / "config.json", record)  # last: a workdir with a config is complete
    for note in notes + _import_notes(_directory(source), config, tokenizer, record):
        print(f"note: {note}")
    return config


def _to_device(params: dict) -> dict:
    """params as JAX's arrays; each numpy array is released when it has been copied, params is empty afterwards."""
    return {k: _to_device(v) if isinstance(v, dict) else jax.numpy.asarray(v) for k, v in _emptied(params)}


def _emptied(params: dict):
    while params:
        key = next(iter(params))
        yield key, params.pop(key)


def _directory(source) -> Path:
    source = Path(source).expanduser()
    return source if source.is_dir() else source.parent


def _settings(directory: Path, name: str) -> dict:
    return read_json(directory / name) if (directory / name).exists() else {}


def _find_tokenizer(source, given: str | None, form: str) -> Tokenizer:
    """The tokenizer, with the end-of-text, begin-of-text and padding ids of the model's own files."""
    directory = _directory(source)
    if form == "nanogpt":
        meta = Path(paths.expand(str(given))) if given else directory / nanogpt.META
        if meta.is_file():
            return nanogpt.read_characters(meta)
    if given:
        tokenizer = make_tokenizer(paths.expand(str(given)), list)
    else:
        try:
            tokenizer = make_tokenizer(str(directory), list)
        except InputError as error:
            raise InputError(
                f"There is no usable tokenizer next to the weights. {error} Give the directory of the model's "
                "tokenizer with --tokenizer=DIR, or import none with --tokenizer=none."
            ) from error
    return tokenizer.for_model(**read_token_ids(directory))


def _import_notes(directory: Path, config, tokenizer: Tokenizer | None, record: dict) -> list[str]:
    notes = []
    if tokenizer is None:
        notes.append("Without a tokenizer this workdir cannot read or write text.")
    elif tokenizer.vocab_size < config.vocab_size:
        notes.append(
            f"The model has {config.vocab_size:,} vocabulary rows and the tokenizer {tokenizer.vocab_size:,} ids: the "
            "other rows are treated as padding and never sampled."
        )
    chat = _settings(directory, "tokenizer_config.json").get("chat_template")
    if "template" not in record and (chat or (directory / "chat_template.jinja").exists()):
        notes.append(
            "Its chat template is not used: sample continues a prompt as plain text, and SFT applies the template of "
            "gptjax/data/chat.py."
        )
    generation = _settings(directory, "generation_config.json")
    unused = [f"{key}={generation[key]}" for key in _SAMPLING if generation.get(key) is not None]
    if unused:
        notes.append(f"Not imported from generation_config.json: {', '.join(unused)}. Use the flags of sample.")
    return notes


def export_weights(workdir, output, step: int | str | None = None, max_shard_size: str = huggingface.MAX_SHARD_SIZE):
    """Writes a directory that transformers loads, from a checkpoint of a workdir.

    Args:
        output: the directory to make; it must not exist, or be empty.
        step: None = the newest intact checkpoint, 'best' = the one with the lowest validation loss.
        max_shard_size: the largest file of weights; a larger model is written in shards.
    Returns:
        The Model that was exported. What the format cannot represent is printed, one line each.
    Raises:
        InputError: as huggingface.write; no such checkpoint.
    """
    run = run_config.read_config(workdir)
    if run["kind"] == "scalar":
        model, head = _reward_model(workdir, step)
    else:
        model, head = load_model(workdir, step=step, needs_tokenizer=False), None
        require_gpt(model.config, "Hugging Face's format")
    huggingface.write(
        output, model.config, jax.tree.map(np.asarray, model.params), model.tokenizer, template=model.template,
        generation=_generation(run), head=head, max_shard_size=max_shard_size,
    )  # fmt: skip
    for note in _export_notes(run, model, isolates_documents(workdir)):
        print(f"note: {note}")
    return model


def _reward_model(workdir, step: int | None) -> tuple[Model, dict]:
    """(trunk, head) of a reward model, with normalized scores."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    scorer = load_reward_model(workdir, mesh=mesh)
    if step not in (None, scorer.step):
        raise InputError(f"--step={step}: a reward model is normalized, and exported, at step {scorer.step} only.")
    trunk, head = scorer.params["trunk"], jax.tree.map(np.asarray, scorer.params["head"])
    return Model(scorer.config, trunk, scorer.tokenizer, scorer.dtype, scorer.step, mesh, scorer.template), head


def _generation(run: dict) -> dict:
    """generation_config.json of a policy: its sampling settings in PPO. Other models have none."""
    rollout = run.get("rollout")
    if not rollout:
        return {}
    # top_k: the default of transformers is 50.
    return {"do_sample": True, "temperature": rollout["temperature"], "top_k": 0, "top_p": 1.0,
            "max_new_tokens": rollout["max_new_tokens"]}  # fmt: skip


def _export_notes(run: dict, model: Model, isolated: bool) -> list[str]:
    notes, tokenizer = [], model.tokenizer
    if "rollout" in run:
        notes.append("The policy's moving average is exported, without the value network and PPO's state.")
    elif run["kind"] == "scalar":
        notes.append(
            "The export is a sequence classifier with one label, whose logit is the normalized score (its bias is "
            "folded into that of the last LayerNorm). The accuracies in reward.json are not exported."
        )
    elif "optimizer" in run:
        notes.append("The optimizer state is not exported: resume training in the workdir.")
    if model.config.mup_base_width is not None:
        notes.append("muP's multipliers are folded into the weights: the same outputs, but training would go on in "
                     "standard parametrization.")  # fmt: skip
    if tokenizer is None:
        return [*notes, "The workdir has no tokenizer, so none is exported."]
    if tokenizer.vocab_size < model.config.vocab_size:
        notes.append(
            f"config.json has vocab_size {model.config.vocab_size:,} and the tokenizer {tokenizer.vocab_size:,} ids: "
            "transformers may sample the others, which have no token."
        )
    if tokenizer.kind == "gpt1":
        notes.append("transformers' OpenAIGPTTokenizer uses neither ftfy nor spaCy: words may differ at punctuation.")
    if model.template == "chat":
        notes.append(
            "The chat template is in tokenizer_config.json. Unlike gptjax, transformers encodes a '<|user|>' in a text "
            "as the special token."
        )
    elif model.template:
        notes.append(f"The template {model.template!r} adds nothing to a prompt, so there is no chat template.")
    if isolated:
        notes.append("The format does not record that the model was pre-trained on isolated documents "
                     "(data.isolate_documents).")  # fmt: skip
    return notes


def main(_):
    origin, target = FLAGS["from"].value, FLAGS["to"].value
    if (origin is None) == (target is None):
        raise InputError("Give --from=hf with --input and --workdir, or --to=hf with --workdir and --output.")
    if origin:
        if not FLAGS.input:
            what = {"hf": "a directory with config.json and model.safetensors", "nanogpt": "nanoGPT's ckpt.pt",
                    "gpt1": "the folder model/ of openai/finetune-transformer-lm"}  # fmt: skip
            raise InputError(f"--from={origin} needs --input=PATH, {what[origin]}.")
        config = import_weights(FLAGS.input, FLAGS.workdir, FLAGS.tokenizer, origin)
        print(f"{FLAGS.workdir}: {parameter_count(config):,} parameters from {FLAGS.input}")
    else:
        if not FLAGS.output:
            raise InputError("--to=hf needs --output=DIR, the directory to make.")
        model = export_weights(FLAGS.workdir, FLAGS.output, FLAGS.step, FLAGS.max_shard_size)
        tokenizer = "" if model.tokenizer is None else ", with the tokenizer"
        print(f"{FLAGS.output}: {parameter_count(model.config):,} parameters of step {model.step}{tokenizer}")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_enum("from", None, ["hf", "nanogpt", "gpt1"], "Format to import weights from.")
    flags.DEFINE_enum("to", None, ["hf"], "Format to export weights to.")
    command_line.define_path("input", None, "What to import: a directory, .safetensors file or ckpt.pt.")
    command_line.define_path("output", None, "Directory to write.")
    command_line.define_path("workdir", None, "Workdir: made with --from, read with --to.")
    command_line.define_path("tokenizer", None, "Tokenizer directory, if the input has none; 'none' to import none.")
    help = "Export files of at most this size, with an index if there are several."
    flags.DEFINE_string("max_shard_size", huggingface.MAX_SHARD_SIZE, help)
    command_line.define_step()
    flags.mark_flag_as_required("workdir")
    command_line.run(main)
