"""Diagonal Gaussians in another orthogonal or learned basis than pixels, with O(d log d) work or less but for the DCT's.

Neighbouring pixels of a posterior are correlated (x_t tells more of the low frequencies of z); in these bases less so.
In all three the mean is predicted in pixels and taken to the basis with z.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.common.errors import UserError

from .density import Covariance, PooledLinear, Scale, Shift, Whitening
from .invertible_conv import InvertibleConv, block_dct, dct_matrix

# Haar -----------------------------------------------------------------------------------------------------------------


class HaarTransform:
    """The orthonormal Haar wavelet coefficients of images (c, h, w), channel by channel (Mallat 1989).

    Each level takes 2x2 blocks [[p, q], [r, s]] to their low-pass (p+q+r+s)/2, which the next level continues with, and the
    details (p-q+r-s)/2, (p+q-r-s)/2, (p-q-r+s)/2. Order: details of the finest level (c, 3, h/2, w/2), ..., the last low-pass.
    """

    def __init__(self, shape: tuple[int, int, int], levels: int, like: Tensor) -> None:
        c, h, w = shape
        self.shape, self.matrix, self.log_det = shape, block_dct(2, like), like.new_zeros(())
        self.detail_shapes = [(c, 3, h >> level, w >> level) for level in range(1, levels + 1)]
        self.low_shape = (c, h >> levels, w >> levels)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        low, coefficients = z.unflatten(2, self.shape), []
        for _ in self.detail_shapes:
            pixels = F.pixel_unshuffle(low.unsqueeze(3), 2)  # (b, k, c, 4, h/2, w/2)
            bands = torch.einsum("fp,bkcphw->bkcfhw", self.matrix, pixels)
            low = bands[:, :, :, 0]
            coefficients.append(bands[:, :, :, 1:].flatten(2))
        return torch.cat([*coefficients, low.flatten(2)], dim=2), self.log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        shapes = [*self.detail_shapes, self.low_shape]
        *details, low = (v.unflatten(2, s) for v, s in zip(y.split([math.prod(s) for s in shapes], 2), shapes, strict=True))
        for detail in reversed(details):
            bands = torch.cat([low.unsqueeze(3), detail], dim=3)
            low = F.pixel_shuffle(torch.einsum("fp,bkcfhw->bkcphw", self.matrix, bands), 2).squeeze(3)
        return low.flatten(2), self.log_det


class Haar(Covariance):
    """Independent Haar wavelet coefficients, with as many levels L as both sides can be halved.

    Maps: c means, then log standard deviations: (c, 3) for each level from the finest on, and c for the last low-pass. A
    coefficient has the average of its map over the pixels that it is made of, so maps and image stay aligned.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        c, h, w = shape
        side = math.gcd(h, w)
        self.levels = (side & -side).bit_length() - 1  # how often 2 divides both
        if not self.levels:
            raise UserError(
                f"objective.posterior.covariance='haar' halves both sides of an image, and {h}x{w} has an odd one; "
                "use images with even sides, or covariance 'dct', which takes any"
            )
        self.sections = [c, *[3 * c] * self.levels, c]
        self.num_maps = sum(self.sections)

    def whitening(self, maps: Tensor) -> list[Whitening]:
        mean, *details, low = maps.split(self.sections, dim=1)
        pooled = [F.avg_pool2d(band, 2**level) for level, band in enumerate(details, 1)]
        pooled.append(F.avg_pool2d(low, 2**self.levels))
        log_std = torch.cat([band.flatten(1) for band in pooled], dim=1)
        return [Shift(mean), HaarTransform(self.shape, self.levels, maps), Scale(log_std)]


# DCT ------------------------------------------------------------------------------------------------------------------


class DCT:
    """The orthonormal two-dimensional DCT-II of images (c, h, w), channel by channel: D_h x D_w^T."""

    def __init__(self, shape: tuple[int, int, int], like: Tensor) -> None:
        self.shape, self.log_det = shape, like.new_zeros(())
        self.rows, self.columns = dct_matrix(shape[1], like), dct_matrix(shape[2], like)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._transformed(z, self.rows.T, self.columns.T), self.log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._transformed(y, self.rows, self.columns), self.log_det

    def _transformed(self, z: Tensor, right_rows: Tensor, right_columns: Tensor) -> Tensor:
        # Matrices from the right only: one large product each, where one from the left would be one for every image.
        along_w = z.unflatten(2, self.shape) @ right_columns
        return (along_w.mT @ right_rows).mT.flatten(2)


class Frequencies(Covariance):
    """Independent DCT coefficients. A frequency has no place in the image, so its log standard deviation comes from averages
    over the image. Maps: c means, PooledLinear.MAPS for the log standard deviations.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        self.num_maps = shape[0] + PooledLinear.MAPS
        self.head = PooledLinear(self.dim)

    def whitening(self, maps: Tensor) -> list[Whitening]:
        mean, features = maps.tensor_split([self.shape[0]], dim=1)
        return [Shift(mean), DCT(self.shape, maps), Scale(self.head(features))]


# Learned --------------------------------------------------------------------------------------------------------------


class Blocks:
    """An InvertibleConv as a map of z (b, k, d), z an image (c, h, w)."""

    def __init__(self, conv: InvertibleConv, shape: tuple[int, int, int]) -> None:
        (c, h, w), p = shape, conv.block
        self.conv, self.shape, self.out_shape = conv, shape, (c * p**2, h // p, w // p)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self.conv(z.unflatten(2, self.shape))
        return y.flatten(2), log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.conv.inverse(y.unflatten(2, self.out_shape))
        return z.flatten(2), log_det


class Learned(Covariance):
    """Independent channels of an invertible convolution over blocks of pixels, learned and shared by all x_t and all blocks.

    Maps: c means, MAPS for the log standard deviations, which a convolution over the same blocks reads.
    """

    MAPS = 8

    def __init__(self, shape: tuple[int, int, int], block: int | None = None) -> None:
        super().__init__(shape)
        c, h, w = shape
        block = block or next(p for p in (4, 2, 1) if h % p == w % p == 0)
        if h % block or w % block:
            raise UserError(
                f"objective.posterior.block: {block}, expected a divisor of both sides of {h}x{w} images; "
                "remove it for the largest of 4, 2 and 1 that is one"
            )
        self.num_maps = c + self.MAPS
        self.conv = InvertibleConv(c, block)
        self.head = nn.Conv2d(self.MAPS, c * block**2, block, stride=block)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)  # but not the weights: the maps start at zero already

    def whitening(self, maps: Tensor) -> list[Whitening]:
        mean, features = maps.tensor_split([self.shape[0]], dim=1)
        return [Shift(mean), Blocks(self.conv, self.shape), Scale(self.head(features))]
