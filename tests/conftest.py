"""What several tests share: random numbers that no global seed reaches, and a world in which every quantity is known.

Test modules cannot import one another or this file, so everything here arrives as a fixture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pipelines.noise import Level, RectifiedFlowSchedule, add_noise, score
from trainers.objectives.amortized import AmortizedScore
from trainers.objectives.base import LossTerms
from trainers.objectives.importance import log_importance
from trainers.objectives.resampled import ResampledScore
from trainers.objectives.vardiu import VarDiU

# Bits are compared, and on some processors (AMD's) MKL's products depend on how their operands lie in memory, but in this mode.
# Read at the first product; processes that tests start inherit it.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

# (b, c, h, w) in pairwise different primes: whatever broadcasts over the wrong axis raises.
SHAPE = (3, 2, 5, 7)


@pytest.fixture
def tiny_teacher() -> dict[str, Any]:
    """A configuration of trainers.train_teacher that takes a second, without output_dir."""
    return {
        "data": {"name": "digits"},
        "network": {"channels": 8, "num_blocks": 1, "patch_size": 2},
        "levels": {"name": "log_uniform", "low": 0.3, "high": 3.0},
        "optimizer": {"lr": 1e-3},
        "steps": 4,
        "batch_size": 6,
        "log_every": 1,
        "sampling_steps": 2,
        "num_samples": 2,
    }


@pytest.fixture
def train_teacher_with(tmp_path, capsys, monkeypatch) -> Callable[..., Callable[..., tuple[int, str]]]:
    """train_teacher_with(config)(folder, a=b ...) -> (exit status, what the command says, without a traceback), in tmp_path."""
    from trainers import train_teacher

    monkeypatch.chdir(tmp_path)

    def with_config(config: dict[str, Any]) -> Callable[..., tuple[int, str]]:
        (tmp_path / "config.yml").write_text(yaml.safe_dump(config))

        def run(folder: str | Path, *overrides: str) -> tuple[int, str]:
            AcceleratorState._reset_state(reset_partial_state=True)
            capsys.readouterr()
            status = 0
            try:
                train_teacher.main(["--config", "config.yml", f"output_dir={folder}", *overrides])
            except SystemExit as stopped:
                status = stopped.code
            said = capsys.readouterr().err
            assert "Traceback" not in said
            return status, said

        return run

    return with_config


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


@pytest.fixture
def float64_weights() -> Iterator[None]:
    """Modules are born in float64: made in float32 and widened, an orthogonal matrix would be one to 1e-7 only."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def assert_all_close() -> Callable[[list[Tensor], list[Tensor], float], None]:
    """assert_all_close(actual, expected, tolerance) of lists of gradients that are not all zero."""

    def check(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
        assert max(float(g.abs().max()) for g in expected) > 1e-3  # else agreement would say nothing
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, rtol=tolerance, atol=tolerance)

    return check


