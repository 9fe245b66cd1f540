"""What an objective is to the training loop, and the pure per-sample losses that several objectives share.

b samples in a micro-batch; images (b, c, h, w); every loss is per sample, (b,); the loop takes the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pipelines.common.strict import Strict
from pipelines.denoiser import Condition, Denoiser, FeatureMaps, FewStepGenerator, Start
from pipelines.noise import Level, Schedule, Weight
from pipelines.up_half import UpDenoiser

from ..config.levels import Levels, LevelSampler, Use
from ..config.networks import Optimizer


class Draw(Protocol):
    """Everything random in one micro-batch, a function of (seed, step, phase) alone."""

    z: Tensor  # (b, c, h, w) ~ N(0, I), the student's input
    eps: Tensor  # (b, c, h, w) ~ N(0, I), the noise of the forward process
    u: Tensor  # (b,) ~ U(0, 1), turned into noise levels by the objective's sampler
    shared_u: Tensor  # () ~ U(0, 1), the same for every sample of the whole batch
    x0: Tensor | None  # (b, c, h, w) data, for objectives with needs_data
    condition: Condition
    progress: float  # share of the run that is done, in [0, 1]
    first_row: int  # where this process's rows begin in the whole batch

    @property
    def step_u(self) -> Tensor:
        """(b,) ~ U(0, 1): which of its steps a student of several makes."""

    @property
    def shared_step_u(self) -> Tensor:
        """() ~ U(0, 1), the same for the whole batch."""

    def further_data(self, k: int) -> tuple[Tensor, Condition]:
        """The k-th further x0 of each row (b, c, h, w) with a condition of its own, k >= 1; for objectives with needs_data."""
        raise NotImplementedError

    def normal(self, name: str, *shape: int) -> Tensor:
        """More standard normal numbers, (b, *shape), independent for each name. Ask once: a second time they are drawn anew."""


class LossTerms(NamedTuple):
    """A loss for each row and what is logged beside it."""

    loss: Tensor  # (b,)
    metrics: dict[str, Tensor]  # scalars for the log


@dataclass(frozen=True)
class Phase:
    """One kind of update: `loss(draw, context)` is differentiated in the networks named by `updates`, then they step.

    A loss that comes in parts yields them one by one: each is differentiated, and its graph freed, before the next is asked for.
    `prepare(draws, gather)`, where given, sees all micro-batches of the update before any graph is built and returns a
    context for each; `gather` concatenates a tensor over processes. It runs only when there is more than one micro-batch.
    `observe(metrics)`, where given, gets the update's metrics, averaged over micro-batches and processes.
    """

    name: str
    updates: tuple[str, ...]
    loss: Callable[[Draw, Any], LossTerms | Iterator[LossTerms]]
    repeats: int = 1
    prepare: Callable[[Sequence[Draw], Callable[[Tensor], Tensor]], list[Any]] | None = None
    observe: Callable[[dict[str, float]], None] | None = None


class Objective(Protocol):
    """What the loop is given: networks, phases and what a checkpoint must keep."""

    networks: dict[str, nn.Module]  # everything that is trained, by role
    frozen: dict[str, nn.Module]  # everything that is only called, by role
    warmup: tuple[Phase, ...]  # run once before the first step
    phases: tuple[Phase, ...]  # run in order at every step
    needs_data: bool
    health: tuple[HealthCheck, ...]  # metrics that say when a run has gone wrong

    @property
    def state(self) -> dict[str, Tensor]:
        """By name, what else a checkpoint must keep."""


Asked = Literal["lora", "network", "last_part", "augment", "posterior", "condition_vector", "features_of", "batch_proposals"]


class Need(NamedTuple):
    """What a configuration asks of the teacher's family, by its key; a value of None, False or 0 asks for nothing.

    lora, network, last_part: a second score network as an adapter on the teacher's weights, as a new one of that section, or as
    an adapter on the last part of the teacher's (a U-Net's way up, a third of a transformer's blocks); augment: one that can be
    told of augmentations; posterior: a posterior's network; condition_vector: conditions that say something; features_of: maps of
    another trained network, at a path; batch_proposals: batches with several samples of each condition.
    """

    key: str
    what: Asked
    value: Any


class Parts(Protocol):
    """What the family of the teacher gives an objective to be built from. latent_shape: (c, h, w) of z and x0; teacher: where the
    objective follows its score.
    """

    student: FewStepGenerator
    teacher: Denoiser
    latent_shape: tuple[int, int, int]
    num_classes: int  # of a class-conditional teacher, else 0

    def fake_score(self, section: Any) -> Denoiser | UpDenoiser:
        """A score network that starts as the teacher; section: its `lora`, `network` and `augment`."""
        raise NotImplementedError

    def features(self) -> FeatureMaps:
        """Maps of the teacher's frozen network at its lowest resolution, and, where it has them, the next."""
        raise NotImplementedError

    def features_of(self, path: str) -> FeatureMaps:
        """The same of another trained network."""
        raise NotImplementedError

    def posterior(self, section: Any, with_mean: bool) -> nn.Module:
        """A posterior (posteriors.UNetPosterior) by its section; it starts as the prior, its mean, where it has one, as the
        teacher if it is made from its weights.
        """
        raise NotImplementedError


