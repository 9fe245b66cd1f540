"""VarFlow: the energy distance between noised student and data samples; no score at all (VarFlow paper, Eqs. 9, 10).

    L_t = w(t) [ mean_ij |xS_i - xT_j|^beta - 1/2 mean_{i != j} |xS_i - xS_j|^beta ],    beta in (0, 2)

Student sample i and data sample i share their condition. The cross term is then over pairs i, i+1 (paired) or all i != j (full):
an expectation over independent draws is what Eq. 9 says. The condition can be part of the sample (`condition_scale` > 0: joint
matching, of images *and* what was asked for) or not (marginal matching, as in the paper: prompts may then be ignored).

With m = `samples_per_condition` > 1 nothing is compared across conditions: m student samples are drawn for each condition and
matched with its own data sample i, in the mean over data the energy distance of the two laws *of that condition* (energy score),

    1/m sum_k |xS_ik - xT_i|^beta - 1/2 mean_{k != l} |xS_ik - xS_il|^beta

In many dimensions the distance is blind to detail: all samples are about equally far from one another, and what remains is their
mean and their overall spread. `grids` adds the distances of the blocks of n x n grids, each an energy distance of marginals, so
still >= 0 and 0 for equal laws:

    L = mean_n 1/n sum_{n^2 blocks} L_block          (the gradient in a pixel is then of one size on all grids; [1]: the paper's)

and `features` those of a frozen network's feature maps of x_t, the teacher's or another's, each position a block: what an image
is of shows there in far fewer samples. It costs two calls of that network and one backward pass through it.

`kernel: drift` puts another field in the place of the distance's gradient, in every block: towards the data nearby, away from the
other student samples nearby, where the energy distance pulls towards all of them alike (drift.py). Conditions and what depends
on them are as above: pairs i, i are left out, and a `condition_scale` makes the condition part of what is near.

`data_per_sample` = m > 1 compares with m times as many data samples as the student makes, each with its own noise and condition:
the mean over data is then over all of them. It costs no call of the student; with features one of their network for each.

The teacher's score is never asked for, so there need not be one: then the student is a new network, and learns from scratch.

One t a batch. What is compared is x_t (and the features), so a batch larger than memory is exact (whole_batch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pipelines.common.errors import UserError
from pipelines.common.strict import Idle, PositiveFloat, PositiveInt, UserPath
from pipelines.denoiser import Condition, FeatureMaps, FewStepGenerator
from pipelines.noise import Level, Schedule, Weight, add_noise, weight

from ..config.level_range import sampler
from ..config.levels import Levels, LevelSampler
from .base import Draw, LeastBatch, LossTerms, Need, ObjectiveConfig, Parts, data_of, sample_level, start_of
from .drift import drift_loss
from .energy import condition_vector, energy_loss, energy_score, grid_blocks, spread, unit_channels
from .whole_batch import WholeBatch

Kernel = Literal["energy", "drift"]
ALONE = "samples_per_condition=1: more are matched with their own data sample alone"
OF_ALL = "cross=full or kernel=drift: in pairs each student sample meets one data sample"


class Batch(NamedTuple):
    """What is compared of one side: x_t (K, c, h, w), and feature maps of it, each (K, c', h', w')."""

    x_t: Tensor
    features: list[Tensor]


class VarFlow(WholeBatch):
    """student: the generator; schedule: the noise that is added; data come with each draw.

    features: a frozen network whose feature maps of x_t (given the sample's condition) are compared too, position by position.
    """

    def __init__(
        self,
        student: FewStepGenerator,
        schedule: Schedule,
        levels: LevelSampler,
        weighting: Weight = "sigma2",
        beta: float = 1.0,
        cross: Literal["full", "paired"] = "paired",
        sigma_data: float = 0.5,
        condition_scale: float = 0.0,
        num_classes: int = 0,
        grids: Sequence[int] = (1,),
        features: FeatureMaps | None = None,
        samples_per_condition: int = 1,
        kernel: Kernel = "energy",
        temperatures: Sequence[float] = (),
        data_per_sample: int = 1,
    ) -> None:
        super().__init__(student, None if features is None else {"features": features})
        self.schedule, self.levels, self.weighting = schedule, levels, weighting
        self.beta, self.cross, self.sigma_data, self.condition_scale = beta, cross, sigma_data, condition_scale
        self.num_classes, self.grids, self.features = num_classes, tuple(grids), features
        self.samples, self.data_sets = samples_per_condition, data_per_sample
        self.kernel, self.temperatures = kernel, tuple(temperatures)

    def batch_loss(self, student: Batch, data: Batch, asked: Tensor | None, same_condition: bool) -> Tensor:
        """(K,) over a whole batch that is noised to one level, without w(t), of K m student samples and K data, or sets of K;
        asked: the data's condition vectors, of which the first K are the students' too, if any.

        The mean over all grids and feature maps, each of which pulls its elements as hard as the others do. At condition_scale 1
        two conditions of the batch are as far apart, in root mean square, as two blocks of unit variance: prompts of one data set
        lie close together in a text encoder's space, so that lengths of its own would say little.
        """
        views = [(grid_blocks(student.x_t, n), grid_blocks(data.x_t, n)) for n in self.grids]
        for mine, theirs in zip(student.features, data.features, strict=True):
            blocks = [unit_channels(maps, theirs).flatten(2).permute(2, 0, 1) for maps in (mine, theirs)]
            views.append((blocks[0], blocks[1]))
        scaled = None if asked is None else self.condition_scale * spread(asked).to(student.x_t)
        total = torch.zeros((), dtype=torch.float64, device=student.x_t.device)
        energy = partial(energy_loss, beta=self.beta, cross=self.cross, same_condition=same_condition)
        of_block = {"energy": energy, "drift": partial(drift_loss, temperatures=self.temperatures)}[self.kernel]
        if self.samples > 1:
            of_block = partial(energy_score, beta=self.beta)
        for x, y in views:  # (blocks, K m or K, elements of a block), the loss of all blocks in one go
            if scaled is not None:
                said = scaled.expand(len(x), -1, -1) * x.shape[2] ** 0.5
                x, y = (torch.cat([v, said[:, : v.shape[1]]], 2) for v in (x, y))
            total = total + torch.vmap(of_block)(x, y).sum(0) / len(x) ** 0.5
        return total / len(views)

    def asked(self, condition: Condition) -> Tensor | None:
        """The condition of each row as a vector (b, n), where it is part of what is compared."""
        if not self.condition_scale or condition is None:
            return None
        return condition_vector(condition, self.num_classes)

    def level(self, draw: Draw, rows: int) -> Level:
        """The one level of a batch."""
        return sample_level(draw.shared_u.expand(rows), self.levels, draw.progress, self.schedule)

    def noised(self, x0: Tensor, eps: Tensor, condition: Condition, draw: Draw) -> list[Tensor]:
        """x0 (n, c, h, w) noised to the batch's level, and the feature maps of that."""
        level = self.level(draw, len(x0))
        x_t = add_noise(x0, eps, level)
        return [x_t, *(self.features(x_t, level, condition) if self.features else ())]

    def drawn(self, draw: Draw) -> tuple[Tensor, Tensor, Condition]:
        """z and eps (b m, c, h, w) and the condition of m samples for each row of the batch, a row's one after the other."""
        if self.samples == 1:
            return draw.z, draw.eps, draw.condition
        shape = draw.z.shape[1:]
        z, eps = (
            [first, *(draw.normal(f"{name}_{k}", *shape) for k in range(1, self.samples))]
            for name, first in (("z", draw.z), ("eps", draw.eps))
        )
        condition = draw.condition and {key: value.repeat_interleave(self.samples, 0) for key, value in draw.condition.items()}
        return torch.stack(z, 1).flatten(0, 1), torch.stack(eps, 1).flatten(0, 1), condition

    def of_student(self, draw: Draw) -> tuple[Tensor, list[Tensor]]:
        z, eps, condition = self.drawn(draw)
        # all of a batch make the same step: the law of each step is to be the data's, not that of their mixture
        start = start_of(self.student, draw, shared=True)
        x0 = self.student(z, condition) if start is None else self.student(z, condition, start)
        return x0, self.noised(x0, eps, condition, draw)

    def of_data(self, draw: Draw, x0: Tensor) -> list[Tensor | None]:
        """x0 of the first set of data, then of each set the condition vectors and what is compared."""
        first, shape = data_of(draw), draw.eps.shape[1:]
        sets = [(first, draw.condition, draw.normal("data_eps", *shape))]
        sets += [(*draw.further_data(k), draw.normal(f"data_eps_{k}", *shape)) for k in range(1, self.data_sets)]
        seen: list[Tensor | None] = [first]
        for data, condition, eps in sets:
            seen += [self.asked(condition), *self.noised(data, eps, condition, draw)]
        return seen

    def whole_loss(self, x0: Tensor, student: Sequence[Tensor], data: Sequence[Tensor | None], draw: Draw) -> LossTerms:
        x0_data, *seen = data
        if x0_data is None:
            raise ValueError("of_data gives x0 first")
        width = len(seen) // self.data_sets
        asked, *theirs = (joined(seen[i::width]) for i in range(width))
        x_t, *features = (t for t in theirs if t is not None)
        # (b,), the mean over a row's samples
        x0_data = x0_data.repeat_interleave(self.samples, 0)
        w = weight(self.weighting, self.level(draw, len(x0)), x0, x0_data, self.sigma_data).view(-1, self.samples).mean(1)
        mine = list(student)
        made = self.student
        of_its_row = isinstance(made, FewStepGenerator) and made.steps > 1 and made.inputs == "data"
        dependent = draw.condition is not None or of_its_row
        return LossTerms(w * self.batch_loss(Batch(mine[0], mine[1:]), Batch(x_t, features), asked, dependent), {})


def joined(sets: Sequence[Tensor | None]) -> Tensor | None:
    """One after the other, (K, ...) each; None where there are none."""
    given = [t for t in sets if t is not None]
    return torch.cat(given) if given else None


class Config(ObjectiveConfig):
    idle = (
        Idle("cross", ALONE, lambda c: c.samples_per_condition == 1),
        Idle("condition_scale", ALONE, lambda c: c.samples_per_condition == 1),
        Idle("data_per_sample", ALONE, lambda c: c.samples_per_condition == 1),
        Idle("data_per_sample", OF_ALL, lambda c: c.cross == "full" or c.kernel == "drift"),
        Idle("kernel", ALONE, lambda c: c.samples_per_condition == 1),
        Idle("beta", "kernel=energy", lambda c: c.kernel == "energy"),
        Idle("cross", "kernel=energy: drift is towards all data", lambda c: c.kernel == "energy"),
        Idle("temperatures", "kernel=drift", lambda c: c.kernel == "drift"),
    )
    built = VarFlow
    follows_score = False
    name: Literal["varflow"]
    levels: Levels
    weighting: Weight = "sigma2"
    kernel: Kernel = "energy"  # the paper's distance, or the drift towards what is near
    temperatures: Annotated[list[PositiveFloat], Field(min_length=1)] = [0.1]  # drift's reach, in the samples' mean distance
    beta: Annotated[float, Field(gt=0, lt=2)] = 1.0
    cross: Literal["full", "paired"] = "paired"
    condition_scale: Annotated[float, Field(ge=0)] = 0.0  # of the condition in the distance; 0 matches images whatever they say
    # compare feature maps of x_t too: the frozen teacher's (true), or those of the trained network at a path
    features: bool | UserPath = False
    grids: Annotated[list[PositiveInt], Field(min_length=1)] = [1]  # n: a distance for each block of an n x n grid; 1: the whole
    samples_per_condition: PositiveInt = 1  # student samples for each data sample; above 1 they are matched with it alone
    data_per_sample: PositiveInt = 1  # data samples for each student sample, in the distance to all of them

    @property
    def least_batch(self) -> LeastBatch:
        return LeastBatch(2, "the energy distance needs pairs of samples")

    def few_steps_refusal(self) -> str | None:
        if self.samples_per_condition == 1:
            return None
        return "objective.samples_per_condition: samples of a condition must be independent, and would begin a later step alike"

    def needs(self) -> list[Need]:
        elsewhere = self.features if isinstance(self.features, str) else None
        return [
            Need("objective.condition_scale", "condition_vector", self.condition_scale),
            Need("objective.features", "features_of", elsewhere),
        ]

    def build(self, parts: Parts, steps: int) -> VarFlow:
        known, sides = parts.student.denoiser, parts.latent_shape[1:]
        if any(side % n for n in self.grids for side in sides):
            raise UserError(f"objective.grids: {self.grids} must all divide the sides of the latents, {sides}")
        features = None
        if self.features:
            features = parts.features_of(self.features) if isinstance(self.features, str) else parts.features()
        return VarFlow(
            parts.student,
            known.schedule,
            sampler(self.levels, steps, known.schedule.t_range),
            self.weighting,
            self.beta,
            self.cross,
            known.sigma_data,
            self.condition_scale,
            parts.num_classes,
            self.grids,
            features,
            self.samples_per_condition,
            self.kernel,
            self.temperatures,
            self.data_per_sample,
        )
