"""Import and export of weights in Hugging Face's GPT-2 and OpenAI-GPT layouts (safetensors, also in shards).

    config, params = read("path/to/gpt2")                 a directory, or one .safetensors file
    write("path/to/export", config, params, tokenizer)    loads with transformers' Auto classes

Arrays are numpy; torch is not needed. The layouts are in layout.py.
"""

import contextlib
import dataclasses
import os
import re
import shutil
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError

from gptjax.errors import InputError
from gptjax.interop import shards
from gptjax.interop.hf_config import ARCHITECTURES, SCORE, model_config, settings_of
from gptjax.interop.hf_tokenizer import dump, read_json, token_ids, write_tokenizer
from gptjax.interop.layout import HEAD, Tensor, assemble, differences, listed, table
from gptjax.model import mup
from gptjax.model.spec import GPTConfig

MAX_SHARD_SIZE = "5GB"
PREFIX = "transformer."  # of every tensor but the head; absent from files of the bare model
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|position_ids")  # causal masks and position ids, not weights


# --- import ---------------------------------------------------------------------------------------------------


def read(source: str | os.PathLike) -> tuple[GPTConfig, dict]:
    """Reads a GPT-2 or OpenAI-GPT checkpoint.

    Args:
        source: a directory with model.safetensors (or shards and their index), or a .safetensors file, with config.json
            in the same directory. Without config.json the sizes come from the tensors' shapes, with d_head 64 as in
            every published GPT-1 and GPT-2.
    Returns:
        (config, params): params with the tree of gptjax.model.gpt.init, in numpy float32 (float16 and bfloat16 are
        converted). The head is tied unless config.json unties it or the file has a different one.
    Raises:
        InputError: a missing or damaged file; an unsupported architecture (the message names the key of config.json);
        missing, extra or mis-shaped tensors (all in one message); NaN or infinite values.
    """
    file, settings, where = _locate(local(source))
    with contextlib.ExitStack() as stack:
        tensors = _open(file, stack)
        config = model_config(settings, tensors, where)
        if config.tied_head:
            tensors.pop(HEAD, None)  # a copy of the embedding
        params = assemble(
            config.n_layer, table(config), tensors, where=where,
            wrong=f"{where} is not the {config.n_layer}-layer {ARCHITECTURES[config.norm]} that its config.json or its "
            "tensors' shapes describe:",
            fix="Use a config.json and safetensors that were saved together, without extra heads.",
        )  # fmt: skip
    return config, unflatten_dict(params, sep="/")


def local(path: str | os.PathLike) -> Path:
    """A path on this machine, ~ being the home folder. InputError: a URL."""
    if "://" in os.fspath(path):
        raise InputError(f"{path} is not a local path: copy the directory to this machine (gcloud storage cp -r).")
    return Path(path).expanduser()


def _locate(source: Path) -> tuple[Path, dict | None, Path]:
    """(safetensors file or index of shards, contents of config.json or None, path for messages) of a checkpoint."""
    directory = source if source.is_dir() else source.parent
    pickles = sorted(source.glob("pytorch_model*.bin")) if source.is_dir() else [source]
    index, single = directory / shards.INDEX, directory / shards.SINGLE
    if not source.exists():
        raise InputError(
            f"{source} does not exist: give a directory with model.safetensors, or that file. Download a model of the "
            "Hub first: hf download NAME --local-dir DIR."
        )
    if source.is_file() and source.name.endswith((".safetensors", ".safetensors.index.json")):
        file = source
    elif source.is_dir() and single.exists():
        file = single
    elif source.is_dir() and index.exists():
        file = index
    elif source.is_dir() and len(found := list(source.glob("*.safetensors"))) == 1:
        file = found[0]
    elif pickles:
        raise InputError(
            f"{pickles[0]} is not a safetensors file. Pickles are not read because they can execute code. Convert "
            'it if you trust it: python -c "from transformers import AutoModelForCausalLM '
            f"as M; M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\""
        )
    else:
        raise InputError(
            f"{source} contains no model.safetensors or model.safetensors.index.json: give a directory that does, or "
            "the .safetensors file itself."
        )
    settings = directory / "config.json"
    return file, read_json(settings) if settings.exists() else None, source


