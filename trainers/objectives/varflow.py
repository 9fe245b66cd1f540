"""VarFlow: the energy distance between noised student and data samples; no score at all (VarFlow paper, Eqs. 9, 10).

    L_t = w(t) [ mean_ij |xS_i - xT_j|^beta - 1/2 mean_{i != j} |xS_i - xS_j|^beta ],    beta in (0, 2)

One t a batch. The loss needs only the students' x0, so a batch larger than memory is exact: draw all x0 without a graph,
take dL/dx0 on the cheap loss, then re-run micro-batches with a graph and inject their rows of dL/dx0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipelines.denoiser import OneStepGenerator
from pipelines.noise import Schedule, add_noise, weight

from .base import Draw, LevelSampler, LossTerms, Phase, dot, sample_level


def pairwise_power(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """|x_i - y_j|^beta, (n, ...) x (m, ...) -> (n, m), in float64 from inner products: no (n, m, d) tensor.

    Where two samples coincide (within float64 cancellation) distance and gradient are exactly 0, for every beta.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    centre = y.mean(0)  # distances do not move with the origin; rounding does
    x, y = x - centre, y - centre
    x2, y2 = x.square().sum(1), y.square().sum(1)
    square = x2[:, None] + y2[None, :] - 2 * x @ y.T
    coincide = square <= 1e-12 * (x2[:, None] + y2[None, :])  # False for NaN, which must come through
    return torch.where(coincide, 0.0, torch.where(coincide, 1.0, square).pow(beta / 2))


def energy_loss(x_student: Tensor, x_data: Tensor, beta: float, cross: Literal["full", "paired"]) -> Tensor:
    """Each student sample's share of the bracket above; the mean over samples is Eq. 9 ("full") or Eq. 10 ("paired").

    x_student, x_data (K, c, h, w) noised to one level, K >= 2 -> (K,) float64.
    """
    k = len(x_student)
    if k < 2 or len(x_data) != k:
        raise ValueError(f"the energy loss needs as many data as student samples and at least 2; got {len(x_data)}, {k}")
    within = pairwise_power(x_student, x_student, beta)
    within = (within - torch.diag(within.diagonal())).sum(1) / (k - 1)
    between = pairwise_power(x_student, x_data, beta)
    return (between.mean(1) if cross == "full" else between.diagonal()) - within / 2


class VarFlow:
    """student: the generator; schedule: the teacher's noise; data come with each draw."""

    needs_data = True
    warmup: tuple[Phase, ...] = ()
    health = ()

    def __init__(
        self,
        student: OneStepGenerator,
        schedule: Schedule,
        levels: LevelSampler,
        weighting: str = "sigma2",
        beta: float = 1.0,
        cross: Literal["full", "paired"] = "paired",
        sigma_data: float = 0.5,
    ) -> None:
        self.networks: dict[str, nn.Module] = {"student": student}
        self.state: dict[str, Tensor] = {}
        self.frozen: dict[str, nn.Module] = {}
        self.student, self.schedule, self.levels, self.weighting = student, schedule, levels, weighting
        self.beta, self.cross, self.sigma_data = beta, cross, sigma_data
        self.phases = (Phase("student", ("student",), self.loss, prepare=self.prepare),)

    def batch_loss(self, x0: Tensor, x0_data: Tensor, eps: Tensor, eps_data: Tensor, draw: Draw) -> Tensor:
        """(K,) over a whole batch, noised to the one level that `shared_u` picks."""
        level = sample_level(draw.shared_u.expand(len(x0)), self.levels, draw.progress, self.schedule)
        x_student, x_data = add_noise(x0, eps, level), add_noise(x0_data, eps_data, level)
        w = weight(self.weighting, level, x0, x0_data, self.sigma_data).flatten()
        return w * energy_loss(x_student, x_data, self.beta, self.cross)

    def prepare(self, draws: Sequence[Draw], gather: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each micro-batch its rows of (K dL/dx0, per-sample loss), exact for the whole batch on all processes."""
        with torch.no_grad():
            x0 = [self.student(d.z, d.condition) for d in draws]
        sizes = [len(x) for x in x0]
        tensors = [x0, [d.x0 for d in draws], [d.eps for d in draws], [self._data_noise(d) for d in draws]]
        x0_all, x0_data, eps, eps_data = (gather(torch.cat(t)) for t in tensors)
        x0_all.requires_grad_()
        per_sample = self.batch_loss(x0_all, x0_data, eps, eps_data, draws[0])
        (gradient,) = torch.autograd.grad(per_sample.sum(), x0_all)
        mine = draws[0].first_row  # this process's rows start here
        rows = slice(mine, mine + sum(sizes))
        return list(zip(gradient[rows].split(sizes), per_sample.detach()[rows].split(sizes), strict=True))

    def loss(self, draw: Draw, context: tuple[Tensor, Tensor] | None = None) -> LossTerms:
        x0 = self.student(draw.z, draw.condition)
        metrics = {"x0_std": x0.detach().std()}
        if context is None:
            return LossTerms(self.batch_loss(x0, draw.x0, draw.eps, self._data_noise(draw), draw), metrics)
        gradient, value = context
        surrogate = dot(gradient, x0)  # its gradient is dL/dx0 . dx0/dtheta; its value is replaced by the loss's
        return LossTerms(surrogate - surrogate.detach() + value, metrics)

    @staticmethod
    def _data_noise(draw: Draw) -> Tensor:
        return draw.normal("data_eps", *draw.eps.shape[1:])
