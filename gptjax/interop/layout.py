"""From a checkpoint's tensors to gptjax's parameters: names, shapes and layouts, and one message for every fault.

A layout is a list of Rows. `table` is Hugging Face's, which stores weights as [in, out] like gptjax (transformers'
Conv1D) and differs in that q, k and v are concatenated and that our tensors are stacked over layers. Sources:
transformers' modeling_gpt2.py and modeling_openai.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.errors import InputError
from gptjax.model.spec import GPTConfig

HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")


class Tensor(NamedTuple):
    """A tensor of a checkpoint, read by `load`.

    name: in its file. dtype: as safetensors names it, 'F32'. load: () -> array of that shape.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]


class Row(NamedTuple):
    """A parameter of gptjax and the corresponding tensor of a checkpoint."""

    ours: str  # path in the parameter tree; those under blocks/ are stacked [layer, ...]
    theirs: str  # their name; {} is the layer
    shape: tuple[int, ...]  # of their tensor
    shape_here: tuple[int, ...]  # of one layer of ours: a reshape of the former
    transposed: bool = False  # theirs is [out, in]

    @property
    def stacked(self) -> bool:
        return self.ours.startswith("blocks/")


def embedding_names(norm: str) -> tuple[str, str]:
    """Names of the token and position embedding of a layout ('pre': GPT-2, 'post': OpenAI-GPT), without prefix."""
    names = {"pre": ("wte", "wpe"), "post": ("tokens_embed", "positions_embed")}[norm]
    return tuple(f"{name}.weight" for name in names)


def table(config: GPTConfig) -> list[Row]:
    """The Row of every parameter of a model, in Hugging Face's layout and order."""
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


def assemble(n_layer: int, rows: Sequence[Row], tensors: Mapping[str, Tensor], *, where, wrong: str, fix: str) -> dict:
    """The parameters of a checkpoint, {Row.ours: float32 array}, layers stacked. Memory holds them once: tensors are
    read one at a time into their place.

    Args:
        tensors: by the names of the rows.
        where: the checkpoint, for messages. wrong, fix: first and last line of the message about its tensors.
    Raises:
        InputError: missing, mis-shaped and extra tensors and those that are not floating-point numbers, all in one
        message; NaN or infinite values.
    """
    layers = {row.ours: range(n_layer) if row.stacked else (0,) for row in rows}
    expected = {row.theirs.format(i): row.shape for row in rows for i in layers[row.ours]}
    faults = differences(expected, {name: tensor.shape for name, tensor in tensors.items()})
    faults += [
        f"{name}: expected floating-point numbers, found {tensor.dtype}"
        for name, tensor in tensors.items()
        if name in expected and tensor.dtype not in FLOATS
    ]
    if faults:
        raise InputError("\n  ".join([wrong, *faults]) + f"\n{fix}")
    params, broken = {}, []
    for row in rows:
        stacked = np.empty((len(layers[row.ours]), *row.shape_here), np.float32)
        for i in layers[row.ours]:
            tensor = tensors[row.theirs.format(i)]
            values = tensor.load().T if row.transposed else tensor.load()
            with np.errstate(over="ignore"):  # a float64 that overflows float32 is reported below
                stacked[i] = values.reshape(row.shape_here)
            if not np.isfinite(stacked[i]).all():
                broken.append(tensor.name)
        params[row.ours] = stacked if row.stacked else stacked[0]
    if broken:
        raise InputError(
            f"{where} has NaN or infinite values in {listed(broken)}: every output would be NaN. Download the file "
            "again, or use an earlier checkpoint."
        )
    return params


def differences(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> list[str]:
    """One line per missing, mis-shaped or extra tensor; expected, found: {name: shape}."""
    missing = [f"missing {name}: expected shape {list(shape)}" for name, shape in expected.items() if name not in found]
    misshaped = [
        f"mis-shaped {name}: expected shape {list(shape)}, found {list(found[name])}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    extra = [
        f"extra {name}: expected none, found shape {list(shape)}"
        for name, shape in found.items()
        if name not in expected
    ]
    return missing + misshaped + extra


def listed(names: Iterable[str]) -> str:
    """The first ten names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 10} more tensors" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
