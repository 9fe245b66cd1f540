"""Exact teachers: closed forms, Tweedie's formula against automatic differentiation, and a data set as a mixture of points."""

import math

import pytest
import torch
from torch import Tensor

from pipelines import analytic
from pipelines.analytic import FORTY_MODES_STD, EmpiricalPosterior, GaussianMixture, forty_modes, make_mixture, neighbours
from pipelines.denoiser import Denoiser
from pipelines.noise import EDMSchedule, Level, RectifiedFlowSchedule

K, B, D = 5, 7, 3
EDM = EDMSchedule(0.0, math.inf)
SCHEDULES = {"edm": (EDM, (0.05, 0.7, 4.0)), "flow": (RectifiedFlowSchedule(), (0.1, 0.5, 0.95))}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=SCHEDULES)
def case(request):
    """(mixture of unequal weights and widths, level t)."""
    schedule, levels = SCHEDULES[request.param]
    std, weights = torch.linspace(0.3, 1.1, K), torch.arange(1.0, K + 1)
    return GaussianMixture(3 * normal(K, D, seed=1), std, schedule, (D, 1, 1), weights), levels


def at(schedule, t: float) -> Level:
    return schedule.level(torch.full((B,), t, dtype=torch.float64))


def test_one_gaussian_in_closed_form():
    mean, std, sigma = normal(1, D, seed=3), 0.8, 1.7
    net = GaussianMixture(mean, std, EDM, (D, 1, 1))
    x = 2 * normal(B, D, 1, 1)
    expected = mean + std**2 / (std**2 + sigma**2) * (x.flatten(1) - mean)
    torch.testing.assert_close(net(x, torch.full((B,), sigma)).flatten(1), expected, rtol=1e-7, atol=1e-7)


def test_tweedie(case):
    """alpha E[x0 | x_t] - x_t = sigma^2 times the gradient of log p."""
    net, levels = case
    for t in levels:
        level = at(net.schedule, t)
        x = (3 * normal(B, D, 1, 1)).requires_grad_()
        (score,) = torch.autograd.grad(net.log_density(x, level).sum(), x)
        expected = (x + level.sigma**2 * score) / level.alpha
        torch.testing.assert_close(net(x, level.t).detach(), expected.detach(), rtol=1e-9, atol=1e-9)


def test_density_integrates_to_one():
    net = GaussianMixture(2 * normal(K, 2, seed=1), torch.linspace(0.3, 1.1, K), EDM, (2, 1, 1), torch.arange(1.0, K + 1))
    axis = torch.arange(-14, 14, 0.05, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    for sigma in (0.0, 0.4, 2.0):
        level = EDM.level(torch.full((len(grid),), sigma, dtype=torch.float64))
        assert float(net.log_density(grid, level).exp().sum() * 0.05**2) == pytest.approx(1, abs=1e-5)


def test_samples_have_the_mixtures_moments(case):
    net, _ = case
    x = net.sample(200_000, torch.Generator().manual_seed(0)).flatten(1)
    weights = net.log_weights.exp()
    mean = weights @ net.means
    second = (
        weights[:, None, None] * (net.means[:, :, None] * net.means[:, None] + net.variances[:, None, None] * torch.eye(D))
    ).sum(0)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(x.T), second - mean[:, None] * mean, rtol=0, atol=0.1)


def test_mean_of_the_noised_is_the_mean(case):
    """E over x_t of E[x0 | x_t] is E[x0], whatever the level."""
    net, levels = case
    for t in levels:
        x0 = net.sample(100_000, torch.Generator().manual_seed(1))
        level = net.schedule.level(torch.full((len(x0),), t, dtype=torch.float64))
        x_t = level.alpha * x0 + level.sigma * normal(*x0.shape, seed=2)
        torch.testing.assert_close(net(x_t, level.t).mean(0), x0.mean(0), rtol=0, atol=0.05)


