"""Images on disk, resumable and by any number of processes: image i depends on the seed and i alone.

<folder>/generation.json        what they depend on, part by part; where any of it differs the folder is refused
<folder>/000000/000123.png      each put in place whole, so that a killed run loses the batch in flight and no more
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pipelines.common.atomic import write_atomically
from pipelines.common.errors import UserError
from pipelines.common.identity import differences, sha256_of
from pipelines.common.reading import read_json

from .sampler import Sampler

PER_FOLDER = 1000
PNG_END = b"IEND\xaeB`\x82"  # the type of the last chunk, which is empty, and its checksum (PNG, second edition, 11.2.5)
MANIFEST = "generation.json"
FORMAT = 2  # of how images are made from seeds, labels and prompts: a change of these rules needs another number
CAUSES = {".weights": "dtype", ".tokens": "captions"}  # what differs because something else does, and is not said then


def image_file(folder: Path, i: int) -> Path:
    """<folder>/000000/000123.png of image 123: PER_FOLDER images a folder, at most."""
    return folder / f"{i // PER_FOLDER * PER_FOLDER:06d}" / f"{i:06d}.png"


def names_of(indices: range) -> list[str]:
    """The images of `indices` as they are named below their folder, in order."""
    return [str(image_file(Path(), i)) for i in indices]


def others_in(folder: Path, indices: range) -> list[str]:
    """Files below the folder that generation did not write: a viewer's copies, hidden files, somebody's own."""
    ours = {MANIFEST, *names_of(indices)}
    names = (str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())
    return sorted(name for name in names if name not in ours)


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
    """Make those images of `indices` that are not there yet, whole. captions: one for each of `indices`, where the model takes
    prompts. batch_size: images a call, at least 1; exact: one a call, so that no byte depends on it. accelerator: of several
    processes each makes its share. progress: what the progress bar is called; None for no bar.

    UserError where the folder holds images of something else, or captions are missing.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; at least 1 is needed")
    if sampler.takes == "prompt" and (captions is None or len(captions) != len(indices)):
        raise UserError(f"{len(indices):,} images need as many captions, got {len(captions or ()):,}; give --captions")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    texts = captions if sampler.takes == "prompt" else None
    size = 1 if exact else batch_size
    manifest = {"format": FORMAT, "seed": seed, "first": indices.start, "n": len(indices), "batch_size": size}
    manifest |= {"captions": None if texts is None else sha256_of(list(texts))} | sampler.identity(texts)
    _claim(folder, manifest, sampler.describe(), rank == 0)
    if accelerator:
        accelerator.wait_for_everyone()
    missing = [i for i in indices[rank::world] if not is_whole(image_file(folder, i))]
    bar = tqdm(total=len(indices[rank::world]), desc=progress, unit="image", disable=progress is None or rank != 0)
    bar.update(bar.total - len(missing))
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


def is_whole(file: Path) -> bool:
    """Whether a picture is there to its end: those written here are, but not what a copy that broke off has left."""
    try:
        with open(file, "rb") as stream:
            stream.seek(-len(PNG_END), os.SEEK_END)
            return stream.read() == PNG_END
    except OSError:  # it is not there, or shorter than that
        return False


def _write(file: Path, pixels) -> None:
    array = pixels.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format="PNG", compress_level=1)
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, buffer.getvalue())


def _claim(folder: Path, manifest: dict[str, Any], model: dict[str, Any], first: bool) -> None:
    """Write generation.json, or refuse a folder whose images were made by something else. model: for readers; not compared."""
    file = folder / MANIFEST
    remedy = "name another --output or remove them"
    if file.is_file():
        found = read_json(file, f"what made the images beside it is unknown: {remedy}")
        found.pop("model", None)
        if "format" not in found:
            raise UserError(f"{folder} holds images of an earlier version, which did not note all they depend on; {remedy}")
        if faults := differences(found, manifest, CAUSES):
            raise UserError(f"{folder} holds images made otherwise: {'; '.join(faults)}; {remedy}")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and has no generation.json; name another --output")
    elif first:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps(manifest | {"model": model}, indent=1) + "\n").encode())
