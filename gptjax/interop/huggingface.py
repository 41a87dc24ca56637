"""Import and export of weights in Hugging Face's GPT-2 and OpenAI-GPT layouts (safetensors).

    config, params = read("path/to/gpt2")                 a directory, or one .safetensors file
    write("path/to/export", config, params, tokenizer)    loads with transformers' Auto classes

Arrays are numpy; torch is not needed. Like gptjax, both layouts store weights as [in, out] (transformers' Conv1D). They
differ in that q, k and v are concatenated and that our tensors are stacked over layers. Sources: transformers'
modeling_gpt2.py and modeling_openai.py.
"""

import contextlib
import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors does not do itself)
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptjax.errors import InputError
from gptjax.interop.hf_config import ARCHITECTURES, HEAD, SCORE, embedding_names, model_config, settings_of
from gptjax.interop.hf_tokenizer import dump, read_json, token_ids, write_tokenizer
from gptjax.model.spec import GPTConfig

_PREFIX = "transformer."  # of every tensor but the head; absent from files of the bare model
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|position_ids")  # causal masks and position ids, not weights
_FLOATS = ("F64", "F32", "F16", "BF16")


class Row(NamedTuple):
    """A parameter of gptjax and the corresponding Hugging Face tensor."""

    ours: str  # path in the parameter tree; those under blocks/ are stacked [layer, ...]
    theirs: str  # Hugging Face name without prefix; {} is the layer
    shape: tuple[int, ...]  # of the Hugging Face tensor
    shape_here: tuple[int, ...]  # of one layer of ours: a reshape of the former


def table(config: GPTConfig) -> list[Row]:
    """The Row of every parameter of a model."""
    V, T, D, F = config.vocab_size, config.context_length, config.d_model, config.d_ff
    wte, wpe = embedding_names(config.norm)

    def row(ours, theirs, shape, shape_here=None):
        return Row(ours, theirs, shape, shape_here or shape)

    rows = [
        row("wte", wte, (V, D)),
        row("wpe", wpe, (T, D)),
        row("blocks/ln_1/scale", "h.{}.ln_1.weight", (D,)),
        row("blocks/ln_1/bias", "h.{}.ln_1.bias", (D,)),
        row("blocks/attn/c_attn/kernel", "h.{}.attn.c_attn.weight", (D, 3 * D), (D, 3, D)),
        row("blocks/attn/c_attn/bias", "h.{}.attn.c_attn.bias", (3 * D,), (3, D)),
        row("blocks/attn/c_proj/kernel", "h.{}.attn.c_proj.weight", (D, D)),
        row("blocks/attn/c_proj/bias", "h.{}.attn.c_proj.bias", (D,)),
        row("blocks/ln_2/scale", "h.{}.ln_2.weight", (D,)),
        row("blocks/ln_2/bias", "h.{}.ln_2.bias", (D,)),
        row("blocks/mlp/c_fc/kernel", "h.{}.mlp.c_fc.weight", (D, F)),
        row("blocks/mlp/c_fc/bias", "h.{}.mlp.c_fc.bias", (F,)),
        row("blocks/mlp/c_proj/kernel", "h.{}.mlp.c_proj.weight", (F, D)),
        row("blocks/mlp/c_proj/bias", "h.{}.mlp.c_proj.bias", (D,)),
    ]
    if config.norm == "pre":
        rows += [row("ln_f/scale", "ln_f.weight", (D,)), row("ln_f/bias", "ln_f.bias", (D,))]
    if not config.tied_head:
        rows.append(row("lm_head", HEAD, (V, D)))
    return rows


