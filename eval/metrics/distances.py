"""Distances and scores on features: n generated rows, m real ones, d columns. float64, in blocks of rows.

Definitions are the ones that published numbers use; draws of subsets are torch-fidelity's, so that its numbers come out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from pipelines.common.errors import UserError

from .samples import squared_distances

BLOCK = 2048
SEED = 2020  # torch-fidelity's rng_seed


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = SEED) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): mean and standard deviation over random subsets of the unbiased squared MMD.

    The kernel is (a.b / d + 1)^3. x (n, d), y (m, d). UserError for sets smaller than a subset.
    """
    if min(len(x), len(y)) < size:
        raise UserError(f"KID takes subsets of {size:,} images, but there are {len(x):,} and {len(y):,}; use more images")
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        a = x[torch.from_numpy(draw.choice(len(x), size, replace=False)).to(x.device)].double()
        b = y[torch.from_numpy(draw.choice(len(y), size, replace=False)).to(y.device)].double()
        values.append(_unbiased_mmd2(*(_cubic(p, q) for p, q in ((a, a), (b, b), (a, b)))))
    std, mean = torch.std_mean(torch.tensor(values, dtype=torch.float64), correction=0)
    return mean.item(), std.item()


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _unbiased_mmd2(k_aa: Tensor, k_bb: Tensor, k_ab: Tensor) -> float:
    m = len(k_aa)
    within = (k_aa.sum() - k_aa.trace() + k_bb.sum() - k_bb.trace()) / (m * (m - 1))
    return (within - 2 * k_ab.mean()).item()


def cmmd(x: Tensor, y: Tensor, bandwidth: float = 10.0) -> float:
    """CMMD (Jayasumana et al. 2024): 1000 times the biased squared MMD of unit CLIP embeddings, Gaussian kernel of width 10.

    x (n, d), y (m, d) with rows of norm 1, ValueError for others. float64: near equal sets the terms agree in their first four
    digits.

    >>> cmmd(torch.eye(3), torch.eye(3)), round(cmmd(torch.eye(3), -torch.eye(3)), 3)
    (0.0, 13.201)
    """
    for rows in (x, y):
        norms = rows.double().norm(dim=1)
        if bool(((norms - 1).abs() > 1e-3).any()):
            raise ValueError(f"CMMD takes unit rows; norms range over {norms.min():.3g}..{norms.max():.3g}")

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        total = reduce(
            torch.add,
            (
                (p @ q.T).mul_(2).sub_(p.square().sum(1)[:, None] + q.square().sum(1)).div_(2 * bandwidth**2).exp_().sum()
                for p in _blocks(a)
                for q in _blocks(b)
            ),
        )
        return total / (len(a) * len(b))

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)).item()


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019. precision: share of generated x within the k-th neighbour radius of some real y.

    recall: the reverse. x (n, d), y (m, d); UserError unless there are more than k rows each. The radius leaves out the image
    itself.
    """
    if min(len(x), len(y)) <= k:
        raise UserError(f"precision and recall with k = {k} need more than {k} images a side, got {len(x)} and {len(y)}")
    centre = y.double().mean(0)  # |a - b|^2 as |a|^2 + |b|^2 - 2ab: a common offset would cost digits
    x, y = x - centre.to(x), y - centre.to(y)
    return _covered(x, y, _radii(y, k)), _covered(y, x, _radii(x, k))


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row (n,)."""
    found = []
    for i, rows in enumerate(_blocks(x)):
        nearest = rows.new_full((len(rows), k), torch.inf)
        for j, others in enumerate(_blocks(x)):
            squares = squared_distances(rows, others)
            if i == j:
                squares.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, squares], dim=1).topk(k, dim=1, largest=False).values
        found.append(nearest[:, -1])
    return torch.cat(found)


def _covered(queries: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = 0
    for rows in _blocks(queries):
        hit = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for others, radius in zip(_blocks(centres), radii.split(BLOCK), strict=True):
            hit |= (squared_distances(rows, others) <= radius).any(1)
        inside += int(hit.sum())
    return inside / len(queries)


def _blocks(x: Tensor) -> Iterator[Tensor]:
    return (rows.double() for rows in x.split(BLOCK))


class InceptionScore:
    """exp E KL(p(y|x) | p(y)) over `splits` parts of n images (Salimans et al. 2016), from logits that arrive in order: from 1 to
    the number of classes.

    Images are spread over the parts by torch-fidelity's shuffle; only sums are kept. UserError for fewer images than parts.
    """

    def __init__(self, n: int, classes: int, splits: int = 10, seed: int = SEED) -> None:
        if n < splits:
            raise UserError(f"the inception score takes {splits} parts, but there are {n} images")
        order = np.random.RandomState(seed).permutation(n)
        part = np.empty(n, dtype=np.int64)
        for i in range(splits):
            part[order[i * n // splits : (i + 1) * n // splits]] = i
        self.part = torch.from_numpy(part)
        self.counts = torch.bincount(self.part, minlength=splits).double()
        self.p = torch.zeros(splits, classes, dtype=torch.float64)
        self.p_log_p = torch.zeros(splits, dtype=torch.float64)
        self.seen = 0

    def update(self, logits: Tensor) -> None:
        """logits (b, classes) of the next b images."""
        log_p = logits.double().cpu().log_softmax(1)
        part = self.part[self.seen : self.seen + len(logits)]
        self.p.index_add_(0, part, log_p.exp())
        self.p_log_p.index_add_(0, part, (log_p.exp() * log_p).sum(1))
        self.seen += len(logits)

    def value(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts. ValueError before all n images have been seen."""
        if self.seen != len(self.part):
            raise ValueError(f"the inception score has seen {self.seen:,} of {len(self.part):,} images")
        q = self.p / self.counts[:, None]
        scores = (self.p_log_p / self.counts - torch.special.xlogy(q, q).sum(1)).exp()
        std, mean = torch.std_mean(scores, correction=0)
        return mean.item(), std.item()
