"""Captions or prompts, one an image, in the order of the images. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.reading import read_json, reason_of
from pipelines.data.prompts import as_text, read_rows


@dataclass(frozen=True)
class Captions:
    """texts: one an image; source: the file; sha256: of the texts, which is what two evaluations must share."""

    texts: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """Hex digest over the texts in their order."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def first(self, n: int) -> Captions:
        """The captions of the first n images. UserError if there are fewer."""
        if len(self) < n:
            raise UserError(f"--captions: {self.source} has captions for {len(self):,} images, {n:,} are needed")
        return Captions(self.texts[:n], self.source)

    def describe(self) -> dict[str, object]:
        """What reports say of them: file, n, sha256."""
        return {"file": self.source, "n": len(self), "sha256": self.sha256}


def read_captions(file: str, column: str = "caption") -> Captions:
    """A column of a .parquet, .csv or .jsonl, the lines of a .txt, or COCO's captions_*.json. Of several captions for one image
    the first; COCO's are ordered by image id, its captions by annotation id.

    FileNotFoundError; UserError for a file of another kind, and for the row without a caption, by its number.
    """
    cells = (
        coco_captions(file) if Path(file).suffix.lower() == ".json" else read_rows(file, column, "--captions", "--caption-column")
    )
    texts = []
    for i, cell in enumerate(cells):
        text = as_text(cell[0] if isinstance(cell, list) and cell else cell)
        if text is None or not text.strip():
            raise UserError(f"--captions: image {i} of {file} has no caption (got {cell!r}); give it one or remove the row")
        texts.append(text)
    if not texts:
        raise UserError(f"--captions: {file} has no captions in it")
    return Captions(tuple(texts), Path(file).name)


def coco_captions(file: str) -> list[Sequence[str]]:
    """The captions of each image of a COCO file, by image id. FileNotFoundError; UserError for a file of another kind."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"--captions: no such file {file!r}")
    try:
        content = read_json(file, "copy it again")
        captions: dict[int, list[str]] = {image["id"]: [] for image in sorted(content["images"], key=lambda image: image["id"])}
        for annotation in sorted(content["annotations"], key=lambda a: a["id"]):
            captions[annotation["image_id"]].append(annotation["caption"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--captions: {file} is no COCO captions file ({reason_of(error)}): expected images and annotations"
        ) from error
    return list(captions.values())
