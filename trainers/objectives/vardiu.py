"""VarDiU: a variational upper bound on the diffusive KL (Wang et al. 2025, arXiv 2508.20646), and two relatives.

x_t = alpha g(z) + sigma eps;   q_phi(z | x_t, t, c): a tractable posterior;   s_d: the teacher's score.

bound: the paper's Eq. 12,
    -E w(t) [ x_t . sg(s_d(x_t)) + log q(z | x_t) ]

multi_sample: ours, after Sobolev & Vetrov 2019 (hierarchical models); z_0 = z, z_k ~ q(. | x_t); K = 0 is the bound,
    E w(t) [ log 1/(K+1) sum_{k=0..K} v_k - x_t . sg(s_d) ],    v_k = N(x_t; alpha g(z_k), sigma^2) p(z_k) / q(z_k | x_t)

resampled_score: ours; q is trained by the bound and proposes latents for the student's own score,
    grad_theta = E w(t) (s_theta - s_d) . d x_t / d theta,    s_theta = (alpha m - x_t) / sigma^2,    m ~ E[g(z) | x_t]
    m = sum_{k=1..K} v_k g(z_k) / sum_k v_k.  z_0 is left out: it made x_t, so its share would only shrink s_theta.
    calibrated: m is biased where few proposals carry the weight; two more maps of q's network regress that bias out
    (importance.calibrated_mean), which mixes the resampled score with a denoiser learned as in Diff-Instruct.

Variance reductions, all unbiased: antithetic eps -> +-eps sharing z; the control variate s_d -> s_d + eps/sigma of the bounds,
which has mean zero given z and turns alpha D(x_t) - x_t into alpha (D(x_t) - g(z)); for the resampled score,
proposals in pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.denoiser import Condition, Denoiser, OneStepGenerator, repeat_condition
from pipelines.noise import Level, add_noise, score, weight

from .base import (
    Draw,
    HealthCheck,
    LevelSampler,
    LossTerms,
    Phase,
    denoising_loss,
    sample_level,
    score_difference_loss,
    teacher_score,
)
from .importance import (
    bound_loss,
    calibrated_mean,
    effective_sample_size,
    log_importance,
    log_standard_normal,
    multi_sample_loss,
)

Estimator = Literal["bound", "multi_sample", "resampled_score"]


class Noised(NamedTuple):
    z: Tensor
    x0: Tensor
    eps: Tensor
    x_t: Tensor
    level: Level
    condition: Condition


class VarDiU:
    """Phases: [posterior alone, posterior_updates times,] then student and posterior jointly on one batch."""

    needs_data = False

    def __init__(
        self,
        student: OneStepGenerator,
        teacher: Denoiser,
        posterior: nn.Module,
        levels: LevelSampler,
        weighting: str = "sigma2",
        estimator: Estimator = "resampled_score",
        num_samples: int = 16,
        calibration_weight: float = 1.0,
        antithetic: bool = True,
        control_variate: bool = True,
        posterior_updates: int = 1,
        warmup_updates: int = 0,
        min_information: float = 0.05,
    ) -> None:
        self.networks: dict[str, nn.Module] = {"student": student, "posterior": posterior}
        self.frozen: dict[str, nn.Module] = {"teacher": teacher}
        self.student, self.teacher, self.posterior = student, teacher, posterior
        self.levels, self.weighting, self.estimator, self.num_samples = levels, weighting, estimator, num_samples
        self.calibration_weight = calibration_weight
        self.antithetic, self.control_variate = antithetic, control_variate
        self.warmup = (Phase("posterior", ("posterior",), self.posterior_loss, warmup_updates),)
        extra = (Phase("posterior", ("posterior",), self.posterior_loss, posterior_updates),) if posterior_updates else ()
        joint = self.resampled_score_loss if estimator == "resampled_score" else self.bound_loss
        self.phases = (*extra, Phase("joint", ("student", "posterior"), joint))
        message = (
            "the posterior has learned nothing of z from x_t: the student has collapsed or the posterior is not warm yet; "
            "raise objective.posterior.warmup_updates or objective.posterior.updates, or lower student.optimizer.lr"
        )
        self.health = (HealthCheck("information", min_information, message),)

    def noised(self, draw: Draw) -> Noised:
        """Student samples noised to random levels; with antithetic pairs 2b samples from b students."""
        x0, z, eps, condition = self.student(draw.z, draw.condition), draw.z, draw.eps, draw.condition
        level = sample_level(draw.u, self.levels, draw.progress, self.teacher.schedule)
        if self.antithetic:
            x0, z, eps, level = torch.cat([x0, x0]), torch.cat([z, z]), torch.cat([eps, -eps]), level.repeat(2)
            condition = None if condition is None else {k: torch.cat([v, v]) for k, v in condition.items()}
        return Noised(z, x0, eps, add_noise(x0, eps, level), level, condition)

    def data_score(self, n: Noised) -> tuple[Tensor, Tensor]:
        """(s_d, w), both constants."""
        x0_hat, score_d = teacher_score(self.teacher, n.x_t, n.level, n.condition)
        if self.control_variate:
            score_d = score_d + n.eps / n.level.sigma
        return score_d, weight(self.weighting, n.level, n.x0, x0_hat, self.teacher.sigma_data)

    def posterior_loss(self, draw: Draw, context: None = None) -> LossTerms:
        """-log q(z | x_t): the bound in phi alone, theta frozen."""
        with torch.no_grad():
            n = self.noised(draw)
        log_q = self.posterior(n.x_t, n.level, n.condition, z=n.z[:, None]).log_q[:, 0]
        return LossTerms(self._pairs(-log_q), {"information": self._information(log_q, n.z)})

    def bound_loss(self, draw: Draw, context: None = None) -> LossTerms:
        """The bound of one (Eq. 12) or of K + 1 samples, differentiated in theta and phi."""
        n = self.noised(draw)
        score_d, w = self.data_score(n)
        noise = None
        if self.estimator == "multi_sample" and self.num_samples:
            noise = self._proposal_noise(draw, n)
        q = self.posterior(n.x_t, n.level, n.condition, z=n.z[:, None], noise=noise)
        metrics = {"information": self._information(q.log_q[:, 0], n.z), "x0_std": n.x0.detach().std()}
        if noise is None:
            return LossTerms(self._pairs(bound_loss(n.x_t, score_d, q.log_q[:, 0], w)), metrics)
        z_k, log_q = torch.cat([n.z[:, None], q.z], 1), torch.cat([q.log_q, q.log_q_z], 1)
        x0_k = torch.cat([n.x0[:, None], self._students(q.z, n.condition)], 1)
        log_v = log_importance(n.x_t, x0_k, z_k, log_q, n.level)
        metrics["ess"] = effective_sample_size(log_v.detach()).mean()
        return LossTerms(self._pairs(multi_sample_loss(n.x_t, score_d, log_v, w)), metrics)

    def resampled_score_loss(self, draw: Draw, context: None = None) -> LossTerms:
        """theta: the resampled score against the teacher's; phi: -log q(z | x_t), on the same x_t and in the same call of q."""
        n = self.noised(draw)
        x0_hat, score_d = teacher_score(self.teacher, n.x_t, n.level, n.condition)
        w = weight(self.weighting, n.level, n.x0, x0_hat, self.teacher.sigma_data)
        q = self.posterior(n.x_t.detach(), n.level, n.condition, z=n.z[:, None], noise=self._proposal_noise(draw, n))
        with torch.no_grad():
            x0_k = self._students(q.z, n.condition)
            log_v = log_importance(n.x_t, x0_k, q.z, q.log_q_z, n.level)
            # not einsum, which autocast would run in half precision
            x0_mean = (log_v.softmax(1)[:, :, None, None, None] * x0_k).sum(1)
        log_q = q.log_q[:, 0]
        loss = -log_q
        metrics = {"information": self._information(log_q, n.z), "ess": effective_sample_size(log_v).mean()}
        if q.calibration is not None:
            x0_mean = calibrated_mean(x0_mean, x0_hat, q.calibration, n.level, self.teacher.sigma_data)
            error = denoising_loss(x0_mean, n.x0.detach(), weight("edm", n.level, n.x0, x0_hat, self.teacher.sigma_data))
            loss = loss + self.calibration_weight * n.x_t[0].numel() * error  # a sum over coordinates, as log q is
            metrics |= {"gate": 1 + q.calibration.detach().chunk(2, 1)[0].mean(), "calibration_error": error.detach().mean()}
        loss = loss + score_difference_loss(n.x_t, score(x0_mean, n.x_t, n.level), score_d, w)
        return LossTerms(self._pairs(loss), metrics | {"x0_std": n.x0.detach().std()})

    def _students(self, z_k: Tensor, condition: Condition) -> Tensor:
        """g at K latents for each sample: (b, K, c, h, w) -> the same."""
        return self.student(z_k.flatten(0, 1), repeat_condition(condition, z_k.shape[1])).unflatten(0, z_k.shape[:2])

    def _proposal_noise(self, draw: Draw, n: Noised) -> Tensor:
        """Standard normal (b, K, c, h, w). For the resampled score and even K in pairs +-noise: what is linear in z cancels.
        The multi-sample bound is one only for independent proposals.
        """
        k, shape = self.num_samples, n.z.shape[1:]
        fresh = k // 2 if k % 2 == 0 and self.estimator == "resampled_score" else k
        noise = draw.normal("proposals", (2 if self.antithetic else 1) * fresh, *shape)
        noise = torch.cat(noise.split(fresh, 1))
        return noise if fresh == k else torch.cat([noise, -noise], 1)

    def _pairs(self, loss: Tensor) -> Tensor:
        """Average an antithetic pair back to one number for each z."""
        return loss.unflatten(0, (2, -1)).mean(0) if self.antithetic else loss

    @staticmethod
    def _information(log_q: Tensor, z: Tensor) -> Tensor:
        """E[log q(z|x_t) - log p(z)] in nats, a lower bound on the mutual information of z and x_t: 0 is collapse."""
        return (log_q.detach() - log_standard_normal(z.flatten(1))).mean()