def _open(file: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """All weights of a checkpoint, by name without prefix. Only the headers are read."""
    found = shards.open_sharded(file, stack) if file.suffix == ".json" else shards.open_single(file, stack)
    tensors = {}
    for name, tensor in found.items():
        short = name.removeprefix(PREFIX)
        if not BUFFERS.fullmatch(short):
            # If a weight occurs with and without prefix, the second keeps its full name and is reported as extra.
            tensors[name if short in tensors else short] = tensor
    return tensors


# --- export --------------------------------------------------------------------------------------------------


def write(directory: str | os.PathLike, config: GPTConfig, params, tokenizer=None, *, template: str | None = None,
          generation: dict | None = None, head: dict | None = None,
          max_shard_size: str = MAX_SHARD_SIZE) -> None:  # fmt: skip
    """Writes a directory that transformers' AutoModelForCausalLM and AutoTokenizer load, in float32.

    With a scalar head it is for AutoModelForSequenceClassification, whose logit at a text's last non-padding token is
    the score.

    Args:
        directory: must not exist, or be empty. It is written atomically.
        config, params: as from gptjax.model.gpt.init; jax or numpy arrays. muP's multipliers are folded in (mup.fold).
        tokenizer: a gptjax.data.tokenizer.Tokenizer, or None to write no tokenizer files.
        template: kind of the Template (data/chat.py) that the model was trained with; 'chat' adds a chat_template.
        generation: further settings for generation_config.json.
        head: of a reward model, {'kernel' [d_model], 'bias' []}; params are then its trunk's.
        max_shard_size: the largest file of weights, as '5GB'; more are written as shards with an index.
    Raises:
        InputError: banded attention, which neither layout supports; a directory that is not empty; a full disk;
        parameters that do not match the configuration, or are not finite; a tokenizer with more ids than the model.
    """
    directory, largest = local(directory), shards.parse_size(max_shard_size)
    _check_export(directory, config, tokenizer)
    config, params = mup.fold(config, params)
    if head is not None:
        config, params = dataclasses.replace(config, tied_head=True), _with_bias(config, params, head)
    tensors = _tensors(config, params)
    if head is not None:
        tensors[SCORE] = _tensor(SCORE, np.asarray(head["kernel"])[None], (1, config.d_model))
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor.load()).all()]:
        raise InputError(
            f"The parameters have NaN or infinite values in {listed(broken)}: every output would be NaN. Export an "
            "earlier checkpoint with --step."
        )
    temporary = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        shards.write(temporary, tensors, largest)
        of_config, of_generation = token_ids(tokenizer)
        dump(temporary / "config.json", settings_of(config, of_config, scorer=head is not None))
        if head is None:
            dump(temporary / "generation_config.json", of_generation | (generation or {}))
        if tokenizer is not None:
            write_tokenizer(temporary, config.context_length, tokenizer, template)
        temporary.replace(directory)  # also replaces an empty directory
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{directory} could not be written ({error}), and no files were left behind. Free some space or give "
            "another directory."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tensors(config: GPTConfig, params) -> dict[str, Tensor]:
    """The tensors of an export in transformers' order, layer by layer. InputError: parameters of another config."""
    rows = {row.ours: row for row in table(config)}
    flat = flatten_dict(params, sep="/")
    expected = {name: (config.n_layer,) * row.stacked + row.shape_here for name, row in rows.items()}
    if faults := differences(expected, {name: np.shape(array) for name, array in flat.items()}):
        raise InputError(
            "\n  ".join(["The parameters do not match the configuration:", *faults])
            + "\nGive the configuration that they were trained with."
        )
    arrays = {name: np.asarray(flat[name]) for name in rows}
    stacked = [row for row in rows.values() if row.stacked]
    first, last = ([name for name in rows if name.startswith(start)] for start in (("w",), ("ln_f", "lm_head")))
    order = [(rows[name], arrays[name], None) for name in first]
    order += [(row, arrays[row.ours], i) for i in range(config.n_layer) for row in stacked]
    order += [(rows[name], arrays[name], None) for name in last]
    tensors = {}
    for row, array, i in order:
        name = (row.theirs if row.theirs == HEAD else PREFIX + row.theirs).format(i)
        tensors[name] = _tensor(name, array if i is None else array[i], row.shape)
    return tensors


def _tensor(name: str, array: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, shape, "F32", lambda: np.asarray(array, np.float32).reshape(shape))


def _with_bias(config, params, head):
    """The trunk with the score's bias folded in, because the head of transformers' classifier has none: a multiple of
    the kernel is added to the bias of the last LayerNorm, which only the head reads."""
    kernel = np.asarray(head["kernel"], np.float64)
    if not kernel.any():
        raise InputError("The reward model's head is zero, so it gives every text the same score: train it first.")
    shift = (float(head["bias"]) / (kernel @ kernel) * kernel).astype(np.float32)
    flat, name = flatten_dict(params, sep="/"), "ln_f/bias" if config.norm == "pre" else "blocks/ln_2/bias"
    biases = np.array(flat[name])  # a copy of this one alone
    biases[... if config.norm == "pre" else -1] += shift
    return unflatten_dict(flat | {name: biases}, sep="/")


def _check_export(directory, config, tokenizer):
    window = config.local_window
    if any(map(config.is_local, range(config.n_layer))) and window < config.context_length:
        raise InputError(
            f"model.local_window={window} is narrower than model.context_length={config.context_length}, but Hugging "
            "Face's GPT-2 has no banded attention and would compute other outputs: export a model with "
            "model.local_window=None."
        )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} ids and the model {config.vocab_size}: give the tokenizer that "
            "the model was trained with."
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not an empty directory: give another path, or remove it.")
