"""Denoising score matching: how a teacher is trained (Karras et al. 2022, Eq. 8, weights of Table 1)."""

from __future__ import annotations

from torch import Tensor, nn

from pipelines.denoiser import Denoiser
from pipelines.noise import Weight, add_noise, weight

from .base import Draw, HealthCheck, LevelSampler, LossTerms, Phase, data_of, denoising_loss, sample_level


class Denoising:
    """min E w(sigma) |D(x0 + sigma eps; sigma) - x0|^2 over data x0."""

    needs_data = True
    warmup: tuple[Phase, ...] = ()
    health: tuple[HealthCheck, ...] = ()

    def __init__(self, teacher: Denoiser, levels: LevelSampler, weighting: Weight = "edm") -> None:
        self.networks: dict[str, nn.Module] = {"teacher": teacher}
        self.state: dict[str, Tensor] = {}
        self.frozen: dict[str, nn.Module] = {}
        self.teacher, self.levels, self.weighting = teacher, levels, weighting
        self.phases: tuple[Phase, ...] = (Phase("teacher", ("teacher",), self.loss),)

    def loss(self, draw: Draw, context: None = None) -> LossTerms:
        """w |D(x0 + n) - x0|^2 of each row of data, (b,)."""
        level = sample_level(draw.u, self.levels, draw.progress, self.teacher.schedule)
        x0 = data_of(draw)
        x0_hat = self.teacher(add_noise(x0, draw.eps, level), level, draw.condition)
        w = weight(self.weighting, level, x0, x0_hat, self.teacher.sigma_data)
        return LossTerms(denoising_loss(x0_hat, x0, w), {})
