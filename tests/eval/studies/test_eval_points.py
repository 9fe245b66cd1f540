"""Models of points: each number against its definition or a closed form, and the exact student density by quadrature."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.studies.points import numbers as points
from pipelines.analytic import GaussianMixture

ROOT = Path(__file__).parents[3]
MEANS = torch.tensor([[0.0, 0.0], [9.0, 1.0], [-3.0, 8.0]])
STD, WEIGHTS = 0.7, torch.tensor([1.0, 2.0, 5.0])


@pytest.fixture
def mixture() -> GaussianMixture:
    return GaussianMixture(MEANS, STD, points.NO_NOISE, (2, 1, 1), WEIGHTS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Mean kernel over all pairs for each bandwidth."""
    squares = (a[:, None] - b).square().sum(2)
    return torch.stack([torch.exp(-squares / (2 * h**2)).sum() for h in points.BANDWIDTHS])


def test_mmd_is_its_definition(monkeypatch):
    """In tiles of another size too."""
    x, y = normal(31, 2), 1.5 * normal(31, 2, seed=1) + 0.3
    n = len(x)
    xx, yy, xy = all_pairs(x, x), all_pairs(y, y), all_pairs(x, y)
    biased = ((xx + yy - 2 * xy) / n**2).mean().item()
    unbiased = ((xx + yy - 2 * n) / (n * (n - 1)) - 2 * xy / n**2).mean().item()
    assert points.mmd(x, y) == pytest.approx((biased, unbiased), rel=1e-5)
    monkeypatch.setattr(points, "TILE", 7)
    assert points.mmd(x, y) == pytest.approx((biased, unbiased), rel=1e-5)


def test_unbiased_mmd_has_the_closed_form_as_its_mean():
    """Of two Gaussians E k(a, b) = (h^2 / (h^2 + s^2))^{d/2} exp(-|m|^2 / 2 (h^2 + s^2)), s^2 the sum of the variances."""
    s, shift, d = 1.3, torch.tensor([0.8, -0.5, 0.2]), 3

    def mean_kernel(h: float, variance: float, m2: float) -> float:
        return (h**2 / (h**2 + variance)) ** (d / 2) * math.exp(-m2 / (2 * (h**2 + variance)))

    m2 = shift.square().sum().item()
    terms = [mean_kernel(h, 2, 0) + mean_kernel(h, 2 * s**2, 0) - 2 * mean_kernel(h, 1 + s**2, m2) for h in points.BANDWIDTHS]
    values = torch.tensor([points.mmd(normal(400, d, seed=i), s * normal(400, d, seed=100 + i) + shift)[1] for i in range(40)])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - sum(terms) / len(terms)) < 4 * error
    assert error < 0.05 * values.mean()


def test_mmd_of_many_points_is_the_mean_over_blocks(monkeypatch):
    """Blocks of different sizes count by their points."""
    monkeypatch.setattr(points, "BLOCK", 13)
    x, y = normal(31, 2), normal(31, 2, seed=1) + 1
    parts = [points.mmd(x[i : i + 13], y[i : i + 13]) for i in (0, 13, 26)]
    expected = [sum(n * part[k] for n, part in zip((13, 13, 5), parts, strict=True)) / 31 for k in (0, 1)]
    assert points.mmd(x, y) == pytest.approx(tuple(expected), rel=1e-12)


@pytest.mark.slow
def test_true_samples(mixture):
    """No better numbers are to be had: log-density is minus the entropy of three islands, up to their tiny overlap."""
    n = 20_000
    found = points.evaluate(mixture.sample(n, torch.Generator().manual_seed(1)).flatten(1), mixture)
    shares = WEIGHTS / WEIGHTS.sum()
    expected = (shares * shares.log()).sum().item() - math.log(2 * math.pi * math.e * STD**2)
    assert found["log_density"] == pytest.approx(expected, abs=4 / math.sqrt(n))
    assert found["in_mode"] == pytest.approx(1 - math.exp(-(points.WITHIN**2) / 2), abs=4 * math.sqrt(0.011 / n))
    assert found["modes"] == 3
    assert 0 <= found["weight_kl"] < 10 / n  # twice n times it is chi-squared with 2 degrees of freedom
    assert abs(found["mmd_unbiased"]) < 2e-4
    assert 0 < found["mmd"] < 4e-4
    assert abs(found["energy"]) < 5e-3


