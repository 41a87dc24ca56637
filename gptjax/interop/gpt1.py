"""Import of the weights that OpenAI released with GPT-1: params_0.npy … params_9.npy and params_shapes.json.

The files are one vector, cut into ten. Its tensors follow each other in the order of the released code's variables:
position embeddings, token embeddings, then 12 tensors of each block; a linear layer is a convolution of width 1, so
that its weights are [1, in, out]. Source: openai/finetune-transformer-lm train.py (the fine-tuning code puts the
position rows behind the token rows, which concerns its own matrix alone).
"""

import bisect
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from gptjax.errors import InputError
from gptjax.interop.huggingface import local
from gptjax.interop.layout import Row, Tensor, assemble, table
from gptjax.model.spec import GPT1, GPTConfig

SHAPES = "params_shapes.json"
_FILES = [f"params_{i}.npy" for i in range(10)]
_D_HEAD = GPT1.d_model // GPT1.n_head  # 64; the files do not have it
_NAMES = {  # in the order of the vector: our parameter, the released code's variable
    "wpe": "positions",
    "wte": "we",
    "blocks/attn/c_attn/kernel": "h{}/attn/c_attn/w",
    "blocks/attn/c_attn/bias": "h{}/attn/c_attn/b",
    "blocks/attn/c_proj/kernel": "h{}/attn/c_proj/w",
    "blocks/attn/c_proj/bias": "h{}/attn/c_proj/b",
    "blocks/ln_1/scale": "h{}/ln_1/g",
    "blocks/ln_1/bias": "h{}/ln_1/b",
    "blocks/mlp/c_fc/kernel": "h{}/mlp/c_fc/w",
    "blocks/mlp/c_fc/bias": "h{}/mlp/c_fc/b",
    "blocks/mlp/c_proj/kernel": "h{}/mlp/c_proj/w",
    "blocks/mlp/c_proj/bias": "h{}/mlp/c_proj/b",
    "blocks/ln_2/scale": "h{}/ln_2/g",
    "blocks/ln_2/bias": "h{}/ln_2/b",
}


def read(source) -> tuple[GPTConfig, dict]:
    """Reads OpenAI's release of GPT-1.

    Args:
        source: the directory with params_0.npy … params_9.npy and params_shapes.json (`model/` of the repository).
    Returns:
        (config, params): params with the tree of gptjax.model.gpt.init, in numpy float32. Layers, width, context and
        vocabulary are those of the shapes; heads of 64 features and dropout .1 are the paper's.
    Raises:
        InputError: missing, damaged or truncated files; missing, extra or mis-shaped tensors (all in one message); NaN
        or infinite values.
    """
    directory = local(source)
    shapes = _shapes(directory)
    n_layer = max(1, round((len(shapes) - 2) / 12))
    positions, tokens = ([*shape, 0, 0][:2] for shape in [*shapes, [], []][:2])
    try:
        if tokens[1] % _D_HEAD:
            raise InputError(f"Its width {tokens[1]} is not a multiple of {_D_HEAD}, the features of a head.")
        config = GPTConfig(tokens[0], n_layer, tokens[1] // _D_HEAD, tokens[1], positions[0], norm="post",
                           dropout=GPT1.dropout)  # fmt: skip
    except InputError as error:
        raise InputError(f"{directory / SHAPES} does not describe a GPT-1: {error}") from None
    rows = _rows(config)
    names = [row.theirs for row in rows if not row.stacked]
    names += [row.theirs.format(i) for i in range(n_layer) for row in rows if row.stacked]
    names += [f"tensor {i}" for i in range(len(names), len(shapes))]  # reported as extra
    params = assemble(
        n_layer, rows, _tensors(directory, names, shapes), where=directory,
        wrong=f"{directory / SHAPES} does not describe a GPT-1 of {n_layer} layers and {config.d_model} features:",
        fix="Download model/ of openai/finetune-transformer-lm again.",
    )  # fmt: skip
    return config, unflatten_dict(params, sep="/")


def _rows(config: GPTConfig) -> list[Row]:
    rows = {row.ours: row for row in table(config)}
    of_convolution = lambda row: (1, *row.shape) if row.ours.endswith("/kernel") else row.shape
    return [rows[ours]._replace(theirs=name, shape=of_convolution(rows[ours])) for ours, name in _NAMES.items()]


def _shapes(directory: Path) -> list[list[int]]:
    if absent := [name for name in [SHAPES, *_FILES] if not (directory / name).exists()]:
        raise InputError(
            f"{directory} has no {', '.join(absent)}: give the folder model/ of openai/finetune-transformer-lm, with "
            "all ten files of parameters."
        )
    try:
        shapes = json.loads((directory / SHAPES).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{directory / SHAPES} is not JSON ({error}): download it again.") from None
    if not isinstance(shapes, list) or not all(
        isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape) for shape in shapes
    ):
        raise InputError(f"{directory / SHAPES} is not a list of shapes: download it again.")
    return shapes


def _tensors(directory: Path, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The tensors of the vector, which may begin in one file and end in another."""
    files = [_vector(directory / name) for name in _FILES]
    starts = [0, *itertools.accumulate(file.size for file in files)]
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    def tensor(name, shape, end):
        begin = end - math.prod(shape)

        def load():
            if ends[-1] != starts[-1]:
                raise InputError(
                    f"{directory}: params_0.npy to params_9.npy have {starts[-1]:,} numbers and {SHAPES} describes "
                    f"{ends[-1]:,}. Download the files again, all from one release."
                )
            first, last = bisect.bisect_right(starts, begin) - 1, bisect.bisect_left(starts, end)
            parts = [files[i][max(begin - starts[i], 0) : end - starts[i]] for i in range(first, last)]
            return np.concatenate(parts).reshape(shape)

        return Tensor(name, tuple(shape), "F32", load)

    return {name: tensor(name, shape, end) for name, shape, end in zip(names, shapes, ends, strict=False)}


def _vector(path: Path) -> np.ndarray:
    try:
        vector = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is damaged or cut off ({error}): download it again.") from None
    if vector.ndim != 1 or vector.dtype != np.float32:
        raise InputError(
            f"{path} has {vector.dtype} of shape {list(vector.shape)} and not a vector of float32: download it again."
        )
    return vector
