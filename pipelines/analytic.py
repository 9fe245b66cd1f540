"""Teachers that are exact: the posterior mean E[x0 | x_t] of a Gaussian mixture, and of a data set itself.

Both are modules of the form network(x_t, t) that predict x0, so `Denoiser(network, schedule, "sample", sigma_data)` makes
teachers of them. Any shape (b, c, h, w); a point in d dimensions is an image of d channels and one pixel.

    x_t = alpha x0 + sigma eps,    score(x_t) = (alpha E[x0 | x_t] - x_t) / sigma^2          (Tweedie's formula)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .common.errors import UserError
from .noise import EDMSchedule, Level, Schedule

CELL, COLUMNS = 256, 512  # points in a cell, and rows of x_t at a time
TABLE = 2**17  # exponents at a time: what a core's cache holds
FLOOR, LARGE = -80.0, 40.0  # of exponents: less counts for nothing; e^LARGE, summed, is far from float32's largest number
SINGLE = 512.0  # a number whose rounding in float32 is 3e-5


class GaussianMixture(nn.Module):
    """sum_j weights_j N(means_j, std_j^2 I): density, score, posterior mean and samples at every noise level.

    means (k, d); std a number or (k,); weights (k,), normalised here, None: equal.
    """

    means: Tensor  # (k, d)
    variances: Tensor  # (k,)
    log_weights: Tensor  # (k,)

    def __init__(
        self, means: Tensor, std: float | Tensor, schedule: Schedule, shape: tuple[int, int, int], weights: Tensor | None = None
    ) -> None:
        super().__init__()
        k, d = means.shape
        if math.prod(shape) != d:
            raise UserError(f"means have {d} dimensions, shape {shape} has {math.prod(shape)}")
        std = torch.as_tensor(std, dtype=torch.float64).expand(k)
        if not bool((std > 0).all()):
            raise UserError(f"std must be positive, got {std.min():g}")
        weights = torch.ones(k) if weights is None else weights
        if weights.shape != (k,) or not bool((weights > 0).all()):
            raise UserError(f"weights must be {k} positive numbers, one for each mean")
        self.schedule, self.shape = schedule, shape
        self.register_buffer("means", means.double())
        self.register_buffer("variances", std.square().double())
        self.register_buffer("log_weights", (weights.double() / weights.double().sum()).log())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t] (b, c, h, w) at levels t (b,), in x_t's dtype."""
        return self.posterior_mean(x_t, self.schedule.level(t))

    def posterior_mean(self, x_t: Tensor, level: Level) -> Tensor:
        """E[x0 | x_t], (b, c, h, w), in closed form."""
        x, alpha = x_t.flatten(1).double(), level.alpha.flatten().double()[:, None]
        log_joint, variances = self._log_joint(x, level)
        share = log_joint.softmax(1)
        # E[x0 | x_t, j] = mu_j + gain_j (x_t - alpha mu_j), gain_j = alpha s_j^2 / v_j
        gain = alpha * self.variances / variances
        mean = (share * (1 - gain * alpha)) @ self.means + (share * gain).sum(1, keepdim=True) * x
        return mean.view_as(x_t).to(x_t.dtype)

    def log_density(self, x_t: Tensor, level: Level) -> Tensor:
        """log p(x_t) (b,) of the mixture noised to `level`, float64; at alpha = 1, sigma = 0 that of the mixture."""
        return self._log_joint(x_t.flatten(1).double(), level)[0].logsumexp(1)

    @property
    def std(self) -> float:
        """Of a coordinate, over all of them: what a network behind EDM's preconditioning takes as sigma_data."""
        weights = self.log_weights.exp()
        centred = self.means - weights @ self.means
        return float((weights @ (self.variances + centred.square().mean(1))).sqrt())

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """x0 (n, c, h, w), float64."""
        j = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[j] + self.variances[j].sqrt()[:, None] * noise).view(n, *self.shape)

    def _log_joint(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """log weights_j N(x; alpha mu_j, v_j) (b, k), and v_j = alpha^2 s_j^2 + sigma^2 (b, k)."""
        alpha, sigma = (v.flatten().double()[:, None] for v in (level.alpha, level.sigma))
        variances = alpha**2 * self.variances + sigma**2
        # |x - alpha mu|^2 expanded: no (b, k, d) table, and double precision has digits enough
        squares = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ self.means.T) + alpha**2 * self.means.square().sum(1)
        return self.log_weights - squares / (2 * variances) - 0.5 * x.shape[1] * (2 * math.pi * variances).log(), variances


