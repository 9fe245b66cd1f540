"""Gaussians in pixel space: diagonal, diagonal plus low rank, and two whose d x d matrices suit only few dimensions d = c h w."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.common.errors import UserError

from .density import Covariance, PooledLinear, Scale, Shift, Whitening


class Diagonal(Covariance):
    """Independent pixels. Maps: c means, then c numbers m whose log standard deviation is LIMIT tanh(m / LIMIT).

    Near 0 that is m; where a network is far off for one x_t, the loss is large there, not infinite.
    """

    LIMIT = 10.0

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        self.num_maps = 2 * shape[0]

    def whitening(self, maps: Tensor) -> list[Whitening]:
        mean, log_std = maps.chunk(2, dim=1)
        return [Shift(mean), Scale(self.LIMIT * torch.tanh(log_std / self.LIMIT))]


class Dense:
    """y = W z with one W (d, d) for all samples."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.log_det = torch.linalg.slogdet(matrix).logabsdet

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z @ self.matrix.T, self.log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.solve(self.matrix, y.flatten(0, 1).T).T.unflatten(0, y.shape[:2]), self.log_det


class DenseLinear(Covariance):
    """Independent coordinates of W z, where the invertible W (d, d) is learned and shared by all x_t.

    It can say what a diagonal in pixels cannot: that x_t tells one low-frequency direction of z and nothing of the rest.
    Maps: c means and c log standard deviations of the coordinates.
    """

    MAX_DIM = 1024

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        if self.dim > self.MAX_DIM:
            raise UserError(
                f"objective.posterior.covariance='linear' has {self.dim} dimensions and needs a matrix of {self.dim**2} weights; "
                f"it is meant for at most {self.MAX_DIM}. Use 'learned', which mixes blocks of pixels"
            )
        self.num_maps = 2 * shape[0]
        self.matrix = nn.Parameter(torch.eye(self.dim))

    def whitening(self, maps: Tensor) -> list[Whitening]:
        mean, log_std = maps.chunk(2, dim=1)
        return [Dense(self.matrix), Shift(mean), Scale(log_std)]


class Triangular:
    """y = L^T z; L (b, d, d) lower triangular with log diagonal (b, d), so that L L^T is the precision."""

    def __init__(self, below: Tensor, log_diag: Tensor) -> None:
        self.lower = below.tril(-1) + torch.diag_embed(log_diag.exp())
        self.log_det = log_diag.sum(-1, keepdim=True)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z @ self.lower, self.log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.solve_triangular(self.lower.mT, y.mT, upper=True).mT, self.log_det


class Full(Covariance):
    """Any covariance, as the Cholesky factor of the precision: d + d (d+1)/2 numbers, read off MAPS maps by a linear layer."""

    MAX_DIM = 256
    MAPS = 8

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        d = self.dim
        if d > self.MAX_DIM:
            raise UserError(
                f"objective.posterior.covariance='full' has {d} dimensions and needs {d * (d + 1) // 2} numbers for each sample; "
                f"it is meant for at most {self.MAX_DIM}. Use 'lowrank' or 'learned'"
            )
        self.num_maps = self.MAPS
        self.head = nn.Linear(self.MAPS * shape[1] * shape[2], 2 * d + d * (d - 1) // 2)
        nn.init.zeros_(self.head.bias)  # but not the weights: the maps start at zero already
        self.register_buffer("rows_cols", torch.tril_indices(d, d, -1), persistent=False)

    rows_cols: Tensor  # (2, d (d - 1) / 2), of the entries below the diagonal

    def whitening(self, maps: Tensor) -> list[Whitening]:
        mean, log_diag, entries = self.head(maps.flatten(1)).tensor_split([self.dim, 2 * self.dim], dim=1)
        below = entries.new_zeros(len(entries), self.dim, self.dim)
        below[:, self.rows_cols[0], self.rows_cols[1]] = entries
        return [Shift(mean), Triangular(below, log_diag)]


class Stretch:
    """y = (I + V diag(e^a - 1) V^T) z: factors e^a along the orthonormal columns of V (b, d, r), 1 across them; a (b, r)."""

    def __init__(self, directions: Tensor, log_factor: Tensor) -> None:
        self.directions, self.log_factor = directions, log_factor[:, None]
        self.log_det = self.log_factor.sum(-1)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._stretched(z, self.log_factor), self.log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._stretched(y, -self.log_factor), self.log_det

    def _stretched(self, z: Tensor, log_factor: Tensor) -> Tensor:
        return z + (z @ self.directions * log_factor.expm1()) @ self.directions.mT


class LowRank(Covariance):
    """Independent pixels, correlated along r directions of each sample's own: O(d r) numbers and work.

        u = (I + V diag(e^a - 1) V^T) S^-1 (z - mean),   covariance S (I + V diag(e^-2a - 1) V^T) S

    A diagonal plus a low rank as in Ong, Nott & Smith 2018, Gaussian variational approximation with a factor covariance
    structure; written as a whitening it needs d normal numbers a sample, not d + r, and no inverse of r x r matrices.
    Maps: c means, c log S, r c for the directions, PooledLinear.MAPS for a.
    """

    def __init__(self, shape: tuple[int, int, int], rank: int = 8) -> None:
        super().__init__(shape)
        if rank > self.dim:
            raise UserError(
                f"objective.posterior.rank: {rank}, expected at most c h w = {self.dim}; there are no more directions. "
                f"Set objective.posterior.rank={self.dim} or less"
            )
        c = shape[0]
        self.sections = [c, c, rank * c, PooledLinear.MAPS]
        self.num_maps = sum(self.sections)
        # At maps 0 the directions need to be something: a Gram matrix of zeros has no Cholesky factor.
        self.template = nn.Parameter(torch.randn(rank, self.dim))
        self.head = PooledLinear(rank)

    def whitening(self, maps: Tensor) -> list[Whitening]:
        mean, log_std, directions, features = maps.split(self.sections, dim=1)
        raw = self.template + directions.reshape(len(maps), *self.template.shape)
        return [Shift(mean), Scale(log_std), Stretch(orthonormal(raw.mT), self.head(features))]


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns (b, d, r) with the span of those given: A L^-T, where L L^T = A^T A."""
    factor, failed = torch.linalg.cholesky_ex(columns.mT @ columns)
    # Not an exception but a loss that is not finite, which stops a run on all processes with everything that led there named.
    factor = factor.masked_fill(failed.bool()[:, None, None], torch.nan)
    return torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
