"""Drift between two sets of samples: towards the data nearby, away from the other student samples nearby (Deng et al. 2026).

Drifting models (arXiv 2602.04770) move each student sample x by a difference of two kernel means (their Eq. 11),

    V(x) = sum_j a_j y_j - sum_j b_j x_j,    a_j = k(x, y_j) / sum_l k(x, y_l),    b_j = k(x, x_j) / sum_l k(x, x_l),

with k(x, y) = exp(-|x - y| / (tau s)), y data, x_j the *other* student samples, s the samples' size; and the loss of a step is

    L = |x - sg(x + V(x))|^2 / s,     V summed over temperatures tau,     dL/dx = -2 V / s

where the energy distance pulls a sample towards all data alike, here those within about tau s of it count.

Each side is normalised over its own samples, so that both weigh 1: swapping the two sets changes the sign of V and nothing
else, and V is 0 where their laws are equal. (One softmax over both sides is antisymmetric too, but as the share of one side
times that of the other: samples far from all data would hardly be pulled.) A softmax of n samples is a biased estimate of the
ratio of means, by O(1 / n'), n' those within reach; the two biases cancel where both sides have as many. Hence data sample i is
left out for student sample i, as that itself is among the students: given x_i, V is of mean exactly 0 for equal laws (of each
condition), at every batch size and temperature, and so is the gradient. Hence, too, more data than students are taken in sets as
large as the batch, whose kernel means are averaged. And hence s, for the paper's mean distance, is the root mean square distance
of all samples of both sides: it does not tell them apart. (Units of feature maps, which are the data's, do, a little.)

What remains at a finite batch: between unequal laws V is that of the estimates, at small tau that of nearest neighbours, whose
distance depends on the batch, and mostly noise; and the loss goes not to 0 but to the variance of V: its value says little.

A condition that is part of the samples has its part in distances and in the loss's value, and no gradient. Not taken over from
the paper: the second softmax, over x, and the division of each temperature's V by its size, which the batch's noise sets here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .energy import pairwise_power


def pair_distance(x: Tensor) -> Tensor:
    """Root mean square distance of two different rows of x (n, d): () in x's precision; 0 where all are equal.

    >>> pair_distance(torch.tensor([[0.0], [3.0]])).item()
    3.0
    """
    return (2 * (x - x.mean(0)).square().sum() / (len(x) - 1)).sqrt()


def distances_to_others(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j| of x, y (K, d), infinite for j = i -> (K, K)."""
    own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return pairwise_power(x, y, 1.0).masked_fill(own, torch.inf)


def drift(x_student: Tensor, x_data: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(V (K, d) for each student sample, s ()), float64, without a graph: the equation above, temperatures in units of s.

    x_student (K, ...), x_data (m K, ...), in sets of K. Row i of every set is left out for student sample i, on which that of the
    first set may depend. ValueError for fewer than two students, no data, or no whole number of sets. 0 where all coincide.

    >>> x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [13.0]])
    >>> drift(x, y, [0.1])[0].tolist()  # one other sample each: 13 - 2 and 10 - 0
    [[11.0], [10.0]]
    """
    k = len(x_student)
    if k < 2 or not len(x_data) or len(x_data) % k:
        raise ValueError(f"drift needs at least 2 student samples and a multiple of them of data; got {k}, {len(x_data)}")
    x, y = x_student.detach().flatten(1).double(), x_data.detach().flatten(1).double()
    size = pair_distance(torch.cat([x, y]))
    unit = torch.where(size == 0, 1.0, size)
    sides = [*y.split(k), x]
    distances = [distances_to_others(x, side) / unit for side in sides]
    total = torch.zeros_like(x)
    for temperature in temperatures:
        *near_data, near_students = ((-r / temperature).softmax(1) @ side for r, side in zip(distances, sides, strict=True))
        total = total + torch.stack(near_data).mean(0) - near_students
    return total, size


def drift_loss(x_student: Tensor, x_data: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Each student sample's |x - sg(x + V)|^2 / s, (K,) float64; as the energy distance it grows with the unit of x. See `drift`.

    >>> x = torch.tensor([[0.0], [2.0]], requires_grad=True)
    >>> loss = drift_loss(x, torch.tensor([[0.0], [2.0]]), [0.1])
    >>> loss.tolist()  # the data are where the students are
    [0.0, 0.0]
    """
    v, size = drift(x_student, x_data, temperatures)
    x = x_student.flatten(1).double()
    moved = x.detach() + v
    return (x - moved).square().sum(1) / torch.where(size == 0, 1.0, size)