class EmpiricalPosterior(nn.Module):
    """The exact posterior mean of a data set: sum_i w_i x_i, w_i proportional to N(x_t; alpha x_i, sigma^2).

    data (n, c, h, w), float. Points are kept in cells of neighbours and read a few cells at a time: nothing larger than TABLE
    numbers, (cells, COLUMNS) and (b, d) is ever held.
    Below the distance between neighbours it gives back the nearest point: a teacher that remembers.
    """

    centres: Tensor  # (cells, d) float64, the mean of each cell's points
    centred: Tensor  # (cells, m, d + 2): [1, p, |p|^2] of each point p less its centre
    weighted: Tensor  # (cells, 1 + d, m): [1, x] of each point, zero where it does not count
    radii: Tensor  # (cells,) float64, the largest distance from the centre

    def __init__(self, data: Tensor, schedule: Schedule) -> None:
        super().__init__()
        if data.ndim != 4 or not len(data) or not data.is_floating_point():
            raise ValueError(f"data must be float (n, c, h, w) with n > 0, got {data.dtype} {tuple(data.shape)}")
        if not bool(torch.isfinite(data).all()):
            raise ValueError("data hold NaN or infinite values")
        self.schedule, self.shape, self.size = schedule, tuple(data.shape[1:]), len(data)
        cells, counted = neighbours(data.flatten(1), CELL)
        points = data.flatten(1)[cells]  # (cells, m, d)
        centres = points.double().mean(1, keepdim=True).to(points.dtype)
        self.register_buffer("centres", centres[:, 0].double())
        self.register_buffer("centred", with_squares(points - centres))
        self.register_buffer("weighted", with_ones(points).mul_(counted[:, :, None]).mT.contiguous())  # (cells, 1 + d, m)
        self.register_buffer("radii", (points - centres).norm(dim=2).amax(1).double() * 1.001)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t] (b, c, h, w) at levels t (b,), in x_t's dtype."""
        return self._passed(x_t, self.schedule.level(t))[0].view_as(x_t).to(x_t.dtype)

    def log_density(self, x_t: Tensor, level: Level) -> Tensor:
        """log p(x_t) (b,) of the noised data set, float64; sigma > 0."""
        _, log_sum = self._passed(x_t, level)
        d, sigma = self.centres.shape[1], level.sigma.flatten().double()
        return log_sum - math.log(self.size) - 0.5 * d * (2 * math.pi * sigma**2).log()

    def _passed(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Mean (b, d) and log sum_i exp(-|x_t - alpha x_i|^2 / 2 sigma^2) (b,), float64."""
        sigma = level.sigma.flatten().double()
        if not bool((sigma > 0).all()):
            raise ValueError("the posterior of a data set needs sigma > 0")
        given = (x_t.flatten(1).double().T, level.alpha.flatten().double(), sigma)
        parts = zip(*(v.split(COLUMNS, -1) for v in given), strict=True)
        single = x_t.dtype != torch.float64
        found = torch.cat([self._columns(x, alpha, sigma, single) for x, alpha, sigma in parts], 1)
        return found[1:].T, found[0]

    def _columns(self, x: Tensor, alpha: Tensor, sigma: Tensor, single: bool) -> Tensor:
        """Log sum and mean (1 + d, b) of x (d, b), alpha and sigma (b,).

        With c the centre of a cell, a = x - alpha c and p = x_i - c, exponents are

            -|a - alpha p|^2 / 2 sigma^2 = -|a|^2 / 2 sigma^2 + [alpha a . p - alpha^2 |p|^2 / 2] / sigma^2

        less a reference, which is below the largest but not by far. Where `single` allows it and what cells nearby add up to is
        so small that float32 is about 3e-5 off, tables of exponents are float32.
        """
        squares = x.square().sum(0) - 2 * alpha * (self.centres @ x) + alpha**2 * self.centres.square().sum(1, keepdim=True)
        distance, radii, precision = squares.clamp_min(0).sqrt(), alpha * self.radii[:, None], 0.5 / sigma**2  # (cells, b)
        reference = -precision * (distance + radii).square().amin(0)  # some point is no further away
        highest = -precision * (distance - radii).clamp_min(0).square() - reference  # that any point of the cell could have
        terms = (2 * precision * (distance + radii) * radii).where(highest > FLOOR, 0)
        fits = (terms.amax(0) < SINGLE) & single
        offsets, slopes = -precision * squares - reference, torch.cat([x, alpha[None]]) * (2 * precision * alpha)
        unsafe = highest.amax(0) > LARGE  # its exponential could overflow: the largest exponent itself instead

        sums, top = x.new_zeros(1 + len(x), x.shape[1]), torch.where(unsafe, -torch.inf, torch.zeros_like(reference))
        for dtype, columns in ((torch.float64, ~fits), (torch.float32, fits)):
            for _, exponents in self._exponents(offsets, slopes, columns & unsafe, dtype):
                top[columns & unsafe] = torch.maximum(top[columns & unsafe], exponents.amax((0, 1)).double())
            total: Tensor | float = 0
            for weighted, exponents in self._exponents(offsets - top, slopes, columns, dtype):
                # a floor: e^-80 counts for nothing, and smaller numbers are no normal ones, which a CPU is very slow with
                total = total + (weighted.to(dtype) @ exponents.clamp_(min=FLOOR).exp_()).sum(0).double()
            sums[:, columns] = total
        return torch.cat([(reference + top + sums[0].log())[None], sums[1:] / sums[0]])

    def _exponents(self, offsets: Tensor, slopes: Tensor, columns: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Some cells at a time: [1, x] of their points (cells, 1 + d, m), and the exponents (cells, m, columns)."""
        if not bool(columns.any()):
            return
        toward, away = slopes[:, columns].split([len(slopes) - 1, 1])
        away, down = -away, (-0.5 * away).expand(len(self.centres), 1, -1)
        step = max(1, TABLE // (self.centred.shape[1] * away.shape[1]))
        parts = (self.centred, self.weighted, self.centres[:, :, None], offsets[:, None, columns], down)
        for p, weighted, c, offset, quadratic in zip(*(v.split(step) for v in parts), strict=True):
            slope = torch.addcmul(toward, c, away)
            if p.dtype == dtype:  # points first: this way round both products are fast
                yield weighted, p @ torch.cat([offset, slope, quadratic], 1).to(dtype)
            else:  # no copy beyond the points' own: of images it would cost more than the product
                p = p[:, :, 1:-1].double()
                yield weighted, torch.baddbmm(offset + p.square().sum(2, keepdim=True) * quadratic, p, slope).to(dtype)


def with_ones(p: Tensor) -> Tensor:
    """[1, p]: p (..., d) -> (..., d + 1)."""
    return torch.cat([torch.ones_like(p[..., :1]), p], -1)


def with_squares(p: Tensor) -> Tensor:
    """[1, p, |p|^2]: p (..., d) -> (..., d + 2)."""
    return torch.cat([with_ones(p), p.square().sum(-1, keepdim=True)], -1)


def neighbours(points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cells of at most `size` of the points (n, d): indices (cells, m), and which of them count: cells that are one short hold
    a point twice. Made by halving at the median of the widest coordinate, again and again.
    """
    cells = [torch.arange(len(points), device=points.device)]
    while max(len(cell) for cell in cells) > size:
        halves: list[Tensor] = []
        for cell in cells:
            inside = points[cell]
            widest = inside[:, (inside.amax(0) - inside.amin(0)).argmax()]
            halves += cell[widest.argsort(stable=True)].tensor_split(2)
        cells = halves
    m = max(len(cell) for cell in cells)
    counted = torch.tensor([[i < len(cell) for i in range(m)] for cell in cells], device=points.device)
    return torch.stack([cell[torch.arange(m).clamp_max(len(cell) - 1)] for cell in cells]), counted


def forty_modes() -> Tensor:
    """The means (40, 2) of the mixture that samplers are compared on (Midgley et al. 2023, FAB): uniform in (-40, 40)^2."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(40, 2, generator=generator) - 0.5) * 80


FORTY_MODES_STD = math.log1p(math.e)  # softplus(1)


def make_mixture(
    means: Sequence[Sequence[float]] | None = None,
    std: float | Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> GaussianMixture:
    """The mixture of a configuration, at EDM's noise levels; without means the forty modes."""
    points = forty_modes() if means is None else torch.tensor(means, dtype=torch.float64)
    width = FORTY_MODES_STD if means is None else torch.as_tensor(std)
    shares = None if weights is None else torch.tensor(weights)
    return GaussianMixture(points, width, EDMSchedule(0.0, math.inf), (points.shape[1], 1, 1), shares)
