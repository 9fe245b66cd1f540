"""VarDiU's multi-sample bound with the batch as proposals, in the linear-Gaussian world: its gradient; a bound for every n."""

import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pipelines.noise import RectifiedFlowSchedule, add_noise
from trainers.families import load_family
from trainers.objectives.base import Need
from trainers.objectives.batch_bound import BatchBound, mixture_terms
from trainers.objectives.vardiu import Config


def objective_of(world) -> BatchBound:
    return BatchBound(world.student, world.teacher, world.levels, "sigma2")


def log_mean_density(world, draw, x0: Tensor, x_t: Tensor) -> Tensor:
    """log 1/n sum_j N(x_t; (1 - t) x0_j, t^2), row by row over the rows j of its label, from torch's own normal."""
    labels, values = draw.condition["class_labels"], []
    for i, t in enumerate(draw.u.tolist()):
        pool = x0[labels == labels[i]].flatten(1)
        kernel = MultivariateNormal((1 - t) * pool, t**2 * torch.eye(world.d, dtype=pool.dtype))
        values.append(kernel.log_prob(x_t[i].flatten()).logsumexp(0) - math.log(len(pool)))
    return torch.stack(values)


def test_loss_and_gradient_by_hand(world):
    """w [log mean_j N - x_t . s_d]: through x_t and every sample of the same class, whatever its level; the pair's mean."""
    draw = world.random(7)
    terms = objective_of(world).loss(draw)
    x0, total = world.student(draw.z, draw.condition), 0
    level = RectifiedFlowSchedule().level(draw.u)
    for sign in (1, -1):
        x_t = add_noise(x0, sign * draw.eps, level)
        real = world.teacher(x_t, level, draw.condition).detach()
        score = ((1 - level.t.view(-1, 1, 1, 1)) * real - x_t.detach()) / level.sigma**2
        total = total + level.t**2 * (log_mean_density(world, draw, x0, x_t) - (score * x_t).flatten(1).sum(1)) / 2
    assert_close(terms.loss, total, rtol=1e-9, atol=1e-9)
    mine, theirs = (world.gradients(value.mean(), world.student) for value in (terms.loss, total))
    for a, b in zip(mine, theirs, strict=True):
        assert float(b.abs().max()) > 1e-2
        assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 23])
def test_it_is_a_bound_and_tightens(n, unconditional_world):
    """E log 1/n sum_j N >= E log p_theta,t, for every n: log N(x_t | z) for one, ever nearer for more. To four standard errors of
    many batches at one level.
    """
    world, t = unconditional_world, 0.5
    mean, cov = world.student_moments(0, t)
    true = MultivariateNormal(mean.detach(), cov.detach())
    own = -0.5 * world.d * (1 + math.log(2 * math.pi * t**2))  # E log N(x_t; alpha g(z), t^2)
    information = own + float(true.entropy())
    slack = []
    for size in (n, 2 * n):
        batches = 20_000 // size
        draw = world.random(batches * size)  # the first cell's rows are enough
        x0 = world.student(draw.z[: batches * size]).view(batches, size, world.d).detach()
        x_t = (1 - t) * x0 + t * draw.eps[: batches * size].view(batches, size, world.d)
        level = RectifiedFlowSchedule().level(torch.full((size,), t, dtype=torch.float64))
        values = [
            mixture_terms(x[:, :, None, None], y[:, :, None, None], level).logsumexp(1) - math.log(size)
            for x, y in zip(x_t, x0, strict=True)
        ]
        gaps = (torch.stack(values) - true.log_prob(x_t)).mean(1)
        slack.append((float(gaps.mean()), float(gaps.std()) / math.sqrt(batches)))
    (first, error), (second, error_2) = slack
    assert first > -4 * error
    assert second < first + 4 * (error + error_2)
    assert first > information - math.log(n) - 4 * error  # what n proposals cannot tell
    if n == 1:
        assert first == pytest.approx(information, abs=4 * error)
    if n == 23:
        assert first < 0.25 * information


def test_information_is_at_most_ln_n(world, randn):
    """A sample's own term is no larger than the sum: log N - log mean <= ln n, and is it where samples lie far apart."""
    with torch.no_grad():
        world.student.matrix.mul_(1e4)
    draw = world.random(7)
    draw.z = randn(*draw.z.shape)  # of its own for each row, not the same in each cell
    terms = objective_of(world).loss(draw)
    sizes = torch.bincount(draw.condition["class_labels"])[draw.condition["class_labels"]]
    assert float(terms.metrics["information"]) == pytest.approx(float(sizes.log().mean()), rel=1e-6)
    assert float(terms.metrics["ess"]) == pytest.approx(1, rel=1e-6)


def test_mixture_terms_at_the_end_of_a_flow():
    """alpha = 0: x_t says nothing of x0."""
    level = RectifiedFlowSchedule().level(torch.tensor([1.0], dtype=torch.float64))
    x_t, x0 = torch.full((1, 3, 2, 1), 2.0, dtype=torch.float64), torch.randn(5, 3, 2, 1, dtype=torch.float64)
    expected = -0.5 * 6 * 4.0 - 3 * math.log(2 * math.pi)
    assert_close(mixture_terms(x_t, x0, level), torch.full((1, 5), expected, dtype=torch.float64), rtol=1e-8, atol=0)


def test_phases(world):
    objective = objective_of(world)
    (phase,) = objective.phases
    assert (phase.updates, phase.repeats, objective.warmup) == (("student",), 1, ())
    assert (objective.networks, objective.frozen) == ({"student": world.student}, {"teacher": world.teacher})
    assert not objective.needs_data


# Configuration -------------------------------------------------------------------------------------------------------------

LEVELS = {"name": "uniform", "low": 1.0, "high": 4.0}
SECTION = {"name": "vardiu", "estimator": "multi_sample", "proposals": "batch", "levels": LEVELS}
POSTERIOR = {"optimizer": {"lr": 1e-3}}


def validated(**changes) -> Config:
    return TypeAdapter(Config).validate_python({k: v for k, v in (SECTION | changes).items() if v is not ...})


def test_it_needs_no_posterior():
    config = validated()
    assert config.optimizers() == {}
    assert config.least_batch.size == 2
    assert not any(need.value for need in config.needs() if need.what == "posterior")
    assert "different steps" in config.few_steps_refusal()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"posterior": POSTERIOR}, "posterior has no effect with proposals=batch"),
        ({"proposals": ...}, "posterior is missing"),
        ({"num_samples": 4}, "num_samples has no effect with proposals=batch"),
        ({"control_variate": False}, "control_variate has no effect with proposals=batch"),
        ({"antithetic": False}, "antithetic has no effect with proposals=batch"),
        ({"estimator": "bound"}, "proposals has no effect with estimator='bound'"),
        ({"pool": "own"}, "pool has no effect with estimator='multi_sample'"),
    ],
)
def test_what_has_no_effect_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        validated(**changes)


def test_teachers_with_a_condition_of_their_own_for_each_sample_refuse_it():
    need = next(need for need in validated().needs() if need.value)
    assert need == Need("objective.proposals: batch", "batch_proposals", True)
    for family in ("stable_diffusion", "stable_diffusion_3", "flux", "dit"):
        assert "objective.proposals: batch has no effect for" in load_family(family).refusal(need)
    assert load_family("edm").refusal(need) is None
