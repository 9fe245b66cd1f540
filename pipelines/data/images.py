"""Image sets in memory: the 8x8 digits, local parquet files, folders and zip files of pictures, and hub data sets.

Pixels are uint8 (n, c, h, w) everywhere outside a network; networks see float32 in [-1, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..common.errors import UserError
from ..common.reading import loading
from . import data_sets
from .decode import Rules, decode
from .labels import LABELS_FILE, MAX_CLASSES, folder_labels
from .walk import Pictures, examples, refuse_pictures, say

# Decoded images are held in memory; this bounds a set to what a workstation can hold beside a model.
MAX_BYTES = 8 * 2**30


DIGITS = Path(__file__).with_name("digits.safetensors")  # images uint8 (n, 8, 8) of 0..16, labels uint8 (n,)

ENLARGED = "smaller than image_size, enlarged"  # a note as those of decoding


@dataclass(frozen=True)
class ImageSet:
    """pixels uint8 (n, c, h, w); labels long (n,) or None; class_names in the order of the labels."""

    pixels: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], of any shape.

    >>> to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist()
    [-1.0, 1.0]
    """
    return pixels.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """float [-1, 1] -> uint8, rounded; values outside are clamped, as any image file would.

    NaN and infinities raise ValueError: they are no colour.

    >>> to_pixels(torch.tensor([-1.0, 0.0, 1.0, 3.0])).tolist()
    [0, 128, 255, 255]
    """
    if not bool(torch.isfinite(x).all()):
        raise UserError("images hold NaN or infinite values; the network that made them has diverged")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_digits(image_size: int = 8) -> ImageSet:
    """The 1,797 grey 8x8 digits that scikit-learn has too (0..16 rescaled to 0..255), enlarged bilinearly to image_size.

    The test set of E. Alpaydin & C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (CC BY 4.0).
    """
    with loading(f"{DIGITS} cannot be read", "get it again: git checkout -- pipelines/data/digits.safetensors"):
        digits = load_file(DIGITS)
    _check_size(len(digits["images"]), 1, image_size, "data")
    grey = digits["images"].double()[:, None] / 16 * 255
    if image_size != 8:
        grey = torch.nn.functional.interpolate(grey, (image_size, image_size), mode="bilinear", align_corners=False)
    pixels = grey.round().to(torch.uint8)
    return ImageSet(pixels, digits["labels"].long(), tuple("0123456789"))


def load_rows(
    dataset,
    image_column: str,
    label_column: str | None,
    image_size: int,
    channels: int,
    background: str | None = "white",
) -> ImageSet:
    """Decode a `datasets.Dataset` to memory, centre-cropped and resized (Lanczos) to image_size; background: decode.Rules.

    Raises UserError for a missing column, a set too large for memory, or the row that cannot be decoded.
    """
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in dataset.column_names:
            raise UserError(f"data.{key}: no column {column!r}; the data set has {', '.join(dataset.column_names)}")
    labels: Tensor | None = None
    names: tuple[str, ...] = ()
    if label_column is not None:
        labels, names = _labels(dataset, label_column)
    cells = undecoded(dataset, image_column, "data.image_column")
    files = ((content_of(row[image_column], f"data.image_column: row {i} of {image_column!r}")) for i, row in enumerate(cells))
    wheres = (f"data.image_column: row {i} of {image_column!r}" for i in range(len(dataset)))
    pixels = _decoded(len(dataset), zip(files, wheres, strict=True), image_size, channels, Rules(background=background), "data")
    return ImageSet(pixels, labels, names)


def undecoded(dataset, column: str, key: str) -> Any:
    """The column of images as files or their content, so that pictures are decoded by one decoder, which can name their row."""
    from datasets import Image

    if not isinstance(dataset.features[column], Image):
        raise UserError(f"{key}: column {column!r} holds {dataset.features[column]}, not images")
    return dataset.select_columns([column]).cast_column(column, Image(decode=False))


