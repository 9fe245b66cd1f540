"""Effective sample size by noise level: what is measured, how it is averaged, and the levels that are drawn by it."""

import math
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.testing import assert_close

from trainers.config.levels import Levels
from trainers.objectives.ess import BINS, GRID, LevelStatistics

SAMPLERS = {
    "uniform": {"low": 0.3, "high": 4.7},
    "log_uniform": {"low": 0.3, "high": 4.7},
    "log_normal": {"mean": -0.4, "std": 1.6},
    "logit_normal": {"mean": -0.4, "std": 1.6},
    "karras": {"low": 0.3, "high": 4.7},
    "power": {"low": 0.3, "high": 4.7, "start": 0.1, "end": 2.0},
}
LARGEST = 17.0
MEANS = torch.tensor([1.0, 1.0, 1.5, 3.0, 4.0, 9.0, 16.0, 17.0])
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_progress = pytest.mark.parametrize("progress", [0.0, 0.3, 0.9])


def sampler(name: str):
    return TypeAdapter(Levels).validate_python({"name": name} | SAMPLERS[name]).sampler()


def statistics(name: str = "log_uniform", means: Tensor | None = None, **options) -> LevelStatistics:
    made = LevelStatistics(sampler(name), LARGEST, **options)
    if means is not None:
        made.mean.copy_(means)
    return made


def midpoints(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.arange(n, dtype=dtype) + 0.5) / n


# Measuring ---------------------------------------------------------------------------------------------------------------


@every_sampler
def test_ranges_are_equally_likely_in_the_middle_of_the_run(name):
    made = statistics(name)
    t = sampler(name)(midpoints(800, torch.float32), 0.5)
    assert torch.bincount(torch.bucketize(t, made.edges), minlength=BINS).tolist() == [100] * BINS
    expected = sampler(name)((torch.arange(BINS) + 0.5) / BINS, 0.5)
    assert made.names == [f"{v:.3g}" for v in expected.tolist()]
    assert len(set(made.names)) == BINS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_by_hand(dtype):
    """Three ranges are hit, of eight; shares and sums are over all samples, so that they can be averaged over batches."""
    made = statistics()
    t = torch.tensor([0.31, 4.6, 0.32, 4.5, 4.69, 0.33, 1.25], dtype=dtype)
    ess = torch.tensor([1.0, 10, 2, 20, 30, 3, 7], dtype=dtype)
    metrics = made.metrics(t, ess)
    assert len(metrics) == 1 + 2 * BINS
    middle = int(torch.bucketize(torch.tensor(1.25), made.edges))
    share = {0: 3 / 7, middle: 1 / 7, 7: 3 / 7}
    total = {0: 6 / 7, middle: 1.0, 7: 60 / 7}
    assert float(metrics["ess"]) == pytest.approx(73 / 7, rel=1e-6)
    for i, name in enumerate(made.names):
        assert float(metrics[f"ess_share@{name}"]) == pytest.approx(share.get(i, 0.0), rel=1e-6)
        assert float(metrics[f"ess_sum@{name}"]) == pytest.approx(total.get(i, 0.0), rel=1e-6)


def test_observe_by_hand():
    """mean <- 0.95 mean + 0.05 (sum / share) where the range was hit; elsewhere, or without the metrics, as it was."""
    made = statistics()
    assert made.mean.tolist() == [LARGEST] * BINS
    assert made.state == {"ess_by_level": made.mean}
    first, last = made.names[0], made.names[-1]
    missed = {f"ess_{what}@{name}": 0.0 for what in ("share", "sum") for name in made.names}
    made.observe(missed | {f"ess_share@{first}": 0.25, f"ess_sum@{first}": 0.5, "loss": 3.0})
    made.observe({f"ess_share@{first}": 0.5, f"ess_sum@{first}": 2.0, f"ess_share@{last}": 0.5, f"ess_sum@{last}": 3.5})
    made.observe({})
    expected = [LARGEST] * BINS
    expected[0] = 0.95 * (0.95 * LARGEST + 0.05 * 2) + 0.05 * 4
    expected[-1] = 0.95 * LARGEST + 0.05 * 7
    assert made.mean.tolist() == pytest.approx(expected, rel=1e-6)
    assert made.state["ess_by_level"] is made.mean  # what a checkpoint saves and restores in place


