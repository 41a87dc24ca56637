"""Import of nanoGPT's checkpoints (ckpt.pt), without torch.

The layout is GPT-2's with torch's Linear layers ([out, in]) and a head that is the token embedding. Source:
karpathy/nanoGPT model.py, train.py, data/shakespeare_char/prepare.py.
"""

import dataclasses

import numpy as np
from flax.traverse_util import unflatten_dict

from gptjax.data.bpe import character_tokenizer_of
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.interop import torch_file
from gptjax.interop.hf_config import is_tied
from gptjax.interop.huggingface import BUFFERS, PREFIX, local
from gptjax.interop.layout import HEAD, Tensor, assemble, table
from gptjax.model.spec import GPT2_VOCAB, GPTConfig

CHECKPOINT, META = "ckpt.pt", "meta.pkl"
_COMPILED = "_orig_mod."  # torch.compile's prefix of every name
_SIZES = ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")
_PADDING = 64  # nanoGPT's vocabulary is a multiple of it: 50,304 rows for GPT-2's 50,257 tokens


def read(source) -> tuple[GPTConfig, dict, list[str]]:
    """Reads a checkpoint of nanoGPT.

    Args:
        source: ckpt.pt, or the directory that has it.
    Returns:
        (config, params, notes): params with the tree of gptjax.model.gpt.init, in numpy float32, with biases of zero
        where the checkpoint has none. notes: what differs, a sentence each.
    Raises:
        InputError: no such file, a damaged one, or one with more than tensors and plain data; another architecture;
        missing, extra or mis-shaped tensors (all in one message); NaN or infinite values.
    """
    path = local(source)
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path} does not exist: give nanoGPT's {CHECKPOINT}, or its out_dir.")
    with torch_file.opened(path) as content:
        tensors, arguments = _parts(path, content)
        biased = arguments.get("bias", True)  # the first versions always had biases
        config = _config(path, arguments, tensors)
        if config.tied_head:
            tensors.pop(HEAD, None)
        rows = [row._replace(shape=row.shape[::-1], transposed=True) if row.ours.endswith("/kernel") else row
                for row in table(config)]  # fmt: skip
        zeros = [] if biased else [row for row in rows if row.ours.endswith("/bias")]
        params = assemble(
            config.n_layer, [row for row in rows if row not in zeros], tensors, where=path,
            wrong=f"{path} is not the {config.n_layer}-layer nanoGPT that its model_args describe:",
            fix="Use a checkpoint of an unmodified nanoGPT.",
        )  # fmt: skip
    params |= {row.ours: np.zeros((config.n_layer,) * row.stacked + row.shape_here, np.float32) for row in zeros}
    notes = [
        "Today's nanoGPT computes GELU exactly and this model, like nanoGPT before mid-2023, by GPT-2's tanh "
        "approximation: activations differ by up to 5e-4. The checkpoint does not say which it was trained with."
    ]
    if zeros:
        notes.append("The checkpoint has no biases (bias=False): here they are zero, and training would change them.")
    if "optimizer" in content:
        notes.append("The optimizer state is not imported.")
    return config, unflatten_dict(params, sep="/"), notes


def without_padding(config: GPTConfig, params: dict, tokens: int | None) -> tuple[GPTConfig, dict]:
    """The model without the rows that only pad its vocabulary to a multiple of 64.

    tokens: how many the tokenizer has; None = GPT-2's 50,257 for a vocabulary of 50,304. A vocabulary that was not
    padded from so many tokens is returned as it is.
    """
    tokens = GPT2_VOCAB if tokens is None else tokens
    if config.vocab_size != -(-tokens // _PADDING) * _PADDING or config.vocab_size == tokens:
        return config, params
    cut = {name: params[name][:tokens] for name in ("wte", "lm_head") if name in params}
    return dataclasses.replace(config, vocab_size=tokens), params | cut


def read_characters(path) -> Tokenizer:
    """The tokenizer of a meta.pkl of nanoGPT's character-level data sets. InputError: any other content."""
    path = local(path)
    meta = torch_file.plain_data(path)
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if isinstance(itos, dict) and set(itos) == set(range(len(itos))):
        itos = [itos[i] for i in range(len(itos))]
    if not isinstance(itos, list) or not itos or not all(isinstance(c, str) and len(c) == 1 for c in itos):
        raise InputError(
            f"{path} does not give a character for each id from 0 ('itos'), so it is not of a character-level data "
            "set: give the directory of the model's tokenizer with --tokenizer=DIR."
        )
    stoi = {c: i for i, c in enumerate(itos)}
    if len(stoi) < len(itos) or meta.get("stoi", stoi) != stoi:
        raise InputError(f"{path} has two ids for a character ('itos' and 'stoi' differ): prepare the data again.")
    return character_tokenizer_of(itos)


def _parts(path, content) -> tuple[dict[str, Tensor], dict]:
    """(tensors by their name in the checkpoint without prefixes, model_args)."""
    absent = [key for key in ("model", "model_args") if not isinstance(content, dict) or
              not isinstance(content.get(key), dict)]  # fmt: skip
    if absent:
        raise InputError(f"{path} has no {' and no '.join(absent)}: give a checkpoint that nanoGPT's train.py saved.")
    tensors = {}
    for name, tensor in content["model"].items():
        if isinstance(tensor, Tensor):
            short = name.removeprefix(_COMPILED).removeprefix(PREFIX)
            if not BUFFERS.fullmatch(short):
                key = name if short in tensors else short  # a second one of a name is reported as extra
                tensors[key] = tensor._replace(name=name)
    return tensors, content["model_args"]


def _config(path, arguments, tensors) -> GPTConfig:
    if missing := [key for key in _SIZES if key not in arguments]:
        raise InputError(f"{path}: model_args has no {', '.join(missing)}: give a checkpoint of nanoGPT's train.py.")
    known = {*_SIZES, "dropout", "bias"}
    if other := [f"{key}={value!r}" for key, value in arguments.items() if key not in known]:
        raise InputError(
            f"{path}: model_args describes an unsupported architecture: {', '.join(other)}. Use a checkpoint of an "
            "unmodified nanoGPT."
        )
    vocab_size, n_layer, n_head, d_model, context = (arguments[key] for key in _SIZES)
    try:
        return GPTConfig(vocab_size, n_layer, n_head, d_model, context, tied_head=is_tied({}, tensors, "pre"),
                         dropout=arguments.get("dropout", 0.0))  # fmt: skip
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: model_args has an invalid value: {error}") from None
