"""Teachers that are exact: the posterior mean E[x0 | x_t] of a Gaussian mixture, and of a data set itself.

Both are modules of the form network(x_t, t) that predict x0, so `Denoiser(network, schedule, "sample", sigma_data)` makes
teachers of them. Any shape (b, c, h, w); a point in d dimensions is an image of d channels and one pixel.

    x_t = alpha x0 + sigma eps,    score(x_t) = (alpha E[x0 | x_t] - x_t) / sigma^2          (Tweedie's formula)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .noise import EDMSchedule, Level, Schedule

CHUNK_NUMBERS = 2**16  # of the (b, chunk) table of exponents held at a time: what a core's cache holds, or nearly


class GaussianMixture(nn.Module):
    """sum_j weights_j N(means_j, std_j^2 I): density, score, posterior mean and samples at every noise level.

    means (k, d); std a number or (k,); weights (k,), normalised here, None: equal.
    """

    def __init__(
        self, means: Tensor, std: float | Tensor, schedule: Schedule, shape: tuple[int, int, int], weights: Tensor | None = None
    ) -> None:
        super().__init__()
        k, d = means.shape
        if math.prod(shape) != d:
            raise ValueError(f"means have {d} dimensions, shape {shape} has {math.prod(shape)}")
        std = torch.as_tensor(std, dtype=torch.float64).expand(k)
        if not bool((std > 0).all()):
            raise ValueError(f"std must be positive, got {std.min():g}")
        weights = torch.ones(k) if weights is None else weights
        if weights.shape != (k,) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be {k} positive numbers, one for each mean")
        self.schedule, self.shape = schedule, shape
        self.register_buffer("means", means.double())
        self.register_buffer("variances", std.square().double())
        self.register_buffer("log_weights", (weights.double() / weights.double().sum()).log())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t] (b, c, h, w) at levels t (b,), in x_t's dtype."""
        return self.posterior_mean(x_t, self.schedule.level(t))

    def posterior_mean(self, x_t: Tensor, level: Level) -> Tensor:
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
        squares = (x[:, None] - alpha[:, None] * self.means).square().sum(2)
        return self.log_weights - squares / (2 * variances) - 0.5 * x.shape[1] * (2 * math.pi * variances).log(), variances


class EmpiricalPosterior(nn.Module):
    """The exact posterior mean of a data set: sum_i w_i x_i, w_i proportional to N(x_t; alpha x_i, sigma^2).

    data (n, c, h, w), float. Points are read in chunks with a running maximum: nothing larger than (b, chunk) and (b, d) is
    ever held. Below the distance between neighbours it gives back the nearest point: a teacher that remembers.
    """

    def __init__(self, data: Tensor, schedule: Schedule) -> None:
        super().__init__()
        if data.ndim != 4 or not len(data) or not data.is_floating_point():
            raise ValueError(f"data must be float (n, c, h, w) with n > 0, got {data.dtype} {tuple(data.shape)}")
        if not bool(torch.isfinite(data).all()):
            raise ValueError("data hold NaN or infinite values")
        self.schedule, self.shape = schedule, tuple(data.shape[1:])
        self.register_buffer("points", data.flatten(1))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t] (b, c, h, w) at levels t (b,), in x_t's dtype."""
        return self._passed(x_t, self.schedule.level(t))[0].view_as(x_t).to(x_t.dtype)

    def log_density(self, x_t: Tensor, level: Level) -> Tensor:
        """log p(x_t) (b,) of the noised data set, float64; sigma > 0."""
        _, log_sum = self._passed(x_t, level)
        d, sigma = self.points.shape[1], level.sigma.flatten().double()
        return log_sum - math.log(len(self.points)) - 0.5 * d * (2 * math.pi * sigma**2).log()

    def _passed(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Mean (b, d) and log sum_i exp(-|x_t - alpha x_i|^2 / 2 sigma^2) (b,), float64.

        Exponents are float64, where |x_t|^2 is the same for all points and left out until the end; what is left after the
        largest has been taken off is exponentiated in the precision of x_t.
        """
        x = x_t.flatten(1).double()
        alpha, sigma = (v.flatten().double()[:, None] for v in (level.alpha, level.sigma))
        if not bool((sigma > 0).all()):
            raise ValueError("the posterior of a data set needs sigma > 0")
        weight_type = torch.promote_types(x_t.dtype, torch.float32)
        gain = alpha / sigma**2
        toward, away = gain * x, -0.5 * alpha * gain
        top = x.new_full((len(x), 1), -torch.inf)
        total, mean = torch.zeros_like(top), torch.zeros_like(x)
        for part in self.points.split(max(1, CHUNK_NUMBERS // len(x))):
            exponents = toward @ part.double().T
            exponents.addcmul_(away, part.double().square().sum(1))
            raised = torch.maximum(top, exponents.amax(1, keepdim=True))
            # a floor: e^-80 counts for nothing, and still smaller numbers are no normal ones, which a CPU is very slow with
            weights, kept = exponents.sub_(raised).to(weight_type).clamp_(min=-80).exp_(), (top - raised).exp()
            total = total * kept + weights.sum(1, keepdim=True)
            mean = mean * kept + weights @ part.to(weight_type)
            top = raised
        return mean / total, (top - 0.5 * (x / sigma).square().sum(1, keepdim=True) + total.log())[:, 0]


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
