"""Which objective makes the better one-step student of the same teacher in the same time? Digits, three seeds, one thread a run.

    python -m scripts.bench.digits [--data digits] [--output outputs/bench] [--seeds 3] [--methods vardiu diff_instruct ...]

Leaves <output>/<data>.json (method -> seed -> list of {step, seconds, calls, fd, ...}) and <data>.png. Seconds are those of
training updates on one thread, warm-up included; calls count every network of the method, one a sample.
Run again, it continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from eval.metrics.frechet import GaussianStats, frechet_distance
from eval.metrics.samples import class_balance, energy_distance, halves_floor, pixel_std
from eval.report.figures import benchmark_chart
from eval.studies.digits.evaluate import load_pipeline
from eval.studies.digits.features import AreaDownsampled, FeatureExtractor, PcaPixels, digits_extractor
from eval.studies.digits.generate import generate
from eval.studies.runs import find_run
from pipelines.common.identity import pipeline_identity
from pipelines.common.options import path, whole
from pipelines.common.provenance import git_commit, versions
from pipelines.data.images import ImageSet, load_digits, load_parquet, to_unit

from ..jobs import LAUNCH, Job, cores, exit_cleanly, kept, run, run_all


@dataclass(frozen=True)
class Method:
    label: str
    config: Path


METHODS = {
    "diff_instruct": Method("Diff-Instruct", Path("configs/digits_diff_instruct.yaml")),
    "sid": Method("SiD", Path("configs/digits_sid.yaml")),
    "varflow": Method("VarFlow", Path("configs/digits_varflow.yaml")),
    "vardiu_bound": Method("VarDiU, bound, diagonal (the paper's)", Path("configs/digits_vardiu_bound.yaml")),
    "vardiu_bound_linear": Method("VarDiU, bound, best covariance", Path("configs/digits_vardiu_bound_linear.yaml")),
    "vardiu_multi_sample": Method("VarDiU, multi-sample bound", Path("configs/digits_vardiu_multi_sample.yaml")),
    "vardiu_batch": Method("VarDiU, multi-sample bound, the batch as proposals", Path("configs/digits_vardiu_batch.yaml")),
    "vardiu_resampled": Method("VarDiU, resampled score", Path("configs/digits_vardiu_resampled.yaml")),
    "vardiu": Method("VarDiU, amortised score", Path("configs/digits_vardiu.yaml")),
}
BASELINE = "diff_instruct"
TITLES = {"fd": "FD, classifier", "fd_pca": "FD, whitened pixels", "energy_distance": "energy distance"}
IMAGES = 10_000


@dataclass(frozen=True)
class Setting:
    """A data set: how to load it, and what its runs have that differs from the recipes of the 8x8 digits.

    data: the `data` section of teachers and of objectives that need one; teacher: further overrides of its training.
    scale: noise levels and sigma_init grow with the side of an upsampled image, whose pixels say the same thing several times.
    """

    load: Callable[[], ImageSet]
    data: str = "{name: digits}"
    teacher: tuple[str, ...] = ()
    scale: float = 1.0


def enlarged_digits(size: int) -> Setting:
    """The U-Net works on blocks of pixels, so that its features stay 8x8 and the price of a call that of the small digits."""
    scale = size // 8
    network = f"network={{channels: 32, channel_mult: [1, 2, 4], num_blocks: 1, patch_size: {scale}}}"
    levels = f"levels={{name: log_normal, mean: {math.log(scale) - 0.8:.3f}, std: 1.4}}"
    data = f"{{name: digits, image_size: {size}}}"
    return Setting(lambda: load_digits(size), data, (network, levels, f"sigma_max={10 * scale}"), scale)


CIFAR = "../shared/data/cifar10/train.parquet"
SETTINGS = {
    "digits": Setting(load_digits),
    "digits16": enlarged_digits(16),
    "digits32": enlarged_digits(32),
    "cifar16": Setting(
        lambda: load_parquet([CIFAR], "img", None, 16, 3),
        f"{{name: parquet, files: [{CIFAR}], image_column: img, image_size: 16}}",
        ("sigma_data=0.5", "network={channels: 32, channel_mult: [1, 2, 4], num_blocks: 1, patch_size: 2}", "steps=2500"),
        1.5,
    ),
}


@dataclass(frozen=True)
class Reference:
    """The real images, their features by each extractor, and what two halves of them read."""

    images: ImageSet
    extractors: dict[str, FeatureExtractor]
    stats: dict[str, GaussianStats]
    floor: dict[str, float]


def reference(name: str) -> Reference:
    images = SETTINGS[name].load()
    extractors: dict[str, FeatureExtractor] = {"fd_pca": PcaPixels(images.pixels)}
    if name.startswith("digits"):
        extractors["fd"] = AreaDownsampled(digits_extractor(), 8)
    features = {key: extractor(images.pixels) for key, extractor in extractors.items()}
    floor = {key: halves_floor(f, torch.Generator().manual_seed(0))[0] for key, f in features.items()}
    return Reference(images, extractors, {key: GaussianStats.of(f) for key, f in features.items()}, floor)


def measure(folder: Path, role: str, name: str, images: int = IMAGES) -> dict[str, Any]:
    """All numbers of one stored model, kept beside it; runs in a process of its own, on one thread."""
    torch.set_num_threads(1)
    real = _reference_of_this_process(name)
    pipe = load_pipeline(folder, role)
    identity = pipeline_identity(pipe) | {"images": images, "extractors": [e.describe() for e in real.extractors.values()]}
    return kept(folder / "bench.json", identity, lambda: _measure(folder, role, pipe, real, images))


def _measure(folder: Path, role: str, pipe: Any, real: Reference, images: int) -> dict[str, Any]:
    pixels = generate(pipe, images, num_classes=pipe.unet.config.num_classes).pixels
    numbers = {key: frechet_distance(GaussianStats.of(e(pixels)), real.stats[key]) for key, e in real.extractors.items()}
    few = 2000  # the energy distance of all pairs costs more than the rest together
    unit = to_unit(real.images.pixels[:IMAGES]).flatten(1)
    numbers["energy_distance"] = energy_distance(to_unit(pixels[:few]).flatten(1), unit)
    numbers["pixel_std"] = pixel_std(pixels) / pixel_std(real.images.pixels)
    if "fd" in real.extractors:
        shares = class_balance(real.extractors["fd"].classify(pixels), len(real.images.class_names))
        numbers |= {"class_min": shares.min().item(), "class_max": shares.max().item()}
    info = json.loads((folder / f"{role}.json").read_text())
    numbers |= {"step": info["steps"], "seconds": info["train_seconds"], "calls": sum(info["calls"].values())}
    return numbers


_references: dict[str, Reference] = {}


def _reference_of_this_process(name: str) -> Reference:
    if name not in _references:
        _references[name] = reference(name)
    return _references[name]


def overrides(setting: Setting, method: Method, seed: int, teacher: Path) -> list[str]:
    """What a run has besides its recipe: the teacher, the seed, and noise levels at the scale of the images."""
    recipe = yaml.safe_load(method.config.read_text())
    given = [f"teacher.path={teacher}", f"seed={seed}", "sample_every=null"]
    if "data" in recipe:
        given.append(f"data={setting.data}")
    if setting.scale != 1:
        given.append(f"student.sigma_init={recipe['student']['sigma_init'] * setting.scale:g}")
        sections = {"objective.levels": recipe["objective"]["levels"]}
        if "fake_score" in recipe["objective"]:
            sections["objective.fake_score.levels"] = recipe["objective"]["fake_score"]["levels"]
        for key, levels in sections.items():
            given += [f"{key}.{end}={levels[end] * setting.scale:g}" for end in ("low", "high")]
    return given


def smoothed(values: list[float]) -> list[float]:
    """Means of three neighbouring evaluations, at the last of them."""
    return [statistics.fmean(values[max(0, i - 2) : i + 1]) for i in range(len(values))]


def summary(curves: dict[str, dict[str, list[dict]]], key: str) -> dict[str, dict[str, float]]:
    """Each method against the baseline: the metric at the end and at the baseline's time, and the time to reach its best value.

    Medians over seeds of each evaluation first; the best and the times to reach it are of curves smoothed over 3 evaluations.
    """
    median = {
        method: [
            (statistics.median(p["seconds"] for p in points), statistics.median(p[key] for p in points))
            for points in zip(*by_seed.values(), strict=True)
        ]
        for method, by_seed in curves.items()
    }
    rows = {}
    budget = median[BASELINE][-1][0] if BASELINE in median else None
    target = min(smoothed([v for _, v in median[BASELINE]])[2:]) if budget else None
    for method, points in median.items():
        smooth = smoothed([v for _, v in points])
        row = {"seconds": points[-1][0], "final": points[-1][1]}
        if budget:
            row["at_baseline_time"] = [v for t, v in points if t <= budget or (t, v) == points[0]][-1]
            times = [t for (t, _), v in zip(points[2:], smooth[2:], strict=True) if v <= target]
            row["seconds_to_baseline_best"] = times[0] if times else None
        rows[method] = row
    return rows


def table(rows: dict[str, dict[str, float]], key: str) -> str:
    lines = [f"{key:24} {'final':>9} {'s':>6} {'at the time of ' + BASELINE:>30} {'s to its best':>14}"]
    for method, row in rows.items():
        reached = row.get("seconds_to_baseline_best")
        shown = "never" if reached is None else f"{reached:.0f}"
        lines.append(f"{method:24} {row['final']:9.4f} {row['seconds']:6.0f} {row.get('at_baseline_time', 0):30.4f} {shown:>14}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    parser.add_argument("--seeds", type=whole(1), default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    setting, runs = SETTINGS[args.data], args.output / args.data
    start, workers = time.perf_counter(), cores()

    train = [*LAUNCH, "trainers.train_teacher", "--config", "configs/digits_teacher.yaml", f"data={setting.data}"]
    run([*train, *setting.teacher, f"output_dir={runs}/teacher", "resume=latest"], workers)
    jobs = []
    for seed in range(args.seeds):
        for name in args.methods:
            given = overrides(setting, METHODS[name], seed, runs / "teacher")
            jobs.append(Job(f"{name} {seed}", METHODS[name].config, runs / f"{name}_{seed}", given))
    run_all(jobs, workers, threads=1)

    print(f"\n{time.perf_counter() - start:.0f} s of training; measuring {IMAGES:,} images of each snapshot", flush=True)
    folders = [[s.model for s in find_run(job.name, job.folder, "student").snapshots] for job in jobs]
    with ProcessPoolExecutor(workers) as pool:
        teacher = pool.submit(measure, runs / "teacher" / "teacher", "teacher", args.data)
        points = [[pool.submit(measure, folder, "student", args.data) for folder in snapshots] for snapshots in folders]
        curves: dict[str, dict[str, list[dict]]] = {}
        for job, futures in zip(jobs, points, strict=True):
            method, seed = job.name.split()
            curves.setdefault(method, {})[seed] = [f.result() for f in futures]
        teacher_numbers = teacher.result()

    real = reference(args.data)
    keys = [key for key in TITLES if key in (*real.extractors, "energy_distance")]
    summaries = {key: summary(curves, key) for key in keys}
    facts = {"teacher": teacher_numbers, "floor": real.floor, "images": IMAGES, "git_commit": git_commit()}
    facts |= {"versions": versions(("torch", "numpy", "diffusers")), "seconds_in_all": round(time.perf_counter() - start)}
    (args.output / f"{args.data}.json").write_text(json.dumps({"methods": curves, "summary": summaries} | facts, indent=1))
    figure: Figure = benchmark_chart(
        {METHODS[m].label: by_seed for m, by_seed in curves.items()}, {k: TITLES[k] for k in keys}, real.floor
    )
    figure.savefig(args.output / f"{args.data}.png", dpi=130)
    for key in keys:
        print(f"\n{table(summaries[key], key)}")
    print(f"\nfloor {real.floor}; teacher { ({k: round(teacher_numbers[k], 4) for k in keys}) }")
    print(f"{time.perf_counter() - start:.0f} s in all: {args.output}/{args.data}.json and .png")


if __name__ == "__main__":
    exit_cleanly(main)
