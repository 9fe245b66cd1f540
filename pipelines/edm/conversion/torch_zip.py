"""torch.save's zip files as views of the file: zipfile reads the directory, its entries are checked against each other."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from .bounds import DIRECTORY, SnapshotError, reason, shown
from .torch_pickles import Storage, read_torch_pickle, storage_key

HEADER = struct.Struct("<4s5H3I2H")  # of an entry in front of its data; the last two: lengths of its name and of an extra field


class Directory(io.FileIO):
    """A file of which zipfile may read the directory, as long as that is of no absurd size."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > DIRECTORY:
            raise SnapshotError(f"a zip file whose directory has {size} bytes; expected {DIRECTORY:,} at most")
        return super().read(size)


class Entry(NamedTuple):
    """limit: where the next entry, or the file, begins or ends."""

    info: zipfile.ZipInfo
    limit: int


def read_torch_zip(file: Path, data: memoryview) -> Any:
    """The value that torch.save wrote to `file`, whose bytes are `data`; tensors are views of them."""
    try:
        with Directory(file) as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
        entries = checked(infos, data)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, OverflowError) as error:
        raise SnapshotError(f"the zip file is damaged or truncated ({reason(error)})") from error
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        first = f"; it holds {shown(next(iter(entries)))}" if entries else ""
        raise SnapshotError(f"a zip file with {len(pickles)} data.pkl{first}; expected a file of torch.save (.pth)")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in entries and bytes(content(entries[f"{root}byteorder"], data)) != b"little":
        raise SnapshotError("the file was written on a big-endian machine")
    storages: dict[str, Storage] = {}

    def storage(key: Any) -> Storage:
        kind, name, size = storage_key(key)
        if name not in storages:
            entry = entries.get(f"{root}data/{name}")
            if entry is None:
                raise SnapshotError(f"storage {name} is missing; the file is damaged or truncated")
            if entry.info.file_size < size * kind.itemsize:
                raise SnapshotError(f"storage {name} of {size} numbers has {entry.info.file_size} bytes; it is truncated")
            storages[name] = Storage(kind, content(entry, data)[: size * kind.itemsize])
        if storages[name].dtype != kind or len(storages[name].data) != size * kind.itemsize:
            raise SnapshotError(f"storage {name} is used with two types or sizes")
        return storages[name]

    value, _ = read_torch_pickle(content(entries[pickles[0]], data), storage)
    return value


def checked(infos: list[zipfile.ZipInfo], data: memoryview) -> dict[str, Entry]:
    """The entries by name: plain, stored as they are, one behind the other, no name twice."""
    entries: dict[str, Entry] = {}
    infos = sorted(infos, key=lambda info: info.header_offset)
    limits = [info.header_offset for info in infos[1:]] + [len(data)]
    for info, limit in zip(infos, limits, strict=True):
        name = shown(info.orig_filename)
        if not (info.orig_filename.isascii() and info.orig_filename.isprintable()) or len(info.orig_filename) > 200:
            raise SnapshotError(f"an entry with the name {name}, which torch.save does not write")
        if info.filename in entries:
            raise SnapshotError(f"the zip file holds {name} twice")
        if info.flag_bits & 1:
            raise SnapshotError(f"{name} is encrypted, which torch.save does not do")
        if info.compress_type != zipfile.ZIP_STORED:
            raise SnapshotError(f"{name} is compressed, which torch.save does not do")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG) and not (info.is_dir() and kind == stat.S_IFDIR):
            raise SnapshotError(f"{name} is a link or a device; expected plain files")
        if info.file_size != info.compress_size:
            raise SnapshotError(f"{name} has {info.file_size} bytes, stored as {info.compress_size}, which cannot be")
        if info.header_offset < 0 or info.header_offset + HEADER.size + len(info.orig_filename) + info.file_size > limit:
            raise SnapshotError(f"{name} reaches into another entry of the zip file, or past its end; damaged or truncated")
        entries[info.filename] = Entry(info, limit)
    return entries


def content(entry: Entry, data: memoryview) -> memoryview:
    """The bytes of an entry. SnapshotError where they do not lie there, or are others than its checksum says."""
    info = entry.info
    name = info.orig_filename.encode("ascii")
    header = HEADER.unpack(data[info.header_offset : info.header_offset + HEADER.size])
    begin = info.header_offset + HEADER.size + header[-2] + header[-1]
    written = bytes(data[info.header_offset + HEADER.size :][: header[-2]])
    if header[0] != b"PK\x03\x04" or written != name or begin + info.file_size > entry.limit:
        raise SnapshotError(f"{info.filename} is not where the zip file says; it is damaged or truncated")
    stored = data[begin : begin + info.file_size]
    if zlib.crc32(stored) != info.CRC:
        raise SnapshotError(f"{info.filename} is damaged: its checksum differs")
    return stored
