"""Image sets as they lie on disk, decoded one by one and prepared as a protocol says: a torch data set that any kind of
worker process can hold.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from pipelines.common.errors import UserError
from pipelines.data import data_sets
from pipelines.data.decode import Rules, decode, says_turned
from pipelines.data.images import content_of, undecoded
from pipelines.data.walk import Pictures, examples, is_hidden, is_picture, natural, say, walk

from ..content import ImageSetFacts
from ..protocols import Protocol

PATCH = 299
OWN_FILE = "generation.json"  # eval/images/generation.py's, beside the images that it makes


class Images(Dataset[dict[str, Tensor]]):
    """A known number of images, each as {view: uint8 (3, h, w)}."""

    def __len__(self) -> int:
        raise NotImplementedError


class ImageFiles(Images):
    """Images of a folder, a zip, parquet files or a hub data set (owner/name:split), in the order in which a person counts their
    names (pipelines/data/walk.py), or of rows.

    An item is a dict of uint8 (3, h, w), one for each view that is asked for: "image", prepared as the protocol says; "patch",
    299 pixels from the middle of the image as it is (a smaller image whole, as in DMD2's patch FID); "clip", the largest centred
    square resized (Lanczos) to protocol.clip_crop. FileNotFoundError and UserError name the source or image at fault. limit: only
    the first so many. option: what the user calls the source. names: of a folder these files, whatever else lies in it.
    """

    def __init__(
        self,
        source: str,
        protocol: Protocol,
        views: Sequence[str] = ("image",),
        column: str | None = None,
        limit: int | None = None,
        option: str = "--images",
        names: Sequence[str] | None = None,
    ) -> None:
        self.source, self.protocol, self.views = source, protocol, tuple(views)
        self.rules = rules_of(protocol)
        self.rows: Any = None
        path = Path(source)
        if names is not None:
            self.pictures, self.names = None, list(names)
        elif path.is_dir() and (parquet := [f.name for f in path.glob("*.parquet") if not is_hidden(f.name)]):
            if pictures := [name for name in walk(path).files if is_picture(name)]:
                raise UserError(f"{source} holds parquet files and pictures ({examples(pictures)}); name a folder of one kind")
            self.rows = _rows("parquet", [str(path / name) for name in sorted(parquet, key=natural)], source)
        elif path.is_dir() or (path.suffix.lower() == ".zip" and path.is_file()):
            self.pictures = Pictures(source, option)
            self.names = self.pictures.names
            left_out = self.pictures.left_out(used=(OWN_FILE,))
            say(f"{source}: {len(self.names):,} images; {left_out}" if left_out else "")
        elif path.suffix == ".parquet" and path.is_file():
            self.rows = _rows("parquet", [source], source)
        elif not path.exists() and source.partition(":")[0].count("/") == 1 and not source.startswith((".", "/", "~")):
            self.rows = _rows("hub", source.partition(":"), source)
        elif os.path.exists(source):
            hint = "; save its arrays as pictures (.png)" if source.lower().endswith((".npz", ".npy")) else ""
            raise UserError(f"{source!r} is neither a folder nor a .zip or .parquet{hint}")
        else:
            raise FileNotFoundError(f"no such folder, .zip or .parquet: {source!r} (a hub data set looks like owner/name:split)")
        if self.rows is not None:
            self.column = _image_column(self.rows, column, source)
            self.rows = undecoded(self.rows, self.column, "--image-column")
            self.names = [f"row {i}" for i in range(len(self.rows))]
        if not self.names:
            raise UserError(f"{source} holds no images")
        self.names = self.names[:limit]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        where = self._where(i)
        image = decode(self._file(i), where, self.rules).image
        return {view: pil_to_tensor(VIEWS[view](image, self.protocol, where)) for view in self.views}

    def _where(self, i: int) -> str:
        return f"{self.names[i]} of {self.source}"

    def _file(self, i: int) -> Path | str | bytes:
        if self.rows is None:
            return self.pictures.file(self.names[i]) if self.pictures else Path(self.source, self.names[i])
        return content_of(self.rows[i][self.column], self._where(i))

    def identity(self) -> ImageSetFacts:
        """n and a sha256 over contents in their order: a copy elsewhere, under other names or in a zip is the same set. turned:
        how many are photos that EXIF says to turn, which is not done (rules_of); no key where none are.
        """
        digest, turned = hashlib.sha256(), 0
        for i in range(len(self)):
            file = self._file(i)
            content = file if isinstance(file, bytes) else Path(file).read_bytes()
            digest.update(hashlib.sha256(content).digest())
            turned += says_turned(content)
        if turned:
            say(f"{self.source}: EXIF would turn {turned:,} of {len(self):,} images; measured as they lie, as by clean-fid")
        found: ImageSetFacts = {"source": Path(self.source).name, "n": len(self), "sha256": digest.hexdigest()}
        if turned:
            found["turned"] = turned
        return found


def rules_of(protocol: Protocol) -> Rules:
    """How evaluation differs from training: what changes numbers is refused, not done. clean-fid, which defines them, does not
    turn photos by EXIF, so neither is that done here. Grey photographs are grey RGB where the protocol takes them, as in DMD2.
    """
    return Rules(background=None, upright=False, deep=False, grey=protocol.grayscale, frames=False)


def prepared(image: Image.Image, protocol: Protocol, where: str) -> Image.Image:
    """Checked for its size, or cropped to the largest centred square and resized (Lanczos), as the protocol says. UserError for
    another size than protocol.size. where: what the message calls the image.
    """
    if protocol.size is not None and image.size != (protocol.size, protocol.size):
        raise UserError(
            f"{where} is {image.width}x{image.height}, protocol {protocol.name} compares images of "
            f"{protocol.size}x{protocol.size}"
        )
    return image if protocol.crop_to is None else square(image, protocol.crop_to)


def square(image: Image.Image, side: int) -> Image.Image:
    """The largest centred square, then Lanczos to `side` pixels (DMD2, GigaGAN: in this order)."""
    short = min(image.size)
    image = middle(image, short)
    return image if short == side else image.resize((side, side), Image.Resampling.LANCZOS)


def middle(image: Image.Image, side: int) -> Image.Image:
    """The `side` pixels square in the middle of an image that is at least as large."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


VIEWS = {
    "image": prepared,
    "patch": lambda image, protocol, where: image if min(image.size) < PATCH else middle(image, PATCH),
    "clip": lambda image, protocol, where: square(image, protocol.clip_crop),
}


def same_sizes(batch: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Items {view: uint8 (3, h, w)} -> [{view: uint8 (b, 3, h, w)}]: stacks of neighbours of one size, in order. What a loader's
    collate_fn returns.
    """
    stacks: list[list[dict[str, Tensor]]] = []
    for item in batch:
        if not stacks or any(stacks[-1][0][view].shape != image.shape for view, image in item.items()):
            stacks.append([])
        stacks[-1].append(item)
    return [{view: torch.stack([item[view] for item in s]) for view in s[0]} for s in stacks]


def _rows(kind: str, what: Any, source: str) -> Any:
    fault = f"{source} cannot be read"
    if kind == "hub":
        name, _, split = what
        return data_sets.load_named(name, split or "train", fault)
    return data_sets.load_files("parquet", what, fault)


def _image_column(rows: Any, column: str | None, source: str) -> str:
    from datasets import Image as ImageFeature

    images = [name for name, feature in rows.features.items() if isinstance(feature, ImageFeature)]
    if column is not None and column not in images:
        raise UserError(f"--image-column: {source} has no image column {column!r} (image columns: {', '.join(images) or 'none'})")
    if column is None and len(images) != 1:
        raise UserError(f"{source} has {len(images)} image columns ({', '.join(images)}); name one with --image-column")
    return column or images[0]
