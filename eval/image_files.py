"""Image sets as they lie on disk, decoded one by one and prepared as a protocol says: a torch data set that any kind of
worker process can hold.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from pipelines.errors import UserError
from pipelines.images import IMAGE_SUFFIXES

from .protocols import Protocol

PATCH = 299
GREY_MODES = ("L", "P", "1", "CMYK")  # colour spaces of photographs that become RGB without a choice to be made


class ImageFiles(Dataset):
    """Images of a folder, a zip, parquet files or a hub data set (owner/name:split), in the order of their names or rows.

    An item is a dict of uint8 (3, h, w), one for each view that is asked for: "image", prepared as the protocol says; "patch",
    299 pixels from the middle of the image as it is (a smaller image whole, as in DMD2's patch FID); "clip", the largest
    centred square resized (Lanczos) to protocol.clip_crop. FileNotFoundError and ValueError name the source or image at
    fault. limit: only the first so many. names: of a folder these files,
    whatever else lies in it.
    """

    def __init__(
        self,
        source: str,
        protocol: Protocol,
        views: Sequence[str] = ("image",),
        column: str | None = None,
        limit: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.source, self.protocol, self.views = source, protocol, tuple(views)
        self.rows: Any = None
        path = Path(source)
        if names is not None:
            self.kind, self.names = "folder", list(names)
        elif path.is_dir() and not (parquet := sorted(path.glob("*.parquet"))):
            self.kind = "folder"
            self.names = sorted(str(f.relative_to(path)) for f in path.rglob("*") if _is_image(f.name))
        elif path.is_dir():
            self.kind, self.rows = "rows", _rows("parquet", [str(f) for f in parquet], source)
        elif path.suffix == ".zip" and path.is_file():
            self.kind = "zip"
            try:
                with zipfile.ZipFile(path) as archive:
                    self.names = sorted(n for n in archive.namelist() if _is_image(n))
            except zipfile.BadZipFile as error:
                raise UserError(f"{source} is not a whole zip file ({error}); copy it again") from error
        elif path.suffix == ".parquet" and path.is_file():
            self.kind, self.rows = "rows", _rows("parquet", [source], source)
        elif not path.exists() and source.partition(":")[0].count("/") == 1 and not source.startswith((".", "/", "~")):
            self.kind, self.rows = "rows", _rows("hub", source.partition(":"), source)
        else:
            raise FileNotFoundError(f"no such folder, .zip or .parquet: {source!r} (a hub data set looks like owner/name:split)")
        if self.rows is not None:
            self.column = _image_column(self.rows, column, source)
            self.rows = _undecoded(self.rows, self.column)
            self.names = [f"row {i}" for i in range(len(self.rows))]
        if not self.names:
            raise UserError(f"{source} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        self.names = self.names[:limit]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        where = f"{self.names[i]} of {self.source}"
        try:
            with Image.open(self._file(i)) as opened:
                deep = any("16" in str(tile[3]) for tile in opened.tile)  # Pillow would give 16-bit colours as 8-bit ones
                opened.load()
                image = as_rgb(opened, where, self.protocol.grayscale, deep)
        except (OSError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            raise UserError(f"{where} cannot be decoded: {error}; mend or remove it") from error
        return {view: pil_to_tensor(VIEWS[view](image, self.protocol, where)) for view in self.views}

    def _file(self, i: int) -> Any:
        if self.kind == "folder":
            return Path(self.source) / self.names[i]
        if self.kind == "zip":  # opened anew: workers must not share a file position
            with zipfile.ZipFile(self.source) as archive:
                return io.BytesIO(archive.read(self.names[i]))
        cell = self.rows[i][self.column]
        if cell is None:
            raise UserError(f"{self.names[i]} of {self.source} has no image; remove the row")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]

    def identity(self) -> dict[str, Any]:
        """n and a sha256 over names and contents, so that a copy elsewhere is the same set."""
        digest = hashlib.sha256()
        for i, name in enumerate(self.names):
            file = self._file(i)
            content = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
            digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\0".encode())
        return {"source": Path(self.source).name, "n": len(self), "sha256": digest.hexdigest()}


def as_rgb(image: Image.Image, where: str, photographs: bool, deep: bool = False) -> Image.Image:
    """RGB as it is; grey, palette and CMYK photographs where the protocol takes them. ValueError for what loses something."""
    clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    deep = deep or image.mode in ("I;16", "I;16B", "I", "F")
    if not clear and not deep and image.mode == "RGB":
        return image
    if not clear and not deep and photographs and image.mode in GREY_MODES:
        return image.convert("RGB")
    what = "transparency" if clear else "more than 8 bits a channel" if deep else "no colour channels"
    raise UserError(
        f"{where} has {what} (mode {image.mode}), expected 8-bit RGB; convert it yourself: how is a choice that changes numbers"
        + ("" if photographs or image.mode not in GREY_MODES else " (--grayscale takes grey photographs as grey RGB)")
    )


def prepared(image: Image.Image, protocol: Protocol, where: str) -> Image.Image:
    """Checked for its size, or cropped to the largest centred square and resized (Lanczos), as the protocol says."""
    if protocol.size is not None and image.size != (protocol.size, protocol.size):
        raise UserError(
            f"{where} is {image.width}x{image.height}, protocol {protocol.name} compares images of "
            f"{protocol.size}x{protocol.size}"
        )
    return image if protocol.crop_to is None else square(image, protocol.crop_to)


def square(image: Image.Image, side: int) -> Image.Image:
    """The largest centred square, then Lanczos (DMD2, GigaGAN: in this order)."""
    short = min(image.size)
    image = middle(image, short)
    return image if short == side else image.resize((side, side), Image.Resampling.LANCZOS)


def middle(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


VIEWS = {
    "image": prepared,
    "patch": lambda image, protocol, where: image if min(image.size) < PATCH else middle(image, PATCH),
    "clip": lambda image, protocol, where: square(image, protocol.clip_crop),
}


def same_sizes(batch: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Items -> stacks of neighbours of one size, in order. What a loader's collate_fn returns."""
    stacks: list[list[dict[str, Tensor]]] = []
    for item in batch:
        if not stacks or any(stacks[-1][0][view].shape != image.shape for view, image in item.items()):
            stacks.append([])
        stacks[-1].append(item)
    return [{view: torch.stack([item[view] for item in s]) for view in s[0]} for s in stacks]


def _is_image(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _rows(kind: str, what: Any, source: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    try:
        if kind == "hub":
            name, _, split = what
            return load_dataset(name, split=split or "train")
        return load_dataset("parquet", data_files=what, split="train")
    except (DatasetGenerationError, ArrowInvalid, OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read: {error.__cause__ or error}") from error


def _image_column(rows: Any, column: str | None, source: str) -> str:
    from datasets import Image as ImageFeature

    images = [name for name, feature in rows.features.items() if isinstance(feature, ImageFeature)]
    if column is not None and column not in images:
        raise UserError(f"--image-column: {source} has no image column {column!r} (image columns: {', '.join(images) or 'none'})")
    if column is None and len(images) != 1:
        raise UserError(f"{source} has {len(images)} image columns ({', '.join(images)}); name one with --image-column")
    return column or images[0]


def _undecoded(rows: Any, column: str) -> Any:
    from datasets import Image as ImageFeature

    return rows.select_columns([column]).cast_column(column, ImageFeature(decode=False))
