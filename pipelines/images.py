"""Image sets in memory: scikit-learn digits, local parquet files, image folders and hub data sets.

Pixels are uint8 (n, c, h, w) everywhere outside a network; networks see float32 in [-1, 1].
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import data_sets
from .errors import UserError

# Decoded images are held in memory; this bounds a set to what a workstation can hold beside a model.
MAX_BYTES = 8 * 2**30
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImageSet:
    """pixels uint8 (n, c, h, w); labels long (n,) or None; class_names in the order of the labels."""

    pixels: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """float [-1, 1] -> uint8, rounded; values outside are clamped, as any image file would.

    NaN and infinities raise ValueError: they are no colour.
    """
    if not bool(torch.isfinite(x).all()):
        raise UserError("images hold NaN or infinite values; the network that made them has diverged")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_digits(image_size: int = 8) -> ImageSet:
    """The 1,797 grey 8x8 digits that ship with scikit-learn (0..16 rescaled to 0..255), enlarged bilinearly to image_size."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    grey = torch.from_numpy(digits.images / 16 * 255)[:, None]
    if image_size != 8:
        grey = torch.nn.functional.interpolate(grey, (image_size, image_size), mode="bilinear", align_corners=False)
    pixels = grey.round().to(torch.uint8)
    return ImageSet(pixels, torch.from_numpy(digits.target).long(), tuple(map(str, digits.target_names)))


def load_rows(dataset, image_column: str, label_column: str | None, image_size: int, channels: int) -> ImageSet:
    """Decode a `datasets.Dataset` to memory, centre-cropped and resized (Lanczos) to image_size.

    Raises ValueError for a missing column or a set too large for memory.
    """
    from tqdm import tqdm

    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in dataset.column_names:
            raise UserError(f"data.{key}: no column {column!r}; the data set has {', '.join(dataset.column_names)}")
    need = len(dataset) * channels * image_size**2
    if need > MAX_BYTES:
        raise UserError(
            f"data: {len(dataset)} images of {channels}x{image_size}x{image_size} take {need / 2**30:.0f} GiB decoded, "
            f"more than {MAX_BYTES / 2**30:.0f}; choose a smaller split, e.g. data.split='train[:10%]'"
        )
    labels, names = None, ()
    if label_column is not None:
        labels, names = _labels(dataset, label_column)
    pixels = torch.empty(len(dataset), channels, image_size, image_size, dtype=torch.uint8)
    # undecoded, so that a damaged image is met here, where its row is known
    undecoded = dataset.select_columns([image_column]).cast_column(image_column, _image_feature(dataset, image_column))
    for i, row in enumerate(tqdm(undecoded, desc="decoding images", unit="image")):
        source = row[image_column]
        if source is None:
            raise UserError(f"data.image_column: row {i} of {image_column!r} is empty; mend or remove it")
        file = io.BytesIO(source["bytes"]) if source["bytes"] is not None else source["path"]
        pixels[i] = _read_image(file, image_size, channels, f"data.image_column: cannot decode row {i} of {image_column!r}")
    return ImageSet(pixels, labels, names)


def _image_feature(dataset, column: str):
    from datasets import Image

    if not isinstance(dataset.features[column], Image):
        raise UserError(f"data.image_column: column {column!r} holds {dataset.features[column]}, not images")
    return Image(decode=False)


def _labels(dataset, column: str) -> tuple[Tensor, tuple[str, ...]]:
    """Class numbers 0, 1, ... and their names (the numbers themselves where the column has none)."""
    values = dataset[column][:]
    if not all(isinstance(v, int) and v >= 0 for v in values):
        wrong = next(v for v in values if not (isinstance(v, int) and v >= 0))
        raise UserError(f"data.label_column: {column!r} must hold class numbers 0, 1, ...; it holds {wrong!r}")
    labels = torch.tensor(values, dtype=torch.long)
    names = getattr(dataset.features[column], "names", None) or map(str, range(int(labels.max()) + 1))
    return labels, tuple(names)


def load_parquet(files: list[str], image_column: str, label_column: str | None, image_size: int, channels: int):
    """Local parquet files with the `datasets` image feature. FileNotFoundError names the file that is missing."""
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"data.files: no such file {file!r}; give the path of a parquet file")
    rows = data_sets.load_files("parquet", files, f"data.files: cannot read {', '.join(files)}")
    return load_rows(rows, image_column, label_column, image_size, channels)


def load_folder(path: str, image_size: int, channels: int) -> ImageSet:
    """A folder of images, searched recursively; sub-folders directly below it are the classes if there are any."""
    from tqdm import tqdm

    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"data.path: no such folder {path!r}")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"data.path: no images ({', '.join(IMAGE_SUFFIXES)}) below {path!r}")
    pixels = torch.empty(len(files), channels, image_size, image_size, dtype=torch.uint8)
    for i, file in enumerate(tqdm(files, desc="decoding images", unit="image")):
        pixels[i] = _read_image(file, image_size, channels, f"data.path: cannot decode {str(file)!r}")
    parents = [f.relative_to(root).parts[0] if len(f.relative_to(root).parts) > 1 else None for f in files]
    if any(p is None for p in parents):
        return ImageSet(pixels)
    names = tuple(sorted(set(parents)))
    return ImageSet(pixels, torch.tensor([names.index(p) for p in parents]), names)


def load_hub(name: str, split: str, image_column: str, label_column: str | None, image_size: int, channels: int):
    """A data set by its hub id (or the path of a data set folder)."""
    rows = data_sets.load_named(name, split, f"data.id: cannot read {name!r}")
    return load_rows(rows, image_column, label_column, image_size, channels)


def _read_image(file, image_size: int, channels: int, fault: str) -> Tensor:
    """A file (path or stream) -> uint8 (channels, image_size, image_size): centre crop to a square, then Lanczos.

    ValueError starting with `fault` for whatever PIL raises on damaged files.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{fault}: {error}; mend or remove it") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != image_size:
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return pil_to_tensor(image)
