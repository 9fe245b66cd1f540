"""Non-leaky augmentation (Karras et al. 2020; 2022, Appendix F.2): random flips, scaling, rotation, stretching and shifts.

The network is told what was done to an image, so that it can be asked for images to which nothing was. Each is used with
probability p on its own (mirroring always), in the order and with the strengths of EDM's CIFAR-10 training, which changes no
colours. Images are resampled once, bicubically, mirrored at their edges; EDM resamples at twice the resolution through wavelets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIM = 9  # of the labels
NUMBERS = 14  # standard normal numbers that an image takes

SCALE_STD = STRETCH_STD = 0.2  # of log2: A_scale = A_aniso = 2^0.2
SHIFT_STD = 0.125  # in widths and heights of the image: A_trans
DIRECTION_PROBABILITY = 0.5  # of stretching along another axis than x


class Changes(NamedTuple):
    """What is done to each image, all (b,), zero where it is not done; shift (b, 2), along x and y; angles in radians.

    scale, stretch and shift are in units of their standard deviations, as the labels are.
    """

    mirror: Tensor
    upside_down: Tensor
    scale: Tensor
    angle: Tensor
    stretch: Tensor
    direction: Tensor
    shift: Tensor

    def labels(self) -> Tensor:
        """(b, 9), the network's augment_labels: zero for an image that was left alone."""
        columns = (
            self.mirror,
            self.upside_down,
            self.scale,
            self.angle.cos() - 1,
            self.angle.sin(),
            self.stretch * self.direction.cos(),
            self.stretch * self.direction.sin(),
        )
        return torch.cat([torch.stack(columns, 1), self.shift], 1)

    def matrices(self) -> Tensor:
        """(b, 2, 2): where, seen from the centre of the source, a point of the result comes from once the shift is undone."""
        s, k = (SCALE_STD * self.scale).exp2(), (STRETCH_STD * self.stretch).exp2()
        stretched = rotation(-self.direction) @ torch.diag_embed(torch.stack([1 / k, k], 1)) @ rotation(self.direction)
        return rotation(self.angle) @ stretched / s[:, None, None]


def rotation(angle: Tensor) -> Tensor:
    """(b,) -> (b, 2, 2)."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).unflatten(1, (2, 2))


def choose(numbers: Tensor, p: float) -> Changes:
    """Standard normal numbers (b, 14) -> what to do."""
    u, (scale, stretch, *shift) = torch.special.ndtr(numbers[:, :10]), numbers[:, 10:].unbind(1)
    zero = torch.zeros_like(scale)

    def sometimes(value: Tensor, chance: Tensor, probability: float = p) -> Tensor:
        return torch.where(chance < probability, value, zero)

    return Changes(
        mirror=(u[:, 0] < 0.5).to(u.dtype),
        upside_down=sometimes((u[:, 1] < 0.5).to(u.dtype), u[:, 2]),
        scale=sometimes(scale, u[:, 3]),
        angle=sometimes((2 * u[:, 4] - 1) * math.pi, u[:, 5]),
        stretch=sometimes(stretch, u[:, 6]),
        direction=sometimes((2 * u[:, 7] - 1) * math.pi, u[:, 8], DIRECTION_PROBABILITY),
        shift=torch.stack([sometimes(value, u[:, 9]) for value in shift], 1),
    )


def apply(images: Tensor, changes: Changes) -> Tensor:
    """images (b, c, h, w) -> the same shape; those that are not moved keep their pixels exactly."""
    b, _, height, width = images.shape
    for flag, axis in ((changes.mirror, 3), (changes.upside_down, 2)):
        images = torch.where(flag.bool().view(b, 1, 1, 1), images.flip(axis), images)
    half = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=images.device, dtype=images.dtype)
    y, x = torch.meshgrid(
        *(torch.arange(n, device=images.device, dtype=images.dtype) - (n - 1) / 2 for n in (height, width)), indexing="ij"
    )
    shift = SHIFT_STD * changes.shift * torch.tensor([width, height], device=images.device, dtype=images.dtype)
    points = torch.stack([x, y], -1) - shift[:, None, None].to(images.dtype)
    source = torch.einsum("bij,bhwj->bhwi", changes.matrices().to(images.dtype), points) / half
    warped = torch.nn.functional.grid_sample(images, source, mode="bicubic", padding_mode="reflection", align_corners=True)
    still = ~torch.stack([changes.scale, changes.angle, changes.stretch, *changes.shift.unbind(1)], 1).any(1)
    return torch.where(still.view(b, 1, 1, 1), images, warped)


def augment(images: Tensor, numbers: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """images (b, c, h, w) and standard normal numbers (b, NUMBERS) -> changed images and their labels (b, DIM)."""
    changes = choose(numbers, p)
    return apply(images, changes), changes.labels().to(images.dtype)
