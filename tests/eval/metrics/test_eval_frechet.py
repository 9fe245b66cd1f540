"""The Frechet distance against closed forms, against independent implementations, and as a streaming statistic."""

import pytest
import scipy
import torch
from torch import Tensor

from eval.metrics.frechet import GaussianStats, frechet_distance, frechet_from_moments

N, M, D = 211, 307, 13


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def features(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Correlated features (n, d) with a mean."""
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + torch.arange(d)


def of_sets(x: Tensor, y: Tensor) -> float:
    return frechet_distance(GaussianStats.of(x), GaussianStats.of(y))


def exact(x: Tensor, y: Tensor) -> float:
    """The distance without any covariance: its trace term is the nuclear norm of the product of the centred data."""
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    trace = torch.linalg.svdvals(a @ b.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * trace)


def test_diagonal_gaussians_closed_form():
    # Commuting covariances: |mu_a - mu_b|^2 + sum (s_a - s_b)^2.
    mean_a, mean_b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 3.0, 0.5])
    std_a, std_b = torch.tensor([1.0, 0.3, 4.0]), torch.tensor([2.0, 0.7, 0.0])
    value = frechet_from_moments(mean_a, std_a.square().diag(), mean_b, std_b.square().diag())
    assert value == pytest.approx(1 + 25 + 1 + 0.16 + 16, rel=1e-6)  # the inputs are float32


@pytest.mark.parametrize("std", [0.0, 1e-12, 1e-6, 1.0])
def test_one_dimension(std):
    one = torch.ones(1, dtype=torch.float64)
    value = frechet_from_moments(0 * one, one[:, None], 3 * one, std**2 * one[:, None])
    assert value == pytest.approx(9 + (1 - std) ** 2, abs=1e-12)


def test_same_set_is_zero_and_symmetric(generator):
    x, y = features(N, D, generator), features(M, D, generator)
    assert of_sets(x, x) == pytest.approx(0, abs=1e-10)
    assert of_sets(x, y) == pytest.approx(of_sets(y, x), rel=1e-12)


def test_translation_and_rotation(generator):
    x, y = features(N, D, generator), features(M, D, generator)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    assert of_sets(x @ rotation + 5, y @ rotation + 5) == pytest.approx(of_sets(x, y), rel=1e-11)
    shift = torch.linspace(-1, 1, D, dtype=torch.float64)
    assert of_sets(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(N, M), (7, M), (N, 7), (7, 11)], ids=["full", "a-few", "b-few", "both-few"])
def test_against_exact_value(n, m, generator):
    """Fewer images than features included, where eigenvalue implementations are off by 1e-5."""
    x, y = features(n, D, generator), features(m, D, generator)
    assert of_sets(x, y) == pytest.approx(exact(x, y), rel=1e-12)
    assert of_sets(x, x) == pytest.approx(0, abs=1e-10)


def test_dead_and_repeated_features(generator):
    def degenerate(n: int) -> Tensor:
        x = features(n, D, generator)
        return torch.cat([x, x[:, :3], torch.zeros(n, 2, dtype=torch.float64)], dim=1)

    x, y = degenerate(N), degenerate(M)
    assert of_sets(x, y) == pytest.approx(exact(x, y), rel=1e-12)


@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-7])
def test_ill_conditioned(smallest, generator):
    """Condition numbers of 1e6 to 1e14: Cholesky alone, Cholesky that barely succeeds, and the fallback."""
    scale = torch.logspace(0, torch.tensor(smallest).log10().item(), 31, dtype=torch.float64)
    x = torch.randn(N, 31, generator=generator, dtype=torch.float64) * scale
    y = torch.randn(M, 31, generator=generator, dtype=torch.float64) * scale.flip(0)
    # A covariance stores its small eigenvalues only to 1e-16 of the largest; their roots are what the distance needs.
    assert of_sets(x, y) == pytest.approx(exact(x, y), rel=1e-16 / smallest + 1e-12)
    assert of_sets(x, x) == pytest.approx(0, abs=1e-12)


def test_constant_features():
    x, y = torch.full((3, 5), 2.0), torch.full((4, 5), -1.0)
    assert of_sets(x, y) == pytest.approx(45, rel=1e-12)


def test_against_torchmetrics(generator):
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = (GaussianStats.of(features(n, D, generator)) for n in (N, M))
    assert frechet_distance(a, b) == pytest.approx(fid._compute_fid(a.mean, a.cov, b.mean, b.cov).item(), rel=1e-10)


@pytest.mark.skipif(tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18), reason="clean-fid calls sqrtm(disp=...)")
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_against_clean_fid(generator):
    cleanfid = pytest.importorskip("cleanfid.fid")
    a, b = (GaussianStats.of(features(n, D, generator)) for n in (N, M))
    theirs = cleanfid.frechet_distance(a.mean.numpy(), a.cov.numpy(), b.mean.numpy(), b.cov.numpy())
    assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-10)


def test_streaming_equals_batch(generator):
    x = features(N, D, generator)
    stats = GaussianStats(D)
    for part in x.split(17):
        stats.update(part)
    stats.update(x[:0])
    assert stats.n == N
    torch.testing.assert_close(stats.mean, x.mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(stats.cov, torch.cov(x.T), rtol=1e-12, atol=1e-12)


def test_merge_equals_whole(generator):
    x = features(N, D, generator)
    parts = [GaussianStats.of(part) for part in x.split([101, 3, 107])]
    merged = GaussianStats(D).merge(parts[0]).merge(parts[1]).merge(parts[2]).merge(GaussianStats(D))
    assert merged.n == N
    assert parts[0].n == 101  # merging makes a new object
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged.cov, torch.cov(x.T), rtol=1e-12, atol=1e-12)


def test_large_offset_costs_no_digits(generator):
    x = features(N, D, generator)
    stats = GaussianStats(D)
    for part in (x + 2.0**26).split(17):
        stats.update(part)
    # The offset leaves x itself 2^-27 of its digits; a plain sum of outer products would be off by about 1e2.
    torch.testing.assert_close(stats.cov, torch.cov(x.T), rtol=1e-7, atol=1e-7)


def test_float32_features_are_summed_in_float64(generator):
    x = features(N, D, generator).float()
    torch.testing.assert_close(GaussianStats.of(x).cov, torch.cov(x.double().T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images(n):
    stats = GaussianStats.of(torch.zeros(n, D))
    with pytest.raises(ValueError, match=f"at least 2 images, got {n}"):
        frechet_distance(stats, stats)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features(value):
    x = torch.zeros(5, D)
    x[3, 2] = value
    with pytest.raises(ValueError, match="of 1 of 5 images are NaN or infinite \\(first: row 3\\)"):
        GaussianStats(D).update(x)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"shape \(n, 13\), got \(5, 11\)"):
        GaussianStats(D).update(torch.zeros(5, 11))
    with pytest.raises(ValueError, match=r"shape \(n, d\), got \(5,\)"):
        GaussianStats.of(torch.zeros(5))
    with pytest.raises(ValueError, match="dimension 13 and 11"):
        frechet_distance(GaussianStats.of(torch.zeros(5, 13)), GaussianStats.of(torch.zeros(5, 11)))
    with pytest.raises(ValueError, match="dimension 13 and 11"):
        GaussianStats(13).merge(GaussianStats(11))
    with pytest.raises(ValueError, match=r"cov_b has shape \(2, 2\), expected \(3, 3\)"):
        frechet_from_moments(torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(2))
    with pytest.raises(ValueError, match="cov_b holds NaN"):
        frechet_from_moments(torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(3) * torch.nan)
