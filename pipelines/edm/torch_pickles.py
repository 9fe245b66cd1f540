"""The pickles of NVlabs' EDM code and of torch.save: what the names in them stand for here, and tensors as views of the file."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .pickles import Global, Instance, SnapshotError, read_pickle

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    f"torch.{name}Storage": np.dtype(kind)
    for name, kind in (
        ("Float", "<f4"),
        ("Double", "<f8"),
        ("Half", "<f2"),
        ("Long", "<i8"),
        ("Int", "<i4"),
        ("Short", "<i2"),
        ("Char", "<i1"),
        ("Byte", "<u1"),
        ("Bool", "?"),
    )
}


class Storage(NamedTuple):
    """The bytes of one torch storage."""

    dtype: np.dtype
    data: memoryview | bytes


class Array(NamedTuple):
    """A torch tensor: a strided view of a storage that has been checked to lie inside it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def numpy(self) -> np.ndarray:
        """A view, not a copy; read-only."""
        dtype = self.storage.dtype
        flat = np.frombuffer(self.storage.data, dtype)[self.offset :]
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * dtype.itemsize for s in self.strides], writeable=False)


def read_torch_pickle(data: memoryview, storage: Callable[[tuple], Storage] | None = None) -> tuple[Any, int]:
    """(value, where it ends), see read_pickle. storage: what the persistent ids of torch.save's zip files stand for."""
    return read_pickle(data, CALLS, STORAGES, storage)


def _persistent_object(meta: dict) -> Instance:
    """An object of NVlabs' persistence module; its source code, which lies beside it, is left alone."""
    if set(meta) != {"type", "version", "module_src", "class_name", "state"} or meta["type"] != "class":
        raise SnapshotError(f"a persistent object with {', '.join(map(repr, meta))}; expected NVlabs' type, version, ... state")
    if meta["version"] != 6:
        raise SnapshotError(f"persistence version {meta['version']!r}; only 6 is known")
    if not isinstance(meta["class_name"], str) or not isinstance(meta["state"], dict):
        raise SnapshotError("a persistent object without a class name or without a state")
    return Instance(meta["class_name"], meta["state"])


def _ordered_dict() -> dict:
    return {}


def _parameter(data: Array, requires_grad: bool, hooks: dict) -> Array:
    return data


def _array(storage: Storage, offset: int, shape: tuple, strides: tuple, requires_grad: bool, hooks: dict) -> Array:
    """SnapshotError for a view that leaves its storage or shows elements of it more than once."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
        raise SnapshotError(f"a tensor of shape {shape}, strides {strides}, offset {offset} is none")
    held = len(storage.data) // storage.dtype.itemsize
    size = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if size and (last >= held or size > held):
        raise SnapshotError(
            f"a tensor of shape {shape}, strides {strides}, offset {offset} reaches outside its storage of {held} numbers"
        )
    return Array(storage, offset, shape, strides)


def _numpy_type(name: str, align: bool = False, copy: bool = False) -> np.dtype:
    if name not in ("f8", "f4", "i8", "i4", "b1"):
        raise SnapshotError(f"a numpy number of type {name!r}; expected a float, an integer or a bool")
    return np.dtype(name)


def _numpy_scalar(dtype: np.dtype, data: memoryview) -> Any:
    if not isinstance(dtype, np.dtype) or len(data) != dtype.itemsize:
        raise SnapshotError("a numpy number whose bytes do not fit its type")
    return np.frombuffer(data, dtype)[0].item()


def _module_dict() -> Instance:
    return Instance("ModuleDict", {})


def _nested_storage(data: memoryview) -> Storage:
    """torch.save's older format: magic number, protocol, system, the object, the storages' keys, their numbers."""
    wanted: dict[str, np.dtype] = {}

    def storage(key: tuple) -> Global:
        kind, name, size = storage_key(key)
        wanted[name] = kind
        return Global(f"{name}/{size}")

    values, position = [], 0
    for _ in range(5):
        value, position = read_pickle(data, {}, STORAGES, storage, position)
        values.append(value)
    magic, protocol, system, found, keys = values
    written = isinstance(system, dict) and system.get("little_endian") is True
    if (magic, protocol) != (LEGACY_MAGIC, LEGACY_PROTOCOL) or not written:
        raise SnapshotError("a nested storage that torch.save did not write on a little-endian machine")
    if not isinstance(found, Global) or "/" not in found.name or keys != [found.name.split("/")[0]]:
        raise SnapshotError("a nested storage that holds something else")
    name, size = found.name.split("/")
    body = data[position:]
    if len(body) < 8 or struct.unpack("<q", body[:8])[0] != int(size) or len(body) - 8 != int(size) * wanted[name].itemsize:
        raise SnapshotError(f"a nested storage of {size} numbers has {len(body) - 8} bytes; it is truncated or damaged")
    return Storage(wanted[name], body[8:])


def storage_key(key: Any) -> tuple[np.dtype, str, int]:
    """(type, key, number of elements) of torch's persistent id."""
    if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage" or (len(key) == 6 and key[5] is not None):
        raise SnapshotError(f"a persistent id {key!r}; expected a whole storage")
    _, kind, name, _, size = key[:5]
    if not isinstance(kind, Global) or kind.name not in STORAGES or type(size) is not int or size < 0:
        raise SnapshotError(f"a storage of {kind!r}; expected one of {', '.join(STORAGES)}")
    return STORAGES[kind.name], str(name), size


CALLS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _array,
    "torch.storage._load_from_bytes": _nested_storage,
    "torch.nn.modules.container.ModuleDict": _module_dict,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
