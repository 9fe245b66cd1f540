"""VarDiU's amortised score: what resampling estimates for one x_t, the posterior's U-Net learns for all of them.

    grad_theta = E w(t) (s_theta - s_d) . d x_t / d theta,    s_theta = (alpha m_phi(x_t) - x_t) / sigma^2
    m_phi: another map of the posterior's network, min_phi E lambda(sigma) |m_phi(x_t) - sum_j v_j g(z_j) / sum_j v_j|^2

The pool {z_j} holds z_0, which made x_t, and others: with num_samples = 0 the other latents of the batch, which are draws of the
prior, v_j = N(x_t; alpha g(z_j), sigma^2), at the cost of no network call; with K > 0 proposals of q, v_j as in resampled.py. z_0
is a draw of p(z | x_t), so picking from the pool in proportion to v is again one (importance.resampling_move), and the target is
*exactly* unbiased for E[g(z) | x_t] whatever the pool: a Rao-Blackwellised g(z_0), of lower variance where more than z_0 counts.
z_0 may stay in, as a regression on x_t cannot follow it. With a pool of z_0 alone (pool="own") this is Diff-Instruct's fake
score; that is what is left in thousands of dimensions, and it saves the calls that several micro-batches make for a common pool.

Posterior (bound and regression) and student learn jointly on one batch. Each student sample is noised `noise_draws` times, at
stratified levels: posterior and student both learn from the first noised copy, the student alone from the others. Cost in calls
of a network: a student sample three (one forward, and backward for twice that); its first copy one, of the teacher, and a
training step of the posterior's decoder; each further copy little more than one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.denoiser import Condition
from pipelines.noise import Level, Weight, add_noise, weight

from .base import Draw, LossTerms, Phase, denoising_loss, dot, generate, sample_level
from .bound import Noised, VarDiU
from .importance import effective_sample_size, log_importance, weighted_mean

COMPARED_AT_ONCE = 2**22  # numbers, of conditions
NO_SIGNAL = 1e-10  # an alpha at which the weights of a pool differ by less than rounding


class Pool(NamedTuple):
    """All student samples of the whole batch (B, c, h, w) and their conditions."""

    x0: Tensor
    condition: Condition


class AmortizedScore(VarDiU):
    """See the module."""

    def __init__(
        self,
        *args: Any,
        regression_weight: float = 80.0,
        regression_weighting: Weight = "edm",
        noise_draws: int = 2,
        pool: str = "batch",
        **options: Any,
    ) -> None:
        self.regression_weight, self.regression_weighting = regression_weight, regression_weighting
        self.noise_draws, self.pool = noise_draws, pool
        super().__init__(*args, antithetic=False, **options)
        # Without proposals the student never reads q, and the regression leaves little of a short run to it: many a good student
        # comes before q knows anything of z.
        self.health = tuple(dataclasses.replace(check, needed=bool(self.num_samples)) for check in self.health)

    def posterior_phase(self, repeats: int) -> Phase:
        return self.with_pool(super().posterior_phase(repeats))

    def joint_phase(self) -> Phase:
        return self.with_pool(super().joint_phase())

    def with_pool(self, phase: Phase) -> Phase:
        return dataclasses.replace(phase, prepare=self.prepare if self.pool == "batch" and not self.num_samples else None)

    def prepare(self, draws: Sequence[Draw], gather: Callable[[Tensor], Tensor]) -> list[Pool]:
        """The pool is the whole batch, however many processes and micro-batches it is spread over."""
        with torch.no_grad():
            x0 = gather(torch.cat([generate(self.student, d) for d in draws]))
        keys = draws[0].condition or {}
        condition = {k: gather(torch.cat([(d.condition or {})[k] for d in draws])) for k in keys} or None
        return [Pool(x0, condition)] * len(draws)

    def posterior_loss(self, draw: Draw, context: Pool | None = None) -> Iterator[LossTerms]:
        """One noised copy of each sample."""
        with torch.no_grad():
            x0 = generate(self.student, draw)
        for _, terms, _ in self.learn_from_first_copy(draw, x0, context):
            yield terms

    def joint_loss(self, draw: Draw, context: Pool | None = None) -> Iterator[LossTerms]:
        """phi on the first noised copy of each sample, theta on all of them: in parts, each (b,)."""
        x0 = generate(self.student, draw)
        direction = torch.zeros_like(x0)  # d loss / d x0
        for rows, terms, gradient in self.learn_from_first_copy(draw, x0.detach(), context):
            direction[rows] = gradient / self.noise_draws
            yield terms
        for copy in range(1, self.noise_draws):
            n = self.noised_copy(draw, x0.detach(), copy, slice(None))
            with torch.no_grad():
                x0_hat, features = self.read_teacher(n.x_t, n.level, n.condition)
                x0_mean = self.posterior(n.x_t, n.level, n.condition, features).x0_mean
            direction += self.student_gradient(n, x0_mean, x0_hat) / self.noise_draws
        yield LossTerms(dot(direction, x0), {"x0_std": x0.detach().std()})

    def student_gradient(self, n: Noised, x0_mean: Tensor, x0_hat: Tensor) -> Tensor:
        """w (s_theta - s_d) . d x_t / d x0, (b, c, h, w)."""
        w = weight(self.weighting, n.level, n.x0, x0_hat, self.teacher.sigma_data)
        return w * (n.level.alpha / n.level.sigma).square() * (x0_mean - x0_hat)

    def noised_copy(self, draw: Draw, x0: Tensor, copy: int, rows: slice) -> Noised:
        """The rows of the batch at levels of their own for each copy."""
        u = (draw.u + copy / self.noise_draws) % 1.0
        level = sample_level(u.clamp_min(torch.finfo(u.dtype).tiny)[rows], self.levels, draw.progress, self.teacher.schedule)
        x0, eps = x0[rows], (draw.normal(f"eps_{copy}", *x0.shape[1:]) if copy else draw.eps)[rows]
        condition = None if draw.condition is None else {k: v[rows] for k, v in draw.condition.items()}
        return Noised(draw.z[rows], x0, eps, add_noise(x0, eps, level), level, condition)

    def learn_from_first_copy(self, draw: Draw, x0: Tensor, pool: Pool | None) -> Iterator[tuple[slice, LossTerms, Tensor]]:
        """Half after half of the batch: (its rows, the loss of phi, the student's gradient at these rows).

        pool: the whole batch, where this is one micro-batch of several.
        """
        pool, k = pool or Pool(x0, draw.condition), self.num_samples
        noise = draw.normal("proposals_0", k, *x0.shape[1:]) if k else None
        for rows in halves(len(x0)):
            n = self.noised_copy(draw, x0, 0, rows)
            loss, metrics, gradient = self.learn_posterior(n, None if noise is None else noise[rows], pool)
            yield rows, share_of(LossTerms(loss, metrics), len(loss) / len(x0)), gradient

    def learn_posterior(self, n: Noised, noise: Tensor | None, pool: Pool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss of phi (b,), metrics, the student's gradient (b, c, h, w)) at one noised copy of x0; noise (b, K, c, h, w) of its
        proposals, if there are any.
        """
        with torch.no_grad():
            x0_hat, features = self.read_teacher(n.x_t, n.level, n.condition)
        q = self.posterior(n.x_t, n.level, n.condition, features, z=n.z[:, None], noise=noise)
        with torch.no_grad():
            if self.pool == "own" and noise is None:
                target, ess = n.x0, n.x0.new_ones(len(n.x0))
            elif noise is None:
                target, ess = batch_mean(n.x_t, n.level, n.condition, pool)
            else:
                x0_k = torch.cat([n.x0[:, None], self.students(q.z, n.condition)], 1)
                z_k, log_q = torch.cat([n.z[:, None], q.z], 1), torch.cat([q.log_q, q.log_q_z], 1)
                log_v = log_importance(n.x_t, x0_k, z_k, log_q, n.level)
                target, ess = weighted_mean(log_v, x0_k), effective_sample_size(log_v)
        w = weight(self.regression_weighting, n.level, n.x0, x0_hat, self.teacher.sigma_data)
        error = denoising_loss(q.x0_mean, target, w)
        # a sum over coordinates, as log q is
        loss = self.regression_weight * n.x0[0].numel() * error - q.log_q[:, 0]
        gradient = self.student_gradient(n, q.x0_mean.detach(), x0_hat)
        metrics = {"information": self.information(q.log_q[:, 0], n.z), "regression_error": error.detach().mean()}
        if self.pool == "batch" or self.num_samples:
            metrics |= self.statistics.metrics(n.level.t, ess)
        return loss, metrics, gradient


def halves(b: int) -> list[slice]:
    """Two halves of a batch: beside the student's activations of the whole batch, memory holds the posterior's of only half."""
    middle = (b + 1) // 2
    return [slice(0, middle), slice(middle, b)] if b > 1 else [slice(0, b)]


def share_of(terms: LossTerms, share: float) -> LossTerms:
    """Terms of some rows as a share of the batch's."""
    return LossTerms(terms.loss * share, {name: value * share for name, value in terms.metrics.items()})


def flat(value: Tensor) -> Tensor:
    """(b, ...) -> (b, n), also for (b,)."""
    return value.reshape(len(value), -1)


def batch_mean(x_t: Tensor, level: Level, condition: Condition, pool: Pool) -> tuple[Tensor, Tensor]:
    """E[g(z) | x_t] over the pool's samples of x_t's condition: x_t (b, c, h, w) -> the same, effective sample size (b,)."""
    # differences are squared one by one: the expanded square would lose, at low noise, the digits that weights are made of.
    # At alpha = 0, and where x_t / alpha could overflow, x_t says nothing of x0 and all weights are equal.
    scale = torch.where(level.alpha > NO_SIGNAL, level.alpha, 1.0)
    distance = torch.cdist(flat(x_t / scale), flat(pool.x0), compute_mode="donot_use_mm_for_euclid_dist")  # (b, B)
    log_v = -0.5 * (distance * (level.alpha / level.sigma).flatten(1)).square()
    for key, value in (condition or {}).items():
        log_v = log_v.masked_fill(~same_rows(flat(value), flat((pool.condition or {})[key])), -torch.inf)
    with torch.autocast(x_t.device.type, enabled=False):
        mean = (log_v.softmax(1) @ flat(pool.x0)).view_as(x_t)
    return mean, effective_sample_size(log_v)


def same_rows(a: Tensor, b: Tensor) -> Tensor:
    """Which rows are equal: a (n, d), b (m, d) -> (n, m) bool. Some of b's rows at a time: an encoded prompt has d = 60,000."""
    some = max(1, COMPARED_AT_ONCE // a.numel())
    return torch.cat([(a[:, None] == rows).all(2) for rows in b.split(some)], 1)
