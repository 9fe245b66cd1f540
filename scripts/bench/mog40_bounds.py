"""After mog40.py: how tight the bounds are, whether the estimators point where the gradient does, and what a step costs.

    python -m scripts.bench.mog40_bounds [--output outputs/bench]

Divergences and scores of a student are exact here: z has two dimensions, and a grid of them sums up its law (points.Pushforward).
Leaves <output>/mog40_bounds.json and mog40_bounds.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.studies.points import numbers as points
from eval.studies.points.figures import tightness_chart
from pipelines.analytic import make_mixture
from pipelines.common.config import load_config
from pipelines.common.options import path
from pipelines.noise import Level, add_noise, score, weight
from trainers import distill
from trainers.config.run import DistillConfig
from trainers.engine.loop import Trainer
from trainers.objectives.base import Draw, LossTerms, dot, sample_level
from trainers.objectives.diff_instruct import DiffInstruct
from trainers.objectives.importance import log_standard_normal
from trainers.objectives.resampled import ResampledScore
from trainers.objectives.vardiu import VarDiU

from ..jobs import exit_cleanly, run_all
from .mog40 import METHODS, job
from .parts.mog40_reference import PublishedVarDiU

POSTERIORS = ("vardiu_gaussian", "vardiu_full", "vardiu_planar", "vardiu_nsf", "vardiu")
LEARNED_SCORES = ("vardiu", "diff_instruct")
SIGMAS = (0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
DRAWN = 2000
EARLY = 300  # steps after which gradients are compared: later they are small, and all noise
BATCHES = 60
INTEGRATED = (0.3, 1.0, 3.0, 8.0, 20.0)
NOISY = ("vardiu_paper", "vardiu_gaussian")
LATENTS, NOISES = 256, 64


def restored(folder: Path) -> Trainer:
    """The run in `folder` as it was at its last checkpoint."""
    trainer = distill.make_trainer(load_config(DistillConfig, str(folder / "config.yaml"), ["resume=latest"]))
    trainer.restore()
    return trainer


# Tightness ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def tightness(objective: VarDiU) -> list[dict[str, float]]:
    """At each noise level the diffusive KL of the student, the bound on it with its constants, their gap and its error."""
    law, target, rows = points.Pushforward(objective.student, 2), make_mixture(), []
    generator = torch.Generator().manual_seed(3)
    for sigma in SIGMAS:
        z, eps = (torch.randn(DRAWN, 2, 1, 1, generator=generator) for _ in range(2))
        level = points.NO_NOISE.level(torch.full((DRAWN,), sigma))
        x_t = add_noise(objective.student(z), eps, level)
        log_q = objective.posterior(x_t, level, z=z[:, None]).log_q[:, 0]
        log_joint = log_standard_normal(z.flatten(1)) + log_standard_normal(eps.flatten(1)) - 2 * math.log(sigma)
        kl = law.diffusive_kl(x_t, target, sigma)
        bound = (log_joint - log_q).double() - target.log_density(x_t, level)
        gap = bound - kl
        error = float(gap.std()) / math.sqrt(DRAWN)
        rows.append({"sigma": sigma, "kl": float(kl.mean()), "bound": float(bound.mean())})
        rows[-1] |= {"gap": float(gap.mean()), "gap_error": error}
    return rows


@torch.no_grad()
def largest_error_of_mass(objective: VarDiU, x_t: Tensor) -> float:
    """max |integral of q(z | x_t) - 1| over points x_t (b, 2, 1, 1) and INTEGRATED levels, on a grid of +-9 std."""
    line, worst = torch.arange(-9, 9, 0.05), 0.0
    y = torch.cartesian_prod(line, line)[None]
    for sigma in INTEGRATED:
        for point in x_t:
            density, _ = objective.posterior.density(point[None], points.NO_NOISE.level(torch.tensor([sigma])))
            z, log_det = y, 0.0
            for f in reversed(density.maps[:2]):  # mean and scales; what follows is near the identity on such a grid
                z, more = f.inverse(z)
                log_det = log_det + more
            mass = (density.log_prob(z.unflatten(2, (2, 1, 1))) - log_det).double().exp().sum() * 0.05**2
            worst = max(worst, abs(float(mass) - 1))
    return worst


# Gradients ------------------------------------------------------------------------------------------------------------------


def gradient(objective: VarDiU | DiffInstruct, loss: Any) -> Tensor:
    """d loss / d theta as one vector; loss in parts is summed over them."""
    parameters = [p for p in objective.student.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters))
    for terms in [loss] if isinstance(loss, LossTerms) else loss:
        found = torch.autograd.grad(terms.loss.mean(), parameters, allow_unused=True)
        total += torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)])
    return total


def exact_loss(objective: VarDiU | DiffInstruct, law: points.Pushforward, draw: Draw) -> LossTerms:
    """w (s_theta - s_d) . x_t with the student's own score by quadrature."""
    x0 = objective.student(draw.z)
    level = sample_level(draw.u, objective.levels, draw.progress, objective.teacher.schedule)
    x_t = add_noise(x0, draw.eps, level)
    with torch.no_grad():
        x0_hat = objective.teacher(x_t, level)
        w = weight(objective.weighting, level, x0, x0_hat, objective.teacher.sigma_data)
        direction = w * (score(law.x0_mean(x_t, level.t), x_t, level) - score(x0_hat, x_t, level))
    return LossTerms(dot(direction, x_t), {})


