"""Effective sample size by noise level: measured, logged, and, where asked, what levels are drawn by.

Importance weights degenerate towards low noise, where x_t says more about z than proposals can guess: an average over few
effective samples is biased, and the bias hurts more than the level teaches. So levels are drawn in proportion to what the
proposals can bear there, and lower ones come into play as the posterior improves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LevelSampler

BINS = 8
GRID = 512  # points of u on which the drawing of levels is tabulated


class LevelStatistics:
    """Running mean effective sample size in BINS ranges of t, equally likely in the middle of the run.

    It starts at `largest`, the number of proposals. observe() takes the numbers that the loop has averaged over processes, so all
    processes hold the same state; checkpoints keep it.
    """

    def __init__(self, levels: LevelSampler, largest: float, decay: float = 0.95) -> None:
        self.levels, self.largest, self.decay = levels, largest, decay
        t = levels((torch.arange(2 * BINS + 1) / (2 * BINS)).clamp(1e-3, 1 - 1e-3), 0.5)
        self.edges = t[2:-1:2].contiguous()
        self.names = [f"{middle:.3g}" for middle in t[1::2].tolist()]
        self.mean = torch.full((BINS,), largest)
        self.state = {"ess_by_level": self.mean}

    def metrics(self, t: Tensor, ess: Tensor) -> dict[str, Tensor]:
        """For levels t (b,) and ess (b,): the mean, and for each range the share of samples in it and their sum of ess over b.

        The ratio of the last two, also of their means over updates and processes, is the mean ess of the range.
        """
        inside = torch.nn.functional.one_hot(torch.bucketize(t, self.edges.to(t.device)), BINS).to(ess.dtype)
        share, total = inside.mean(0), (inside * ess[:, None]).mean(0)
        named = {f"ess_share@{n}": share[i] for i, n in enumerate(self.names)}
        return {"ess": ess.mean()} | named | {f"ess_sum@{n}": total[i] for i, n in enumerate(self.names)}

    def observe(self, values: dict[str, float]) -> None:
        """Take up the metrics of one update."""
        for i, name in enumerate(self.names):
            share = values.get(f"ess_share@{name}", 0.0)
            if share > 0:
                self.mean[i].lerp_(torch.tensor(values[f"ess_sum@{name}"] / share), 1 - self.decay)

    def by_effective_size(self, u: Tensor, progress: float) -> Tensor:
        """Uniform u (b,) -> u', so that levels(u') are drawn with the sampler's density times (ess - 1) / (largest - 1).

        That factor is 0 where a single proposal carries all weight and 1 where all carry the same. At most 99 % of the draws are
        moved, so that every level goes on being measured.
        """
        grid = (torch.arange(GRID, device=u.device) + 0.5) / GRID
        worth = ((self.mean.to(u.device) - 1) / (self.largest - 1)).clamp(0, 1)
        density = worth[torch.bucketize(self.levels(grid, progress), self.edges.to(u.device))] + 1e-6
        density = 0.99 * density / density.sum() + 0.01 / GRID
        cumulated = torch.cat([density.new_zeros(1), density.cumsum(0)])
        cell = torch.searchsorted(cumulated, u * cumulated[-1], right=True).clamp(1, GRID) - 1
        inside = (u * cumulated[-1] - cumulated[cell]) / density[cell]
        return ((cell + inside.clamp(0, 1)) / GRID).clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)
