"""What a draw takes its data and conditions from: rows of an image set, points, class labels, or encoded prompts and latents."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from pipelines.analytic import GaussianMixture, make_mixture
from pipelines.data import images
from pipelines.data.images import ImageSet, to_unit
from pipelines.denoiser import Condition, null_rows

from ..config.data import Data, DigitsData, FolderData, HubData, MixtureData, ParquetData


class Examples(Protocol):
    """has_x0: whether rows come with data, or with conditions only."""

    has_x0: bool

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> tuple[Tensor | None, Condition]:
        """index (b,) -> x0 (b, c, h, w) float32 or None, and the condition of each or None."""


class Images:
    """Images in [-1, 1], with their labels as condition where they have any."""

    has_x0 = True

    def __init__(self, images: ImageSet) -> None:
        c, h, w = images.pixels.shape[1:]
        self.images, self.shape, self.class_names = images, (c, h, w), images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor) -> tuple[Tensor, Condition]:
        labels = self.images.labels
        return to_unit(self.images.pixels[index]), None if labels is None else {"class_labels": labels[index]}


class Points:
    """Points (n, d) of a Gaussian mixture, as images of d channels and one pixel; drawn when the first are asked for."""

    has_x0 = True
    class_names: tuple[str, ...] = ()

    def __init__(self, mixture: GaussianMixture, num_samples: int, seed: int) -> None:
        self.mixture, self.shape, self.num_samples, self.seed = mixture, mixture.shape, num_samples, seed

    @cached_property
    def points(self) -> Tensor:
        return self.mixture.sample(self.num_samples, torch.Generator().manual_seed(self.seed)).float()

    def __len__(self) -> int:
        return self.num_samples

    def rows(self, index: Tensor) -> tuple[Tensor, None]:
        return self.points[index], None


class Labels:
    """No data, every class equally often."""

    has_x0 = False

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __len__(self) -> int:
        return self.num_classes

    def rows(self, index: Tensor) -> tuple[None, Condition]:
        return None, {"class_labels": index}


class Tensors:
    """Encoded prompts (and latents, where there are any) that are held in memory, key -> (n, ...)."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.condition = {k: v for k, v in tensors.items() if k != "latents"}
        self.latents = tensors.get("latents")
        self.has_x0 = self.latents is not None

    def __len__(self) -> int:
        return len(next(iter(self.condition.values())))

    def rows(self, index: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        latents = None if self.latents is None else self.latents[index].float()
        return latents, {k: v[index] for k, v in self.condition.items()}


def without(condition: dict[str, Tensor], null: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The condition with `rows` (b,) bool replaced by the null condition; keys that it does not have stay."""
    return {
        k: torch.where(rows.view(-1, *[1] * (v.ndim - 1)), null_rows(null[k], v), v) if k in null else v
        for k, v in condition.items()
    }


def load_data(data: Data) -> Images | Points:
    """What a `data` section names, for teachers that are no text-to-image models."""
    if isinstance(data, MixtureData):
        return Points(make_mixture(data.means, data.std, data.weights), data.num_samples, data.seed)
    return Images(load_images(data))


def load_images(data: Data) -> ImageSet:
    """The image set a `data` section names; labels only where the section asks for them."""
    if isinstance(data, DigitsData):
        digits = images.load_digits(data.image_size)
        return digits if data.labels else ImageSet(digits.pixels)
    if isinstance(data, FolderData):
        return images.load_folder(data.path, data.image_size, data.channels, data.labels, data.background)
    if not isinstance(data, ParquetData | HubData):
        raise ValueError(f"data: {data.name!r} is no set of images with labels")
    load = (
        partial(images.load_parquet, data.files)
        if isinstance(data, ParquetData)
        else partial(images.load_hub, data.id, data.split)
    )
    return load(data.image_column, data.label_column, data.image_size, data.channels, data.background)


# Shown while a run trains ---------------------------------------------------------------------------------------------


def evenly(count: int, n: int) -> Tensor:
    """`count` of n rows, all where there are fewer, at equal distances: neighbours in a file of captions are often alike. (m,)"""
    return torch.arange(min(count, n)) * n // min(count, n)


def shown_classes(count: int, num_classes: int) -> Tensor:
    """(count,): each class in turn, or classes at equal distances: neighbours of ImageNet's are often alike."""
    return evenly(count, num_classes) if count < num_classes else torch.arange(count) % num_classes
