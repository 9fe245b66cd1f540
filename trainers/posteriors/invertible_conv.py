"""An invertible convolution over blocks of pixels, which starts as their DCT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dct_matrix(n: int, like: Tensor | None = None) -> Tensor:
    """The orthonormal DCT-II (Ahmed, Natarajan & Rao 1974), (n, n) with frequencies as rows; float64 unless `like` says.

    sqrt((2 - [i=0]) / n) cos(pi i (2j+1) / 2n)
    """
    dtype, device = (torch.float64, None) if like is None else (like.dtype, like.device)
    i = torch.arange(n, device=device)
    # Reduced to one turn as integers, so that float32 loses nothing to large angles.
    angle = (i[:, None] * (2 * i + 1) % (4 * n)).to(dtype) * (math.pi / (2 * n))
    return torch.cos(angle) * torch.where(i == 0, 1 / n, 2 / n).to(dtype).sqrt()[:, None]


def block_dct(block: int, like: Tensor | None = None) -> Tensor:
    """The two-dimensional DCT of the p^2 pixels of a block, rows by rows: (p^2, p^2). For p = 2 it is the Haar transform."""
    line = dct_matrix(block, like)
    return torch.kron(line, line)


class InvertibleConv(nn.Module):
    """An invertible 1x1 convolution over p x p blocks: space-to-depth, then y = P L U x (Kingma & Dhariwal 2018, Glow, Sec. 3.2).

    P is a fixed permutation; L has a unit diagonal; U has the diagonal sign * exp(log |s|), the sign fixed, so that
    log |det| = (number of blocks) * sum log |s| and the matrix stays invertible. It starts as the DCT of a block, so what comes
    out is ordered by frequency, channels together: the first channels are the low frequencies.
    """

    sign: Tensor  # (size,), of U's diagonal
    order: Tensor  # (size,), the permutation P

    def __init__(self, channels: int, block: int) -> None:
        super().__init__()
        size = channels * block**2
        # Space-to-depth puts the pixels of a channel together; the rows put the channels of a frequency together.
        matrix = torch.einsum("fp,cd->fcdp", block_dct(block), torch.eye(channels, dtype=torch.float64)).reshape(size, size)
        order, lower, upper = pivoted_lu(matrix)
        diagonal = upper.diagonal()
        # One matrix holds L below, log |s| on and U above the diagonal.
        factors = lower.tril(-1) + upper.triu(1) + diagonal.abs().log().diag()
        self.block = block
        self.factors = nn.Parameter(factors.to(torch.get_default_dtype()))
        self.register_buffer("sign", diagonal.sign().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., c, h, w) -> y (..., c p^2, h/p, w/p) and log |det|, ()."""
        lower, upper = self._triangles()
        x = F.pixel_unshuffle(x, self.block)
        return mixed_channels(x, (lower @ upper)[self.order]), self._log_det(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., c p^2, h/p, w/p) -> x (..., c, h, w) and log |det| of the forward map, ()."""
        lower, upper = self._triangles()
        permutation = torch.eye(len(lower), dtype=y.dtype, device=y.device)[self.order]
        undone = torch.linalg.solve_triangular(lower, permutation.T, upper=False, unitriangular=True)
        matrix = torch.linalg.solve_triangular(upper, undone, upper=True)
        return F.pixel_shuffle(mixed_channels(y, matrix), self.block), self._log_det(y)

    def _triangles(self) -> tuple[Tensor, Tensor]:
        diagonal = self.factors.diagonal()
        lower = self.factors.tril(-1) + torch.eye(len(diagonal), dtype=diagonal.dtype, device=diagonal.device)
        return lower, self.factors.triu(1) + torch.diag(self.sign * diagonal.exp())

    def _log_det(self, blocks: Tensor) -> Tensor:
        return blocks.shape[-2] * blocks.shape[-1] * self.factors.diagonal().sum()


def mixed_channels(x: Tensor, matrix: Tensor) -> Tensor:
    """The matrix times the channels at every place, x (..., c, h, w); no convolution, which a GPU would round to TF32."""
    return F.linear(x.movedim(-3, -1), matrix).movedim(-1, -3)


def pivoted_lu(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(order, L, U) with matrix = (L U)[order], L of unit diagonal.

    The order is not in a checkpoint, so every machine must find the same one. A DCT has pivots that tie but for rounding; rows
    made unequal by a millionth decide these ties, and the factors are scaled back exactly.
    """
    weight = 1 - 1e-6 * torch.arange(len(matrix), dtype=matrix.dtype)
    permutation, lower, upper = torch.linalg.lu(weight[:, None] * matrix)
    pivoted = permutation.T @ weight
    return permutation.argmax(1), lower * pivoted / pivoted[:, None], upper / pivoted[:, None]
