"""The pickles of NVlabs' EDM code and of torch.save: what the names in them stand for here, and tensors as views of the file."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .bounds import DIMENSIONS, NAME, NUMBER, Budget, SnapshotError, listed, shown
from .pickles import Global, Instance, read_pickle

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

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """A view, not a copy; read-only."""
        dtype = self.storage.dtype
        flat = np.frombuffer(self.storage.data, dtype)[self.offset :]
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * dtype.itemsize for s in self.strides], writeable=False)


def read_torch_pickle(data: memoryview, storage: Callable[[Any], Storage] | None = None) -> tuple[Any, int]:
    """(value, where it ends), see read_pickle. storage: what the persistent ids of torch.save's zip files stand for."""
    budget = Budget()

    def nested(content: memoryview) -> Storage:
        return _nested_storage(content, budget)

    return read_pickle(data, CALLS | {"torch.storage._load_from_bytes": nested}, STORAGES, storage, budget=budget)


def _persistent_object(meta: dict) -> Instance:
    """An object of NVlabs' persistence module; its source code, which lies beside it, is left alone."""
    if type(meta) is not dict or meta.keys() != {"type", "version", "module_src", "class_name", "state"}:
        content = listed(meta) if type(meta) is dict else shown(meta)
        raise SnapshotError(f"a persistent object with {content}; expected NVlabs' type, version, module_src, class_name, state")
    if meta["type"] != "class" or meta["version"] != 6:
        raise SnapshotError(f"persistence type {shown(meta['type'])}, version {shown(meta['version'])}; only 'class', 6 is known")
    if type(meta["class_name"]) is not str or type(meta["state"]) is not dict:
        raise SnapshotError("a persistent object without a class name or without a state")
    return Instance(meta["class_name"], meta["state"])


def _ordered_dict() -> dict:
    return {}


def _parameter(data: Array, requires_grad: bool, hooks: dict) -> Array:
    if type(data) is not Array:
        raise SnapshotError(f"a parameter that is {shown(data)}; expected a tensor")
    return data


def _array(storage: Storage, offset: int, shape: tuple, strides: tuple, requires_grad: bool, hooks: dict) -> Array:
    """SnapshotError for a view that leaves its storage or shows elements of it more than once."""
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= DIMENSIONS:
        raise SnapshotError(f"a tensor whose shape is {shown(shape)} and strides {shown(strides)} is none")
    numbers = ", ".join(map(shown, (offset, *shape, *strides)))
    if type(storage) is not Storage or not all(type(n) is int and 0 <= n < NUMBER for n in (offset, *shape, *strides)):
        raise SnapshotError(f"a tensor of offset, shape and strides {numbers} is none")
    content = len(storage.data) // storage.dtype.itemsize
    size = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if size and (last >= content or size > content):
        raise SnapshotError(
            f"a tensor of shape {shape}, strides {strides}, offset {offset} reaches outside its storage of {content} numbers"
        )
    extent = 1
    for stride, n in sorted(zip(strides, shape, strict=True)):
        if size and n > 1:
            if stride < extent:
                raise SnapshotError(f"a tensor of shape {shape}, strides {strides} shows numbers of its storage more than once")
            extent += stride * (n - 1)
    return Array(storage, offset, shape, strides)


def _numpy_type(name: str, align: bool = False, copy: bool = False) -> np.dtype:
    if type(name) is not str or name not in ("f8", "f4", "i8", "i4", "b1"):
        raise SnapshotError(f"a numpy number of type {shown(name)}; expected a float, an integer or a bool")
    return np.dtype(name)


def _numpy_scalar(dtype: np.dtype, data: memoryview) -> Any:
    if not isinstance(dtype, np.dtype) or type(data) is not memoryview or len(data) != dtype.itemsize:
        raise SnapshotError("a numpy number whose bytes do not fit its type")
    return np.frombuffer(data, dtype)[0].item()


def _module_dict() -> Instance:
    return Instance("ModuleDict", {})


def _nested_storage(data: memoryview, budget: Budget) -> Storage:
    """torch.save's older format: magic number, protocol, system, the object, the storages' keys, their numbers."""
    if type(data) is not memoryview:
        raise SnapshotError(f"a nested storage that is {shown(data)}; expected bytes")
    wanted: dict[str, tuple[np.dtype, int]] = {}

    def storage(key: Any) -> Global:
        kind, name, size = storage_key(key)
        wanted[name] = kind, size
        return Global(name)

    values, position = [], 0
    for _ in range(5):
        value, position = read_pickle(data, {}, STORAGES, storage, position, budget)
        values.append(value)
    magic, protocol, system, found, keys = values
    written = type(system) is dict and system.get("little_endian") is True
    if (magic, protocol) != (LEGACY_MAGIC, LEGACY_PROTOCOL) or not written:
        raise SnapshotError("a nested storage that torch.save did not write on a little-endian machine")
    if type(found) is not Global or found.name not in wanted or keys != [found.name]:
        raise SnapshotError("a nested storage that holds something else")
    kind, size = wanted[found.name]
    body = data[position:]
    if len(body) < 8 or struct.unpack("<q", body[:8])[0] != size or len(body) - 8 != size * kind.itemsize:
        raise SnapshotError(f"a nested storage of {size} numbers has {len(body) - 8} bytes; it is truncated or damaged")
    return Storage(kind, body[8:])


def storage_key(key: Any) -> tuple[np.dtype, str, int]:
    """(type, key, number of elements) of torch's persistent id."""
    if type(key) is not tuple or len(key) not in (5, 6) or key[0] != "storage" or (len(key) == 6 and key[5] is not None):
        raise SnapshotError(f"a persistent id that is {shown(key)}; expected a whole storage")
    _, kind, name, _, size = key[:5]
    if type(kind) is not Global or kind.name not in STORAGES:
        raise SnapshotError(f"a storage of {kind.name if type(kind) is Global else shown(kind)}; expected {', '.join(STORAGES)}")
    if type(name) is not str or not NAME.fullmatch(name) or type(size) is not int or not 0 <= size < NUMBER:
        raise SnapshotError(f"a storage with the key {shown(name)} and {shown(size)} numbers; expected a short name and a size")
    return STORAGES[kind.name], name, size


CALLS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _array,
    "torch.nn.modules.container.ModuleDict": _module_dict,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
