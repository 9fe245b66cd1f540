"""A fake score: the score of the student's noised samples, learned by denoising them, beside the student that follows it.

What Diff-Instruct and SiD share: the network, its own phase and its section of the configuration. A fake score that is `shared`
reads what the teacher's own call has made at the same x_t, and costs the last part of a network (a U-Net's way up, a third of a
transformer's blocks); where it learns alone, the part before is run for it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.common.strict import PositiveInt, Strict
from pipelines.denoiser import Condition, Denoiser, FewStepGenerator
from pipelines.last_blocks import BlockInputs
from pipelines.noise import Level, Weight, add_noise, weight
from pipelines.up_half import UpDenoiser, UpInputs, WayDown

from ..config.level_range import sampler
from ..config.levels import Levels, LevelSampler, Use
from ..config.networks import Lora, NewNetwork, Optimizer
from ..data.augment import NUMBERS, augment
from .base import Asked, Draw, HealthCheck, LossTerms, Need, ObjectiveConfig, Parts, Phase, denoising_loss, generate, sample_level


class WithFakeScore:
    """Phases: the fake score, fake_updates times, then the student, by `student_loss` of a subclass.

    fake_score starts as a copy of the teacher, so that shared errors cancel in the difference of scores.
    """

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
        self.warmup: tuple[Phase, ...] = (self.fake_phase(warmup_updates),)
        self.phases: tuple[Phase, ...] = (self.fake_phase(fake_updates), Phase("student", ("student",), self.student_loss))

    def fake_phase(self, repeats: int) -> Phase:
        """The fake score alone."""
        return Phase("fake_score", ("fake_score",), self.fake_score_loss, repeats)

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

    def student_loss(self, draw: Draw, context: None = None) -> LossTerms:
        """(b,), differentiated in the student alone."""
        raise NotImplementedError

    def noised(self, draw: Draw) -> tuple[Tensor, Tensor, Level]:
        """Student samples x0 and their x_t, both (b, c, h, w) with a graph, at the student's levels."""
        x0 = generate(self.student, draw)
        level = sample_level(draw.u, self.levels, draw.progress, self.teacher.schedule)
        return x0, add_noise(x0, draw.eps, level), level

    def read_teacher(self, x_t: Tensor, level: Level, condition: Condition) -> tuple[Tensor, UpInputs | BlockInputs | None]:
        """x0 of the teacher at x_t (b, c, h, w), and the features that a shared fake score reads there."""
        if not isinstance(self.fake_score, UpDenoiser):
            return self.teacher(x_t, level, condition), None
        return self.teacher(x_t, level, condition, return_features=True)

    def fake(self, x_t: Tensor, level: Level, condition: Condition, features: UpInputs | BlockInputs | None = None) -> Tensor:
        """x0 of the fake score at x_t (b, c, h, w); features: the teacher's there, if it has been called."""
        if not isinstance(self.fake_score, UpDenoiser):
            return self.fake_score(x_t, level, condition)
        return self.fake_score(x_t, level, self.frozen["way_down"](x_t, level, condition) if features is None else features)

    def fake_loss(self, x0_hat: Tensor, x0: Tensor, level: Level) -> Tensor:
        """Its error against x0, weighted, (b,)."""
        return denoising_loss(x0_hat, x0, weight(self.fake_weighting, level, x0, x0_hat, self.teacher.sigma_data))

    def metrics(self, x0: Tensor, x0_teacher: Tensor, x0_fake: Tensor) -> dict[str, Tensor]:
        """For the log of a student's update."""
        return {"x0_gap": (x0_fake - x0_teacher).detach().square().mean().sqrt(), "x0_std": x0.detach().std()}


class FakeScore(Strict):
    optimizer: Optimizer
    # shared: LoRA on the last part of the teacher's network (not EDM's); a section: a new one, for exact teachers; None: of the
    # student's kind
    network: Literal["shared"] | NewNetwork | None = None
    lora: Lora | None = None  # an adapter on the teacher's weights; None: a copy of the teacher
    levels: Levels
    weighting: Weight = "edm"
    updates: PositiveInt = 1
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    augment: Annotated[float, Field(ge=0, le=1)] = 0.0  # of what it learns from, not of the student: as in SiD, for EDM networks


class FakeScoreConfig(ObjectiveConfig):
    """The section of an objective that has one; a subclass has `name` and `built`."""

    built = WithFakeScore
    levels: Levels
    weighting: Weight = "sigma2"
    fake_score: FakeScore

    def uses(self) -> list[Use]:
        f = self.fake_score
        return [*super().uses(), Use("objective.fake_score.levels", f.levels, {"objective.fake_score.weighting": f.weighting})]

    def needs(self) -> list[Need]:
        f, key = self.fake_score, "objective.fake_score"
        asked: dict[Asked, Any] = {"lora": f.lora, "network": None if f.network == "shared" else f.network, "augment": f.augment}
        needs = [Need(f"{key}.{what}", what, value) for what, value in asked.items()]
        return [*needs, Need(f"{key}.network", "last_part", f.network == "shared")]

    def optimizers(self) -> dict[str, Optimizer]:
        return {"fake_score": self.fake_score.optimizer}

    def own(self) -> dict[str, Any]:
        """More arguments of `built`."""
        return {}

    def build(self, parts: Parts, steps: int) -> WithFakeScore:
        f, t_range = self.fake_score, parts.teacher.schedule.t_range
        return self.built(
            parts.student,
            parts.teacher,
            parts.fake_score(f),
            sampler(self.levels, steps, t_range),
            sampler(f.levels, steps, t_range),
            self.weighting,
            f.weighting,
            f.updates,
            f.warmup_updates,
            f.augment,
            **self.own(),
        )
