"""How good samples in a few dimensions are, where the density is known: points x (n, d) against a GaussianMixture.

No number stands alone. Samples that drop modes have a *higher* log-density than the truth's own, diffuse ones cover all modes,
and the biased MMD has a floor set by the number of points; so all are measured together, and on true samples beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.analytic import EmpiricalPosterior, GaussianMixture
from pipelines.common.errors import UserError
from pipelines.noise import EDMSchedule

from ...metrics.samples import energy_distance

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # each twice the one before
TILE = 400  # squared: pairs whose kernel fits a core's cache
BLOCK = 10_000  # points a kernel is summed over; of more, means over blocks are taken
WITHIN = 3.0  # standard deviations that belong to a mode
COVERED = 1e-3  # share of the samples that makes a mode covered
NO_NOISE = EDMSchedule(0.0, math.inf)


def evaluate(x: Tensor, mixture: GaussianMixture, seed: int = 0) -> dict[str, float]:
    """All numbers of samples x (n, d), the true samples they are compared with drawn from `seed`; memory is O(BLOCK + n d).

    log_density: mean, in nats. mmd: as in the paper (squared, biased, mean over BANDWIDTHS), and mmd_unbiased. modes: with at
    least COVERED of the samples within WITHIN standard deviations; in_mode: the share of samples so near to any. weight_kl: KL of
    the shares of the nearest modes to the true ones, nats. energy: energy distance. UserError for points that are not finite.
    """
    if not bool(torch.isfinite(x).all()):
        raise UserError("points hold NaN or infinite values; the network that made them has diverged")
    x = x.double()
    y = mixture.sample(len(x), torch.Generator().manual_seed(seed)).flatten(1).to(x.device)
    biased, unbiased = mmd(x, y)
    blocks = list(zip(x.split(BLOCK), y.split(BLOCK), strict=True))
    energy = sum(energy_distance(a, b) * len(a) for a, b in blocks) / len(x)
    return mode_numbers(x, mixture) | {
        "log_density": log_density(x, mixture),
        "mmd": biased,
        "mmd_unbiased": unbiased,
        "energy": energy,
    }


def log_density(x: Tensor, mixture: GaussianMixture) -> float:
    """Mean log p(x) of points x (n, d), nats."""
    total = 0.0
    for rows in x.split(BLOCK):
        level = NO_NOISE.level(rows.new_zeros(len(rows)))
        total += float(mixture.log_density(rows.view(-1, *mixture.shape), level).sum())
    return total / len(x)


def mode_numbers(x: Tensor, mixture: GaussianMixture) -> dict[str, float]:
    """modes, in_mode and weight_kl of `evaluate`, for x (n, d)."""
    k = len(mixture.means)
    nearest, inside = torch.zeros(k), torch.zeros(k)
    for rows in x.split(BLOCK):
        distance, index = torch.cdist(rows, mixture.means).min(1)
        nearest += torch.bincount(index, minlength=k).cpu()
        near = distance < WITHIN * mixture.variances.sqrt()[index]
        inside += torch.bincount(index[near], minlength=k).cpu()
    shares = nearest.double() / len(x)
    excess = torch.special.xlogy(shares, shares) - shares * mixture.log_weights.cpu()
    return {
        "modes": int((inside >= COVERED * len(x)).sum()),
        "in_mode": float(inside.sum() / len(x)),
        "weight_kl": float(excess.sum()),
    }


def mmd(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Squared MMD with Gaussian kernels exp(-|a - b|^2 / 2 h^2), the mean over h in BANDWIDTHS: (V-statistic, unbiased).

    x, y (n, d), as many of each. Of more than BLOCK points the mean over pairs of blocks (Zaremba et al. 2013): the unbiased
    estimate stays one, and the V-statistic keeps the floor that it has with BLOCK points, so that numbers compare.
    """
    biased, unbiased, blocks = 0.0, 0.0, list(zip(x.split(BLOCK), y.split(BLOCK), strict=True))
    for a, b in blocks:
        n = len(a)
        within, cross = _kernel_sums(a) + _kernel_sums(b), _kernel_sums(a, b)  # within: with 2n ones on the diagonals
        biased += float(((within - 2 * cross) / n**2).mean()) * n
        unbiased += float(((within - 2 * n) / (n * (n - 1)) - 2 * cross / n**2).mean()) * n
    return biased / len(x), unbiased / len(x)


def _kernel_sums(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Sum over all pairs, of a alone or of a and b, for each bandwidth (5,), float64."""
    sums = torch.zeros(len(BANDWIDTHS), dtype=torch.float64, device=a.device)
    tiles = a.float().split(TILE)
    for i, rows in enumerate(tiles):
        for j, others in enumerate(tiles[i:] if b is None else b.float().split(TILE)):
            counted = 2 if b is None and j else 1  # a pair of tiles stands for its mirror image
            # differences are squared one by one: the expanded square loses the digits that matter between near points
            squares = sum((x[:, None] - y).square_() for x, y in zip(rows.T, others.T, strict=True))
            # floors instead of numbers too small for float32's normal range, which take a CPU a hundred times as long
            kernel = squares.mul_(-0.5 / BANDWIDTHS[-1] ** 2).clamp_(min=-60).exp_()
            for k in reversed(range(len(BANDWIDTHS))):
                sums[k] += counted * kernel.sum()
                kernel.clamp_(min=1e-9).square_().square_()  # that of half the bandwidth
    return sums


# Divergence at a noise level ----------------------------------------------------------------------------------------------


def latent_grid(per_axis: int, d: int) -> Tensor:
    """per_axis^d points (n, d) of equal probability under N(0, I): quantiles at the middle of equal cells."""
    quantiles = torch.special.ndtri((torch.arange(per_axis, dtype=torch.float64) + 0.5) / per_axis)
    return torch.cartesian_prod(*[quantiles] * d).view(-1, d)


class Pushforward:
    """The student's own law, by quadrature over its latents: every log-density and score of g(z) + sigma eps, z ~ N(0, I).

    generator: z (b, d, 1, 1) -> x0, float32; accurate where sigma exceeds the distance between neighbouring g(z) of the grid.
    """

    def __init__(self, generator: Callable[[Tensor], Tensor], d: int, per_axis: int = 500) -> None:
        with torch.no_grad():
            z = latent_grid(per_axis, d).float().view(-1, d, 1, 1)
            x0 = torch.cat([generator(rows) for rows in z.split(BLOCK)])
        self.law = EmpiricalPosterior(x0, NO_NOISE)

    def log_density(self, x_t: Tensor, sigma: float) -> Tensor:
        """x_t (b, d, 1, 1) -> log p_theta(x_t; sigma) (b,), float64."""
        return self.law.log_density(x_t, NO_NOISE.level(x_t.new_full((len(x_t),), sigma)))

    def x0_mean(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """E[g(z) | x_t] (b, d, 1, 1) for sigma (b,)."""
        return self.law(x_t, sigma)

    def diffusive_kl(self, x_t: Tensor, mixture: GaussianMixture, sigma: float) -> Tensor:
        """log p_theta - log p_d at x_t (b, d, 1, 1) drawn from the student at sigma: (b,), whose mean is the KL, in nats."""
        return self.log_density(x_t, sigma) - mixture.log_density(x_t, NO_NOISE.level(x_t.new_full((len(x_t),), sigma)))
