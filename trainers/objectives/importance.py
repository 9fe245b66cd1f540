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


def jackknife_weights(log_v: Tensor) -> Tensor:
    """Weights of the jackknifed self-normalised average, (b, K) -> (b, K); they sum to 1 and may be negative.

    sum_k v_k g_k / sum_k v_k is off by order 1/K. With m_-k the average without sample k, K m - (K-1)/K sum_k m_-k is off by
    order 1/K^2 (Quenouille 1956), at no further network call. Every m_-k is a convex average, so nothing can blow up.
    """
    k = log_v.shape[1]
    alone = torch.eye(k, dtype=torch.bool, device=log_v.device)
    without = log_v[:, None, :].masked_fill(alone, -torch.inf).softmax(2)  # row k: the weights that leave k out
    return k * log_v.softmax(1) - (k - 1) / k * without.sum(1)
