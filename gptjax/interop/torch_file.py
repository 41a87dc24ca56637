"""Files of torch.save, read without torch: tensors and plain data. Nothing in them is executed.

    with opened("ckpt.pt") as content:     content["model"]["transformer.wte.weight"].load() -> numpy array

Such a file holds a pickle, which can name any function and call it. Our unpickler knows the three names that tensors
need (OrderedDict, _rebuild_tensor_v2 and torch's storage classes) and refuses all others. A tensor is read from the
file when it is loaded. Both of torch's forms are known: the zip archive and, before torch 1.6, a series of pickles
with the storages behind them. Source: torch/serialization.py.
"""

import contextlib
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gptjax.errors import InputError
from gptjax.interop.layout import Tensor

_STORAGES = {  # torch's class: (dtype as safetensors names it, numpy's, always little-endian)
    "DoubleStorage": ("F64", np.dtype("<f8")),
    "FloatStorage": ("F32", np.dtype("<f4")),
    "HalfStorage": ("F16", np.dtype("<f2")),
    "BFloat16Storage": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "LongStorage": ("I64", np.dtype("<i8")),
    "IntStorage": ("I32", np.dtype("<i4")),
    "ShortStorage": ("I16", np.dtype("<i2")),
    "CharStorage": ("I8", np.dtype("i1")),
    "ByteStorage": ("U8", np.dtype("u1")),
    "BoolStorage": ("BOOL", np.dtype("?")),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Storage(NamedTuple):
    """Numbers in a file that tensors are views of. read: (key, length) -> so many bytes."""

    key: str
    kind: str
    count: int
    read: Callable[[str, int], bytes]

    @property
    def length(self) -> int:
        return self.count * _STORAGES[self.kind][1].itemsize


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """What a file of torch.save holds, its tensors as layout.Tensor, which can be loaded until the context ends.

    InputError: not such a file, a damaged or truncated one, or one with anything but tensors and plain data.
    """
    with open(path, "rb") as file:
        zipped = zipfile.is_zipfile(file)
        file.seek(0)
        yield (_zip_content if zipped else _legacy_content)(path, file)


def plain_data(path: Path) -> Any:
    """What a pickle of numbers, texts, lists and dictionaries holds. InputError: damaged, or any class in it."""
    with open(path, "rb") as file:
        return _unpickle(path, file, {}, None)


def _zip_content(path, file):
    with _damage(path):
        archive = zipfile.ZipFile(file)
        names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("it has no data.pkl")
        folder = names[0].removesuffix("/data.pkl")
        order = f"{folder}/byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise InputError(f"{path} has big-endian numbers: save it again on a usual machine.")

    def read(key, length):
        with _damage(path):
            name = f"{folder}/data/{key}"
            if archive.getinfo(name).file_size != length:
                raise ValueError(f"{name} has another length than its tensors")
            return archive.read(name)

    with archive.open(names[0]) as pickled:
        return _unpickle(path, pickled, _GLOBALS, read)


def _legacy_content(path, file):
    places = {}  # key of a storage: offset of its numbers

    def read(key, length):
        with _damage(path):
            file.seek(places[key])
            if len(data := file.read(length)) < length:
                raise ValueError("its end is missing")
            return data

    if _unpickle(path, file, {}, None) != _LEGACY_MAGIC:
        raise InputError(f"{path} is not a file of torch.save: give nanoGPT's ckpt.pt.")
    for _ in range(2):  # version of the protocol, and the sizes of C's types
        _unpickle(path, file, {}, None)
    storages: dict[str, Storage] = {}
    content = _unpickle(path, file, _GLOBALS, read, storages)
    keys = _unpickle(path, file, {}, None)
    with _damage(path):
        for key in keys:
            if struct.unpack("<q", file.read(8)) != (storages[key].count,):
                raise ValueError(f"storage {key} has another length than its tensors")
            places[key] = file.tell()
            file.seek(storages[key].length, 1)
    return content


class _TensorMaker:
    """Stands for torch._utils._rebuild_tensor_v2. Without attributes: a pickle can set those of what it finds."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, stride, *_):
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        shape, stride = tuple(shape), tuple(stride)
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor of impossible shape")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last >= storage.count or np.prod(shape, dtype=object) > storage.count):
            raise ValueError("a tensor that is larger than its storage")
        dtype, numpy_dtype = _STORAGES[storage.kind]

        def load():
            numbers = np.frombuffer(storage.read(storage.key, storage.length), numpy_dtype)[offset:]
            steps = [step * numpy_dtype.itemsize for step in stride]
            return np.lib.stride_tricks.as_strided(numbers, shape, steps, writeable=False)

        return Tensor(f"storage {storage.key}", shape, dtype, load)


_GLOBALS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _TensorMaker(),
    **{("torch", name): name for name in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, path, allowed, read, storages):
        super().__init__(file, encoding="utf-8")
        self.path, self.allowed, self.read_storage, self.storages = path, allowed, read, storages

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise InputError(
                f"{self.path} contains {module}.{name}, which is neither a tensor nor plain data, so the file is "
                "refused. Nothing of it was executed. If you trust it, save its weights again as nanoGPT's train.py "
                "does, without other objects."
            )
        return self.allowed[module, name]

    def persistent_load(self, pid):
        if self.read_storage is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise ValueError(f"an unknown reference {pid!r}")
        _, kind, key, _, count, *view = pid
        if kind not in _STORAGES or type(key) is not str or type(count) is not int or view not in ([], [None]):
            raise ValueError("a storage of unknown kind")
        storage = self.storages.setdefault(key, Storage(key, kind, count, self.read_storage))
        if (storage.kind, storage.count) != (kind, count):
            raise ValueError(f"storage {key} with two sizes")
        return storage


def _unpickle(path, file, allowed, read, storages: dict | None = None):
    with _damage(path):
        return _Unpickler(file, path, allowed, read, {} if storages is None else storages).load()


@contextlib.contextmanager
def _damage(path):
    """What a damaged file makes the libraries raise, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pickle raises whatever its bytes lead to
        raise InputError(f"{path} is damaged or not a file of torch.save ({error}): copy it again.") from None
