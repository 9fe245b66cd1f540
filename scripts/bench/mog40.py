"""VarDiU on its own benchmark, forty Gaussians in the plane: every variant, its published update and Diff-Instruct, equal time.

    python -m scripts.bench.mog40 [--seconds 300] [--seeds 3] [--methods vardiu diff_instruct ...] [--output outputs/bench]

Each method first runs a few steps, in as many copies as there are workers, then as many as fit into --seconds on one thread, so
that rates and noise levels are annealed over the same time. Leaves <output>/mog40.json (methods: method -> seed -> list of
{seconds, step, log_density, mmd, modes, ...}), mog40_samples.png and mog40_curves.png. Run again, it continues where it was
stopped. mog40_bounds.py does the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.studies.points import numbers as points
from eval.studies.points.figures import curves_chart, scatter_chart
from pipelines.analytic import make_mixture
from pipelines.common.atomic import new_file
from pipelines.common.identity import pipeline_identity
from pipelines.common.options import path, typed, whole
from pipelines.common.provenance import git_commit, versions
from pipelines.common.strict import PositiveFloat
from pipelines.edm import EDMPipeline

from ..jobs import LAUNCH, Job, cores, exit_cleanly, kept, run, run_all
from .parts.mog40_reference import PublishedVarDiU

SAMPLES = 10_000
SNAPSHOTS = 10
LEARNED_SIGMA_INIT = 40.0  # a level that the learned teacher knows, with z in sight
CALIBRATION = 120  # steps; the second half is timed
KEYS = ("log_density", "mmd", "mmd_unbiased", "modes", "in_mode", "weight_kl", "energy")


@dataclass(frozen=True)
class Method:
    """teacher: density, learned or samples; published: the authors' update instead of a configuration."""

    label: str
    config: str = ""
    overrides: tuple[str, ...] = ()
    teacher: str = "density"
    published: bool = False


METHODS = {
    "published": Method("VarDiU as published (all samples count alike)", published=True),
    "published_weights": Method("the same, its weights meant as written", published=True),
    "vardiu_paper": Method("the published setting, this library", "mog40_vardiu_paper"),
    "vardiu_paper_single": Method(
        "the same, one noise a sample, control variate",
        "mog40_vardiu_paper",
        ("objective.antithetic=false", "objective.control_variate=true"),
    ),
    "vardiu_gaussian": Method("VarDiU, bound, diagonal Gaussian", "mog40_vardiu_gaussian"),
    "vardiu_full": Method("VarDiU, bound, full Gaussian", "mog40_vardiu_gaussian", ("objective.posterior.covariance=full",)),
    "vardiu_nsf": Method("VarDiU, bound, neural splines", "mog40_vardiu_gaussian", ("objective.posterior.covariance=nsf",)),
    "vardiu_planar": Method("VarDiU, bound, planar flow", "mog40_vardiu_gaussian", ("objective.posterior.covariance=planar",)),
    "no_antithetic": Method(
        "bound, independent noise", "mog40_vardiu_gaussian", ("objective.antithetic=false", "batch_size=1024")
    ),
    "no_annealing": Method(
        "bound, noise levels not annealed", "mog40_vardiu_gaussian", ("objective.levels={name: uniform, low: 0.3, high: 20.0}",)
    ),
    "vardiu_multi_sample": Method(
        "VarDiU, multi-sample bound, K = 4",
        "mog40_vardiu_gaussian",
        ("objective.estimator=multi_sample", "objective.num_samples=4", "batch_size=128"),
    ),
    "vardiu_resampled": Method(
        "VarDiU, resampled score, K = 8",
        "mog40_vardiu_gaussian",
        (
            "objective.estimator=resampled_score",
            "objective.num_samples=8",
            "objective.levels.low=1.0",
            "objective.posterior.covariance=nsf",
            "batch_size=128",
        ),
    ),
    "vardiu": Method("VarDiU, amortised score", "mog40_vardiu"),
    "diff_instruct": Method("Diff-Instruct", "mog40_diff_instruct"),
    "diff_instruct_10": Method("Diff-Instruct, 10 score updates", "mog40_diff_instruct", ("objective.fake_score.updates=10",)),
    "vardiu_learned": Method("VarDiU, learned teacher", "mog40_vardiu", teacher="learned"),
    "vardiu_gaussian_learned": Method("bound, diagonal Gaussian, learned teacher", "mog40_vardiu_gaussian", teacher="learned"),
    "diff_instruct_learned": Method("Diff-Instruct, learned teacher", "mog40_diff_instruct", teacher="learned"),
    # lower levels would show it single points
    "vardiu_samples": Method(
        "VarDiU, teacher is 10,000 points", "mog40_vardiu", ("objective.levels.low=0.65",), teacher="samples"
    ),
    "diff_instruct_samples": Method(
        "Diff-Instruct, teacher is 10,000 points",
        "mog40_diff_instruct",
        ("objective.levels.low=0.65", "objective.fake_score.levels.low=0.65"),
        teacher="samples",
    ),
}