def test_observing_a_batch_in_parts_is_observing_it_whole(randn):
    t, ess = sampler("log_uniform")(midpoints(60).float(), 0.5), 1 + 16 * midpoints(60).float()
    order = randn(60).argsort()
    whole, parts = statistics(), statistics()
    whole.observe({name: float(v) for name, v in whole.metrics(t, ess).items()})
    each = [parts.metrics(t[rows], ess[rows]) for rows in order.split(15)]
    parts.observe({name: sum(float(m[name]) for m in each) / 4 for name in each[0]})
    assert_close(parts.mean, whole.mean, rtol=1e-6, atol=0)
    assert not bool((whole.mean == LARGEST).any())


# Drawing -----------------------------------------------------------------------------------------------------------------


@every_sampler
@every_progress
@pytest.mark.parametrize("ess", [1.5, LARGEST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_sizes_change_nothing(name, progress, ess, dtype):
    u = midpoints(3001, dtype)
    drawn = statistics(name, torch.full((BINS,), ess)).by_effective_size(u, progress)
    assert drawn.dtype == dtype
    assert_close(drawn, u, rtol=0, atol=1e-6)


@every_sampler
@every_progress
def test_density_of_the_levels(name, progress):
    """In each range the sampler's own times (ess - 1) / (largest - 1), and a hundredth of the sampler's own everywhere."""
    made, levels = statistics(name, MEANS), sampler(name)
    u = midpoints(100_000)
    drawn = made.by_effective_size(u, progress)
    assert bool((drawn.diff() > 0).all())
    edges = made.edges.double()
    prior = torch.bincount(torch.bucketize(levels(u, progress), edges), minlength=BINS) / len(u)
    share = torch.bincount(torch.bucketize(levels(drawn, progress), edges), minlength=BINS) / len(u)
    worth = (MEANS.double() - 1) / (LARGEST - 1) * prior
    assert_close(share.double(), 0.99 * worth / worth.sum() + 0.01 * prior, rtol=0, atol=2.0 / GRID)
    # where one proposal has all the weight, the hundredth is left, to be measured by
    assert float(share[0]) == pytest.approx(0.01 * float(prior[0]), rel=0.1, abs=1e-9)
    # within one range the map is linear in u, but for the cell of the grid that an edge goes through
    cell = torch.bucketize(levels(drawn, progress), edges)
    slope = drawn.diff() / u.diff()
    for i in range(BINS):
        inside = (cell[1:] == i) & (cell[:-1] == i)
        if int(inside.sum()) > 100:
            assert float(((slope[inside] / slope[inside].median() - 1).abs() < 1e-2).double().mean()) > 0.8


@every_sampler
@every_progress
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("means", [MEANS, MEANS.flip(0), torch.ones(BINS), torch.full((BINS,), 40.0)])
def test_every_draw_is_strictly_inside(name, progress, dtype, means):
    """So that every level is finite and positive: ndtri and log need u in (0, 1)."""
    ends = torch.tensor([torch.finfo(dtype).tiny, 1e-30, 0.0, 1 - torch.finfo(dtype).eps / 2, 0.5], dtype=dtype)
    drawn = statistics(name, means).by_effective_size(ends, progress)
    assert float(drawn.min()) > 0
    assert float(drawn.max()) < 1
    t = sampler(name)(drawn, progress)
    assert bool(((t > 0) & (t < math.inf)).all())


def test_every_sampler_is_tried():
    union = get_args(get_args(Levels)[0])
    assert {get_args(kind.model_fields["name"].annotation)[0] for kind in union} == set(SAMPLERS)
