"""Images on disk, resumable and by any number of processes: image i depends on the seed and i alone.

<folder>/generation.json        what made them; another model or seed is refused
<folder>/000000/000123.png      each put in place whole, so that a killed run loses the batch in flight and no more
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pipelines.atomic import write_atomically
from pipelines.errors import UserError

from .sampler import Sampler

PER_FOLDER = 1000


def image_file(folder: Path, i: int) -> Path:
    return folder / f"{i // PER_FOLDER * PER_FOLDER:06d}" / f"{i:06d}.png"


def generate(
    sampler: Sampler,
    folder: Path,
    indices: range,
    seed: int = 0,
    batch_size: int = 64,
    captions: Sequence[str] | None = None,
    accelerator=None,
    progress: str | None = None,
    exact: bool = True,
) -> None:
    """Make those images of `indices` that are not there yet. captions: one for each of `indices`, where the model takes prompts.

    ValueError where the folder holds images of something else, or captions are missing.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; at least 1 is needed")
    if sampler.takes == "prompt" and (captions is None or len(captions) != len(indices)):
        raise UserError(f"{len(indices):,} images need as many captions, got {len(captions or ()):,}; give --captions")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    texts = captions if sampler.takes == "prompt" else None
    manifest = {"model": sampler.describe(), "seed": seed, "first": indices.start, "n": len(indices), "captions": _hash(texts)}
    manifest["batch_size"] = 1 if exact else batch_size
    _claim(folder, manifest, rank == 0)
    if accelerator:
        accelerator.wait_for_everyone()
    missing = [i for i in indices[rank::world] if not image_file(folder, i).is_file()]
    bar = tqdm(total=len(indices[rank::world]), desc=progress, unit="image", disable=progress is None or rank != 0)
    bar.update(bar.total - len(missing))
    size = manifest["batch_size"]
    for start in range(0, len(missing), size):
        batch = missing[start : start + size]
        filled = batch + batch[-1:] * (size - len(batch))
        prompts = [texts[i - indices.start] for i in filled] if texts is not None else None
        for i, pixels in zip(batch, sampler(filled, seed, prompts), strict=False):
            _write(image_file(folder, i), pixels)
        bar.update(len(batch))
    bar.close()
    if accelerator:
        accelerator.wait_for_everyone()


def _write(file: Path, pixels) -> None:
    array = pixels.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format="PNG", compress_level=1)
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, buffer.getvalue())


def _claim(folder: Path, manifest: dict[str, Any], first: bool) -> None:
    """Write generation.json, or refuse a folder whose images were made by something else."""
    file = folder / "generation.json"
    stored = json.loads(json.dumps(manifest))  # tuples become lists, as in the file
    if file.is_file():
        other = json.loads(file.read_text())
        differing = [key for key in stored if other.get(key) != stored[key]]
        if differing:
            key = differing[0]
            raise UserError(
                f"{folder} holds images made with another {key} ({other.get(key)!r}, now {stored[key]!r}); name another --output "
                "or remove them"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and has no generation.json; name another --output")
    elif first:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps(manifest, indent=1) + "\n").encode())


def _hash(texts: Sequence[str] | None) -> str | None:
    import hashlib

    return None if texts is None else hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
