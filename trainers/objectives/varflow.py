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

and `features` those of the frozen teacher's feature maps of x_t, each position a block: what an image is of shows there in far
fewer samples. It costs two calls of the teacher and one backward pass through it.

One t a batch. The loss needs only what is compared, so a batch larger than memory is exact: draw all x0 without a graph,
take dL/dx_t (and in the features) on the cheap loss, then re-run micro-batches with a graph and inject their rows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.denoiser import Condition, FeatureMaps, OneStepGenerator
from pipelines.noise import Level, Schedule, add_noise, weight

from .base import Draw, LevelSampler, LossTerms, Phase, dot, sample_level
from .energy import condition_vector, energy_loss, energy_score, grid_blocks, spread, unit_channels


class Batch(NamedTuple):
    """What is compared of one side: x_t (K, c, h, w), and feature maps of it, each (K, c', h', w')."""

    x_t: Tensor
    features: list[Tensor]


class VarFlow:
    """student: the generator; schedule: the teacher's noise; data come with each draw.

    features: a frozen network whose feature maps of x_t (given the sample's condition) are compared too, position by position.
    """

    needs_data = True
    warmup: tuple[Phase, ...] = ()
    health = ()

    def __init__(
        self,
        student: OneStepGenerator,
        schedule: Schedule,
        levels: LevelSampler,
        weighting: str = "sigma2",
        beta: float = 1.0,
        cross: Literal["full", "paired"] = "paired",
        sigma_data: float = 0.5,
        condition_scale: float = 0.0,
        num_classes: int = 0,
        grids: Sequence[int] = (1,),
        features: FeatureMaps | None = None,
        samples_per_condition: int = 1,
    ) -> None:
        self.networks: dict[str, nn.Module] = {"student": student}
        self.state: dict[str, Tensor] = {}
        self.frozen: dict[str, nn.Module] = {} if features is None else {"teacher": features}
        self.student, self.schedule, self.levels, self.weighting = student, schedule, levels, weighting
        self.beta, self.cross, self.sigma_data, self.condition_scale = beta, cross, sigma_data, condition_scale
        self.num_classes, self.grids, self.features = num_classes, tuple(grids), features
        self.samples = samples_per_condition
        self.phases = (Phase("student", ("student",), self.loss, prepare=self.prepare),)

    def batch_loss(self, student: Batch, data: Batch, said: Tensor | None, same_condition: bool) -> Tensor:
        """(K,) over a whole batch that is noised to one level, without w(t), of K m student and K data samples; said (K, n): the
        condition vectors, if any.

        The mean over all grids and feature maps, each of which pulls its elements as hard as the others do. At condition_scale 1
        two conditions of the batch are as far apart, in root mean square, as two blocks of unit variance: prompts of one data set
        lie close together in a text encoder's space, so that lengths of its own would say little.
        """
        views = [(grid_blocks(student.x_t, n), grid_blocks(data.x_t, n)) for n in self.grids]
        for mine, theirs in zip(student.features, data.features, strict=True):
            views.append(tuple(unit_channels(maps, theirs).flatten(2).permute(2, 0, 1) for maps in (mine, theirs)))
        said = None if said is None else self.condition_scale * spread(said).to(student.x_t)
        total = torch.zeros((), dtype=torch.float64, device=student.x_t.device)
        for view in views:
            for pair in zip(*view, strict=True):
                if self.samples > 1:
                    loss = energy_score(*pair, self.beta)
                else:
                    if said is not None:
                        pair = [torch.cat([x, said * x.shape[1] ** 0.5], 1) for x in pair]
                    loss = energy_loss(*pair, self.beta, self.cross, same_condition)
                total = total + loss / len(view[0]) ** 0.5
        return total / len(views)

    def said(self, draw: Draw) -> Tensor | None:
        if not self.condition_scale or draw.condition is None:
            return None
        return condition_vector(draw.condition, self.num_classes)

    def compared(self, x0: Tensor, eps: Tensor, condition: Condition, draw: Draw) -> Batch:
        """What is compared of x0 (n, c, h, w): noised to the batch's level, and the feature maps of that."""
        level = self.level(draw, len(x0))
        x_t = add_noise(x0, eps, level)
        return Batch(x_t, self.features(x_t, level, condition) if self.features else [])

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

    def of_student(self, draw: Draw) -> tuple[Tensor, Batch]:
        """x0 (b m, c, h, w), and what is compared of it."""
        z, eps, condition = self.drawn(draw)
        x0 = self.student(z, condition)
        return x0, self.compared(x0, eps, condition, draw)

    def level(self, draw: Draw, rows: int) -> Level:
        """The one level of a batch."""
        return sample_level(draw.shared_u.expand(rows), self.levels, draw.progress, self.schedule)

    def level_weight(self, draw: Draw, x0: Tensor, x0_data: Tensor) -> Tensor:
        """(b,), the mean over a row's samples. x0 (b m, c, h, w), x0_data (b, c, h, w)."""
        x0_data = x0_data.repeat_interleave(self.samples, 0)
        return weight(self.weighting, self.level(draw, len(x0)), x0, x0_data, self.sigma_data).view(-1, self.samples).mean(1)

    @torch.no_grad()
    def of_data(self, draw: Draw) -> Batch:
        return self.compared(draw.x0, draw.normal("data_eps", *draw.eps.shape[1:]), draw.condition, draw)

    def prepare(self, draws: Sequence[Draw], gather: Callable[[Tensor], Tensor]) -> list[tuple[Batch, Tensor]]:
        """For each micro-batch its rows of (K dL/d what is compared, per-sample loss), exact over all processes."""
        with torch.no_grad():
            x0, mine = zip(*(self.of_student(d) for d in draws), strict=True)
        student, data = (gathered(batches, gather) for batches in (mine, [self.of_data(d) for d in draws]))
        leaves = [t.requires_grad_() for t in (student.x_t, *student.features)]
        said = [self.said(d) for d in draws]
        said = None if said[0] is None else gather(torch.cat(said))
        w = self.level_weight(draws[0], *(gather(torch.cat(t)) for t in (x0, [d.x0 for d in draws])))
        per_sample = w * self.batch_loss(student, data, said, draws[0].condition is not None)
        gradients = torch.autograd.grad(per_sample.sum(), leaves)
        first, sizes = draws[0].first_row, [len(d.x0) for d in draws]  # this process's rows start here
        rows, m = slice(first, first + sum(sizes)), self.samples
        parts = zip(*(g.unflatten(0, (-1, m))[rows].split(sizes) for g in gradients), strict=True)
        values = per_sample.detach()[rows].split(sizes)
        flat = ([g.flatten(0, 1) for g in part] for part in parts)
        return [(Batch(x_t, features), value) for (x_t, *features), value in zip(flat, values, strict=True)]

    def loss(self, draw: Draw, context: tuple[Batch, Tensor] | None = None) -> LossTerms:
        x0, batch = self.of_student(draw)
        metrics = {"x0_std": x0.detach().std()}
        if context is None:
            loss = self.batch_loss(batch, self.of_data(draw), self.said(draw), draw.condition is not None)
            return LossTerms(self.level_weight(draw, x0, draw.x0) * loss, metrics)
        gradient, value = context
        # its gradient is that of the batch's loss through this micro-batch; its value is replaced by the loss's
        surrogate = sum(dot(g, x) for g, x in zip((gradient.x_t, *gradient.features), (batch.x_t, *batch.features), strict=True))
        surrogate = surrogate.view(-1, self.samples).sum(1)
        return LossTerms(surrogate - surrogate.detach() + value, metrics)


def gathered(batches: Sequence[Batch], gather: Callable[[Tensor], Tensor]) -> Batch:
    """Micro-batches of all processes as one."""
    x_t = gather(torch.cat([b.x_t for b in batches]))
    return Batch(x_t, [gather(torch.cat(maps)) for maps in zip(*(b.features for b in batches), strict=True)])
