"""The benchmark of points: the published update, what the two scripts write, and the laws that their numbers rest on."""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.studies.points.numbers import Pushforward
from pipelines.analytic import make_mixture
from pipelines.common.config import load_config
from pipelines.noise import EDMSchedule
from scripts.bench import mog40 as bench_mog40
from scripts.bench import mog40_bounds as bench_mog40_bounds
from scripts.bench.parts.mog40_reference import PublishedVarDiU, network
from trainers import distill
from trainers.config.run import DistillConfig
from trainers.objectives.importance import bound_loss
from trainers.objectives.vardiu import VarDiU

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerator")


STEP_SEED = 5


def published_gradients(monkeypatch, weights_as_published: bool) -> list[Tensor]:
    """Of both networks in the published update's first step, neither clipped nor applied."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    baseline = PublishedVarDiU(make_mixture(), 3, weights_as_published)
    held: list[Tensor] = []
    for net, optimizer in zip((baseline.decoder, baseline.encoder), baseline.optimizers, strict=True):
        optimizer.step = lambda net=net: held.extend(p.grad.clone() for p in net.parameters())
    torch.manual_seed(STEP_SEED)
    baseline.step(0.0)
    return held


def bound_gradients(weighting: str) -> list[Tensor]:
    """This library's bound on the same networks and draws, weighted by 1 or by (sigma / 20)^2."""
    baseline = PublishedVarDiU(make_mixture(), 3)
    torch.manual_seed(STEP_SEED)
    z = torch.randn(512, 2).repeat(2, 1)
    x0 = baseline.sample(z)
    sigma = (0.1 + torch.rand(512, 1) ** 0.1 * 19.9).repeat(2, 1)
    eps = torch.randn(512, 2)
    x_t = x0 + sigma * torch.cat([eps, -eps])
    mean, raw = baseline.encoder(torch.cat([x_t, sigma, sigma], 1)).chunk(2, 1)
    log_q = torch.distributions.Normal(mean, torch.nn.functional.softplus(raw) * sigma).log_prob(z).sum(1)
    level, points = EDMSchedule(0.0, 100.0).level(sigma[:, 0]), x_t.detach()[:, :, None, None]
    score_d = (make_mixture()(points, level.t) - points) / level.sigma.square()
    w = {"uniform": torch.ones(1024), "sigma2": (sigma[:, 0] / 20).square()}[weighting]
    loss = bound_loss(x_t[:, :, None, None], score_d, log_q, w.view(-1, 1, 1, 1)).mean()
    scale = 1.0 if weighting == "sigma2" else (sigma / 20).square().mean()
    gradients = torch.autograd.grad(loss, [*baseline.decoder.parameters(), *baseline.encoder.parameters()])
    return [scale * g for g in gradients]


def differ(a: list[Tensor], b: list[Tensor]) -> float:
    """Relative distance of two gradients."""
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (a, b))
    return float((a - b).norm() / b.norm())


def test_published_weights_cancel(monkeypatch):
    """(b, 1) times (b,): the published gradient is the mean weight times that of uniform weights. Meant as written, it is the
    gradient of this library's weighted bound.
    """
    published, meant = (published_gradients(monkeypatch, as_published) for as_published in (True, False))
    assert differ(published, bound_gradients("uniform")) < 1e-4
    assert differ(meant, bound_gradients("sigma2")) < 1e-4
    assert differ(meant, published) > 0.01