@pytest.fixture(scope="module")
def one_thread():
    """For networks so small that more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps its settings for the life of a process; the test starts without."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass
class Draw:
    """What an objective asks of a draw; `normals` holds the named extra numbers, `further` the further data."""

    z: Tensor
    eps: Tensor
    u: Tensor
    condition: dict[str, Tensor] | None = None
    x0: Tensor | None = None
    normals: dict[str, Tensor] = field(default_factory=dict)
    progress: float = 0.0
    first_row: int = 0
    further: list[tuple[Tensor, dict[str, Tensor] | None]] = field(default_factory=list)

    @property
    def shared_u(self) -> Tensor:
        return self.u[0]

    def further_data(self, k: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        return self.further[k - 1]

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
    """p(z | x_t, c) of a linear student, exact for the matrix and bias it holds; `stretch` scales its standard deviation.

    x0_mean: that student's mean image under it, so E[g(z) | x_t] where it is exact.
    """

    on_teacher_features = False

    def __init__(self, matrix: Tensor, bias: Tensor, stretch: float = 1.0) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(matrix.clone()), nn.Parameter(bias.clone())
        self.log_stretch = nn.Parameter(torch.tensor(math.log(stretch), dtype=torch.float64))

    def moments(self, label: int, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """(M, c, Q) with q(z | x_t) = N(M x_t + c, Q)."""
        gain = torch.linalg.inv(torch.eye(D, dtype=torch.float64) + ((1 - t) / t) ** 2 * self.matrix.T @ self.matrix)
        slope = gain @ self.matrix.T * (1 - t) / t**2
        return slope, -(1 - t) * slope @ self.bias[label], gain * torch.exp(2 * self.log_stretch)

    def forward(self, x_t: Tensor, level: Level, condition=None, features=None, z=None, noise=None) -> SimpleNamespace:
        labels = labels_of(condition, x_t)
        cells = list(zip(labels.tolist(), level.t.tolist(), strict=True))
        each = {cell: self.moments(*cell) for cell in set(cells)}
        slope, offset, cov = (torch.stack(v) for v in zip(*(each[cell] for cell in cells), strict=True))
        mean = (torch.einsum("bij,bj->bi", slope, x_t.flatten(1)) + offset)[:, None]
        factor = torch.linalg.cholesky(cov)

        def log_prob(z: Tensor) -> Tensor:
            white = torch.linalg.solve_triangular(factor, (z - mean).mT, upper=False).mT
            return (-0.5 * (white.square() + math.log(2 * math.pi))).sum(-1) - factor.diagonal(0, 1, 2).log().sum(-1)[:, None]

        samples = None if noise is None else mean + noise.flatten(2) @ factor.mT
        return SimpleNamespace(
            log_q=None if z is None else log_prob(z.flatten(2)),
            z=None if noise is None else image(samples),
            log_q_z=None if noise is None else log_prob(samples),
            x0_mean=image(mean[:, 0] @ self.matrix.T + self.bias[labels]),
        )


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

    def _draw(self, nodes: Tensor, extra: dict[str, int]) -> Draw:
        """nodes (n, (2 + images) d), repeated for every cell; a draw's extra normals by name: how many images, 0 for one
        without an axis of its own.
        """
        n, cells = len(nodes), len(self.cells)
        z, eps, *more = nodes.repeat(cells, 1).split([D, D, *(max(k, 1) * D for k in extra.values())], 1)
        label, t = zip(*self.cells, strict=True)
        label, t = torch.tensor(label).repeat_interleave(n), torch.tensor(t, dtype=torch.float64).repeat_interleave(n)
        normals = {name: image(v.unflatten(1, (k, D)) if k else v) for (name, k), v in zip(extra.items(), more, strict=True)}
        return Draw(image(z), image(eps), t, {"class_labels": label} if self.conditional else None, normals=normals)

    def cubature(self, proposals: int = 0, **extra: int) -> Draw:
        """Points +-sqrt(n) times the columns of a random rotation: means of polynomials of degree three are exact."""
        extra = {"proposals": proposals} | extra if proposals else extra
        n = (2 + sum(max(k, 1) for k in extra.values())) * D
        rotation = torch.linalg.qr(torch.randn(n, n, generator=self.generator, dtype=torch.float64)).Q
        return self._draw(math.sqrt(n) * torch.cat([rotation, -rotation]), extra)

    def random(self, n: int, proposals: int = 0, **extra: int) -> Draw:
        extra = {"proposals": proposals} | extra if proposals else extra
        images = 2 + sum(max(k, 1) for k in extra.values())
        return self._draw(torch.randn(n, images * D, generator=self.generator, dtype=torch.float64), extra)

    def at_one_x_t(self, n: int, **extra: int) -> tuple[Draw, Tensor]:
        """n draws in every cell that lead to one x_t (cells, d) there: z of the posterior p(z | x_t), eps what is left."""
        draw = self.random(n, **extra)
        x_t, z, eps = [], [], []
        for (label, t), white in zip(self.cells, self.by_cell(draw.z.flatten(1)), strict=True):
            mean, cov = (v.detach() for v in self.student_moments(label, t))
            x_t.append(mean + torch.linalg.cholesky(cov) @ torch.randn(D, generator=self.generator, dtype=torch.float64))
            slope, offset, cov = (v.detach() for v in self.exact.moments(label, t))
            z.append(slope @ x_t[-1] + offset + white @ torch.linalg.cholesky(cov).T)
            x0 = z[-1] @ self.student.matrix.detach().T + self.student.bias.detach()[label]
            eps.append((x_t[-1] - (1 - t) * x0) / t)
        draw.z, draw.eps = image(torch.cat(z)), image(torch.cat(eps))
        return draw, torch.stack(x_t)

    def posterior_mean(self, x_t: Tensor) -> Tensor:
        """E[g(z) | x_t] for one x_t in each cell (cells, d), by conditioning the joint Gaussian of x0 and x_t."""
        means = []
        for (label, t), x in zip(self.cells, x_t, strict=True):
            mean, cov = self.student_moments(label, t)
            cross = (1 - t) * self.student.matrix @ self.student.matrix.T
            means.append(self.student.bias[label] + cross @ torch.linalg.solve(cov, x - mean))
        return torch.stack(means).detach()

    def by_cell(self, value: Tensor) -> list[Tensor]:
        return list(value.chunk(len(self.cells)))

    # Objectives over it ----------------------------------------------------------------------------------------------

    def objective(self, estimator: str = "bound", posterior: nn.Module | None = None, **options) -> VarDiU:
        """The estimator by its name in configurations; the amortised one with the batch as its pool and one noised copy."""
        kind = {"resampled_score": ResampledScore, "amortized_score": AmortizedScore}.get(estimator, VarDiU)
        defaults = {
            "amortized_score": {"num_samples": 0, "noise_draws": 1},
            "bound": {"num_samples": 0, "antithetic": False, "control_variate": False},
            "multi_sample": {"num_samples": 5, "antithetic": False, "control_variate": False},
            "resampled_score": {"num_samples": 5, "antithetic": False},
        }
        options = defaults[estimator] | {"weighting": "sigma2"} | options
        return kind(self.student, self.teacher, self.exact if posterior is None else posterior, self.levels, **options)

    @staticmethod
    def extra_of(objective: VarDiU) -> dict[str, int]:
        """The extra normals that a joint update draws."""
        k, pairs = objective.num_samples, 2 if objective.antithetic else 1
        if isinstance(objective, AmortizedScore):
            named = {f"eps_{i}": 0 for i in range(1, objective.noise_draws)}
            return named | ({f"proposals_{i}": k for i in range(objective.noise_draws)} if k else {})
        if not isinstance(objective, ResampledScore):
            return {"proposals": k * pairs} if k else {}
        if objective.moves:
            return {"proposals": (objective.moves + 1) * k * pairs}  # "moves" are numbers, not images
        return {"proposals": (k // 2 if k % 2 == 0 else k) * pairs}  # an even number comes in pairs +-noise

    @staticmethod
    def whole(terms: LossTerms | Iterator[LossTerms]) -> LossTerms:
        """A loss that comes in parts in one piece: the sum of their means, as the loop sums their gradients."""
        if isinstance(terms, LossTerms):
            return terms
        total, metrics = 0, {}
        for loss, more in terms:
            total = total + loss.mean()
            metrics = {name: metrics.get(name, 0) + more.get(name, 0) for name in (metrics | more)}
        return LossTerms(total, metrics)

    def joint(self, objective: VarDiU, draw: Draw) -> LossTerms:
        return self.whole(objective.phases[-1].loss(draw))

    @staticmethod
    def gradients(loss: Tensor, *networks: nn.Module) -> list[Tensor]:
        parameters = [p for network in networks for p in network.parameters()]
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True))

    def student_score_seen(self, objective: VarDiU, draw: Draw) -> tuple[Tensor, Tensor]:
        """(The student's score in the loss, x_t) at every x_t (n, d), read off its gradient in x0: w alpha (s_theta - s_d)."""
        outputs = []
        handle = self.student.register_forward_hook(lambda m, args, out: outputs.append(out))
        loss = self.joint(objective, draw).loss.sum()
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, outputs[0])
        level = RectifiedFlowSchedule().level(draw.u)
        x_t = add_noise(outputs[0].detach(), draw.eps, level)
        score_d = score(self.teacher(x_t, level, draw.condition), x_t, level)
        return (gradient / (level.sigma**2 * level.alpha) + score_d).detach().flatten(1), x_t.detach().flatten(1)

    def importance(self, draw: Draw, posterior: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """(log v of the draw's own z and K proposals (n, K+1), x_t, log p_theta,t(x_t) (n,)) at a draw."""
        level = RectifiedFlowSchedule().level(draw.u)
        x0 = self.student(draw.z, draw.condition)
        x_t = add_noise(x0, draw.eps, level)
        noise = draw.normals.get("proposals", x0.new_empty(len(x0), 0, D, 1, 1))
        q = posterior(x_t, level, draw.condition, z=draw.z[:, None], noise=noise)
        x0_k = torch.stack([x0, *(self.student(z, draw.condition) for z in q.z.unbind(1))], 1)
        log_v = log_importance(x_t, x0_k, torch.cat([draw.z[:, None], q.z], 1), torch.cat([q.log_q, q.log_q_z], 1), level)
        cells = zip(self.cells, self.by_cell(x_t.flatten(1)), strict=True)
        log_p = torch.cat([MultivariateNormal(*self.student_moments(c, t)).log_prob(x) for (c, t), x in cells])
        return log_v.detach(), x_t.detach(), log_p.detach()

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
