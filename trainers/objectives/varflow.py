"""VarFlow: the energy distance between noised student and data samples; no score at all (VarFlow paper, Eqs. 9, 10).

    L_t = w(t) [ mean_ij |xS_i - xT_j|^beta - 1/2 mean_{i != j} |xS_i - xS_j|^beta ],    beta in (0, 2)

Student sample i and data sample i share their condition. The cross term is then over pairs i, i+1 (paired) or all i != j (full):
an expectation over independent draws is what Eq. 9 says. The condition can be part of the sample (`condition_scale` > 0: joint
matching, of images *and* what was asked for) or not (marginal matching, as in the paper: prompts may then be ignored).

In many dimensions the distance is blind to detail: all samples are about equally far from one another, and what remains is their
mean and their overall spread. `grids` adds the distances of the blocks of n x n grids, each an energy distance of marginals, so
still >= 0 and 0 for equal laws:

    L = mean_n 1/n sum_{n^2 blocks} L_block          (the gradient in a pixel is then of one size on all grids; [1]: the paper's)

One t a batch. The loss needs only the students' x0, so a batch larger than memory is exact: draw all x0 without a graph,
take dL/dx0 on the cheap loss, then re-run micro-batches with a graph and inject their rows of dL/dx0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipelines.denoiser import Condition, OneStepGenerator
from pipelines.noise import Schedule, add_noise, weight

from .base import Draw, LevelSampler, LossTerms, Phase, dot, sample_level


def pairwise_power(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """|x_i - y_j|^beta, (n, ...) x (m, ...) -> (n, m), in float64 from inner products: no (n, m, d) tensor.

    Where two samples coincide (within float64 cancellation) distance and gradient are exactly 0, for every beta.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    centre = y.mean(0)  # distances do not move with the origin; rounding does
    x, y = x - centre, y - centre
    x2, y2 = x.square().sum(1), y.square().sum(1)
    square = x2[:, None] + y2[None, :] - 2 * x @ y.T
    coincide = square <= 1e-12 * (x2[:, None] + y2[None, :])  # False for NaN, which must come through
    return torch.where(coincide, 0.0, torch.where(coincide, 1.0, square).pow(beta / 2))


def energy_loss(
    x_student: Tensor, x_data: Tensor, beta: float, cross: Literal["full", "paired"], same_condition: bool = False
) -> Tensor:
    """Each student sample's share of the bracket above; the mean over samples is Eq. 9 ("full") or Eq. 10 ("paired").

    x_student, x_data (K, ...) noised to one level, K >= 2 -> (K,) float64. same_condition: rows i of both depend on one another,
    so that the cross term leaves the pairs i, i out.
    """
    k = len(x_student)
    if k < 2 or len(x_data) != k:
        raise ValueError(f"the energy loss needs as many data as student samples and at least 2; got {len(x_data)}, {k}")
    within = pairwise_power(x_student, x_student, beta)
    within = (within - torch.diag(within.diagonal())).sum(1) / (k - 1)
    if same_condition and cross == "paired":
        x_data = x_data.roll(-1, 0)
    between = pairwise_power(x_student, x_data, beta)
    if cross == "paired":
        return between.diagonal() - within / 2
    if same_condition:
        between = (between - torch.diag(between.diagonal())).sum(1) / (k - 1)
    else:
        between = between.mean(1)
    return between - within / 2


def condition_vector(condition: Condition, num_classes: int) -> Tensor:
    """What a condition says, (b, n) of length 1 a row: SDXL's pooled text, else the mean over tokens; a class as one-hot."""
    if "class_labels" in condition:
        return torch.nn.functional.one_hot(condition["class_labels"], num_classes).float()
    text = condition["text_embeds"] if "text_embeds" in condition else condition["encoder_hidden_states"].mean(1)
    return torch.nn.functional.normalize(text.float(), dim=1)


def spread(said: Tensor) -> Tensor:
    """(K, n) -> the same, moved and scaled to mean 0 and mean square length 1 over the rows; zeros where all rows are equal."""
    centred = said - said.mean(0)
    length = centred.square().sum(1).mean().sqrt()
    return centred / length if length > 1e-6 else torch.zeros_like(centred)


