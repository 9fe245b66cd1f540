"""Diff-Instruct (Luo et al. 2023), also known as VSD: a fake score learned on the student's samples.

    grad_theta = E w(t) (s_fake(x_t) - s_teacher(x_t)) . d x_t / d theta,   x_t = alpha g(z) + sigma eps

The baseline of both VarDiU and VarFlow. Two phases a step: the fake score (denoising, `fake_updates` times), the student. With
`joint` they learn from the same noised samples in one phase (after fake_updates - 1 of the fake score alone), which takes one
call of the student and one of the fake score less. A fake score that is `shared` reads what the teacher's own call has made at
the same x_t, and costs a network's way up; where it learns alone, the teacher's way down is run for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipelines.common.strict import PositiveInt, Strict
from pipelines.denoiser import Condition, Denoiser, FewStepGenerator
from pipelines.noise import Level, Weight, add_noise, score, weight
from pipelines.up_half import UpDenoiser, UpInputs, WayDown

from ..config.level_range import sampler
from ..config.levels import Levels, LevelSampler, Use
from ..config.networks import Lora, NewNetwork, Optimizer
from ..data.augment import NUMBERS, augment
from .base import (
    Asked,
    Draw,
    HealthCheck,
    LossTerms,
    Need,
    ObjectiveConfig,
    Parts,
    Phase,
    denoising_loss,
    generate,
    sample_level,
    score_difference_loss,
    teacher_score,
)


class DiffInstruct:
    """fake_score starts as a copy of the teacher, so that shared errors cancel in the difference of scores."""

    needs_data = False
    health: tuple[HealthCheck, ...] = ()

    def __init__(
        self,
        student: FewStepGenerator,
        teacher: Denoiser,
        fake_score: Denoiser | UpDenoiser,
        levels: LevelSampler,
        fake_levels: LevelSampler,
        weighting: Weight = "sigma2",
        fake_weighting: Weight = "edm",
        fake_updates: int = 1,
        warmup_updates: int = 0,
        joint: bool = False,
        fake_augment: float = 0.0,
    ) -> None:
        self.networks: dict[str, nn.Module] = {"student": student, "fake_score": fake_score}
        self.state: dict[str, Tensor] = {}
        self.frozen: dict[str, nn.Module] = {"teacher": teacher}
        if isinstance(fake_score, UpDenoiser):
            self.frozen["way_down"] = WayDown(teacher)
        self.student, self.teacher, self.fake_score = student, teacher, fake_score
        self.levels, self.fake_levels = levels, fake_levels
        self.weighting, self.fake_weighting, self.fake_augment = weighting, fake_weighting, fake_augment
        fake = Phase("fake_score", ("fake_score",), self.fake_score_loss, fake_updates - joint)
        both = Phase("joint", ("student", "fake_score"), self.joint_loss)
        last = both if joint else Phase("student", ("student",), self.student_loss)
        self.phases: tuple[Phase, ...] = (fake, last) if fake.repeats else (last,)
        self.warmup: tuple[Phase, ...] = (Phase("fake_score", ("fake_score",), self.fake_score_loss, warmup_updates),)

    def fake_score_loss(self, draw: Draw, context: None = None) -> LossTerms:
        """Denoising of the student's samples, (b,), at levels of its own."""
        with torch.no_grad():
            x0 = generate(self.student, draw)
        condition = draw.condition
        if self.fake_augment:
            x0, labels = augment(x0, draw.normal("augment", NUMBERS), self.fake_augment)
            condition = (condition or {}) | {"augment_labels": labels}
        level = sample_level(draw.u, self.fake_levels, draw.progress, self.teacher.schedule)
        x0_hat = self.fake(add_noise(x0, draw.eps, level), level, condition)
        return LossTerms(self.fake_loss(x0_hat, x0, level), {})

    def fake(self, x_t: Tensor, level: Level, condition: Condition, features: UpInputs | None = None) -> Tensor:
        """x0 of the fake score at x_t (b, c, h, w); features: the teacher's there, if it has been called."""
        if not isinstance(self.fake_score, UpDenoiser):
            return self.fake_score(x_t, level, condition)
        return self.fake_score(x_t, level, self.frozen["way_down"](x_t, level, condition) if features is None else features)

    @torch.no_grad()
    def read_teacher(self, x_t: Tensor, level: Level, condition: Condition) -> tuple[Tensor | None, UpInputs | None]:
        """Its x0 and features, of a fake score that needs them before; else nothing yet."""
        if not isinstance(self.fake_score, UpDenoiser):
            return None, None
        return self.teacher(x_t, level, condition, return_features=True)

    def fake_loss(self, x0_hat: Tensor, x0: Tensor, level: Level) -> Tensor:
        """Its error against x0, weighted, (b,)."""
        return denoising_loss(x0_hat, x0, weight(self.fake_weighting, level, x0, x0_hat, self.teacher.sigma_data))

    def joint_loss(self, draw: Draw, context: None = None) -> Iterator[LossTerms]:
        """Both at the student's levels; the student follows the fake score as it was before this update."""
        x0 = generate(self.student, draw)
        level = sample_level(draw.u, self.levels, draw.progress, self.teacher.schedule)
        x_t = add_noise(x0, draw.eps, level)
        x0_teacher, features = self.read_teacher(x_t.detach(), level, draw.condition)
        x0_fake = self.fake(x_t.detach(), level, draw.condition, features)
        yield LossTerms(self.fake_loss(x0_fake, x0.detach(), level), {})
        yield self.follow(draw, x0, x_t, level, x0_fake.detach(), x0_teacher)

    def student_loss(self, draw: Draw, context: None = None) -> LossTerms:
        """The student follows the difference of the scores, (b,)."""
        x0 = generate(self.student, draw)
        level = sample_level(draw.u, self.levels, draw.progress, self.teacher.schedule)
        x_t = add_noise(x0, draw.eps, level)
        x0_teacher, features = self.read_teacher(x_t.detach(), level, draw.condition)
        with torch.no_grad():
            x0_fake = self.fake(x_t, level, draw.condition, features)
        return self.follow(draw, x0, x_t, level, x0_fake, x0_teacher)

    def follow(self, draw: Draw, x0: Tensor, x_t: Tensor, level: Level, x0_fake: Tensor, x0_teacher: Tensor | None) -> LossTerms:
        """A loss whose gradient is w (s_fake - s_teacher) at x_t, which has a graph, (b,). x0_teacher: if it has been called."""
        if x0_teacher is None:
            x0_teacher, s_teacher = teacher_score(self.teacher, x_t, level, draw.condition)
        else:
            s_teacher = score(x0_teacher, x_t.detach(), level)
        s_fake = score(x0_fake, x_t.detach(), level)
        w = weight(self.weighting, level, x0, x0_teacher, self.teacher.sigma_data)
        loss = score_difference_loss(x_t, s_fake, s_teacher, w)
        return LossTerms(loss, {"x0_gap": (x0_fake - x0_teacher).square().mean().sqrt(), "x0_std": x0.detach().std()})


