"""VarDiU: a variational upper bound on the diffusive KL (Wang et al. 2025, arXiv 2508.20646), of one and of more samples.

x_t = alpha g(z) + sigma eps;   q_phi(z | x_t, t, c): a tractable posterior;   s_d: the teacher's score.

num_samples = 0: the paper's Eq. 12,
    -E w(t) [ x_t . sg(s_d(x_t)) + log q(z | x_t) ]

num_samples = K: ours, after Sobolev & Vetrov 2019 (hierarchical models); z_0 = z, z_k ~ q(. | x_t), K = 0 is the bound above,
    E w(t) [ log 1/(K+1) sum_{k=0..K} v_k - x_t . sg(s_d) ],    v_k = N(x_t; alpha g(z_k), sigma^2) p(z_k) / q(z_k | x_t)

Variance reductions, both unbiased: antithetic eps -> +-eps sharing z; the control variate s_d -> s_d + eps/sigma, which has
mean zero given z and turns alpha D(x_t) - x_t into alpha (D(x_t) - g(z)).

resampled.py and amortized.py follow the same posterior with other estimates of the student's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipelines.denoiser import Condition, Denoiser, FewStepGenerator
from pipelines.noise import Level, Weight, add_noise, score, weight

from .base import Draw, HealthCheck, LevelSampler, LossTerms, Phase, generate, sample_level
from .ess import LevelStatistics
from .importance import bound_loss, effective_sample_size, log_importance, log_standard_normal, multi_sample_loss


class Noised(NamedTuple):
    """Student samples x0 = g(z) and their x_t = alpha x0 + sigma eps, rows of one length."""

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
        student: FewStepGenerator,
        teacher: Denoiser,
        posterior: nn.Module,
        levels: LevelSampler,
        weighting: Weight = "sigma2",
        *,
        num_samples: int = 0,
        antithetic: bool = True,
        control_variate: bool = True,
        posterior_updates: int = 0,
        warmup_updates: int = 0,
        min_information: float = 0.05,
    ) -> None:
        self.networks: dict[str, nn.Module] = {"student": student, "posterior": posterior}
        self.frozen: dict[str, nn.Module] = {"teacher": teacher}
        self.student, self.teacher, self.posterior = student, teacher, posterior
        self.levels, self.weighting, self.num_samples = levels, weighting, num_samples
        self.antithetic, self.control_variate = antithetic, control_variate
        self.statistics = LevelStatistics(levels, float(num_samples))
        self.warmup: tuple[Phase, ...] = (self.posterior_phase(warmup_updates),)
        extra = (self.posterior_phase(posterior_updates),) if posterior_updates else ()
        self.phases: tuple[Phase, ...] = (*extra, self.joint_phase())
        message = (
            "the posterior has learned nothing of z from x_t: the student has collapsed or the posterior is not warm yet; "
            "raise objective.posterior.warmup_updates or objective.posterior.updates, or lower student.optimizer.lr"
        )
        self.health: tuple[HealthCheck, ...] = (HealthCheck("information", min_information, message),)

    @property
    def state(self) -> dict[str, Tensor]:
        return self.statistics.state

    def posterior_phase(self, repeats: int) -> Phase:
        """phi alone."""
        return Phase("posterior", ("posterior",), self.posterior_loss, repeats)

    def joint_phase(self) -> Phase:
        """theta and phi on one batch."""
        return Phase("joint", ("student", "posterior"), self.joint_loss)

    def sample_level(self, draw: Draw) -> Level:
        """A level for each row."""
        return sample_level(draw.u, self.levels, draw.progress, self.teacher.schedule)

    def noised(self, draw: Draw) -> Noised:
        """Student samples noised to random levels; with antithetic pairs 2b samples from b students."""
        x0, z, eps, condition = generate(self.student, draw), draw.z, draw.eps, draw.condition
        level = self.sample_level(draw)
        if self.antithetic:
            x0, z, eps, level = torch.cat([x0, x0]), torch.cat([z, z]), torch.cat([eps, -eps]), level.repeat(2)
            condition = None if condition is None else {k: torch.cat([v, v]) for k, v in condition.items()}
        return Noised(z, x0, eps, add_noise(x0, eps, level), level, condition)

    def read_teacher(self, x_t: Tensor, level: Level, condition: Condition) -> tuple[Tensor, Any]:
        """(x0_hat, the features that the posterior reads or None). No parameter of the teacher ever gets a gradient; x_t does,
        through the features, if it has a graph and the posterior is built on the teacher's encoder.
        """
        if not self.posterior.on_teacher_features:
            with torch.no_grad():
                return self.teacher(x_t, level, condition), None
        x0_hat, features = self.teacher(x_t, level, condition, return_features=True)
        return x0_hat.detach(), features

    def posterior_loss(self, draw: Draw, context: Any = None) -> LossTerms | Iterator[LossTerms]:
        """-log q(z | x_t): the bound in phi alone, theta and the teacher frozen."""
        with torch.no_grad():
            n = self.noised(draw)
            features = self.read_teacher(n.x_t, n.level, n.condition)[1] if self.posterior.on_teacher_features else None
        log_q = self.posterior(n.x_t, n.level, n.condition, features, z=n.z[:, None]).log_q[:, 0]
        return LossTerms(self._pairs(-log_q), {"information": self.information(log_q, n.z)})

    def joint_loss(self, draw: Draw, context: Any = None) -> LossTerms | Iterator[LossTerms]:
        """The bound of one (Eq. 12) or of K + 1 samples, differentiated in theta and phi."""
        n = self.noised(draw)
        x0_hat, features = self.read_teacher(n.x_t, n.level, n.condition)
        score_d = score(x0_hat, n.x_t.detach(), n.level)
        if self.control_variate:
            score_d = score_d + n.eps / n.level.sigma
        w = weight(self.weighting, n.level, n.x0, x0_hat, self.teacher.sigma_data)
        noise = self.proposal_noise(draw, n) if self.num_samples else None
        q = self.posterior(n.x_t, n.level, n.condition, features, z=n.z[:, None], noise=noise)
        metrics = {"information": self.information(q.log_q[:, 0], n.z), "x0_std": n.x0.detach().std()}
        if noise is None:
            return LossTerms(self._pairs(bound_loss(n.x_t, score_d, q.log_q[:, 0], w)), metrics)
        z_k, log_q = torch.cat([n.z[:, None], q.z], 1), torch.cat([q.log_q, q.log_q_z], 1)
        x0_k = torch.cat([n.x0[:, None], self.students(q.z, n.condition)], 1)
        log_v = log_importance(n.x_t, x0_k, z_k, log_q, n.level)
        metrics |= self.statistics.metrics(n.level.t, effective_sample_size(log_v.detach()))
        return LossTerms(self._pairs(multi_sample_loss(n.x_t, score_d, log_v, w)), metrics)

    def students(self, z_k: Tensor, condition: Condition) -> Tensor:
        """g at K latents for each sample: (b, K, c, h, w) -> the same, one k at a time and, where a graph is wanted, recomputed
        in backward: memory holds the activations of one call, whatever K is.
        """
        run = partial(checkpoint, self.student, use_reentrant=False) if torch.is_grad_enabled() else self.student
        return torch.stack([run(z, condition) for z in z_k.unbind(1)], 1)

    def proposal_noise(self, draw: Draw, n: Noised) -> Tensor:
        """Standard normal (b, K, c, h, w), independent: the multi-sample bound is one only for independent proposals."""
        noise = draw.normal("proposals", (2 if self.antithetic else 1) * self.num_samples, *n.z.shape[1:])
        return torch.cat(noise.split(self.num_samples, 1))

    def _pairs(self, loss: Tensor) -> Tensor:
        """Average an antithetic pair back to one number for each z."""
        return loss.unflatten(0, (2, -1)).mean(0) if self.antithetic else loss

    @staticmethod
    def information(log_q: Tensor, z: Tensor) -> Tensor:
        """E[log q(z|x_t) - log p(z)] in nats, a lower bound on the mutual information of z and x_t: 0 is collapse."""
        return (log_q.detach() - log_standard_normal(z.flatten(1))).mean()