def grid_blocks(x: Tensor, n: int) -> Tensor:
    """(K, c, h, w) -> (n^2, K, c (h/n) (w/n)): the blocks of an n x n grid."""
    k, c, h, w = x.shape
    return x.reshape(k, c, n, h // n, n, w // n).permute(2, 4, 0, 1, 3, 5).reshape(n * n, k, -1)


class VarFlow:
    """student: the generator; schedule: the teacher's noise; data come with each draw."""

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
    ) -> None:
        self.networks: dict[str, nn.Module] = {"student": student}
        self.state: dict[str, Tensor] = {}
        self.frozen: dict[str, nn.Module] = {}
        self.student, self.schedule, self.levels, self.weighting = student, schedule, levels, weighting
        self.beta, self.cross, self.sigma_data, self.condition_scale = beta, cross, sigma_data, condition_scale
        self.num_classes, self.grids = num_classes, tuple(grids)
        self.phases = (Phase("student", ("student",), self.loss, prepare=self.prepare),)

    def batch_loss(self, x0: Tensor, x0_data: Tensor, eps: Tensor, eps_data: Tensor, said: Tensor | None, draw: Draw) -> Tensor:
        """(K,) over a whole batch, noised to the one level that `shared_u` picks; said (K, n): the condition vectors, if any.

        At condition_scale 1 two conditions of the batch are as far apart, in root mean square, as two images (or blocks of images)
        of unit variance: prompts of one data set lie close together in a text encoder's space, so that lengths of its own would
        say little.
        """
        level = sample_level(draw.shared_u.expand(len(x0)), self.levels, draw.progress, self.schedule)
        x_student, x_data = add_noise(x0, eps, level), add_noise(x0_data, eps_data, level)
        w = weight(self.weighting, level, x0, x0_data, self.sigma_data).flatten()
        said = None if said is None else self.condition_scale * spread(said).to(x_student)
        total = torch.zeros_like(w, dtype=torch.float64)
        for n in self.grids:
            for pair in zip(grid_blocks(x_student, n), grid_blocks(x_data, n), strict=True):
                if said is not None:
                    pair = [torch.cat([x, said * x.shape[1] ** 0.5], 1) for x in pair]
                total = total + energy_loss(*pair, self.beta, self.cross, same_condition=draw.condition is not None) / n
        return w * total / len(self.grids)

    def said(self, draw: Draw) -> Tensor | None:
        if not self.condition_scale or draw.condition is None:
            return None
        return condition_vector(draw.condition, self.num_classes)

    def prepare(self, draws: Sequence[Draw], gather: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each micro-batch its rows of (K dL/dx0, per-sample loss), exact for the whole batch on all processes."""
        with torch.no_grad():
            x0 = [self.student(d.z, d.condition) for d in draws]
        sizes = [len(x) for x in x0]
        tensors = [x0, [d.x0 for d in draws], [d.eps for d in draws], [self._data_noise(d) for d in draws]]
        x0_all, x0_data, eps, eps_data = (gather(torch.cat(t)) for t in tensors)
        x0_all.requires_grad_()
        said = [self.said(d) for d in draws]
        said = None if said[0] is None else gather(torch.cat(said))
        per_sample = self.batch_loss(x0_all, x0_data, eps, eps_data, said, draws[0])
        (gradient,) = torch.autograd.grad(per_sample.sum(), x0_all)
        mine = draws[0].first_row  # this process's rows start here
        rows = slice(mine, mine + sum(sizes))
        return list(zip(gradient[rows].split(sizes), per_sample.detach()[rows].split(sizes), strict=True))

    def loss(self, draw: Draw, context: tuple[Tensor, Tensor] | None = None) -> LossTerms:
        x0 = self.student(draw.z, draw.condition)
        metrics = {"x0_std": x0.detach().std()}
        if context is None:
            return LossTerms(self.batch_loss(x0, draw.x0, draw.eps, self._data_noise(draw), self.said(draw), draw), metrics)
        gradient, value = context
        surrogate = dot(gradient, x0)  # its gradient is dL/dx0 . dx0/dtheta; its value is replaced by the loss's
        return LossTerms(surrogate - surrogate.detach() + value, metrics)

    @staticmethod
    def _data_noise(draw: Draw) -> Tensor:
        return draw.normal("data_eps", *draw.eps.shape[1:])
