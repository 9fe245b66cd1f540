"""The three containers of an EDM network, read as data: NVlabs' and SiD's pickles, FastGen's .pth. Other files by name."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bounds import DEPTH, NAME, TENSORS, VISITS, SnapshotError, listed, shown
from .pickles import Instance
from .torch_pickles import LEGACY_MAGIC, Array, read_torch_pickle
from .torch_zip import read_torch_zip

PRECONDITIONERS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
MODELS = {"SongUNet": "song", "DhariwalUNet": "adm"}
ZIP = b"PK\x03\x04"
FIX = "expected a .pkl of NVlabs' EDM or of SiD, or a .pth of FastGen"


@dataclass
class Snapshot:
    """tensors by NVlabs' names without `model.`; preconditioning, network and model (the objects): where the file has them."""

    tensors: dict[str, Array]
    preconditioning: str | None = None
    network: Instance | None = None
    model: Instance | None = None
    objects: dict[str, Instance] = field(default_factory=dict)


def open_snapshot(source: Path) -> Snapshot:
    """What the file holds. Tensors are views of the file, which stays open as long as they live."""
    if source.is_dir():
        raise SnapshotError(f"is a folder; {FIX}")
    if not source.is_file():
        raise FileNotFoundError(f"no such file {str(source)!r}" if not source.exists() else f"{str(source)!r} is no plain file")
    if source.stat().st_size == 0:
        raise SnapshotError(f"the file is empty; {FIX}. Was the download interrupted?")
    with source.open("rb") as file:
        # closed with its last view, which an error's traceback may hold
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if other := what_else(bytes(data[:1024])):
        raise SnapshotError(f"{other}; {FIX}")
    snapshot = state_dict(read_torch_zip(source, data)) if data[:4] == ZIP else read_pickled(data)
    check_tensors(snapshot.tensors, len(data))
    return snapshot


def what_else(head: bytes) -> str | None:
    """What a file is by its first bytes, if it is neither a pickle nor a zip file."""
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize ([0-9]{1,15})\n", head)
        held = f" of {int(size[1]):,} bytes" if size else ""
        return f"this is a Git LFS pointer to a file{held}, not the file; run 'git lfs pull' where it was cloned"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<":
        return "this is a web page (HTML or XML), not a network: the download failed, or asked for something; download it again"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "this is a safetensors file: weights without a network's objects, or a network that is converted already"
    archives = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z"}
    for magic, name in (archives | {b"Rar!": "rar"}).items():
        if head.startswith(magic):
            return f"this is a {name} archive; unpack it first"
    if head.startswith(b"PK\x05\x06"):
        return "this is an empty zip file"
    written = all(32 <= c < 127 or c in b"\t\r\n" for c in head)  # so are pickles of protocol 0, which end with a dot
    if text and written and (b" " in head or not text.rstrip().endswith(b".")):
        return f"this is a text file that begins with {shown(text[:60].decode('ascii'))}, not a network"
    return None


def check_tensors(tensors: Mapping[str, Array], size: int) -> None:
    """Names that a network's tensors can have, and no more numbers than there are bytes: a storage is no two tensors'."""
    if len(tensors) > TENSORS:
        raise SnapshotError(f"the file holds {len(tensors):,} tensors; expected {TENSORS:,} at most")
    total = 0
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            raise SnapshotError(f"tensor {name!r} is {tensor.shape}: it holds nothing")
        total += tensor.nbytes
    if total > size:
        raise SnapshotError(f"the tensors have {total:,} bytes, the file {size:,}: some are the same numbers; expected each once")


# Pickles ----------------------------------------------------------------------------------------------------------------------