def content_of(cell: dict[str, Any] | None, where: str) -> bytes | str:
    """An undecoded cell -> its content or path. UserError for an empty one."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UserError(f"{where} has no image; remove the row")
    return cell["bytes"] if cell["bytes"] is not None else cell["path"]


def _decoded(n: int, pictures: Iterable[tuple[Any, str]], image_size: int, channels: int, rules: Rules, option: str) -> Tensor:
    """n pairs of a file and what a message calls it -> uint8 (n, channels, image_size, image_size); says what had to be done."""
    from tqdm import tqdm

    _check_size(n, channels, image_size, option)
    pixels, notes = torch.empty(n, channels, image_size, image_size, dtype=torch.uint8), Counter[str]()
    for i, (file, where) in enumerate(tqdm(pictures, desc="decoding images", unit="image", total=n)):
        pixels[i], done = _square(file, where, image_size, channels, rules)
        notes.update(done)
    say(summary_of(notes, option))
    return pixels


def _check_size(n: int, channels: int, image_size: int, option: str) -> None:
    """UserError for a set that would not fit in memory."""
    need = n * channels * image_size**2
    if need > MAX_BYTES:
        raise UserError(
            f"{option}: {n:,} images of {channels}x{image_size}x{image_size} take {need / 2**30:.3g} GiB decoded, more than "
            f"{MAX_BYTES / 2**30:.3g}; choose a smaller split (e.g. data.split='train[:10%]'), folder or data.image_size"
        )


def summary_of(notes: Counter, option: str) -> str:
    """One sentence of what decoding did to pictures of a set; "" for nothing."""
    return f"{option}: " + "; ".join(f"{count:,} pictures: {note}" for note, count in notes.most_common()) if notes else ""


def _labels(dataset, column: str) -> tuple[Tensor, tuple[str, ...]]:
    """Class numbers 0, 1, ... and their names (the numbers themselves where the column has none)."""
    values = dataset[column][:]
    if not all(isinstance(v, int) and v >= 0 for v in values):
        wrong = next(v for v in values if not (isinstance(v, int) and v >= 0))
        raise UserError(f"data.label_column: {column!r} must hold class numbers 0, 1, ...; it holds {wrong!r}")
    if max(values) >= MAX_CLASSES:
        raise UserError(f"data.label_column: {column!r} holds {max(values)}; expected class numbers below {MAX_CLASSES:,}")
    labels = torch.tensor(values, dtype=torch.long)
    names = getattr(dataset.features[column], "names", None) or map(str, range(int(labels.max()) + 1))
    return labels, tuple(names)


def load_parquet(
    files: list[str],
    image_column: str,
    label_column: str | None,
    image_size: int,
    channels: int,
    background: str | None = "white",
) -> ImageSet:
    """Local parquet files with the `datasets` image feature. FileNotFoundError names the file that is missing."""
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"data.files: no such file {file!r}; give the path of a parquet file")
    rows = data_sets.load_files("parquet", files, f"data.files: cannot read {examples(files)}")
    return load_rows(rows, image_column, label_column, image_size, channels, background)


def load_folder(
    path: str, image_size: int, channels: int, labels: bool | None = None, background: str | None = "white"
) -> ImageSet:
    """A folder or zip file of pictures, searched to its depths, in the order in which a person counts (walk.natural).

    labels: True refuses a set without classes, False ignores them, None takes them where they are (labels.folder_labels).
    background: decode.Rules.
    """
    pictures = Pictures(path, "data.path")
    classes = None if labels is False else folder_labels(pictures, required=bool(labels))
    found = "labels not asked for" if labels is False else classes.summary if classes else "no classes"
    left_out = pictures.left_out(used=(pictures.top + LABELS_FILE,))
    say(f"data.path: {len(pictures.names):,} pictures, {found}" + (f"; {left_out}" if left_out else ""))
    files = ((pictures.file(name), f"data.path: {name!r} of {path}") for name in pictures.names)
    pixels = _decoded(len(pictures.names), files, image_size, channels, Rules(background=background), "data.path")
    return ImageSet(pixels, classes.labels, classes.names) if classes else ImageSet(pixels)


def load_hub(
    name: str,
    split: str,
    image_column: str,
    label_column: str | None,
    image_size: int,
    channels: int,
    background: str | None = "white",
) -> ImageSet:
    """A data set by its hub id (or the path of a data set folder)."""
    refuse_pictures(name, "data.id", f"data={{name: folder, path: {name}, ...}}")
    rows = data_sets.load_named(name, split, f"data.id: cannot read {name!r}")
    return load_rows(rows, image_column, label_column, image_size, channels, background)


def _square(file, where: str, image_size: int, channels: int, rules: Rules) -> tuple[Tensor, tuple[str, ...]]:
    """A file -> uint8 (channels, image_size, image_size): centre crop to a square, then Lanczos; and the decoder's notes."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    decoded = decode(file, where, rules)
    image = decoded.image if channels == 3 else decoded.image.convert("L")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    notes = decoded.notes + ((ENLARGED,) if side < image_size else ())
    if side != image_size:
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return pil_to_tensor(image), notes