class LeastBatch(NamedTuple):
    """The smallest batch that a loss is defined for, and why."""

    size: int
    reason: str


class ObjectiveConfig(Strict):
    """The section `objective` of one kind: its keys, what it needs, how it is built. Subclasses have a `name` and `levels`.

    built: the class of what `build` makes, which says by `needs_data` whether draws must come with data. follows_score: whether
    the teacher's score is read, so that guidance has an effect.
    """

    built: ClassVar[type[Objective]]
    follows_score: ClassVar[bool] = True
    if TYPE_CHECKING:  # keys of every subclass, each where it stands there
        name: str
        levels: Levels
        weighting: Weight

    @property
    def least_batch(self) -> LeastBatch:
        """What the loss is defined for."""
        return LeastBatch(1, "")

    def uses(self) -> list[Use]:
        """All levels that are drawn, and the weightings that are computed at them."""
        return [Use("objective.levels", self.levels, {"objective.weighting": self.weighting})]

    def needs(self) -> list[Need]:
        """What it asks of the teacher's family."""
        return []

    def few_steps_refusal(self) -> str | None:
        """Why it cannot teach a student of several steps, or None."""
        return None

    def optimizers(self) -> dict[str, Optimizer]:
        """Of the networks other than the student, by role."""
        return {}

    def build(self, parts: Parts, steps: int) -> Objective:
        """For a run of so many steps."""
        raise NotImplementedError


@dataclass(frozen=True)
class HealthCheck:
    """Warn when the logged mean of `metric` is below `minimum`. needed: also before it has been above; False: where the student
    learns well without it, so that only its loss tells something.
    """

    metric: str
    minimum: float
    message: str
    needed: bool = True


def sample_level(u: Tensor, sampler: LevelSampler, progress: float, schedule: Schedule) -> Level:
    """Levels for uniform numbers u (b,), each moved to the nearest that the network knows."""
    return schedule.level(schedule.nearest(sampler(u, progress)))


def data_of(draw: Draw) -> Tensor:
    """x0 (b, c, h, w) of a draw; ValueError where it comes without data."""
    if draw.x0 is None:
        raise ValueError("this objective needs data, and the draw has none: needs_data was not heeded")
    return draw.x0


def generate(student: nn.Module, draw: Draw) -> Tensor:
    """x0 (b, c, h, w) of one step of the student for each row, of a student of several steps one drawn uniformly.

    Any function of z and condition is a student of one step.
    """
    start = start_of(student, draw)
    return student(draw.z, draw.condition) if start is None else student(draw.z, draw.condition, start)


def start_of(student: nn.Module, draw: Draw, shared: bool = False) -> Start | None:
    """Where a step of each row begins, or with `shared` the same step of all rows of the whole batch; None of a student of one.

    Simulated: with its own x0 of the step before, made from noise by all earlier steps, without a graph (backward simulation, Yin
    et al. 2024, DMD2, section 4.4), so that it learns from what it will see. Else with the data of the draw.
    """
    if not isinstance(student, FewStepGenerator) or student.steps == 1:
        return None
    u = draw.shared_step_u.expand(len(draw.z)) if shared else draw.step_u
    step = (u * student.steps).long().clamp_max(student.steps - 1)  # u may be rounded to 1
    if student.inputs == "data":
        return Start(data_of(draw), step)
    x0 = torch.zeros_like(draw.z)
    for k in range(student.steps - 1):
        rows = (step > k).nonzero()[:, 0]
        noise = draw.normal(f"step_{k}", *draw.z.shape[1:])
        called = rows
        if not len(rows):
            if not student.denoiser.collective:
                break
            called = rows.new_zeros(1)  # another process may have rows, and all gather the weights together
        with torch.no_grad():
            condition = None if draw.condition is None else {name: value[called] for name, value in draw.condition.items()}
            made = student(noise[called], condition, Start(x0[called], torch.full_like(called, k)), between=True)
        if len(rows):
            x0[rows] = made.to(x0.dtype)
    return Start(x0, step)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample's images: (b, ...) x (b, ...) -> (b,)."""
    return (a * b).flatten(1).sum(1)


def score_difference_loss(x_t: Tensor, score_student: Tensor, score_teacher: Tensor, w: Tensor) -> Tensor:
    """A loss whose gradient is w (s_student - s_teacher) . d x_t/d theta: Diff-Instruct's, VSD's (VarFlow paper Eq. 6).

    x_t (b, c, h, w) with a graph; both scores are constants; w (b, 1, 1, 1). Its value is not the KL.
    """
    return dot(w * (score_student - score_teacher).detach(), x_t)


def denoising_loss(x0_hat: Tensor, x0: Tensor, w: Tensor) -> Tensor:
    """Denoising score matching in x0: w mean((x0_hat - x0)^2) for each sample (Karras et al. 2022, Eq. 8)."""
    return (w * (x0_hat - x0).square()).flatten(1).mean(1)
