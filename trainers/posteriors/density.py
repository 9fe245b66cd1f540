"""What every posterior over an image-shaped latent z (c, h, w) is: N(0, I) seen through invertible maps of z.

d = c h w; b samples of x_t with k latents each. Inside a density latents are rows of d numbers, (b, k, d).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

LOG_2PI = math.log(2 * math.pi)
T = TypeVar("T")


class Whitening(Protocol):
    """An invertible map of z (b, k, d) and log |det dy/dz|, which broadcasts against (b, k), in both directions alike."""

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z -> y and log |det dy/dz|."""

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y -> z and log |det dy/dz| at that z: the same number, not its negative."""


def full_precision(method: Callable[..., T]) -> Callable[..., T]:
    """The method with its tensor in float32 or wider and autocast off: densities are exponentiated into importance weights."""

    @functools.wraps(method)
    def wrapped(self, x: Tensor) -> T:
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x.to(torch.promote_types(x.dtype, torch.float32)))

    return wrapped


class Density:
    """q(z) = N(f(z); 0, I) |det df/dz| with f the composition of `maps`, the first one applied to z first."""

    def __init__(self, shape: tuple[int, int, int], maps: Sequence[Whitening]) -> None:
        self.shape, self.maps = shape, maps

    @full_precision
    def log_prob(self, z: Tensor) -> Tensor:
        """z (b, k, c, h, w) -> (b, k)."""
        y, log_det = z.flatten(2), z.new_zeros(z.shape[:2])
        for f in self.maps:
            y, more = f(y)
            log_det = log_det + more
        return self._log_prob(y, log_det)

    @full_precision
    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normal noise (b, k, c, h, w) -> z (b, k, c, h, w), reparameterised, and log q(z) (b, k)."""
        noise = y = noise.flatten(2)
        log_det = noise.new_zeros(noise.shape[:2])
        for f in reversed(self.maps):
            y, more = f.inverse(y)
            log_det = log_det + more
        return y.unflatten(2, self.shape), self._log_prob(noise, log_det)

    @staticmethod
    def _log_prob(noise: Tensor, log_det: Tensor) -> Tensor:
        return log_det - 0.5 * (noise.square() + LOG_2PI).sum(-1)


class Covariance(nn.Module):
    """Turns `num_maps` output channels of a network into a density over z; a subclass says by which maps.

    At maps 0 and with untrained weights it is the prior N(0, I), so a network whose last layer starts at zero starts there.
    """

    num_maps: int

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        c, h, w = shape
        self.shape, self.dim = (c, h, w), c * h * w

    @full_precision
    def forward(self, maps: Tensor) -> Density:
        """maps (b, num_maps, h, w) -> a density over (c, h, w) for each of b samples."""
        return Density(self.shape, self.whitening(maps))

    def whitening(self, maps: Tensor) -> list[Whitening]:
        """The maps that make z standard normal, in the order in which they are applied."""
        raise NotImplementedError


class Shift:
    """y = z - mean; mean (b, ...) with d numbers a sample."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean.flatten(1)[:, None]
        self.log_det = mean.new_zeros(())

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z - self.mean, self.log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y + self.mean, self.log_det


class Scale:
    """y = z exp(-log_std); log_std (b, ...) with d numbers a sample."""

    def __init__(self, log_std: Tensor) -> None:
        self.log_std = log_std.flatten(1)[:, None]
        self.log_det = -self.log_std.sum(-1)  # (b, 1)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z * torch.exp(-self.log_std), self.log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y * self.log_std.exp(), self.log_det


class PooledLinear(nn.Linear):
    """num_outputs numbers that belong to no place in the image, from feature maps (b, MAPS, h, w) averaged over it.

    Its weights start at random, not at zero, because the maps do start there: two zeros in a row would never move.
    """

    MAPS = 8

    def __init__(self, num_outputs: int) -> None:
        super().__init__(self.MAPS, num_outputs)
        nn.init.zeros_(self.bias)

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.mean((2, 3)))
