"""What several tests share: random numbers that no global seed reaches, and a world in which every quantity is known.

Test modules cannot import one another or this file, so everything here arrives as a fixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pipelines.noise import Level, RectifiedFlowSchedule

# (b, c, h, w) in pairwise different primes: whatever broadcasts over the wrong axis raises.
SHAPE = (3, 2, 5, 7)


@pytest.fixture
def shape() -> tuple[int, int, int, int]:
    return SHAPE


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def randn(generator) -> Callable[..., Tensor]:
    """randn(*shape): standard normal float64."""
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def randomise(generator) -> Callable[..., nn.Module]:
    """randomise(module, std): the module in float64 with N(0, std^2) weights, so that none of its zeros hides anything."""

    def fill(module: nn.Module, std: float = 0.2) -> nn.Module:
        module.double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return module

    return fill


@dataclass
class Draw:
    """What an objective asks of a draw; `normals` holds the named extra numbers."""

    z: Tensor
    eps: Tensor
    u: Tensor
    condition: dict[str, Tensor] | None = None
    x0: Tensor | None = None
    normals: dict[str, Tensor] = field(default_factory=dict)
    progress: float = 0.0
    first_row: int = 0

    @property
    def shared_u(self) -> Tensor:
        return self.u[0]

    def normal(self, name: str, *shape: int) -> Tensor:
        assert self.normals[name].shape == (len(self.z), *shape), f"{name}: asked for {shape}"
        return self.normals[name]


@pytest.fixture
def make_draw() -> type[Draw]:
    return Draw


# A linear student, Gaussian data and the exact posterior ----------------------------------------------------------------
# Vectors of d numbers are images (b, d, 1, 1). Three cells of (class, noise level) stand for everything that a batch mixes.

D = 3
CELLS = ((0, 0.3), (1, 0.6), (0, 0.8))


def labels_of(condition: dict[str, Tensor] | None, like: Tensor) -> Tensor:
    return torch.zeros(len(like), dtype=torch.long) if condition is None else condition["class_labels"]


def image(v: Tensor) -> Tensor:
    return v[..., None, None]


class LinearStudent(nn.Module):
    """g(z, c) = A z + b_c."""

    def __init__(self, matrix: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(matrix), nn.Parameter(bias)
        self.calls = 0

    def forward(self, z: Tensor, condition=None) -> Tensor:
        self.calls += 1
        return image(z.flatten(1) @ self.matrix.T + self.bias[labels_of(condition, z)])


class GaussianDenoiser(nn.Module):
    """E[x0 | x_t] for x0 ~ N(m_c, S)."""

    sigma_data = 0.7

    def __init__(self, mean: Tensor, cov: Tensor) -> None:
        super().__init__()
        self.mean, self.cov = nn.Parameter(mean), nn.Parameter(cov)
        self.schedule = RectifiedFlowSchedule()

    def moments(self, label: int, t: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_t = (1 - t) x0 + t eps."""
        return (1 - t) * self.mean[label], (1 - t) ** 2 * self.cov + t**2 * torch.eye(D, dtype=self.cov.dtype)

    def forward(self, x_t: Tensor, level: Level, condition=None) -> Tensor:
        mean, alpha, sigma = self.mean[labels_of(condition, x_t)], level.alpha.flatten(1), level.sigma.flatten(1)
        total = alpha[:, :, None] ** 2 * self.cov + sigma[:, :, None] ** 2 * torch.eye(D, dtype=self.cov.dtype)
        gain = alpha[:, :, None] * self.cov @ torch.linalg.inv(total)
        return image(mean + torch.einsum("bij,bj->bi", gain, x_t.flatten(1) - alpha * mean))


