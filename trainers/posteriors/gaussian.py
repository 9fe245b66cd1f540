"""Conditional Gaussians over a latent z (d,), from a network's output for each x_t: exact density and exact samples.

Each covariance says how many numbers it needs a sample and turns them into a density. At output 0 all are the prior
N(0, I), so a posterior whose last layer starts at zero starts as the prior.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

LOG_2PI = math.log(2 * math.pi)


class Density(Protocol):
    def log_prob(self, z: Tensor) -> Tensor:
        """z (b, k, d) -> (b, k)."""

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normal noise (b, k, d) -> z (b, k, d), reparameterised, and log q(z) (b, k)."""


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype also under autocast: densities are exponentiated, so they are never taken in half precision."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class DiagonalDensity:
    """N(mean, diag(exp(log_std))^2); mean, log_std (b, d)."""

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean, self.log_std = mean[:, None], log_std[:, None]

    def log_prob(self, z: Tensor) -> Tensor:
        return self._log_prob((z - self.mean) * torch.exp(-self.log_std))

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean + self.log_std.exp() * noise, self._log_prob(noise)

    def _log_prob(self, noise: Tensor) -> Tensor:
        return -(0.5 * (noise.square() + LOG_2PI) + self.log_std).sum(-1)


class CholeskyDensity:
    """N(mean, P^-1) with precision P = L L^T; L lower triangular (b, d, d) with log diagonal log_diag (b, d)."""

    def __init__(self, mean: Tensor, lower: Tensor, log_diag: Tensor) -> None:
        self.mean, self.log_det = mean[:, None], log_diag.sum(-1, keepdim=True)
        self.lower = lower.tril(-1) + torch.diag_embed(log_diag.exp())

    def log_prob(self, z: Tensor) -> Tensor:
        return self._log_prob(matmul(z - self.mean, self.lower))  # L^T (z - mean) is standard normal

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.linalg.solve_triangular(self.lower.mT, noise.mT, upper=True).mT
        return self.mean + z, self._log_prob(noise)

    def _log_prob(self, noise: Tensor) -> Tensor:
        return self.log_det - 0.5 * (noise.square() + LOG_2PI).sum(-1)


class LinearDensity:
    """q(z) = N(W z; mean, diag) |det W|: a diagonal Gaussian after a linear map W (d, d) of z."""

    def __init__(self, base: DiagonalDensity, matrix: Tensor) -> None:
        self.base, self.matrix = base, matrix
        self.log_det = torch.linalg.slogdet(matrix).logabsdet

    def log_prob(self, z: Tensor) -> Tensor:
        return self.base.log_prob(matmul(z, self.matrix.T)) + self.log_det

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        u, log_q = self.base.sample(noise)
        return torch.linalg.solve(self.matrix, u.flatten(0, 1).T).T.unflatten(0, u.shape[:2]), log_q + self.log_det


class Diagonal(nn.Module):
    """Independent coordinates: 2d numbers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_outputs = 2 * dim

    def forward(self, output: Tensor) -> DiagonalDensity:
        """output (b, 2d) -> a density over (d,)."""
        return DiagonalDensity(*output.chunk(2, dim=1))


class LearnedLinear(nn.Module):
    """Independent coordinates of W z, where the invertible W is learned and shared by all x_t: 2d numbers and d^2 weights.

    It can say what a diagonal in pixels cannot: that x_t tells one low-frequency direction of z and nothing of the rest.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_outputs = 2 * dim
        self.matrix = nn.Parameter(torch.eye(dim))

    def forward(self, output: Tensor) -> LinearDensity:
        """output (b, 2d) -> a density over (d,)."""
        return LinearDensity(DiagonalDensity(*output.chunk(2, dim=1)), self.matrix)


class Full(nn.Module):
    """Any covariance, as the Cholesky factor of the precision: d + d (d+1)/2 numbers, so for small d only."""

    MAX_DIM = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim > self.MAX_DIM:
            raise ValueError(
                f"objective.posterior.covariance='full' has {dim} dimensions and needs {dim * (dim + 1) // 2} numbers for "
                f"each sample; it is meant for at most {self.MAX_DIM}. Use 'linear' or 'diagonal'"
            )
        self.dim = dim
        self.num_outputs = 2 * dim + dim * (dim - 1) // 2
        self.register_buffer("rows_cols", torch.tril_indices(dim, dim, -1), persistent=False)

    def forward(self, output: Tensor) -> CholeskyDensity:
        """output (b, d + d (d+1)/2) -> a density over (d,)."""
        mean, log_diag, below = output.split([self.dim, self.dim, output.shape[1] - 2 * self.dim], dim=1)
        lower = output.new_zeros(len(output), self.dim, self.dim)
        lower[:, self.rows_cols[0], self.rows_cols[1]] = below
        return CholeskyDensity(mean, lower, log_diag)


COVARIANCES = {"diagonal": Diagonal, "linear": LearnedLinear, "full": Full}
