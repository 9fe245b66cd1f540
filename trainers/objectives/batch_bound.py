"""VarDiU's multi-sample bound with the batch as its proposals: no posterior, no second network.

    E w(t) [ log 1/n sum_{j: c_j = c} N(x_t; alpha g(z_j, c), sigma^2) - x_t . sg(s_d(x_t)) ]

The bound of bound.py where z_k are other draws of the prior, so that p(z_k) / q(z_k) = 1: the n rows of the whole batch with the
condition of x_t, its own among them. It is one for every n (Sobolev & Vetrov 2019), and the gradient passes through x_t and every
g(z_j). What it can say of the information of z and x_t is at most ln n: where there is more, at low noise, a sample's own term
carries all weight, and with it the entropy has no gradient. So levels begin where samples overlap.

Pairs +-eps of one sample take the noise out of s_d at every level: eps / sigma, the control variate of bound.py, cancels in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.denoiser import Denoiser, FewStepGenerator
from pipelines.noise import Level, Weight, add_noise, score, weight

from ..config.levels import LevelSampler
from .amortized import NO_SIGNAL, flat, same_rows
from .base import Draw, HealthCheck, LossTerms, dot, generate, sample_level
from .importance import effective_sample_size
from .whole_batch import WholeBatch


def mixture_terms(x_t: Tensor, x0: Tensor, level: Level) -> Tensor:
    """log N(x_t,i; alpha_i x0_j, sigma_i^2 I): x_t (n, c, h, w), x0 (m, c, h, w) -> (n, m)."""
    # differences are squared one by one: the expanded square would lose, at low noise, the digits that weights are made of
    d, alpha, sigma = x0[0].numel(), level.alpha.flatten(1).clamp_min(NO_SIGNAL), level.sigma.flatten(1)
    distance = torch.cdist(flat(x_t) / alpha, flat(x0), compute_mode="donot_use_mm_for_euclid_dist")
    return -0.5 * (distance * alpha / sigma).square() - d * (sigma.log() + 0.5 * math.log(2 * math.pi))


class Rows(NamedTuple):
    """What the loss sees beside x0, of each row of the whole batch."""

    eps: Tensor  # (B, c, h, w)
    x0_hat: Tensor  # (B, 2, c, h, w), the teacher's at eps and -eps
    t: Tensor  # (B,)


class BatchBound(WholeBatch):
    """One phase, that of the student."""

    needs_data = False

    def __init__(self, student: FewStepGenerator, teacher: Denoiser, levels: LevelSampler, weighting: Weight = "sigma2") -> None:
        super().__init__(student, {"teacher": teacher})
        self.teacher, self.levels, self.weighting = teacher, levels, weighting
        message = (
            "x_t says nothing of which sample of the batch it was made of: the student has collapsed; "
            "lower student.optimizer.lr, or raise batch_size"
        )
        self.health: tuple[HealthCheck, ...] = (HealthCheck("information", 0.05, message),)

    def of_student(self, draw: Draw) -> tuple[Tensor, list[Tensor]]:
        x0 = generate(self.student, draw)
        return x0, [x0]

    def of_data(self, draw: Draw, x0: Tensor) -> list[Tensor]:
        level = sample_level(draw.u, self.levels, draw.progress, self.teacher.schedule)
        x0_hat = [self.teacher(add_noise(x0, eps, level), level, draw.condition) for eps in (draw.eps, -draw.eps)]
        conditions = [value for _, value in sorted((draw.condition or {}).items())]
        return [*Rows(draw.eps, torch.stack(x0_hat, 1), level.t), *conditions]

    def whole_loss(self, x0: Tensor, student: Sequence[Tensor], data: Sequence[Tensor | None], draw: Draw) -> LossTerms:
        made = student[0]
        given = [value for value in data if value is not None]
        rows, conditions = Rows(*given[:3]), given[3:]
        level = self.teacher.schedule.level(rows.t)
        alike = torch.ones(len(x0), len(x0), dtype=torch.bool, device=x0.device)
        for value in conditions:
            alike = alike & same_rows(flat(value), flat(value))
        loss, information, ess = torch.zeros_like(rows.t), [], []
        for eps, x0_hat in zip((rows.eps, -rows.eps), rows.x0_hat.unbind(1), strict=True):
            x_t = add_noise(made, eps, level)
            with torch.autocast(x0.device.type, enabled=False):
                terms = mixture_terms(x_t, made, level).masked_fill(~alike, -torch.inf)
            log_p = terms.logsumexp(1) - alike.sum(1).to(terms).log()
            w = weight(self.weighting, level, x0, x0_hat, self.teacher.sigma_data).flatten()
            loss = loss + w * (log_p - dot(x_t, score(x0_hat, x_t.detach(), level))) / 2
            information.append((terms.diagonal() - log_p).detach().mean())
            ess.append(effective_sample_size(terms.detach()).mean())
        return LossTerms(loss, {"information": torch.stack(information).mean(), "ess": torch.stack(ess).mean()})
