"""Diff-Instruct (Luo et al. 2023), also known as VSD: a fake score learned on the student's samples.

    grad_theta = E w(t) (s_fake(x_t) - s_teacher(x_t)) . d x_t / d theta,   x_t = alpha g(z) + sigma eps

The baseline of both VarDiU and VarFlow. Two phases a step: the fake score (denoising, `fake_updates` times), the student. With
`joint` they learn from the same noised samples in one phase (after fake_updates - 1 of the fake score alone), which takes one
call of the student and one of the fake score less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from pipelines.noise import Level, score, weight

from ..config.levels import Use
from .base import Draw, LossTerms, Phase, score_difference_loss
from .fake_score import FakeScoreConfig, WithFakeScore


class DiffInstruct(WithFakeScore):
    def __init__(self, *args: Any, joint: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        if joint:
            alone = self.fake_phase(self.phases[0].repeats - 1)
            both = Phase("joint", ("student", "fake_score"), self.joint_loss)
            self.phases = (alone, both) if alone.repeats else (both,)

    def joint_loss(self, draw: Draw, context: None = None) -> Iterator[LossTerms]:
        """Both at the student's levels; the student follows the fake score as it was before this update."""
        x0, x_t, level = self.noised(draw)
        with torch.no_grad():
            x0_teacher, features = self.read_teacher(x_t, level, draw.condition)
        x0_fake = self.fake(x_t.detach(), level, draw.condition, features)
        yield LossTerms(self.fake_loss(x0_fake, x0.detach(), level), {})
        yield self.follow(x0, x_t, level, x0_fake.detach(), x0_teacher)

    def student_loss(self, draw: Draw, context: None = None) -> LossTerms:
        """The student follows the difference of the scores, (b,)."""
        x0, x_t, level = self.noised(draw)
        with torch.no_grad():
            x0_teacher, features = self.read_teacher(x_t, level, draw.condition)
            x0_fake = self.fake(x_t, level, draw.condition, features)
        return self.follow(x0, x_t, level, x0_fake, x0_teacher)

    def follow(self, x0: Tensor, x_t: Tensor, level: Level, x0_fake: Tensor, x0_teacher: Tensor) -> LossTerms:
        """A loss whose gradient is w (s_fake - s_teacher) at x_t, which has a graph, (b,)."""
        s_fake, s_teacher = (score(x0_hat, x_t.detach(), level) for x0_hat in (x0_fake, x0_teacher))
        w = weight(self.weighting, level, x0, x0_teacher, self.teacher.sigma_data)
        return LossTerms(score_difference_loss(x_t, s_fake, s_teacher, w), self.metrics(x0, x0_teacher, x0_fake))


class Config(FakeScoreConfig):
    built = DiffInstruct
    name: Literal["diff_instruct"]
    joint: bool = False  # one update of both networks on the same student samples, instead of two updates on two batches

    @model_validator(mode="after")
    def _augmentation_fits(self):
        if self.joint and self.fake_score.augment:
            raise ValueError("fake_score.augment and joint exclude each other: in a joint update both see the same samples")
        alone = not self.joint or self.fake_score.updates > 1 or self.fake_score.warmup_updates
        if not alone and self.fake_score.levels != self.levels:
            raise ValueError(
                "fake_score.levels have no effect: every update is joint, at the objective's levels; give it the same, or set "
                "joint=false, fake_score.updates above 1 or fake_score.warmup_updates"
            )
        return self

    def uses(self) -> list[Use]:
        own, fake = super().uses()
        return [own._replace(weightings={**own.weightings, **fake.weightings}) if self.joint else own, fake]

    def own(self) -> dict[str, Any]:
        return {"joint": self.joint}
