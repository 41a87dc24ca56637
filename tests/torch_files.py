"""Writes files as torch.save does, without torch: for tests of what reads them (tests/peers has the real ones)."""

import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np

_KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "bfloat16": "BFloat16Storage"}


class Stored:
    """A tensor to be written: a view of `storage`, a flat array."""

    def __init__(self, array, storage=None, offset=0, stride=None):
        self.storage = np.ravel(array) if storage is None else storage
        self.offset, self.shape = offset, np.shape(array)
        self.stride = stride or tuple(int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape)))


def _fake_torch():
    """Modules that pickle finds the names of torch in."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch._utils = utils
    for kind in _KINDS.values():
        setattr(torch, kind, type(kind, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*_):
        raise AssertionError("only its name is written")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    return {"torch": torch, "torch._utils": utils}


class _Storage:
    def __init__(self, array):
        self.array = array


class _Pickler(pickle.Pickler):
    def __init__(self, file, modules, legacy):
        super().__init__(file, protocol=2)
        self.modules, self.legacy, self.storages = modules, legacy, []

    def persistent_id(self, value):
        if not isinstance(value, _Storage):
            return None
        known = [i for i, array in enumerate(self.storages) if array is value.array]
        key = known[0] if known else len(self.storages)
        if not known:
            self.storages.append(value.array)
        kind = getattr(self.modules["torch"], _KINDS[value.array.dtype.name])
        return ("storage", kind, str(key), "cuda:0", value.array.size, *([None] if self.legacy else []))

    def reducer_override(self, value):
        if not isinstance(value, Stored):
            return NotImplemented
        arguments = (_Storage(value.storage), value.offset, value.shape, value.stride, False, OrderedDict())
        return self.modules["torch._utils"]._rebuild_tensor_v2, arguments


def save(content, path, monkeypatch, legacy=False):
    """torch.save(content, path), where Stored stands for a tensor."""
    modules = _fake_torch()
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        if legacy:
            with open(path, "wb") as file:
                for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
                    pickle.dump(value, file, protocol=2)
                pickler = _Pickler(file, modules, True)
                pickler.dump(content)
                pickle.dump([str(i) for i in range(len(pickler.storages))], file, protocol=2)
                for array in pickler.storages:
                    file.write(struct.pack("<q", array.size) + array.tobytes())
            return
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("ckpt/data.pkl", "w") as file:
                pickler = _Pickler(file, modules, False)
                pickler.dump(content)
            archive.writestr("ckpt/byteorder", "little")
            for i, array in enumerate(pickler.storages):
                archive.writestr(f"ckpt/data/{i}", array.tobytes())
