"""Rows of text-to-image data before they are encoded: a prompt each and, for captioned data, an image."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.common.errors import UserError
from pipelines.common.identity import sha256_of
from pipelines.data import data_sets
from pipelines.data.decode import Rules, decode
from pipelines.data.images import ENLARGED, content_of, to_unit, undecoded
from pipelines.data.prompts import as_text, read_rows
from pipelines.data.walk import examples, refuse_pictures

from ..config.data import Captions, Prompts, TeacherSamples
from .caption_folder import captioned_folder

MOST_PIXELS = 2**27  # of a resized image before it is cut, 400 MB


@dataclass(frozen=True)
class ImageRow:
    """pixels (3, size, size) in [-1, 1]; (height, width) of the image as it was, (top, left) of the cut in the resized one."""

    pixels: Tensor
    original_and_crop: tuple[int, int, int, int]


class PromptRows:
    """prompts: one a row; identity: what must be the same for an encoded copy to be of these rows."""

    def __init__(self, prompts: list[Any], source: str) -> None:
        for i, prompt in enumerate(prompts):
            if as_text(prompt) is None and prompt is not None:
                raise UserError(
                    f"{source}: prompt {i + 1} of {len(prompts)} is {prompt!r:.80}, no text; remove it or put it in quotes"
                )
            if not (as_text(prompt) or "").strip():
                raise UserError(f"{source}: prompt {i + 1} of {len(prompts)} is empty; remove it")
        if not prompts:
            raise UserError(f"{source}: no prompts in it; put one on each line or row")
        self.prompts = [str(prompt) for prompt in prompts]
        self.identity = {"prompts": sha256_of(self.prompts), "rows": len(prompts)}

    def __len__(self) -> int:
        return len(self.prompts)


class CaptionRows(PromptRows):
    """Images with their captions; an image with a list of captions is a row for each.

    cells: a caption or a list of them for each image; file(i): image i undecoded, a path or its content; name: what a message
    calls image i. notes: what had to be done to the images that were decoded, counted.
    """

    def __init__(
        self, cells: list[Any], file: Callable[[int], Any], name: Callable[[int], str], data: Captions, source: str
    ) -> None:
        captions, self.index = [], []
        for i, cell in enumerate(cells):
            each = _texts(cell, f"data.caption_column: {name(i)} of {source}")
            captions += each
            self.index += [i] * len(each)
        super().__init__(captions, source)
        self.file, self.name = file, name
        self.rules, self.notes = Rules(background=data.background), Counter[str]()
        # images by their contents, and which of them a prompt belongs to
        self.identity["images"] = sha256_of([[_sha256(file(i)) for i in range(len(cells))], self.index])
        if data.background != "white":
            self.identity["background"] = data.background

    def image(self, row: int, size: int) -> ImageRow:
        """Resized so that the shorter side is `size` (Lanczos), then cut from the middle. UserError names it if it is damaged."""
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor

        i = self.index[row]
        decoded = decode(self.file(i), f"data: {self.name(i)}", self.rules)
        image = decoded.image
        self.notes.update(decoded.notes + ((ENLARGED,) if min(image.size) < size else ()))
        scale = size / min(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
        if width * height > MOST_PIXELS:
            raise UserError(
                f"data: {self.name(i)} is {image.width}x{image.height}, and {width}x{height} with the shorter side at {size}: "
                "too long a strip; crop it"
            )
        left, top = (width - size) // 2, (height - size) // 2
        cut = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
        return ImageRow(to_unit(pil_to_tensor(cut)), (image.height, image.width, top, left))


def _sha256(file: Path | str | bytes) -> str:
    return hashlib.sha256(file if isinstance(file, bytes) else Path(file).read_bytes()).hexdigest()


def _texts(cell: Any, where: str) -> list[str]:
    """The captions in a cell, one or a list of them. UserError starting with `where` for what is empty or no text."""
    texts = []
    for caption in cell if isinstance(cell, list) else [cell]:
        text = as_text(caption)
        if text is None and caption is not None:
            raise UserError(f"{where} has the caption {caption!r:.80}, which is no text; remove it or put it in quotes")
        texts.append(text or "")
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"{where} has no caption; give it one or remove it")
    return texts


def load_rows(data: Prompts | Captions | TeacherSamples) -> PromptRows:
    """The rows that a data section names. FileNotFoundError or ValueError name the file, row or column at fault."""
    if isinstance(data, Captions):
        return _captions(data)
    cells = read_rows(data.file, data.column, "data.file", "data.column")
    if [] in cells:
        raise UserError(f"data.file {data.file!r}: row {cells.index([]) + 1} has an empty list of prompts; remove it")
    prompts = [p for cell in cells for p in (cell if isinstance(cell, list) else [cell])]
    if isinstance(data, TeacherSamples):
        prompts = [p for p in prompts for _ in range(data.images_per_prompt)]
    return PromptRows(prompts, f"data.file {data.file!r}")


def _captions(data: Captions) -> CaptionRows:
    source, fault = examples(data.paths), f"data.paths: cannot read {examples(data.paths)}"
    if data.source in ("hub", "imagefolder") and len(data.paths) != 1:
        raise UserError(f"data.paths: one {'hub id' if data.source == 'hub' else 'folder'}, got {len(data.paths)}")
    if data.source == "hub":
        refuse_pictures(data.paths[0], "data.paths", "data.source=imagefolder")
        return _caption_table(data_sets.load_named(data.paths[0], data.split, fault), data, source)
    for path in data.paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"data.paths: no such file or folder {path!r}")
    if data.source == "imagefolder":
        pictures, names, cells = captioned_folder(data.paths[0], data.image_column, data.caption_column)
        return CaptionRows(cells, lambda i: pictures.file(names[i]), lambda i: f"image {names[i]!r}", data, source)
    return _caption_table(data_sets.load_files(data.source, data.paths, fault), data, source)


def _caption_table(rows: Any, data: Captions, source: str) -> CaptionRows:
    """rows: a `datasets.Dataset` with a column of images and one of captions."""
    for key, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
        if column not in rows.column_names:
            names = ", ".join(rows.column_names)
            what = "its images have no captions" if key == "caption_column" else "it has no images"
            raise UserError(f"data.{key}: no column {column!r} in {source}, so {what}; its columns are {names}")
    cells, images = list(rows[data.caption_column]), undecoded(rows, data.image_column, f"data.image_column: {source}")

    def file(i: int) -> bytes | str:
        return content_of(images[i][data.image_column], f"data: image {i} of {source}")

    return CaptionRows(cells, file, lambda i: f"image {i}", data, source)


def image_batch(rows: CaptionRows, index: range, size: int) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """Images (b, 3, size, size) in [-1, 1] of these rows, and where each was cut out: (height, width, top, left)."""
    images = [rows.image(i, size) for i in index]
    return torch.stack([i.pixels for i in images]), [i.original_and_crop for i in images]