# --- import ---------------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A tensor in an open file, read by `load`."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str

    def load(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


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
    files, settings, where = _locate(_local(source))
    with contextlib.ExitStack() as stack:
        tensors = _open(files, stack)
        config = model_config(settings, tensors, where)
        if config.tied_head:
            tensors.pop(HEAD, None)  # a copy of the embedding
        rows = table(config)
        layers = {row.ours: range(config.n_layer) if "{}" in row.theirs else (0,) for row in rows}
        expected = {row.theirs.format(i): row.shape for row in rows for i in layers[row.ours]}
        faults = _differences(expected, {name: tensor.shape for name, tensor in tensors.items()})
        faults += [
            f"{name}: expected floating-point numbers, found {tensor.dtype}"
            for name, tensor in tensors.items()
            if name in expected and tensor.dtype not in _FLOATS
        ]
        if faults:
            raise InputError(
                f"{where} is not the {config.n_layer}-layer {ARCHITECTURES[config.norm]} that its config.json or its "
                "tensors' shapes describe:"
                + "".join(f"\n  {fault}" for fault in faults)
                + "\nUse a config.json and safetensors that were saved together, without extra heads."
            )
        params, broken = {}, []
        for row in rows:
            # Copy one tensor at a time into the stack, so that memory holds the model only once.
            stacked = np.empty((len(layers[row.ours]), *row.shape_here), np.float32)
            for i in layers[row.ours]:
                tensor = tensors[row.theirs.format(i)]
                with np.errstate(over="ignore"):  # a float64 that overflows float32 is reported below
                    stacked[i] = tensor.load().reshape(row.shape_here)
                if not np.isfinite(stacked[i]).all():
                    broken.append(tensor.name)
            params[row.ours] = stacked if "{}" in row.theirs else stacked[0]
    if broken:
        raise InputError(
            f"{where} has NaN or infinite values in {_listed(broken)}: every output would be NaN. Download the file "
            "again, or use an earlier checkpoint."
        )
    return config, unflatten_dict(params, sep="/")


def _listed(names) -> str:
    more = f" and {len(names) - 10} more tensors" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _local(path):
    if "://" in os.fspath(path):
        raise InputError(f"{path} is not a local path: copy the directory to this machine (gcloud storage cp -r).")
    return Path(path).expanduser()


def _locate(source: Path) -> tuple[list[Path], dict | None, Path]:
    """(safetensors files, contents of config.json or None, path for messages) of a checkpoint."""
    directory = source if source.is_dir() else source.parent
    pickles = sorted(source.glob("pytorch_model*.bin")) if source.is_dir() else [source]
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not source.exists():
        raise InputError(
            f"{source} does not exist: give a directory with model.safetensors, or that file. Download a model of the "
            "Hub first: hf download NAME --local-dir DIR."
        )
    if source.suffix == ".safetensors" and source.is_file():
        files = [source]
    elif source.is_dir() and single.exists():
        files = [single]
    elif source.is_dir() and index.exists():
        files = _shards(index)
    elif source.is_dir() and len(found := list(source.glob("*.safetensors"))) == 1:
        files = found
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
    return files, read_json(settings) if settings.exists() else None, source


def _shards(index):
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or any(Path(str(name)).name != name for name in names.values()):
        raise InputError(f"{index} has no valid weight_map from tensors to file names: download it again.")
    files = [index.parent / name for name in sorted(set(names.values()))]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise InputError(f"{index} names missing shards: {', '.join(absent)}. Put them in the same directory.")
    return files


def _open(files, stack) -> dict[str, _Tensor]:
    """All weights of the files, by name without prefix. Only the headers are read."""
    tensors = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            with contextlib.suppress(OSError), open(path, "rb") as pointer:
                if pointer.read(40).startswith(b"version https://git-lfs"):
                    raise InputError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull.") from None
            raise InputError(f"{path} is damaged or not a safetensors file ({error}): download it again.") from None
        for name in file.keys():
            short = name.removeprefix(_PREFIX)
            if not _BUFFERS.fullmatch(short):
                view = file.get_slice(name)
                # If a weight occurs with and without prefix, the second keeps its full name and is reported as extra.
                key = name if short in tensors else short
                tensors[key] = _Tensor(file, name, tuple(view.get_shape()), view.get_dtype())
    return tensors


def _differences(expected, found) -> list[str]:
    """One line per missing, mis-shaped or extra tensor; expected, found: {name: shape}."""
    missing = [f"missing {name}: expected shape {list(shape)}" for name, shape in expected.items() if name not in found]
    misshaped = [
        f"mis-shaped {name}: expected shape {list(shape)}, found {list(found[name])}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    extra = [
        f"extra {name}: expected none, found shape {list(shape)}"
        for name, shape in found.items()
        if name not in expected
    ]
    return missing + misshaped + extra


# --- export --------------------------------------------------------------------------------------------------


def write(directory: str | os.PathLike, config: GPTConfig, params, tokenizer=None, *, template: str | None = None,
          generation: dict | None = None, head: dict | None = None) -> None:  # fmt: skip
    """Writes a directory that transformers' AutoModelForCausalLM and AutoTokenizer load, in float32.

    With a scalar head it is for AutoModelForSequenceClassification, whose logit at a text's last non-padding token is
    the score.

    Args:
        directory: must not exist, or be empty. It is written atomically.
        config, params: as from gptjax.model.gpt.init; jax or numpy arrays.
        tokenizer: a gptjax.data.tokenizer.Tokenizer, or None to write no tokenizer files.
        template: kind of the Template (data/chat.py) that the model was trained with; 'chat' adds a chat_template.
        generation: further settings for generation_config.json.
        head: of a reward model, {'kernel' [d_model], 'bias' []}; params are then its trunk's.
    Raises:
        InputError: banded attention, which neither layout supports; a directory that is not empty; a full disk;
        parameters that do not match the configuration, or are not finite; a tokenizer with more ids than the model.
    """
    directory = _local(directory)
    _check_export(directory, config, tokenizer)
    if head is not None:
        config, params = dataclasses.replace(config, tied_head=True), _with_bias(config, params, head)
    flat = flatten_dict(params, sep="/")
    tensors, expected = {}, {}
    for row in table(config):
        stacked = "{}" in row.theirs
        expected[row.ours] = ((config.n_layer,) if stacked else ()) + row.shape_here
        name = row.theirs if row.theirs == HEAD else _PREFIX + row.theirs
        if tuple(np.shape(flat.get(row.ours))) == expected[row.ours]:
            array = np.asarray(flat[row.ours], np.float32)
            for i, tensor in enumerate(array if stacked else [array]):
                tensors[name.format(i)] = np.ascontiguousarray(tensor).reshape(row.shape)
    if faults := _differences(expected, {name: np.shape(array) for name, array in flat.items()}):
        raise InputError(
            "The parameters do not match the configuration:"
            + "".join(f"\n  {fault}" for fault in faults)
            + "\nGive the configuration that they were trained with."
        )
    if head is not None:
        tensors[SCORE] = np.asarray(head["kernel"], np.float32)[None]
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise InputError(
            f"The parameters have NaN or infinite values in {_listed(broken)}: every output would be NaN. Export an "
            "earlier checkpoint with --step."
        )
    temporary = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
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


def _with_bias(config, params, head):
    """The trunk with the score's bias folded in, because the head of transformers' classifier has none: a multiple of
    the kernel is added to the bias of the last LayerNorm, which only the head reads."""
    kernel = np.asarray(head["kernel"], np.float64)
    if not kernel.any():
        raise InputError("The reward model's head is zero, so it gives every text the same score: train it first.")
    shift = (float(head["bias"]) / (kernel @ kernel) * kernel).astype(np.float32)
    flat = {name: np.array(array) for name, array in flatten_dict(params, sep="/").items()}
    last = flat["ln_f/bias"] if config.norm == "pre" else flat["blocks/ln_2/bias"][-1]
    last += shift
    return unflatten_dict(flat, sep="/")


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
