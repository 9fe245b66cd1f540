"""Diff-Instruct (Luo et al. 2023), also known as VSD: a fake score learned on the student's samples.

    grad_theta = E w(t) (s_fake(x_t) - s_teacher(x_t)) . d x_t / d theta,   x_t = alpha g(z) + sigma eps

The baseline of both VarDiU and VarFlow. Two phases a step: the fake score (denoising, `fake_updates` times), the student.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.denoiser import Denoiser, OneStepGenerator
from pipelines.noise import add_noise, score, weight

from .base import (
    Draw,
    LevelSampler,
    LossTerms,
    Phase,
    denoising_loss,
    sample_level,
    score_difference_loss,
    teacher_score,
)


class DiffInstruct:
    """fake_score starts as a copy of the teacher, so that shared errors cancel in the difference of scores."""

    needs_data = False
    health = ()

    def __init__(
        self,
        student: OneStepGenerator,
        teacher: Denoiser,
        fake_score: Denoiser,
        levels: LevelSampler,
        fake_levels: LevelSampler,
        weighting: str = "sigma2",
        fake_weighting: str = "edm",
        fake_updates: int = 1,
        warmup_updates: int = 0,
    ) -> None:
        self.networks: dict[str, nn.Module] = {"student": student, "fake_score": fake_score}
        self.state: dict[str, Tensor] = {}
        self.frozen: dict[str, nn.Module] = {"teacher": teacher}
        self.student, self.teacher, self.fake_score = student, teacher, fake_score
        self.levels, self.fake_levels = levels, fake_levels
        self.weighting, self.fake_weighting = weighting, fake_weighting
        fake = Phase("fake_score", ("fake_score",), self.fake_score_loss, fake_updates)
        self.phases = (fake, Phase("student", ("student",), self.student_loss))
        self.warmup = (Phase("fake_score", ("fake_score",), self.fake_score_loss, warmup_updates),)

    def fake_score_loss(self, draw: Draw, context: None = None) -> LossTerms:
        with torch.no_grad():
            x0 = self.student(draw.z, draw.condition)
        level = sample_level(draw.u, self.fake_levels, draw.progress, self.teacher.schedule)
        x0_hat = self.fake_score(add_noise(x0, draw.eps, level), level, draw.condition)
        w = weight(self.fake_weighting, level, x0, x0_hat, self.teacher.sigma_data)
        return LossTerms(denoising_loss(x0_hat, x0, w), {})

    def student_loss(self, draw: Draw, context: None = None) -> LossTerms:
        x0 = self.student(draw.z, draw.condition)
        level = sample_level(draw.u, self.levels, draw.progress, self.teacher.schedule)
        x_t = add_noise(x0, draw.eps, level)
        x0_teacher, s_teacher = teacher_score(self.teacher, x_t, level, draw.condition)
        with torch.no_grad():
            x0_fake = self.fake_score(x_t, level, draw.condition)
            s_fake = score(x0_fake, x_t, level)
        w = weight(self.weighting, level, x0, x0_teacher, self.teacher.sigma_data)
        loss = score_difference_loss(x_t, s_fake, s_teacher, w)
        return LossTerms(loss, {"x0_gap": (x0_fake - x0_teacher).square().mean().sqrt(), "x0_std": x0.std()})