@pytest.mark.slow
def test_a_missing_mode_shows_in_all_but_the_density(mixture):
    """One island less: KL log(8/7), two modes, and a *higher* log-density."""
    x = mixture.sample(30_000, torch.Generator().manual_seed(1)).flatten(1)
    whole = points.evaluate(x, mixture)
    found = points.evaluate(x[torch.cdist(x, mixture.means).argmin(1) != 0], mixture)
    assert found["modes"] == 2
    assert found["weight_kl"] == pytest.approx(math.log(8 / 7), abs=1e-3)
    assert found["log_density"] > whole["log_density"] + 0.1
    assert found["mmd"] > 5 * whole["mmd"]
    assert found["energy"] > 0.05


def test_points_between_modes_are_in_none(mixture):
    x = torch.cat([MEANS.repeat(400, 1), torch.tensor([[4.5, 0.5]]).expand(300, 2), MEANS[:1] + 2.9 * STD, MEANS[:1] - 3.1 * STD])
    found = points.mode_numbers(x.double(), mixture)
    assert found["modes"] == 3
    # (2.9, 2.9) standard deviations are 4.1 away, so neither of the last two is inside
    assert found["in_mode"] == pytest.approx(1200 / 1502)
    assert points.mode_numbers(x.double()[:1201], mixture)["modes"] == 3


def test_a_mode_needs_its_share(mixture):
    """One of a thousand samples covers a mode, fewer do not."""
    x = MEANS[2:].repeat(2000, 1).double()
    x[0] = x[1] = MEANS[1]
    assert points.mode_numbers(x, mixture)["modes"] == 2
    x[1] = MEANS[2]
    assert points.mode_numbers(x, mixture)["modes"] == 1


def test_broken_points_are_refused(mixture):
    x = normal(11, 2)
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        points.evaluate(x, mixture)


def test_latent_grid_is_of_equal_probability():
    grid = points.latent_grid(41, 2)
    assert grid.shape == (41**2, 2)
    assert grid.mean(0).abs().max() < 1e-12
    assert grid[20 * 41 + 20].abs().max() < 1e-12
    assert torch.special.ndtr(grid[:41, 1]).diff() == pytest.approx(1 / 41, rel=1e-9)
    assert points.latent_grid(201, 1).square().mean().item() == pytest.approx(1, abs=0.02)


def test_pushforward_of_a_linear_student():
    """g(z) = A z + m: p_theta,t is a Gaussian, whose density, posterior mean and KL to another are known."""
    a, m, sigma = torch.tensor([[1.5, 0.4], [-0.3, 0.8]]), torch.tensor([0.7, -1.1]), 0.6
    law = points.Pushforward(lambda z: (z.flatten(1) @ a.T + m).view_as(z), 2, per_axis=250)
    cov = (a @ a.T + sigma**2 * torch.eye(2)).double()
    exact = torch.distributions.MultivariateNormal(m.double(), cov)
    torch.manual_seed(0)
    x = exact.sample((500,))
    x_t = x.view(-1, 2, 1, 1)
    near = ((x - m).unsqueeze(1) @ torch.linalg.inv(cov) @ (x - m).unsqueeze(2)).flatten() < 6  # where latents of the grid reach
    torch.testing.assert_close(law.log_density(x_t, sigma)[near], exact.log_prob(x)[near], rtol=0, atol=0.02)
    gain = (a @ a.T).double() @ torch.linalg.inv(cov)
    expected = m + (x - m) @ gain.T
    torch.testing.assert_close(
        law.x0_mean(x_t[near], torch.full((500,), sigma)[near]).flatten(1), expected[near], rtol=0, atol=0.02
    )
    other = GaussianMixture(torch.zeros(1, 2), 1.2, points.NO_NOISE, (2, 1, 1))
    values = law.diffusive_kl(x_t, other, sigma)
    v = 1.2**2 + sigma**2
    kl = 0.5 * (cov.trace() / v + m.square().sum() / v - 2 + 2 * math.log(v) - torch.logdet(cov)).item()
    assert values.mean().item() == pytest.approx(kl, abs=4 * values.std().item() / math.sqrt(500) + 5e-3)


@pytest.mark.slow
def test_memory_of_many_points():
    """A million points; of the sums over pairs, whose blocks have one size however many there are, two blocks."""
    program = """
from eval.studies.points import numbers as points
from pipelines.analytic import FORTY_MODES_STD, GaussianMixture, forty_modes

mixture = GaussianMixture(forty_modes(), FORTY_MODES_STD, points.NO_NOISE, (2, 1, 1))
x = mixture.sample(1_000_000).flatten(1)
points.evaluate(x[:20_000], mixture)
print(points.mode_numbers(x, mixture)["modes"], points.log_density(x, mixture))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    modes, density, peak = done.stdout.split()
    assert modes == "40"
    assert float(density) == pytest.approx(-6.86, abs=0.01)
    assert int(peak) < 2e6  # kB
