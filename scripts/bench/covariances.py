"""What each covariance of the posterior buys: VarDiU's bound on the digits with one after another, all else equal.

    python -m scripts.bench.covariances [--teacher RUN] [--output outputs/bench] [--steps 160]

For each: the bound on KL(p_theta,t || p_d,t) in nats; its value with 64 more samples of the same posterior, nearer the KL, so
that the difference is slack that another covariance might have spared; E log q(z|x_t) - log p(z), a lower bound on what x_t says
of z; all averaged over the recipe's levels; and the student's FD. Writes <output>/covariances.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.common.config import load_config
from pipelines.common.options import path, whole
from pipelines.data.images import load_digits, to_unit
from pipelines.noise import Level
from trainers.config.run import DistillConfig
from trainers.engine import checkpoint
from trainers.engine.draws import DrawSource
from trainers.families.edm import Family
from trainers.objectives.base import sample_level
from trainers.objectives.importance import log_importance, log_standard_normal
from trainers.objectives.vardiu import VarDiU
from trainers.posteriors import COVARIANCES

from ..jobs import Job, cores, exit_cleanly, run_all
from .digits import measure

CONFIG = Path("configs/digits_vardiu_bound_linear.yaml")
SAMPLES, MORE = 1024, 64


def log_density_of_data(x_t: Tensor, level: Level, data: Tensor) -> Tensor:
    """log p_d,t(x_t) of the noised data set itself: a mixture of a Gaussian around each image. -> (b,)."""
    sigma = level.sigma.flatten(1)
    residual = (x_t.flatten(1)[:, None] - level.alpha.flatten(1)[:, None] * data.flatten(1)) / sigma[:, :, None]
    log_n = log_standard_normal(residual) - residual.shape[2] * sigma.log()
    return log_n.logsumexp(1) - torch.tensor(float(len(data))).log()


@torch.no_grad()
def bounds(config: DistillConfig, folder: Path) -> dict[str, float]:
    """The networks of the last checkpoint, measured on fresh draws."""
    models = Family(config)
    teacher, student, shape = models.teacher, models.student, models.latent_shape
    objective = config.objective.build(models, config.steps)
    assert isinstance(objective, VarDiU)
    tensors, _ = checkpoint.load(checkpoint.list_checkpoints(folder / "checkpoints")[-1])
    checkpoint.restore_tensors(checkpoint.network_tensors(objective.networks), tensors["networks"], str(folder))
    data = to_unit(load_digits().pixels)
    totals: dict[str, list[Tensor]] = {"bound": [], "bound_of_65": [], "information": []}
    draws = DrawSource(config.seed, SAMPLES, shape, torch.device("cpu"), micro_batch_size=64).batch(("measure",), progress=1.0)
    for draw in draws:
        level = sample_level(draw.u, objective.levels, 1.0, teacher.schedule)
        x0 = student(draw.z)
        x_t = level.alpha * x0 + level.sigma * draw.eps
        _, features = objective.read_teacher(x_t, level, None)
        noise = draw.normal("more", MORE, *shape)
        q = objective.posterior(x_t, level, None, features, z=draw.z[:, None], noise=noise)
        x0_k = torch.cat([x0[:, None], objective.students(q.z, None)], 1)
        z_k, log_q = torch.cat([draw.z[:, None], q.z], 1), torch.cat([q.log_q, q.log_q_z], 1)
        log_v = log_importance(x_t, x0_k, z_k, log_q, level)
        log_d = log_density_of_data(x_t, level, data)
        totals["bound"].append(log_v[:, 0] - log_d)
        totals["bound_of_65"].append(log_v.logsumexp(1) - torch.tensor(1.0 + MORE).log() - log_d)
        totals["information"].append(q.log_q[:, 0] - log_standard_normal(draw.z.flatten(1)))
    return {name: torch.cat(values).mean().item() for name, values in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=path, default=Path("outputs/bench/digits/teacher"))
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    parser.add_argument("--steps", type=whole(1), default=160)
    args = parser.parse_args()
    runs = args.output / "covariances"
    jobs = {}
    for name in COVARIANCES:
        given = [f"teacher.path={args.teacher}", f"objective.posterior.covariance={name}", f"steps={args.steps}"]
        jobs[name] = Job(name, CONFIG, runs / name, [*given, "sample_every=null", "snapshot_every=null"])
    run_all(list(jobs.values()), cores(), threads=1)
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'':10}{'bound':>9}{'of 65':>9}{'information':>13}{'FD':>8}{'energy d.':>11}{'std':>7}{'classes':>16}{'s':>6}")
    for name, job in jobs.items():
        config = load_config(DistillConfig, str(CONFIG), [f"output_dir={job.folder}", *job.overrides])
        rows[name] = row = bounds(config, job.folder) | measure(job.folder / "student", "student", "digits")
        print(
            f"{name:10}{row['bound']:9.2f}{row['bound_of_65']:9.2f}{row['information']:13.2f}{row['fd']:8.2f}"
            f"{row['energy_distance']:11.3f}{row['pixel_std']:7.2f}{row['class_min']:9.1%}-{row['class_max']:.1%}{row['seconds']:6.0f}"
        )
    (args.output / "covariances.json").write_text(json.dumps({"steps": args.steps, "rows": rows}, indent=1))


if __name__ == "__main__":
    exit_cleanly(main)