def test_networks_of_the_published_setting():
    """4 -> 400 x 4 -> 2 and 4, as the authors' files have them."""
    first, hidden = 4 * 400 + 400, 400 * 400 + 400
    assert [sum(p.numel() for p in network(n).parameters()) for n in (2, 4)] == [first + 3 * hidden + 401 * n for n in (2, 4)]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Both scripts, a few steps and samples of everything; -> the folder that they fill."""
    for name, value in (("SAMPLES", 300), ("SNAPSHOTS", 2), ("CALIBRATION", 4)):
        monkeypatch.setattr(bench_mog40, name, value)
    # measuring processes must see these, which they do as copies of this one: not the default from Python 3.14 on
    pool = partial(ProcessPoolExecutor, mp_context=get_context("fork"))
    monkeypatch.setattr(bench_mog40, "ProcessPoolExecutor", pool)
    for name, value in (("DRAWN", 50), ("EARLY", 3), ("BATCHES", 2), ("SIGMAS", (2.0, 9.0)), ("INTEGRATED", (2.0,))):
        monkeypatch.setattr(bench_mog40_bounds, name, value)
    return tmp_path


def call(main, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    main()


@pytest.mark.slow
def test_the_whole_benchmark(bench, monkeypatch, capfd):
    """Method by method: what is there is kept, and nothing is trained twice."""
    methods = ["published", "vardiu"]
    options = ["--seconds", "0.2", "--seeds", "1", "--output", str(bench), "--workers", "2"]
    for name in methods:
        call(bench_mog40.main, monkeypatch, *options, "--methods", name)
    found = json.loads((bench / "mog40.json").read_text())
    assert sorted(found["methods"]) == sorted(methods)
    for name in methods:
        (rows,) = found["methods"][name].values()
        assert {"seconds", "step", *bench_mog40.KEYS} == rows[0].keys()
        assert [r["seconds"] for r in rows] == sorted(r["seconds"] for r in rows)
    assert len(rows) == 2
    assert found["truth"]["modes"] == 40
    assert all((bench / f"mog40_{name}.png").stat().st_size > 5000 for name in ("samples", "curves"))
    before = (bench / "mog40" / "vardiu_0" / "student" / "student.json").read_text()
    call(bench_mog40.main, monkeypatch, *options, "--methods", "vardiu")
    assert (bench / "mog40" / "vardiu_0" / "student" / "student.json").read_text() == before

    monkeypatch.setattr(bench_mog40_bounds, "step_times", lambda: {"published": {"median": 1.0}})  # timed elsewhere
    call(bench_mog40_bounds.main, monkeypatch, "--output", str(bench))
    bounds = json.loads((bench / "mog40_bounds.json").read_text())
    assert len(bounds["tightness"]) == 1
    for label, rows in bounds["tightness"].items():
        assert [r["sigma"] for r in rows] == [2.0, 9.0]
        assert all(r["gap"] > -4 * r["gap_error"] for r in rows)
        assert bounds["mass"][label] < 1e-3
    assert bounds["cosines"]["bound"]["mean"] <= 1
    assert (bench / "mog40_bounds.png").stat().st_size > 5000
    assert bounds["noise"] == {}  # of runs that were not made here


def test_noise_of_gradients_where_they_are_linear(tmp_path, monkeypatch):
    """A teacher N(0, s^2) and a posterior that is the prior: the gradient is -x_t / (s^2 + sigma^2), a pair has no noise, and
    neither has the control variate times sigma^2 / (s^2 + sigma^2).
    """
    monkeypatch.setattr(bench_mog40_bounds, "LATENTS", 13)
    s, given = 3.0, [f"output_dir={tmp_path}", "student.network={width: 5}", "objective.posterior.network={width: 5}"]
    given += [f"data={{name: mixture, means: [[0, 0]], std: {s}}}"]
    config = load_config(DistillConfig, str(ROOT / "configs" / "mog40_vardiu.yaml"), given)
    rows = bench_mog40_bounds.noise_of_gradients(distill.make_trainer(config).objective)
    assert [r["sigma"] for r in rows] == [0.1, *bench_mog40_bounds.SIGMAS]
    for r in rows:
        variance = s**2 + r["sigma"] ** 2
        assert r["factor"] == pytest.approx(r["sigma"] ** 2 / variance, rel=1e-3)
        assert r["single"] == pytest.approx(2 * r["sigma"] ** 2 / variance**2, rel=0.15)  # 13 x 64 x 2 squares
        assert r["pair"] < 1e-6 * r["single"]
        assert r["best"] < 1e-4 * r["single"]


def test_exact_gradient_is_that_of_the_divergence(tmp_path):
    """With uniform weights at one level E (s_theta - s_d) . dx_t/dtheta is the derivative of the KL, by differences of it."""
    given = [f"output_dir={tmp_path}", "student.network={width: 5}"]
    trainer = distill.make_trainer(load_config(DistillConfig, str(ROOT / "configs" / "mog40_vardiu.yaml"), given))
    networks = (trainer.objective.student, trainer.objective.teacher, trainer.objective.posterior)
    plain = VarDiU(*networks, lambda u, _: torch.full_like(u, 9.0), "uniform", antithetic=False)
    bias, n = trainer.objective.student.denoiser.network.conv_out.bias, 4000
    (draw,) = trainer.draws.batch(("x", 0), 0.5)
    draw.z, draw.eps = (torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    draw.u = torch.full((n,), 0.5)

    def law() -> Pushforward:
        return Pushforward(trainer.objective.student, 2, per_axis=120)

    @torch.no_grad()
    def divergence(shift: float) -> Tensor:
        bias[0] += shift
        values = law().diffusive_kl(plain.noised(draw).x_t, make_mixture(), 9.0)
        bias[0] -= shift
        return values

    (found,) = torch.autograd.grad(bench_mog40_bounds.exact_loss(plain, law(), draw).loss.mean(), bias)
    differences = (divergence(0.02) - divergence(-0.02)) / 0.04
    error = differences.std().item() / n**0.5
    assert found[0].item() == pytest.approx(differences.mean().item(), abs=4 * error)
    assert abs(found[0].item()) > 8 * error  # it is not nothing that is compared