def job(name: str, method: Method, folder: Path, learned: Path, *more: str) -> Job:
    """A learned teacher's student and score start from it, and so take smaller steps."""
    given = [*method.overrides, "sample_every=null", *more]
    if method.teacher == "samples":
        given += ["teacher.exact=samples", "data.num_samples=10000"]
    if method.teacher == "learned":
        score = "posterior.network=copy" if "vardiu" in method.config else "fake_score.network=null"
        start = ["student.network=null", f"student.sigma_init={LEARNED_SIGMA_INIT}", f"objective.{score}"]
        start += ["student.optimizer.lr=2.0e-3", f"objective.{score.partition('.')[0]}.optimizer.lr=1.0e-3"]
        given += [f"teacher={{path: {learned}}}", "data=null", *start]
    return Job(name, Path("configs") / f"{method.config}.yaml", folder, given)


# Runs -----------------------------------------------------------------------------------------------------------------------


def seconds_a_step(chosen: dict[str, Method], runs: Path, workers: int) -> dict[str, float]:
    """Of each method, in as many copies at once as runs will be side by side later: they share caches and cores."""
    quick = [f"log_every={CALIBRATION // 2}", "checkpoint_every=null", f"steps={CALIBRATION}"]
    copies = {
        name: [job(f"{name} timed {i}", m, runs / f"timed_{name}_{i}", runs / "teacher", *quick) for i in range(workers)]
        for name, m in chosen.items()
    }
    run_all([copy for same in copies.values() for copy in same], workers, threads=1)

    def second_half(timed: Job) -> float:
        half, whole = (json.loads(line)["seconds"] for line in (timed.folder / "timings.jsonl").read_text().splitlines()[-2:])
        return (whole - half) / (CALIBRATION - CALIBRATION // 2)

    return {name: statistics.median(map(second_half, same)) for name, same in copies.items()}


def distil(chosen: dict[str, Method], seeds: int, seconds: float, runs: Path, workers: int) -> tuple[list[Job], dict[str, str]]:
    """The runs that came to their end, and the errors of those that did not: to diverge is a result."""
    file = runs / "steps.json"
    steps = json.loads(file.read_text()) if file.is_file() else {}
    if steps.get("seconds") != seconds:  # of runs of another length
        steps = {"seconds": seconds}
    new = {n: m for n, m in chosen.items() if n not in steps and not m.published}
    for name, each in seconds_a_step(new, runs, workers).items():
        steps[name] = max(SNAPSHOTS, round(seconds / each / SNAPSHOTS)) * SNAPSHOTS
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(steps, indent=1))
    jobs = []
    for seed in range(seeds):
        for name, m in chosen.items():
            if m.published:
                continue
            every = steps[name] // SNAPSHOTS
            sizes = [f"steps={every * SNAPSHOTS}", f"snapshot_every={every}", f"log_every={every}", f"checkpoint_every={every}"]
            jobs.append(job(f"{name} {seed}", m, runs / f"{name}_{seed}", runs / "teacher", *sizes, f"seed={seed}"))
    failed = run_all(jobs, workers, threads=1, keep_going=True)
    return [done for done in jobs if done.name not in failed], failed


def measured(x: Tensor, **facts: Any) -> dict[str, Any]:
    found = points.evaluate(x, make_mixture())
    return facts | {key: found[key] for key in KEYS}


def measure(folder: Path) -> dict[str, Any]:
    """All numbers of one stored student, kept beside it; runs in a process of its own, on one thread."""
    torch.set_num_threads(1)
    info = json.loads((folder / "student.json").read_text())
    identity = pipeline_identity(EDMPipeline.from_pretrained(folder)) | {"samples": SAMPLES, "keys": KEYS}
    return kept(
        folder / "points.json",
        identity,
        lambda: measured(draw(folder), step=info["steps"], seconds=info["train_seconds"]),
    )


def draw(folder: Path, n: int = SAMPLES) -> Tensor:
    pipeline = EDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(n, generator=torch.Generator().manual_seed(11), output_type="latent").images.flatten(1)


