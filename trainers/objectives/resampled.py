"""VarDiU's resampled score: the posterior proposes latents for the student's own score, which needs no network then.

    grad_theta = E w(t) (s_theta - s_d) . d x_t / d theta,    s_theta = (alpha m - x_t) / sigma^2,    m ~ E[g(z) | x_t]
    m = sum_{k=1..K} v_k g(z_k) / sum_k v_k,    v_k = N(x_t; alpha g(z_k), sigma^2) p(z_k) / q(z_k | x_t),   z_k ~ q(. | x_t)

q is trained by the bound (Eq. 12). For exact q one proposal is unbiased, for another q m converges with K. z_0 is left out: it
made x_t, so its share of the weight would only shrink s_theta. For even K proposals come in pairs +-noise.

target_ess: temper the weights until that many count. moves: start from z_0, which is a draw of the posterior p(z | x_t), move it
by resampling among K proposals each time, and average over the last pool: no bias given x_t, but what has not moved is still z_0.
ess_levels: draw levels in proportion to the effective sample size measured there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pipelines.noise import Level, score, weight

from .base import Draw, LossTerms, Phase, sample_level, score_difference_loss
from .bound import Noised, VarDiU
from .importance import effective_sample_size, log_importance, resampling_move, tempered, weighted_mean


class ResampledScore(VarDiU):
    """See the module."""

    def __init__(
        self,
        *args: Any,
        num_samples: int = 16,
        antithetic: bool = True,
        target_ess: float | None = None,
        moves: int = 0,
        ess_levels: bool = False,
        **options: Any,
    ) -> None:
        self.target_ess, self.moves, self.ess_levels = target_ess, moves, ess_levels
        super().__init__(*args, num_samples=num_samples, antithetic=antithetic, **options)

    def joint_phase(self) -> Phase:
        return dataclasses.replace(super().joint_phase(), observe=self.statistics.observe)

    def sample_level(self, draw: Draw) -> Level:
        u = self.statistics.by_effective_size(draw.u, draw.progress) if self.ess_levels else draw.u
        return sample_level(u, self.levels, draw.progress, self.teacher.schedule)

    def joint_loss(self, draw: Draw, context: None = None) -> LossTerms:
        """theta: the resampled score against the teacher's; phi: -log q(z | x_t), on the same x_t and in the same call of q."""
        n = self.noised(draw)
        with torch.no_grad():
            x0_hat, features = self.read_teacher(n.x_t.detach(), n.level, n.condition)
        noise = self.proposal_noise(draw, n)
        q = self.posterior(n.x_t.detach(), n.level, n.condition, features, z=n.z[:, None], noise=noise)
        with torch.no_grad():
            x0_k = self.students(q.z, n.condition)
            log_v = log_importance(n.x_t, x0_k, q.z, q.log_q_z, n.level)
            ess = effective_sample_size(log_v[:, : self.num_samples])
            if self.moves:
                log_v_0 = log_importance(n.x_t, n.x0[:, None], n.z[:, None], q.log_q, n.level)[:, 0]
                x0_mean = self.moved_mean(draw, log_v_0, n.x0.detach(), log_v, x0_k)
            else:
                x0_mean = weighted_mean(tempered(log_v, self.target_ess) if self.target_ess else log_v, x0_k)
        w = weight(self.weighting, n.level, n.x0, x0_hat, self.teacher.sigma_data)
        score_d = score(x0_hat, n.x_t.detach(), n.level)
        log_q = q.log_q[:, 0]
        loss = score_difference_loss(n.x_t, score(x0_mean, n.x_t.detach(), n.level), score_d, w) - log_q
        metrics = {"information": self.information(log_q, n.z), "x0_std": n.x0.detach().std()}
        return LossTerms(self._pairs(loss), metrics | self.statistics.metrics(n.level.t, ess))

    def moved_mean(self, draw: Draw, log_v: Tensor, x0: Tensor, log_v_k: Tensor, x0_k: Tensor) -> Tensor:
        """Move (log_v (b,), x0 (b, c, h, w)) through all rounds of K proposals but the last, then average over that pool."""
        u = torch.special.ndtr(draw.normal("moves", (2 if self.antithetic else 1) * self.moves))
        u = torch.cat(u.split(self.moves, 1))
        rounds = list(zip(log_v_k.split(self.num_samples, 1), x0_k.split(self.num_samples, 1), strict=True))
        for i, (log_v_more, x0_more) in enumerate(rounds):
            pool_v, pool_x0 = torch.cat([log_v[:, None], log_v_more], 1), torch.cat([x0[:, None], x0_more], 1)
            if i < self.moves:
                log_v, x0 = resampling_move(pool_v, pool_x0, u[:, i])
        return weighted_mean(pool_v, pool_x0)

    def proposal_noise(self, draw: Draw, n: Noised) -> Tensor:
        """Standard normal (b, (moves + 1) K, c, h, w). For even K in pairs +-noise, where what is linear in z cancels; not with
        moves, which are exact for independent proposals.
        """
        total = (self.moves + 1) * self.num_samples
        paired = total % 2 == 0 and not self.moves
        fresh = total // 2 if paired else total
        noise = draw.normal("proposals", (2 if self.antithetic else 1) * fresh, *n.z.shape[1:])
        noise = torch.cat(noise.split(fresh, 1))
        return torch.cat([noise, -noise], 1) if paired else noise
