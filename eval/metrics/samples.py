"""Metrics as pure functions of tensors: n generated images, m real ones, d features or pixels.

None of them builds an (n, m, d) tensor: distances come in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.common.errors import UserError

from .frechet import GaussianStats, frechet_distance

BLOCK = 1024  # rows a block: 1024 x 10,000 float64 distances are 80 MB


def class_balance(labels: Tensor, num_classes: int) -> Tensor:
    """Share of each class among labels (n,), as float64 (num_classes,) that sum to 1.

    ValueError for no labels, or others than 0 .. num_classes - 1.

    >>> class_balance(torch.tensor([0, 2, 2, 0]), 3).tolist()
    [0.5, 0.0, 0.5]
    """
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels must have shape (n,) with n > 0, got {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels range over {int(labels.min())}..{int(labels.max())}, expected 0..{num_classes - 1}")
    return torch.bincount(labels, minlength=num_classes).double() / len(labels)


def pixel_std(pixels: Tensor) -> float:
    """How much images differ from one another: the standard deviation over n, averaged over pixels, in [-1, 1] units.

    pixels uint8 (n, c, h, w). A set that has collapsed to one image gives 0.
    ValueError for fewer than two images.

    >>> pixel_std(torch.full((4, 3, 2, 2), 7, dtype=torch.uint8))
    0.0
    """
    if len(pixels) < 2:
        raise ValueError(f"a spread needs at least 2 images, got {len(pixels)}")
    return (pixels.flatten(1).double().std(dim=0).mean() / 127.5).item()


def energy_distance(x: Tensor, y: Tensor, block: int = BLOCK) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|: zero for equal distributions and only for them (Szekely & Rizzo 2013).

    x (n, d) and y (m, d), n, m >= 2, any float type. The unbiased U-statistic (pairs i != j), so unlike the Frechet distance it
    does not grow for small sets and may come out slightly below zero. ValueError: shapes that do not match, too few rows.
    UserError: values that are not finite.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> energy_distance(x, x + 10)  # 2 * 10 - 2 - 2
    16.0
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have shapes (n, d) and (m, d), got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"energy distance needs at least 2 rows a side, got {len(x)} and {len(y)}")
    if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise UserError("energy distance got NaN or infinite values; the images or features are broken")
    # |a - b|^2 is taken as |a|^2 + |b|^2 - 2ab: a common offset would cost digits, so remove it first.
    centre = y.double().mean(dim=0)
    x, y = x.double() - centre, y.double() - centre
    n, m = len(x), len(y)
    cross = sum(_distances(rows, y).sum() for rows in x.split(block)) / (n * m)
    return float(2 * cross - _mean_within(x, block) - _mean_within(y, block))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, d), (m, d) -> (n, m) Euclidean distances."""
    return squared_distances(a, b).sqrt_()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, d), (m, d) float64 -> (n, m) squared Euclidean distances, at least 0; exact for integers (up to 2^53)."""
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return squares.addmm_(a, b.T, alpha=-2).clamp_(min=0)


def _mean_within(x: Tensor, block: int) -> Tensor:
    """Mean distance over pairs i < j of x (n, d)."""
    total = x.new_zeros(())
    for start in range(0, len(x), block):
        # Block against itself and everything after it: half the work, and no distance of a row to itself.
        total += _distances(x[start : start + block], x[start:]).triu(diagonal=1).sum()
    return total / (len(x) * (len(x) - 1) / 2)


@dataclass(frozen=True)
class NeighbourCheck:
    """How near generated images come to real ones, against how near real ones come to each other.

    distances and indices (n,): each generated image's nearest real image; real_distances (m,): each real image's
    nearest other real image. Distances are Euclidean in [-1, 1] pixels.
    close_share: share of generated images nearer than close_threshold, the 1st percentile of real-to-real distances;
    new images from the same distribution would have about 0.01. exact_duplicates: generated images equal to a real one.
    """

    distances: Tensor
    indices: Tensor
    real_distances: Tensor
    median_generated: float
    median_real: float
    close_threshold: float
    close_share: float
    exact_duplicates: int

    def summary(self) -> dict[str, float | int]:
        """The numbers without the tensors, for a report."""
        keys = ("median_generated", "median_real", "close_threshold", "close_share", "exact_duplicates")
        return {key: getattr(self, key) for key in keys}


def nearest_neighbour_check(generated: Tensor, real: Tensor, block: int = BLOCK) -> NeighbourCheck:
    """Look for copies of real images among generated ones: uint8 (n, c, h, w) and (m, c, h, w), m at least 2.

    Real-to-real distances leave out the image itself, not its possible duplicates. ValueError: another type or shape, too few.
    UserError: image sizes differ.
    """
    for name, pixels, least in (("generated", generated, 1), ("real", real, 2)):
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or len(pixels) < least:
            raise ValueError(f"{name} must be uint8 (n, c, h, w) with n >= {least}, got {pixels.dtype} {tuple(pixels.shape)}")
    if generated.shape[1:] != real.shape[1:]:
        raise UserError(f"image sizes differ: {tuple(generated.shape[1:])} generated, {tuple(real.shape[1:])} real")
    scale = 1 / 127.5
    real_rows = real.flatten(1).double()  # integers: squared distances are exact, a copy has distance 0
    distances, indices = _nearest(generated.flatten(1).double(), real_rows, block, skip_self=False)
    between, _ = _nearest(real_rows, real_rows, block, skip_self=True)
    threshold = between.quantile(0.01)
    return NeighbourCheck(
        distances=distances * scale,
        indices=indices,
        real_distances=between * scale,
        median_generated=float(distances.median() * scale),
        median_real=float(between.median() * scale),
        close_threshold=float(threshold * scale),
        close_share=float((distances < threshold).double().mean()),
        exact_duplicates=int((distances == 0).sum()),
    )


def _nearest(queries: Tensor, keys: Tensor, block: int, skip_self: bool) -> tuple[Tensor, Tensor]:
    """Distance to and index of the nearest key for each query: (n,), (n,)."""
    best = []
    for start in range(0, len(queries), block):
        squares = squared_distances(queries[start : start + block], keys)
        if skip_self:
            rows = torch.arange(len(squares), device=squares.device)
            squares[rows, start + rows] = torch.inf
        best.append(squares.min(dim=1))
    return torch.cat([b.values for b in best]).sqrt(), torch.cat([b.indices for b in best])


def random_halves(n: int, splits: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """`splits` times the indices of two random halves of n items: (n // 2,) and (n - n // 2,)."""
    for _ in range(splits):
        order = torch.randperm(n, generator=generator)
        yield order[: n // 2], order[n // 2 :]


def halves_floor(features: Tensor, generator: torch.Generator, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation, over random splits, of the Frechet distance between two halves of real images.

    features (n, d); ValueError unless n >= 4, splits >= 2. The distance is zero between distributions and biased upwards between
    sets, so this is what "no difference" reads as at half the size of the reference.
    """
    if len(features) < 4 or splits < 2:
        raise ValueError(f"need at least 4 images and 2 splits, got {len(features)} and {splits}")
    values = [
        frechet_distance(GaussianStats.of(features[a]), GaussianStats.of(features[b]))
        for a, b in random_halves(len(features), splits, generator)
    ]
    std, mean = torch.std_mean(torch.tensor(values, dtype=torch.float64))
    return mean.item(), std.item()
