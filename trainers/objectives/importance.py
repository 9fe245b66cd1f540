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


def calibrated_mean(x0_mean: Tensor, x0_hat: Tensor, calibration: Tensor, level: Level, sigma_data: float) -> Tensor:
    """E[g(z) | x_t] ~ D + (1 + gate) (m - D) + c_out residual, (b, c, h, w); gradients reach `calibration` only.

    m (b, c, h, w) is the self-normalised average over K proposals: biased where few of them carry the weight. D is the teacher's
    x0_hat. calibration (b, 2 c, h, w) = (gate, residual) from the posterior's network, fitted by regressing g(z_0) on x_t, whose
    regression function is E[g(z) | x_t] itself: so it learns the bias of m, and how far to trust m at all. m does not depend on
    z_0 given x_t, which is what makes the regression fair. At 0 this is m. c_out is EDM's output scale for the level.
    """
    gate, residual = calibration.chunk(2, dim=1)
    ratio = level.sigma / level.alpha
    c_out = ratio * sigma_data * (ratio.square() + sigma_data**2).rsqrt()
    return x0_hat + (1 + gate) * (x0_mean - x0_hat) + c_out * residual
