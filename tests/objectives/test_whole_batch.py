"""objectives/whole_batch.py: any loss of a whole batch, split over processes and micro-batches, by an objective of ten lines."""

import pytest
import torch
from torch import Tensor, nn

from trainers.objectives.base import LossTerms
from trainers.objectives.whole_batch import WholeBatch


class Spread(WholeBatch):
    """Of two things made of x0: the variance of the batch in one against the data's in the other, weighted by x0 itself."""

    def __init__(self, student: nn.Module, samples: int) -> None:
        super().__init__(student)
        self.samples = samples

    def of_student(self, draw) -> tuple[Tensor, list[Tensor]]:
        x0 = torch.stack([self.student((k + 1) * draw.z, None) for k in range(self.samples)], 1).flatten(0, 1)
        return x0, [x0 + draw.eps.repeat_interleave(self.samples, 0), x0.square().mean((2, 3))]

    def of_data(self, draw, x0) -> list[Tensor | None]:
        return [draw.x0, None]

    def whole_loss(self, x0, student, data, draw) -> LossTerms:
        assert data[1] is None
        assert not x0.requires_grad
        assert not data[0].requires_grad
        a, b = (c.flatten(1) for c in student)
        share = (a - a.mean(0)).square().sum(1).log() * (b - b.mean(0)).square().sum(1)
        share = share * x0.flatten(1).square().mean() - a.sum(1) * data[0].flatten(1).std()
        return LossTerms(share.view(-1, self.samples).mean(1), {"spread": a.detach().std()})


@pytest.mark.parametrize("sizes", [[6], [3, 3], [2, 2, 2], [1] * 6])
@pytest.mark.parametrize(("processes", "samples"), [(1, 1), (2, 1), (2, 3)])
def test_the_gradient_and_the_values_are_those_of_the_whole_batch(sizes, processes, samples, make_draw, randn):
    if len(sizes) % processes:
        pytest.skip("as many micro-batches on each process")
    student = nn.Module()
    weight = student.weight = nn.Parameter(randn(2, 2))
    student.forward = lambda z, condition: torch.einsum("ij,bjhw->bihw", weight, z).tanh()
    objective = Spread(student, samples)
    whole = make_draw(randn(6, 2, 3, 5), randn(6, 2, 3, 5), torch.rand(6, dtype=torch.float64), x0=randn(6, 2, 3, 5))
    expected, metrics = objective.loss(whole)
    (gradient,) = torch.autograd.grad(expected.mean(), weight)

    parts = [
        make_draw(*t, x0=x0) for *t, x0 in zip(*(v.split(sizes) for v in (whole.z, whole.eps, whole.u, whole.x0)), strict=True)
    ]
    per_process = len(parts) // processes
    groups = [parts[i : i + per_process] for i in range(0, len(parts), per_process)]
    first = 0
    for draws in groups:
        for draw in draws:
            draw.first_row = first
        first += sum(len(d.z) for d in draws)
    sent: list[list[Tensor]] = []
    for draws in groups:  # what each process would send, were it alone
        sent.append([])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                objective,
                "whole_loss",
                lambda x0, student, data, draw: LossTerms(sum(c.sum() for c in student) + 0 * data[0].sum((1, 2, 3)), {}),
            )
            objective.prepare(draws, lambda t: sent[-1].append(t) or torch.cat([t] * processes))
    values, total = [], 0
    for draws in groups:
        gathered = iter([torch.cat(each).detach() for each in zip(*sent, strict=True)])
        for draw, context in zip(draws, objective.prepare(draws, lambda t, rows=gathered: next(rows)), strict=True):
            loss, mine = objective.loss(draw, context)
            assert mine["spread"] == metrics["spread"]  # of the whole batch
            values.append(loss.detach())
            total = total + loss.mean() * len(loss) / 6
    torch.testing.assert_close(torch.cat(values), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, weight)[0], gradient, rtol=1e-10, atol=1e-12)
