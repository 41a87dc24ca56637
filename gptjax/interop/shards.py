"""safetensors files: one, or shards with the index that transformers writes next to them.

Reading opens the files and reads their headers alone; a tensor is read when it is asked for. Writing has at most one
shard's views at a time. Source: huggingface_hub's serialization (names, sizes, order of the shards).
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors does not do itself)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptjax.errors import InputError
from gptjax.interop.hf_tokenizer import dump, read_json
from gptjax.interop.layout import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def open_single(path: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """{name: Tensor} of a file, which `stack` closes. InputError: a damaged or truncated file, or a Git LFS pointer."""
    try:
        file = stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError), open(path, "rb") as pointer:
            if pointer.read(40).startswith(b"version https://git-lfs"):
                raise InputError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull.") from None
        raise InputError(f"{path} is damaged or not a safetensors file ({error}): download it again.") from None

    def tensor(name):
        view = file.get_slice(name)
        return Tensor(name, tuple(view.get_shape()), view.get_dtype(), lambda: file.get_tensor(name))

    return {name: tensor(name) for name in file.keys()}


def open_sharded(index: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """{name: Tensor} of the shards that an index names, each tensor from the file that the index gives.

    A tensor that the index names and its shard lacks is absent. One that a shard has and the index gives to another
    file, or does not name, is in the result as 'NAME (FILE)': the caller reports it as extra.

    InputError: a damaged index; files that are not there; as open_single.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or any(Path(str(name)).name != name for name in places.values()):
        raise InputError(f"{index} has no valid weight_map from tensors to file names: download it again.")
    files = sorted(set(places.values()))
    if absent := [name for name in files if not (index.parent / name).exists()]:
        raise InputError(f"{index} names missing shards: {', '.join(absent)}. Put them in the same directory.")
    found = {}
    for file in files:
        for name, tensor in open_single(index.parent / file, stack).items():
            found[name if places.get(name) == file else f"{name} ({file})"] = tensor
    return found


def parse_size(text: str) -> int:
    """Bytes of '5GB', '200MB', …, with decimal units as in transformers. InputError: another form, or no bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not size:
        raise InputError(f"--max_shard_size={text}: give a number with KB, MB, GB or TB, as 5GB.")
    return size


def split(sizes: Mapping[str, int], largest: int) -> list[list[str]]:
    """Names in shards of at most `largest` bytes, as huggingface_hub splits them: in order, a tensor that is larger
    in a shard of its own, ahead of the one that is being filled."""
    shards, current, filled = [], [], 0
    for name, size in sizes.items():
        if size > largest:
            shards.append([name])
            continue
        if filled + size > largest:
            shards.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    return [*shards, current] if current else shards


def write(directory: Path, tensors: Mapping[str, Tensor], largest: int) -> None:
    """Writes tensors in float32: model.safetensors or, if they have more than `largest` bytes, shards and an index.

    OSError or SafetensorError: the disk is full.
    """
    sizes = {name: 4 * int(np.prod(tensor.shape)) for name, tensor in tensors.items()}
    shards = split(sizes, largest)
    places = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(directory / file, names, tensors)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        dump(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def _save(path: Path, names: Sequence[str], tensors: Mapping[str, Tensor]):
    # Views of the parameters where they are float32 and contiguous: the library writes from them without a copy.
    arrays = {name: np.ascontiguousarray(tensors[name].load(), np.float32) for name in names}
    save_file(arrays, path, metadata={"format": "pt"})
