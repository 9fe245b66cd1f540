"""VarDiU's published update in the plane, from what the authors' code does: the baseline of bench/mog40.py, in plain PyTorch.

Two networks of 4 x 400 that see (x, sigma, sigma); 512 latents used twice, with +eps and -eps; std of q = softplus * sigma; Adam;
gradients clipped to norm 10. Its weights (b, 1) meet losses (b,), so that their product is a (b, b) table whose mean is the
product of the means: `weights_as_published` keeps that, and with it every sample counts alike.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pipelines.noise import EDMSchedule, annealed_power, power_t, score

SIGMA_MIN, SIGMA_MAX, PAIRS, HIDDEN = 0.1, 20.0, 512, 400
SCHEDULE = EDMSchedule(0.0, math.inf)


def network(outputs: int) -> nn.Sequential:
    sizes = [4, HIDDEN, HIDDEN, HIDDEN, HIDDEN]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, outputs))


class PublishedVarDiU:
    """decoder: the student; encoder: mean and raw std of q. teacher: x_t (b, 2, 1, 1), sigma (b,) -> E[x0 | x_t]."""

    def __init__(self, teacher: nn.Module, seed: int, weights_as_published: bool = True, lr: float = 1e-4) -> None:
        torch.manual_seed(seed)
        self.teacher, self.weights_as_published = teacher, weights_as_published
        self.encoder, self.decoder = network(4), network(2)
        self.optimizers = [torch.optim.Adam(net.parameters(), lr=lr) for net in (self.decoder, self.encoder)]

    def sample(self, z: Tensor) -> Tensor:
        """z (b, 2) -> x0 (b, 2)."""
        return self.decoder(torch.cat([z, torch.zeros_like(z)], 1))

    def step(self, progress: float) -> None:
        z = torch.randn(PAIRS, 2).repeat(2, 1)
        x0 = self.sample(z)
        power = annealed_power(progress, 0.1, 2.0, 0.8)
        sigma = power_t(torch.rand(PAIRS, 1), SIGMA_MIN, SIGMA_MAX, power).repeat(2, 1)
        eps = torch.randn(PAIRS, 2)
        x_t = x0 + sigma * torch.cat([eps, -eps])
        mean, raw_std = self.encoder(torch.cat([x_t, sigma, sigma], 1)).chunk(2, 1)
        log_q = torch.distributions.Normal(mean, softplus(raw_std) * sigma).log_prob(z).sum(1)
        with torch.no_grad():
            points, level = x_t[:, :, None, None], SCHEDULE.level(sigma[:, 0])
            score_d = score(self.teacher(points, level.t), points, level).flatten(1)
        losses, weights = log_q + (score_d * x0).sum(1), (sigma / SIGMA_MAX).square()
        loss = -(weights * losses).mean() if self.weights_as_published else -(weights[:, 0] * losses).mean()
        loss.backward()
        for net, optimizer in zip((self.decoder, self.encoder), self.optimizers, strict=True):
            nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