class GaussianPosterior(nn.Module):
    """p(z | x_t, c) of a linear student, exact for the matrix and bias it holds; `stretch` scales its standard deviation."""

    def __init__(self, matrix: Tensor, bias: Tensor, stretch: float = 1.0) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(matrix.clone()), nn.Parameter(bias.clone())
        self.log_stretch = nn.Parameter(torch.tensor(math.log(stretch), dtype=torch.float64))

    def moments(self, label: int, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """(M, c, Q) with q(z | x_t) = N(M x_t + c, Q)."""
        gain = torch.linalg.inv(torch.eye(D, dtype=torch.float64) + ((1 - t) / t) ** 2 * self.matrix.T @ self.matrix)
        slope = gain @ self.matrix.T * (1 - t) / t**2
        return slope, -(1 - t) * slope @ self.bias[label], gain * torch.exp(2 * self.log_stretch)

    def forward(self, x_t: Tensor, level: Level, condition=None, z=None, noise=None) -> SimpleNamespace:
        labels = labels_of(condition, x_t)
        cells = list(zip(labels.tolist(), level.t.tolist(), strict=True))
        each = {cell: self.moments(*cell) for cell in set(cells)}
        slope, offset, cov = (torch.stack(v) for v in zip(*(each[cell] for cell in cells), strict=True))
        mean = (torch.einsum("bij,bj->bi", slope, x_t.flatten(1)) + offset)[:, None]
        factor = torch.linalg.cholesky(cov)

        def log_prob(z: Tensor) -> Tensor:
            white = torch.linalg.solve_triangular(factor, (z - mean).mT, upper=False).mT
            return (-0.5 * (white.square() + math.log(2 * math.pi))).sum(-1) - factor.diagonal(0, 1, 2).log().sum(-1)[:, None]

        log_q = None if z is None else log_prob(z.flatten(2))
        if noise is None:
            return SimpleNamespace(log_q=log_q, z=None, log_q_z=None, calibration=None)
        samples = mean + noise.flatten(2) @ factor.mT
        return SimpleNamespace(log_q=log_q, z=image(samples), log_q_z=log_prob(samples), calibration=None)


class LinearGaussian:
    """Student, teacher and posterior with Gaussian marginals at every level, hence closed forms for all that is trained.

    Losses here are polynomials of degree two in all the normal numbers of a draw together wherever q is exact, so
    `cubature` (equal weights, exact to degree three) turns an expectation into a mean without error.
    """

    d, cells, weighting = D, CELLS, "sigma2"

    def __init__(self, generator: torch.Generator, conditional: bool = True) -> None:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.generator, self.conditional = generator, conditional
        if not conditional:
            self.cells = tuple((0, t) for _, t in CELLS)
        half = randn(D, D) / 2
        self.student = LinearStudent(torch.eye(D, dtype=torch.float64) + 0.4 * randn(D, D), randn(2, D))
        self.teacher = GaussianDenoiser(randn(2, D), 0.2 * torch.eye(D, dtype=torch.float64) + half @ half.T)
        self.teacher.schedule = RectifiedFlowSchedule()
        self.exact = GaussianPosterior(self.student.matrix.detach(), self.student.bias.detach())
        matrix, bias = self.student.matrix.detach() + 0.2 * randn(D, D), self.student.bias.detach() + 0.3 * randn(2, D)
        self.wrong = GaussianPosterior(matrix, bias, stretch=1.3)

    @staticmethod
    def levels(u: Tensor, progress: float) -> Tensor:
        return u

    def _draw(self, nodes: Tensor, proposals: int) -> Draw:
        """nodes (n, 2d + proposals d), repeated for every cell."""
        n, cells = len(nodes), len(self.cells)
        z, eps, more = nodes.repeat(cells, 1).split([D, D, proposals * D], 1)
        label, t = zip(*self.cells, strict=True)
        label, t = torch.tensor(label).repeat_interleave(n), torch.tensor(t, dtype=torch.float64).repeat_interleave(n)
        return Draw(
            image(z),
            image(eps),
            t,
            {"class_labels": label} if self.conditional else None,
            normals={"proposals": image(more.reshape(len(z), proposals, D))},
        )

    def cubature(self, proposals: int = 0) -> Draw:
        """Points +-sqrt(n) times the columns of a random rotation: means of polynomials of degree three are exact."""
        n = (2 + proposals) * D
        rotation = torch.linalg.qr(torch.randn(n, n, generator=self.generator, dtype=torch.float64)).Q
        return self._draw(math.sqrt(n) * torch.cat([rotation, -rotation]), proposals)

    def random(self, n: int, proposals: int = 0) -> Draw:
        return self._draw(torch.randn(n, (2 + proposals) * D, generator=self.generator, dtype=torch.float64), proposals)

    def weight(self, t: float) -> float:
        return t**2

    def cell_mean(self, value: Callable[[int, float], Tensor], weighted: bool = True) -> Tensor:
        """Mean over the cells of w(t) value(label, t): what a loss's mean over a draw estimates."""
        terms = [(self.weight(t) if weighted else 1.0) * value(label, t) for label, t in self.cells]
        return sum(terms) / len(terms)

    def student_moments(self, label: int, t: float) -> tuple[Tensor, Tensor]:
        a, b = self.student.matrix, self.student.bias[label]
        return (1 - t) * b, (1 - t) ** 2 * a @ a.T + t**2 * torch.eye(D, dtype=a.dtype)

    def kl(self, label: int, t: float) -> Tensor:
        """KL(p_theta,t || p_d,t), with a graph to the student."""
        mean, cov = self.student_moments(label, t)
        mean_d, cov_d = (v.detach() for v in self.teacher.moments(label, t))
        shift, precision = mean - mean_d, torch.linalg.inv(cov_d)
        trace = (precision @ cov).trace() + shift @ precision @ shift - D
        return 0.5 * (trace + torch.logdet(cov_d) - torch.logdet(cov))

    def gradient(self, value: Tensor, network: nn.Module | None = None) -> list[Tensor]:
        return list(torch.autograd.grad(value, list((network or self.student).parameters()), retain_graph=True))


@pytest.fixture
def world(generator) -> LinearGaussian:
    return LinearGaussian(generator)


@pytest.fixture
def unconditional_world(generator) -> LinearGaussian:
    return LinearGaussian(generator, conditional=False)