def estimators(objective: VarDiU | DiffInstruct) -> dict[str, Callable[[Draw], Any]]:
    """Losses whose gradient in the student estimates the exact one, all with the networks of `objective`.

    VarDiU's on one student and one posterior, trained by the amortised score's objective, whose bound trains q as the others do.
    """
    if isinstance(objective, DiffInstruct):
        return {"Diff-Instruct's fake score": objective.student_loss}
    networks = (objective.student, objective.teacher, objective.posterior)
    options = {"levels": objective.levels, "weighting": objective.weighting, "antithetic": False}
    return {
        "bound": VarDiU(*networks, **options).joint_loss,
        "multi-sample bound, K = 8": VarDiU(*networks, **options, num_samples=8).joint_loss,
        "resampled score, K = 8": ResampledScore(*networks, **options, num_samples=8).joint_loss,
        "amortised score": objective.joint_loss,
    }


def cosines(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Of each estimator's mean gradient over BATCHES batches with the exact one's; and of single batches, on average.

    At the levels of the run's end: of those that it has left behind the networks know little by then.
    """
    objective, losses = trainer.objective, estimators(trainer.objective)
    law = points.Pushforward(objective.student, 2, per_axis=300)
    sums: dict[str, list[Tensor]] = {name: [] for name in ("exact", *losses)}
    for i in range(BATCHES):
        (draw,) = trainer.draws.batch(("study", i), progress=1.0)
        sums["exact"].append(gradient(objective, exact_loss(objective, law, draw)))
        for name, loss in losses.items():
            sums[name].append(gradient(objective, loss(draw)))
    exact = torch.stack(sums.pop("exact"))
    rows = {f"exact, one half of the batches with the other, {type(objective).__name__}": halves(exact)}
    for name, found in sums.items():
        each = statistics.fmean(cosine(g, exact.mean(0)) for g in found)
        mean = torch.stack(found).mean(0)
        rows[name] = {"mean": cosine(mean, exact.mean(0)), "single": each, "length": float(mean.norm() / exact.mean(0).norm())}
    return rows


def halves(gradients: Tensor) -> dict[str, float]:
    """How far the mean itself is known: gradients (n, parameters)."""
    return {"mean": cosine(gradients[::2].mean(0), gradients[1::2].mean(0))}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


# Noise ----------------------------------------------------------------------------------------------------------------------


def noise_of_gradients(objective: VarDiU) -> list[dict[str, float]]:
    """Variances, summed over dimensions, of the bound's gradient in x0 at each noise level (w = 1), in the run's last networks:

    between_z, of its mean over eps, which only more latents lower; and given z, over eps, of one noise a sample as in Eq. 12
    (single), with the control variate, and of the mean of a pair +-eps. best: the factor of eps / sigma with the least variance.
    """
    generator, rows = torch.Generator().manual_seed(7), []
    z = torch.randn(LATENTS, 2, 1, 1, generator=generator)
    with torch.no_grad():
        x0 = objective.student(z).repeat_interleave(NOISES, 0)
    z = z.repeat_interleave(NOISES, 0)[:, None]
    for sigma in (0.1, *SIGMAS):
        level = points.NO_NOISE.level(torch.full((len(x0),), sigma))
        eps = torch.randn(x0.shape, generator=generator)

        def slope(noise: Tensor, level: Level = level) -> Tensor:
            x_t = add_noise(x0, noise, level).requires_grad_(True)
            (of_q,) = torch.autograd.grad(objective.posterior(x_t, level, z=z).log_q.sum(), x_t)
            with torch.no_grad():
                found = of_q + score(objective.teacher(x_t, level), x_t, level)
            return found.view(LATENTS, NOISES, 2)

        single, control = slope(eps), (eps / sigma).view(LATENTS, NOISES, 2)
        pair = (single + slope(-eps)) / 2
        best = -float(covariance(single, control) / covariance(control, control))
        kinds = {"single": single, "control_variate": single + control, "best": single + best * control, "pair": pair}
        mean = pair.mean(1)[None]
        rows.append({"sigma": sigma, "between_z": float(covariance(mean, mean)), "factor": best})
        rows[-1] |= {name: float(covariance(v, v)) for name, v in kinds.items()}
    return rows


def covariance(a: Tensor, b: Tensor) -> Tensor:
    """Within groups, summed over dimensions, mean over groups: (groups, n, d) -> ()."""
    return ((a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))).sum((1, 2)).mean() / (a.shape[1] - 1)


# A step ---------------------------------------------------------------------------------------------------------------------


def step_times(steps: int = 60) -> dict[str, dict[str, float]]:
    """Milliseconds of a published update, of ours in its setting, and of ours with one noise a sample instead of a pair: one
    after the other on one thread, medians and minima, and how they compare with the published ones.
    """
    torch.set_num_threads(1)
    baseline, rare = PublishedVarDiU(make_mixture(), 0), ("steps", "log_every", "sample_every", "checkpoint_every")
    run: dict[str, Callable[[], None]] = {"published": lambda: baseline.step(0.5)}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("vardiu_paper", "vardiu_paper_single"):
            given = [f"output_dir={folder}/{name}", *METHODS[name].overrides, *(f"{key}=1000000" for key in rare)]
            trainer = distill.make_trainer(load_config(DistillConfig, f"configs/{METHODS[name].config}.yaml", given))
            trainer.log.resume({}, step=0)
            trainer.log.bar.close()
            run[name] = trainer.one_step
        times: dict[str, list[float]] = {name: [] for name in run}
        for _ in range(steps):
            for name, step in run.items():
                start = time.perf_counter()
                step()
                times[name].append(1000 * (time.perf_counter() - start))
    kinds = {"median": statistics.median, "min": min}
    found = {name: {kind: of(values[10:]) for kind, of in kinds.items()} for name, values in times.items()}
    for row in found.values():
        row |= {f"{kind}_ratio": row[kind] / found["published"][kind] for kind in kinds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    args = parser.parse_args()
    runs = args.output / "mog40"
    found: dict[str, Any] = {"step_ms": step_times()}
    print(json.dumps(found["step_ms"], indent=1), flush=True)

    often = (f"steps={EARLY}", "checkpoint_every=100")
    early = {name: job(name, METHODS[name], runs / f"gradients_{name}", runs / "teacher", *often) for name in LEARNED_SCORES}
    run_all(list(early.values()), len(early), threads=1)
    found["cosines"] = {name: row for run in early.values() for name, row in cosines(restored(run.folder)).items()}
    print(json.dumps(found["cosines"], indent=1), flush=True)

    found["tightness"], found["mass"] = {}, {}
    for name in POSTERIORS:
        if not (runs / f"{name}_0" / "checkpoints").is_dir():
            continue
        objective = restored(runs / f"{name}_0").objective
        found["tightness"][METHODS[name].label] = tightness(objective)
        x_t = make_mixture().sample(5, torch.Generator().manual_seed(5)).float()
        found["mass"][METHODS[name].label] = largest_error_of_mass(objective, x_t)
        gaps = ", ".join(
            f"{r['sigma']:g}: {r['gap']:.3f} +- {r['gap_error']:.3f}" for r in found["tightness"][METHODS[name].label]
        )
        print(f"{METHODS[name].label}: mass off by {found['mass'][METHODS[name].label]:.1e}; gap {gaps}", flush=True)
    found["noise"] = {
        METHODS[name].label: noise_of_gradients(restored(runs / f"{name}_0").objective)
        for name in NOISY
        if (runs / f"{name}_0" / "checkpoints").is_dir()
    }
    (args.output / "mog40_bounds.json").write_text(json.dumps(found, indent=1))
    tightness_chart(found["tightness"]).savefig(args.output / "mog40_bounds.png", dpi=130)


if __name__ == "__main__":
    exit_cleanly(main)