def published(name: str, seed: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """The authors' update for as many seconds, annealed by the clock; its last samples are kept for the picture."""

    def curve() -> list[dict[str, Any]]:
        torch.set_num_threads(1)
        baseline = PublishedVarDiU(make_mixture(), seed, weights_as_published=name == "published")
        z = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(11))
        rows, spent, step = [], 0.0, 0
        while spent < seconds:
            start = time.perf_counter()
            baseline.step(spent / seconds)
            spent, step = spent + time.perf_counter() - start, step + 1
            if spent >= seconds * (len(rows) + 1) / SNAPSHOTS:
                with torch.no_grad():
                    x = baseline.sample(z)
                rows.append(measured(x, step=step, seconds=spent))
        with new_file(folder / f"{name}_{seed}.safetensors") as partial:
            save_file({"x": x}, partial)
        return rows

    return kept(folder / f"{name}_{seed}.json", {"seconds": seconds, "samples": SAMPLES, "snapshots": SNAPSHOTS}, curve)


# What came out --------------------------------------------------------------------------------------------------------------


def table(curves: dict[str, dict[str, list[dict]]], truth: dict[str, float]) -> str:
    shown = ("seconds", "step", *KEYS)
    lines = [f"{'median over seeds, at the end':46}" + "".join(f"{key:>13}" for key in shown)]
    for name, by_seed in curves.items():
        row = [statistics.median(rows[-1][key] for rows in by_seed.values()) for key in shown]
        lines.append(f"{METHODS[name].label:46}" + "".join(f"{v:13.5g}" for v in row))
    return "\n".join([*lines, f"{'true samples':46}{'':26}" + "".join(f"{truth[key]:13.5g}" for key in KEYS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=typed(PositiveFloat), default=300.0, help="of training on one thread, each run")
    parser.add_argument("--seeds", type=whole(1), default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workers", type=whole(1), default=cores(), help="runs side by side")
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    args = parser.parse_args()
    start, runs = time.perf_counter(), args.output / "mog40"
    chosen = {name: METHODS[name] for name in args.methods}
    runs.mkdir(parents=True, exist_ok=True)
    if any(m.teacher == "learned" for m in chosen.values()):
        train = [*LAUNCH, "trainers.train_teacher", "--config", "configs/mog40_teacher.yaml"]
        run([*train, f"output_dir={runs}/teacher", "resume=latest"], args.workers)
    jobs, failed = distil(chosen, args.seeds, args.seconds, runs, args.workers)

    curves: dict[str, dict[str, list[dict]]] = {name: {} for name in chosen}
    with ProcessPoolExecutor(args.workers) as pool:
        waiting: dict[tuple[str, str], Future | list[Future]] = {}
        for name, m in chosen.items():
            for seed in range(args.seeds) if m.published else ():
                waiting[name, str(seed)] = pool.submit(published, name, seed, args.seconds, runs)
        for done in jobs:
            snapshots = sorted((done.folder / "snapshots").glob("step_*"))
            waiting[tuple(done.name.split())] = [pool.submit(measure, folder) for folder in snapshots]
        for (name, seed), futures in waiting.items():
            curves[name][seed] = [f.result() for f in futures] if isinstance(futures, list) else futures.result()

    law = make_mixture()
    truth = points.evaluate(law.sample(SAMPLES, torch.Generator().manual_seed(12)).flatten(1), law)
    facts = {
        "truth": truth,
        "samples": SAMPLES,
        "git_commit": git_commit(),
        "versions": versions(("torch", "numpy", "diffusers")),
    }
    facts |= {"failed": failed, "labels": {name: m.label for name, m in METHODS.items()}}
    facts |= {"seconds_in_all": round(time.perf_counter() - start)}
    file = args.output / "mog40.json"
    before = json.loads(file.read_text())["methods"] if file.is_file() else {}
    curves = before | {name: by_seed for name, by_seed in curves.items() if by_seed}
    curves = {name: curves[name] for name in METHODS if name in curves}
    file.write_text(json.dumps({"methods": curves} | facts, indent=1))
    labelled = {METHODS[n].label: by_seed for n, by_seed in curves.items()}
    curves_chart(labelled, truth).savefig(args.output / "mog40_curves.png", dpi=130)
    panels = {"true samples": law.sample(SAMPLES, torch.Generator().manual_seed(12)).flatten(1)}
    for name in curves:
        run_of = runs / f"{name}_{min(curves[name])}"
        published_x = run_of.with_suffix(".safetensors")
        panels[METHODS[name].label] = load_file(published_x)["x"] if METHODS[name].published else draw(run_of / "student")
    scatter_chart(panels, law).savefig(args.output / "mog40_samples.png", dpi=110)
    for name, error in failed.items():
        print(f"\n{name} did not come to its end: {error}")
    print(f"\n{table(curves, truth)}\n{time.perf_counter() - start:.0f} s in all: {file}")


if __name__ == "__main__":
    exit_cleanly(main)