def read_pickled(data: memoryview) -> Snapshot:
    """A pickle of EDM or SiD: {"ema": the network, ...}, or the network itself."""
    value, end = read_torch_pickle(data)
    if value == LEGACY_MAGIC and end != len(data):
        raise SnapshotError("torch.save's format of before 2020; load it and save it again with torch.save, then convert that")
    if end != len(data):
        raise SnapshotError(f"byte {end}: {len(data) - end} more bytes after the end of the pickle")
    network = value.get("ema") if type(value) is dict else value
    if type(network) is not Instance:
        held = listed(value) if type(value) is dict else type(value).__name__
        if type(value) is dict and "ema" in value:
            raise SnapshotError(f"'ema' is {shown(network)}; expected a network")
        raise SnapshotError(f"the file holds {held}; expected a network under 'ema'")
    if network.class_name not in PRECONDITIONERS:
        raise SnapshotError(f"the network is a {named(network)}; expected one of {', '.join(PRECONDITIONERS)}")
    tensors: dict[str, Array] = {}
    objects: dict[str, Instance] = {}
    collect(network, "", tensors, objects, Walk())
    del objects[""]  # the network itself
    model = objects.get("model.")
    if model is None or model.class_name not in MODELS:
        raise SnapshotError(f"the model is a {model and named(model)}; expected one of {', '.join(MODELS)}")
    return Snapshot(without_prefix(tensors), PRECONDITIONERS[network.class_name], network, model, without_prefix(objects))


def named(module: Instance) -> str:
    """The class of a module for a message."""
    return module.class_name if NAME.fullmatch(module.class_name) else shown(module.class_name)


class Walk:
    """How much of a network has been visited."""

    def __init__(self) -> None:
        self.visits = 0
        self.seen: set[int] = set()

    def enter(self, module: Instance, prefix: str) -> None:
        if id(module.state) in self.seen:
            raise SnapshotError(f"the module {prefix!r} is in the network twice")
        self.seen.add(id(module.state))

    def step(self) -> None:
        self.visits += 1
        if self.visits > VISITS:
            raise SnapshotError(f"a network of more than {VISITS:,} modules and tensors")


def collect(module: Instance, prefix: str, tensors: dict[str, Array], objects: dict[str, Instance], walk: Walk) -> None:
    """All parameters and buffers below a module, by their dotted names, and all modules by theirs."""
    walk.enter(module, prefix)
    objects[prefix] = module
    for kind in ("_parameters", "_buffers"):
        for name, tensor in entries(module, kind, prefix, walk):
            if tensor is not None and type(tensor) is not Array:
                raise SnapshotError(f"{prefix}{name} is a {type(tensor).__name__}, not a tensor")
            if tensor is not None:
                tensors[prefix + name] = tensor
    for name, child in entries(module, "_modules", prefix, walk):
        if child is not None and type(child) is not Instance:
            raise SnapshotError(f"{prefix}{name} is a {type(child).__name__}, not a module")
        if child is not None:
            if prefix.count(".") >= DEPTH:
                raise SnapshotError("modules within modules without end")
            collect(child, f"{prefix}{name}.", tensors, objects, walk)


def entries(module: Instance, kind: str, prefix: str, walk: Walk) -> list[tuple[str, Any]]:
    """(name, parameter, buffer or module) of those that a module keeps as `kind`."""
    held = module.state.get(kind, {})
    if type(held) is not dict:
        raise SnapshotError(f"{named(module)}.{kind} is not a dictionary of names")
    found = []
    for name, value in held.items():
        walk.step()
        check_name(name if type(name) is not str else prefix + name)
        found.append((name, value))
    return found


def check_name(name: Any) -> None:
    if type(name) is not str or not NAME.fullmatch(name):
        raise SnapshotError(f"a tensor or module with the name {shown(name)}; expected letters, digits, dots, 200 at most")


def without_prefix(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {key.removeprefix("model."): value for key, value in values.items()}
    if len(found) != len(values):
        twice = next(key for key in values if f"model.{key}" in values)
        raise SnapshotError(f"the file holds both {twice!r} and 'model.{twice}'")
    return found


# State dicts ------------------------------------------------------------------------------------------------------------------


def state_dict(value: Any) -> Snapshot:
    """FastGen: a state dict of the network, or a checkpoint {"model": {"ema" or "net": state dict, ...}, ...}."""
    if type(value) is dict and type(value.get("model")) is dict:
        value = value["model"].get("ema", value["model"].get("net"))
    if type(value) is not dict or not value or not all(type(v) is Array for v in value.values()):
        raise SnapshotError("the file holds no state dict; expected tensors by name")
    for name in value:
        check_name(name)
    return Snapshot(without_prefix(value))
