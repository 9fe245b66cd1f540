"""Losses of a whole batch of samples at the memory of one micro-batch, exact over all processes and micro-batches.

A distance between samples (VarFlow's energy distance, an MMD) is no mean over micro-batches: computed on each it would be another
loss. But it needs of the student's samples only what is compared of them, so its gradient can be had in two passes:

    1. make all x0 without a graph, take the loss's gradient in what is compared       (WholeBatch.prepare, once an update)
    2. make each micro-batch again with a graph, and inject its rows of that gradient  (WholeBatch.loss)

An objective of this kind is a subclass that says what of its samples is compared, with what, and the loss of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import Draw, HealthCheck, LossTerms, Phase, dot


class Injected(NamedTuple):
    """A micro-batch's rows of the gradient in each tensor that `of_student` makes, and of the loss (b,); the batch's metrics."""

    gradients: list[Tensor]
    loss: Tensor
    metrics: dict[str, Tensor]


class WholeBatch:
    """One phase, that of the student. frozen: networks that `of_student` and `of_data` call, by role."""

    needs_data = True
    warmup: tuple[Phase, ...] = ()
    health: tuple[HealthCheck, ...] = ()

    def __init__(self, student: nn.Module, frozen: dict[str, nn.Module] | None = None) -> None:
        self.student = student
        self.networks: dict[str, nn.Module] = {"student": student}
        self.frozen: dict[str, nn.Module] = frozen or {}
        self.state: dict[str, Tensor] = {}
        self.phases: tuple[Phase, ...] = (Phase("student", ("student",), self.loss, prepare=self.prepare),)

    def of_student(self, draw: Draw) -> tuple[Tensor, Sequence[Tensor]]:
        """The student's samples x0 (b m, c, h, w), m for each row of the draw, one row's after another, and what the loss sees of
        them, each (b m, ...), with a graph.
        """
        raise NotImplementedError

    def of_data(self, draw: Draw, x0: Tensor) -> Sequence[Tensor | None]:
        """All else that it sees, each (b, ...), beside the student's samples x0; called without a graph, once for each row."""
        raise NotImplementedError

    def whole_loss(self, x0: Tensor, student: Sequence[Tensor], data: Sequence[Tensor | None], draw: Draw) -> LossTerms:
        """The loss of each row, (K,), and what is logged of the batch, from all K m samples x0, which have no graph, and what
        `of_student` and `of_data` made.

        draw: one of the batch's, for what all of them share (`shared_u`, `progress`); its rows are not those of the whole batch.
        """
        raise NotImplementedError

    def prepare(self, draws: Sequence[Draw], gather: Callable[[Tensor], Tensor]) -> list[Injected]:
        """For each micro-batch what is injected into it; `gather` concatenates over processes."""

        def whole(rows: Sequence[Tensor | None]) -> Tensor | None:
            given = [r for r in rows if r is not None]
            return gather(torch.cat(given)) if given else None

        with torch.no_grad():
            made = [(x0, *seen) for x0, seen in map(self.of_student, draws)]
            others = [self.of_data(d, x0) for d, (x0, *_) in zip(draws, made, strict=True)]
            x0, *student = (gather(torch.cat(rows)) for rows in zip(*made, strict=True))
            del made
            data = [whole(rows) for rows in zip(*others, strict=True)]
        leaves = [t.requires_grad_() for t in student]
        loss, metrics = self.whole_loss(x0, leaves, data, draws[0])
        gradients = torch.autograd.grad(loss.sum(), leaves)
        first, sizes = draws[0].first_row, [len(d.z) for d in draws]  # this process's rows start here
        rows = slice(first, first + sum(sizes))
        parts = zip(*(t.unflatten(0, (len(loss), -1))[rows].split(sizes) for t in (*gradients, loss.detach())), strict=True)
        return [Injected([g.flatten(0, 1) for g in gradients], value[:, 0], metrics) for *gradients, value in parts]

    def loss(self, draw: Draw, context: Injected | None = None) -> LossTerms:
        x0, student = self.of_student(draw)
        metrics = {"x0_std": x0.detach().std()}
        if context is None:
            with torch.no_grad():
                data = self.of_data(draw, x0.detach())
            loss, more = self.whole_loss(x0.detach(), student, data, draw)
            return LossTerms(loss, metrics | more)
        # its gradient is that of the batch's loss through this micro-batch; its value is replaced by the loss's
        parts = (dot(g, x) for g, x in zip(context.gradients, student, strict=True))
        surrogate = reduce(torch.add, parts).view(len(context.loss), -1).sum(1)
        return LossTerms(surrogate - surrogate.detach() + context.loss, metrics | context.metrics)
