"""VarDiU's per-sample losses and importance weights, on tensors alone.

x_t, score_d (b, c, h, w); K latents for each sample are (b, K, c, h, w); w (b, 1, 1, 1); log densities and weights (b, K).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipelines.noise import Level

from .base import dot


def bound_loss(x_t: Tensor, score_d: Tensor, log_q: Tensor, w: Tensor) -> Tensor:
    """-w [x_t . sg(s_d) + log q], Eq. 12. x_t, score_d (b, c, h, w); log_q (b,); w (b, 1, 1, 1) -> (b,)."""
    return -w.flatten() * (dot(x_t, score_d.detach()) + log_q)


def multi_sample_loss(x_t: Tensor, score_d: Tensor, log_v: Tensor, w: Tensor) -> Tensor:
    """w [log mean_k v_k - x_t . sg(s_d)]; log_v (b, K+1), the true latent's weight among them -> (b,)."""
    return w.flatten() * (log_v.logsumexp(1) - math.log(log_v.shape[1]) - dot(x_t, score_d.detach()))


def log_importance(x_t: Tensor, x0_k: Tensor, z_k: Tensor, log_q: Tensor, level: Level) -> Tensor:
    """log v_k = log N(x_t; alpha g(z_k), sigma^2) + log p(z_k) - log q(z_k | x_t); x0_k, z_k (b, K, c, h, w) -> (b, K)."""
    sigma = level.sigma.flatten(1)
    residual = (x_t[:, None] - level.alpha[:, None] * x0_k).flatten(2)
    log_n = log_standard_normal(residual / sigma[:, :, None]) - residual.shape[2] * sigma.log()
    return log_n + log_standard_normal(z_k.flatten(2)) - log_q


def log_standard_normal(x: Tensor) -> Tensor:
    """log N(x; 0, I) over the last axis."""
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(-1)


def effective_sample_size(log_v: Tensor) -> Tensor:
    """1 / sum of squared normalised weights, (b, K) -> (b,) in [1, K]."""
    return torch.exp(-(2 * log_v.log_softmax(1)).logsumexp(1))


def weighted_mean(log_v: Tensor, x0_k: Tensor) -> Tensor:
    """Self-normalised average: log_v (b, K), x0_k (b, K, c, h, w) -> (b, c, h, w)."""
    # not einsum, which autocast would run in half precision
    return (log_v.softmax(1)[:, :, None, None, None] * x0_k).sum(1)


def tempered(log_v: Tensor, target: float) -> Tensor:
    """tau log v with the largest tau in [0, 1] for each row at which the effective sample size is at least `target`.

    tau = 0 makes the average the posterior mean E_q[g(z)]. log_v (b, K), 1 <= target <= K -> (b, K).
    ess falls as tau grows (its logarithm is a Renyi entropy of the weights), so bisection finds tau.
    """
    low = torch.zeros_like(log_v[:, :1])
    high = torch.ones_like(low)
    for _ in range(30):
        middle = (low + high) / 2
        enough = effective_sample_size(middle * log_v)[:, None] >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(effective_sample_size(log_v)[:, None] >= target, log_v, low * log_v)


def resampling_move(log_v: Tensor, x0_k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Pick one of each row's pool in proportion to v: -> (log v of it (b,), its x0 (b, c, h, w)).

    If one member of the pool comes from the posterior p(z | x_t) and the others from the proposal q, so does, exactly and for any
    q, the one that is picked: iterated sampling importance resampling (Andrieu, Lee & Vihola 2018). u (b,) in (0, 1).
    """
    picked = (log_v.softmax(1).cumsum(1) < u[:, None]).sum(1).clamp(max=log_v.shape[1] - 1)
    rows = torch.arange(len(log_v), device=log_v.device)
    return log_v[rows, picked], x0_k[rows, picked]
