"""Encoded text-to-image data: safetensors shards of conditions and latents, with an identity that refuses what does not fit.

    cache/identity.json                 written first: weights, sizes and rows that the shards are made from
    cache/shard_00000.safetensors       key -> (rows of the shard, ...); written whole or not at all
    cache/cache.json                    written last: the number of rows; a cache without it is not finished

`accelerate launch -m trainers.cache --config X.yaml` builds the one that a configuration needs, over all processes; started
again, it goes on where it was stopped. The training commands build it themselves if it is not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipelines.common.atomic import new_file, write_text
from pipelines.common.errors import UserError
from pipelines.common.identity import differences
from pipelines.common.lock import FolderLock
from pipelines.common.reading import read_json

SHARD_ROWS = 256
# in another dtype the same weights have another hash, and other prompts other tokens: only the cause is said
CAUSES = {".weights": "dtype", ".tokens": "prompts"}
# (row numbers) -> tensors of these rows: the condition's keys, and "latents" where there are images
Encode = Callable[[range], dict[str, Tensor]]


class CacheError(UserError):
    """A cache that is not of this configuration, or is damaged, and what to do about it."""


def shard_file(folder: Path, shard: int) -> Path:
    """The file of the shard of this number."""
    return folder / f"shard_{shard:05d}.safetensors"


def build(
    folder: Path,
    identity: dict[str, Any],
    num_rows: int,
    encode: Encode,
    accelerator: Accelerator,
    batch_size: int = 16,
    shard_rows: int = SHARD_ROWS,
) -> None:
    """Make the shards that are missing, each process its own. CacheError if the folder holds a cache of something else, UserError
    if another command is making it.
    """
    check_identity(folder, identity)
    if (folder / "cache.json").is_file():
        return
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    lock = FolderLock(folder, "data.cache")
    try:
        if accelerator.is_main_process:
            lock.acquire()
            for half in folder.glob(".partial_*"):  # of a build that was killed
                half.unlink()
            write_text(folder / "identity.json", json.dumps(identity, indent=1) + "\n")
        accelerator.wait_for_everyone()
        _encode_missing(folder, num_rows, encode, accelerator, batch_size, shard_rows)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_text(folder / "cache.json", json.dumps({"rows": num_rows, "shard_rows": shard_rows}) + "\n")
        accelerator.wait_for_everyone()
    finally:
        lock.release()


def _encode_missing(
    folder: Path, num_rows: int, encode: Encode, accelerator: Accelerator, batch_size: int, shard_rows: int
) -> None:
    """This process's share of the shards that are not there."""
    shards = range(-(-num_rows // shard_rows))
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(total=num_rows, desc="encoding", unit="row", disable=not accelerator.is_main_process)
    for shard in mine:
        rows = range(shard * shard_rows, min((shard + 1) * shard_rows, num_rows))
        if not is_complete(shard_file(folder, shard), len(rows)):
            parts = []
            for start in range(rows.start, rows.stop, batch_size):
                encoded = encode(range(start, min(start + batch_size, rows.stop)))
                parts.append({k: v.detach().cpu() for k, v in encoded.items()})
                bar.update(len(next(iter(encoded.values()))) * accelerator.num_processes)
            with new_file(shard_file(folder, shard)) as partial:
                save_file({k: torch.cat([p[k] for p in parts]).contiguous() for k in parts[0]}, partial)
        else:
            bar.update(len(rows) * accelerator.num_processes)
    bar.close()


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """UserError where a cache was made of something else, naming what differs."""
    file = folder / "identity.json"
    if not file.is_file():
        if folder.is_dir() and any(folder.glob("shard_*")):
            raise CacheError(f"cache {str(folder)!r} has no identity.json; remove it or name another folder in data.cache")
        return
    found = read_json(file, f"remove the cache {str(folder)!r}")
    remedy = f"Name another folder in data.cache, or remove {str(folder)!r}"
    if "format" in identity and "format" not in found:
        raise CacheError(f"cache {str(folder)!r} was made by an earlier version, which did not note all it depends on. {remedy}")
    if faults := differences(found, identity, CAUSES):
        raise CacheError(f"cache {str(folder)!r} is of other data or another model: {'; '.join(faults)}. {remedy}")


def is_complete(file: Path, rows: int) -> bool:
    """A shard is written by one rename, so one that can be opened is whole; CacheError for one that cannot."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as shard:
            return all(shard.get_slice(key).get_shape()[0] == rows for key in shard.keys())
    except SafetensorError as error:
        finished = str(file.parent / "cache.json")
        raise CacheError(
            f"cache file {str(file)!r} is damaged ({error}); remove it and {finished!r}, and it will be made again"
        ) from error


class Cached:
    """Rows of a finished cache, read from disk as they are drawn. See data.Examples."""

    def __init__(self, folder: Path) -> None:
        try:
            facts = json.loads((folder / "cache.json").read_text())
            self.num_rows, self.shard_rows = facts["rows"], facts["shard_rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{str(folder / 'cache.json')!r} is damaged ({error!r}); remove it to make it again") from error
        self.shards = []
        for shard in range(-(-self.num_rows // self.shard_rows)):
            file = shard_file(folder, shard)
            rows = min(self.shard_rows, self.num_rows - shard * self.shard_rows)
            if not is_complete(file, rows):
                finished = str(folder / "cache.json")
                raise CacheError(f"cache file {str(file)!r} is missing or short; remove {finished!r} to make it again")
            self.shards.append(safe_open(file, framework="pt"))
        self.keys = [k for k in self.shards[0].keys() if k != "latents"]
        self.has_x0 = "latents" in self.shards[0].keys()

    def __len__(self) -> int:
        return self.num_rows

    def rows(self, index: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        condition = {key: self._read(key, index) for key in self.keys}
        return (self._read("latents", index).float() if self.has_x0 else None), condition

    def _read(self, key: str, index: Tensor) -> Tensor:
        places = [divmod(i, self.shard_rows) for i in index.tolist()]
        return torch.cat([self.shards[shard].get_slice(key)[row : row + 1] for shard, row in places])