def test_a_data_set_is_a_mixture_of_points(case, monkeypatch):
    """As the limit of narrow components; in cells of a few points and for a few rows at a time, which change nothing."""
    schedule, levels = case[0].schedule, case[1]
    points = 2 * normal(31, 2, 3, 1, seed=4)
    whole = EmpiricalPosterior(points, schedule)
    monkeypatch.setattr(analytic, "CELL", 3)
    monkeypatch.setattr(analytic, "COLUMNS", 2)
    parts = EmpiricalPosterior(points, schedule)
    narrow = GaussianMixture(points.flatten(1), 1e-7, schedule, (2, 3, 1))
    x = 2 * normal(B, 2, 3, 1, seed=5)
    for t in levels:
        level = at(schedule, t)
        for net in (whole, parts):
            torch.testing.assert_close(net(x, level.t), narrow(x, level.t), rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(net.log_density(x, level), narrow.log_density(x, level), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 3.0, 50.0])
def test_cells_and_levels_far_apart(sigma, monkeypatch):
    """Clusters in the plane, rows at levels of their own; in single precision too, against the whole table in float64."""
    monkeypatch.setattr(analytic, "CELL", 11)
    centres = 40 * normal(13, 1, 2, seed=6)
    points = (centres + normal(13, 17, 2, seed=7)).view(-1, 2, 1, 1).float()
    t = sigma * torch.linspace(0.5, 2, 29)
    x = points[:29] + (t.view(-1, 1, 1, 1) * normal(29, 2, 1, 1, seed=8)).float()
    difference = x.flatten(1)[:, None].double() - points.flatten(1).double()
    exponents = -0.5 * difference.square().sum(2) / t[:, None].double() ** 2
    mean, log_sum = exponents.softmax(1) @ points.flatten(1).double(), exponents.logsumexp(1)
    for kind, tolerance in ((torch.float32, 3e-5), (torch.float64, 1e-9)):
        found, found_sum = EmpiricalPosterior(points.to(kind), EDM)._passed(x.to(kind), EDM.level(t.to(kind)))
        torch.testing.assert_close(found, mean, rtol=0, atol=tolerance)
        torch.testing.assert_close(found_sum, log_sum, rtol=0, atol=tolerance)


def test_neighbours():
    """Every point counts once, in cells of at most the size, which are compact: narrower than the whole on every side."""
    points = normal(1009, 3, seed=9)
    cells, counted = neighbours(points, 70)
    assert torch.equal(cells[counted].sort().values, torch.arange(1009))
    assert cells.shape == (16, 64)
    extent = (points[cells].amax(1) - points[cells].amin(1)).median(0).values
    assert bool((extent < 0.6 * (points.amax(0) - points.amin(0))).all())


def test_few_dimensions_in_float32():
    """Points are kept relative to their cell: at little noise, far from 0, single precision is still exact enough."""
    points = 40 + normal(501, 2, 1, 1, seed=4)
    x, t = points[:B] + 0.05 * normal(B, 2, 1, 1, seed=5), torch.full((B,), 0.05, dtype=torch.float64)
    single, double = EmpiricalPosterior(points.float(), EDM), EmpiricalPosterior(points, EDM)
    torch.testing.assert_close(single(x.float(), t.float()).double(), double(x, t), rtol=0, atol=1e-3)
    found, exact = (net.log_density(v, EDM.level(t.to(v.dtype))) for net, v in ((single, x.float()), (double, x)))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)


def test_mixtures_by_their_numbers():
    """The forty modes without any; else means, std and weights; the standard deviation of a coordinate over all of it."""
    assert torch.equal(make_mixture().means, forty_modes().double())
    mixture = make_mixture([[0, 0, 3], [9, 1, 1]], [0.5, 2.0], [1, 3])
    assert mixture.shape == (3, 1, 1)
    x = mixture.sample(300_000, torch.Generator().manual_seed(0)).flatten(1)
    assert (x - x.mean(0)).square().mean().sqrt().item() == pytest.approx(mixture.std, rel=5e-3)
    assert mixture.log_weights.exp().tolist() == pytest.approx([0.25, 0.75])


