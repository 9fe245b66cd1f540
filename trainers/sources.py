"""Rows of text-to-image data before they are encoded: a prompt each and, for captioned data, an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines import data_sets
from pipelines.errors import UserError
from pipelines.identity import sha256_of
from pipelines.images import to_unit
from pipelines.prompts import read_rows

from .config_data import Captions, Prompts, TeacherSamples


@dataclass(frozen=True)
class ImageRow:
    """pixels (3, size, size) in [-1, 1]; (height, width) of the image as it was, (top, left) of the cut in the resized one."""

    pixels: Tensor
    original_and_crop: tuple[int, int, int, int]


class PromptRows:
    """prompts: one a row; identity: what must be the same for an encoded copy to be of these rows."""

    def __init__(self, prompts: list[str], source: str) -> None:
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"{source}: prompt {i + 1} of {len(prompts)} is empty; remove it")
        if not prompts:
            raise UserError(f"{source}: no prompts in it; put one on each line or row")
        self.prompts = prompts
        self.identity = {"prompts": sha256_of(prompts), "rows": len(prompts)}

    def __len__(self) -> int:
        return len(self.prompts)


class CaptionRows(PromptRows):
    """Images of a `datasets` data set with their captions; an image with a list of captions is a row for each."""

    def __init__(self, rows: Any, data: Captions, source: str) -> None:
        from datasets import Image

        for key, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
            if column not in rows.column_names:
                names = ", ".join(rows.column_names)
                what = "its images have no captions" if key == "caption_column" else "it has no images"
                raise UserError(f"data.{key}: no column {column!r} in {source}, so {what}; its columns are {names}")
        if not isinstance(rows.features[data.image_column], Image):
            kind = rows.features[data.image_column]
            raise UserError(f"data.image_column: column {data.image_column!r} of {source} holds {kind}, not images")
        captions, self.index = [], []
        for i, caption in enumerate(rows[data.caption_column]):
            each = caption if isinstance(caption, list) else [caption]
            if not each or not all(isinstance(c, str) and c.strip() for c in each):
                raise UserError(f"data.caption_column: image {i} of {source} has no caption; give it one or remove it")
            captions += each
            self.index += [i] * len(each)
        super().__init__(captions, source)
        self.images, self.column = rows, data.image_column
        images = data_sets.contents_sha256(rows, data.image_column)
        self.identity["images"] = sha256_of([images, self.index])  # and which of them a prompt belongs to

    def image(self, row: int, size: int) -> ImageRow:
        """Resized so that the shorter side is `size` (Lanczos), then cut from the middle."""
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor

        try:
            image = self.images[self.index[row]][self.column]
            if image is None:
                raise UserError("there is none")
            image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"data: image {self.index[row]} cannot be decoded: {error}; mend or remove it") from error
        scale = size / min(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
        left, top = (width - size) // 2, (height - size) // 2
        cut = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
        return ImageRow(to_unit(pil_to_tensor(cut)), (image.height, image.width, top, left))


def load_rows(data: Prompts | Captions | TeacherSamples) -> PromptRows:
    """The rows that a data section names. FileNotFoundError or ValueError name the file, row or column at fault."""
    if isinstance(data, Captions):
        return _captions(data)
    cells = read_rows(data.file, data.column, "data.file", "data.column")
    prompts = [p for cell in cells for p in (cell if isinstance(cell, list) else [cell])]
    if isinstance(data, TeacherSamples):
        prompts = [p for p in prompts for _ in range(data.images_per_prompt)]
    return PromptRows(prompts, f"data.file {data.file!r}")


def _captions(data: Captions) -> CaptionRows:
    source, fault = ", ".join(data.paths), f"data.paths: cannot read {', '.join(data.paths)}"
    if data.source in ("hub", "imagefolder") and len(data.paths) != 1:
        raise UserError(f"data.paths: one {'hub id' if data.source == 'hub' else 'folder'}, got {len(data.paths)}")
    if data.source == "hub":
        return CaptionRows(data_sets.load_named(data.paths[0], data.split, fault), data, source)
    for path in data.paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"data.paths: no such file or folder {path!r}")
    if data.source == "imagefolder":
        return CaptionRows(data_sets.load_image_folder(data.paths[0], fault), data, source)
    return CaptionRows(data_sets.load_files(data.source, data.paths, fault), data, source)


def image_batch(rows: CaptionRows, index: range, size: int) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    images = [rows.image(i, size) for i in index]
    return torch.stack([i.pixels for i in images]), [i.original_and_crop for i in images]