class FakeScore(Strict):
    optimizer: Optimizer
    # shared: LoRA on the way up of the teacher's U-Net (Stable Diffusion); a section: a new one, for exact teachers; None: of the
    # student's kind
    network: Literal["shared"] | NewNetwork | None = None
    lora: Lora | None = None  # an adapter on the teacher's weights; None: a copy of the teacher
    levels: Levels
    weighting: Weight = "edm"
    updates: PositiveInt = 1
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    augment: Annotated[float, Field(ge=0, le=1)] = 0.0  # of what it learns from, not of the student: as in SiD, for EDM networks


class Config(ObjectiveConfig):
    built = DiffInstruct
    name: Literal["diff_instruct"]
    levels: Levels
    weighting: Weight = "sigma2"
    joint: bool = False  # one update of both networks on the same student samples, instead of two updates on two batches
    fake_score: FakeScore

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
        own, fake = {"objective.weighting": self.weighting}, {"objective.fake_score.weighting": self.fake_score.weighting}
        return [
            Use("objective.levels", self.levels, own | (fake if self.joint else {})),
            Use("objective.fake_score.levels", self.fake_score.levels, fake),
        ]

    def needs(self) -> list[Need]:
        f, key = self.fake_score, "objective.fake_score"
        asked: dict[Asked, Any] = {"lora": f.lora, "network": None if f.network == "shared" else f.network, "augment": f.augment}
        needs = [Need(f"{key}.{what}", what, value) for what, value in asked.items()]
        return [*needs, Need(f"{key}.network", "way_up", f.network == "shared")]

    def optimizers(self) -> dict[str, Optimizer]:
        return {"fake_score": self.fake_score.optimizer}

    def build(self, parts: Parts, steps: int) -> DiffInstruct:
        f, t_range = self.fake_score, parts.teacher.schedule.t_range
        return DiffInstruct(
            parts.student,
            parts.teacher,
            parts.fake_score(f),
            sampler(self.levels, steps, t_range),
            sampler(f.levels, steps, t_range),
            self.weighting,
            f.weighting,
            f.updates,
            f.warmup_updates,
            self.joint,
            f.augment,
        )