def test_far_away_and_at_small_noise_it_is_the_nearest_point():
    """Where every weight underflows, the running maximum keeps the largest."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]], dtype=torch.float64).view(3, 2, 1, 1)
    net = EmpiricalPosterior(points, EDM)
    x = torch.tensor([[900.0, 0.0], [0.1, 4.0]], dtype=torch.float64).view(2, 2, 1, 1)
    mean = net(x, torch.full((2,), 1e-3, dtype=torch.float64))
    torch.testing.assert_close(mean.flatten(1), torch.tensor([[1.0, 0.0], [0.0, 5.0]], dtype=torch.float64))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("points_kind", [torch.bfloat16, torch.float32, torch.float64])
def test_images_and_dtypes(points_kind, kind):
    """Whatever is stored and asked in, the answer is x_t's kind and that of float64 to its digits."""
    points, x = torch.rand(11, 3, 5, 7).to(points_kind), torch.randn(2, 3, 5, 7).to(kind)
    found = EmpiricalPosterior(points, EDM)(x, torch.ones(2))
    exact = EmpiricalPosterior(points.double(), EDM)(x.double(), torch.ones(2).double())
    assert found.dtype == kind
    assert found.shape == x.shape
    tolerance = 1e-2 if torch.bfloat16 in (kind, points_kind) else 1e-4
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


def test_as_a_teacher():
    """Behind the denoiser's interface, with the level as the network's time."""
    net = GaussianMixture(forty_modes(), FORTY_MODES_STD, EDM, (2, 1, 1))
    teacher = Denoiser(net, EDM, "sample", 20.0)
    x = 30 * normal(B, 2, 1, 1)
    level = EDM.level(torch.linspace(0.1, 20, B, dtype=torch.float64))
    assert torch.equal(teacher(x, level), net.posterior_mean(x, level))


def test_forty_modes_are_fabs():
    """torch.manual_seed(0), (rand(40, 2) - .5) * 2 * 40; softplus(1). True samples have log-density -6.85."""
    torch.manual_seed(0)
    assert torch.equal(forty_modes(), (torch.rand(40, 2) - 0.5) * 2 * 40)
    assert pytest.approx(float(torch.nn.functional.softplus(torch.tensor(1.0)))) == FORTY_MODES_STD
    net = GaussianMixture(forty_modes(), FORTY_MODES_STD, EDM, (2, 1, 1))
    x = net.sample(100_000, torch.Generator().manual_seed(0))
    assert float(net.log_density(x, EDM.level(torch.zeros(len(x)))).mean()) == pytest.approx(-6.85, abs=0.01)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianMixture(torch.zeros(5, 3), 1.0, EDM, (2, 1, 1)), r"means have 3 dimensions, shape \(2, 1, 1\) has 2"),
        (lambda: GaussianMixture(torch.zeros(5, 2), 0.0, EDM, (2, 1, 1)), "std must be positive, got 0"),
        (lambda: GaussianMixture(torch.zeros(5, 2), 1.0, EDM, (2, 1, 1), torch.ones(4)), "must be 5 positive numbers"),
        (lambda: EmpiricalPosterior(torch.zeros(5, 2), EDM), r"float \(n, c, h, w\) with n > 0, got torch.float32 \(5, 2\)"),
        (lambda: EmpiricalPosterior(torch.full((5, 2, 1, 1), torch.nan), EDM), "NaN or infinite"),
    ],
)
def test_impossible_teachers(build, message):
    with pytest.raises(ValueError, match=message):
        build()
    net = EmpiricalPosterior(torch.zeros(3, 2, 1, 1), EDM)
    with pytest.raises(ValueError, match=r"needs sigma > 0"):
        net(torch.zeros(1, 2, 1, 1), torch.zeros(1))
