"""CIFAR-10 by the shipped recipes: a teacher, its curve, one-step students of all three objectives, a grid.

    python -m scripts.bench.cifar --cifar DIR [--size cpu] [--output outputs/bench] [--objectives vardiu ...]

DIR holds train.parquet with columns img and label. --size full: the recipes as they are, but for the data (a GPU, days); cpu: a
small network and few steps, SMALL below. Frechet distance on the features of a classifier made here. Writes <output>/cifar.json
and cifar.png. Run again, it continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from eval.metrics.frechet import GaussianStats, frechet_distance
from eval.studies.digits.evaluate import load_pipeline
from eval.studies.digits.generate import generate
from pipelines.common.identity import pipeline_identity
from pipelines.common.options import path, whole
from pipelines.common.provenance import git_commit, versions
from pipelines.data.images import ImageSet, load_parquet

from ..jobs import LAUNCH, Job, cores, exit_cleanly, kept, run, run_all
from .parts.judge import Judge

OBJECTIVES = ("vardiu", "diff_instruct", "varflow")
SMALL = {
    "teacher": (
        *("network.model_channels=32", "network.channel_mult=[1,2,2]", "network.num_blocks=1", "network.dropout=0.0"),
        *("batch_size=64", "steps=2600", "log_every=50", "optimizer.lr=2e-3", "optimizer.warmup_steps=200"),
        *("optimizer.schedule=cosine", "optimizer.final_ratio=0.02", "ema_halflife=20000"),
        *("sample_every=650", "checkpoint_every=650", "snapshot_every=650"),
    ),
    "student": (
        *("student.lora.rank=16", "student.optimizer.lr=5e-4", "student.optimizer.warmup_steps=20", "ema_halflife=2000"),
        *("student.optimizer.schedule=cosine", "student.optimizer.final_ratio=0.1", "log_every=10"),
        *("sample_every=80", "checkpoint_every=80", "snapshot_every=80"),
    ),
    "vardiu": ("steps=400", "batch_size=32", "objective.posterior.optimizer.lr=1e-3"),
    "diff_instruct": (
        *("steps=400", "batch_size=32", "objective.fake_score.optimizer.lr=1e-3", "objective.fake_score.lora.rank=16"),
    ),
    "varflow": ("steps=160", "batch_size=128", "student.optimizer.lr=2e-3"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=path, required=True)
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    parser.add_argument("--size", choices=("cpu", "full"), default="cpu")
    parser.add_argument("--images", type=whole(2), default=500, help="of each model, to measure")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    args = parser.parse_args()
    folder, start = args.output / "cifar", time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    file = args.cifar / "train.parquet"
    data = f"data={{name: parquet, files: [{file}], image_column: img, image_size: 32}}"
    small = SMALL if args.size == "cpu" else dict.fromkeys(SMALL, ())

    teacher = [*LAUNCH, "trainers.train_teacher", "--config", "configs/cifar10_teacher.yaml", f"output_dir={folder}/teacher"]
    run([*teacher, data, "resume=latest", *small["teacher"]], cores())
    jobs = []
    for name in args.objectives:
        more = [f"teacher.path={folder}/teacher", *small["student"], *small[name], *([data] if name == "varflow" else [])]
        jobs.append(Job(name, Path(f"configs/cifar10_edm_{name}.yaml"), folder / name, more))
    run_all(jobs, min(len(jobs), cores()), threads=max(1, cores() // len(jobs)))

    images = load_parquet([str(file)], "img", "label", 32, 3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:20_000]
    judge = Judge(ImageSet(images.pixels[order], images.labels[order]), folder / "judge.safetensors", steps=300)
    as_many = GaussianStats.of(judge.held_out_features[: args.images])  # the distance depends on how many images there are
    floor = {"fd": frechet_distance(as_many, judge.real), "accuracy": judge.held_out["accuracy"]}
    numbers, rows = {"real, held out, as many": floor}, [images.pixels[:16]]

    def measure(name: str, model: Path, role: str, show: bool) -> None:
        """Its numbers are kept beside a model; of those in the grid, 16 images are drawn again."""
        pipe = load_pipeline(model, role)

        def found() -> dict[str, float]:
            made = generate(pipe, args.images, batch_size=100, progress=name)
            facts = json.loads((model / f"{role}.json").read_text())
            found = judge.measure(made.pixels) | {key: facts[key] for key in ("steps", "train_seconds")}
            return found | {"calls": made.calls, "seconds_per_image": made.seconds_per_image}

        identity = pipeline_identity(pipe) | {"judge": judge.identity, "images": args.images}
        numbers[name] = kept(model / "measured.json", identity, found)
        print(f"{name:32} FD {numbers[name]['fd']:8.3f}  {numbers[name]['calls']:g} calls an image", flush=True)
        if show:
            rows.append(generate(pipe, 16).pixels)

    for model in sorted((folder / "teacher" / "snapshots").iterdir()):
        measure(f"teacher, {model.name}", model, "teacher", show=False)
    measure("teacher", folder / "teacher" / "teacher", "teacher", show=True)
    for name in args.objectives:
        for model in sorted((folder / name / "snapshots").iterdir()):
            measure(f"{name}, {model.name}", model, "student", show=False)
        measure(name, folder / name / "student", "student", show=True)
    save_image(enlarged(torch.cat(rows)), args.output / "cifar.png", nrow=16)
    facts = {"git_commit": git_commit(), "versions": versions(("torch", "diffusers", "peft")), "images": args.images}
    facts |= {"size": args.size, "seconds_in_all": round(time.perf_counter() - start), "cpus": os.cpu_count()}
    (args.output / "cifar.json").write_text(json.dumps({"models": numbers} | facts, indent=1))


def enlarged(pixels: Tensor) -> Tensor:
    """uint8 (n, 3, 32, 32) -> float (n, 3, 64, 64) in [0, 1]."""
    return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3).float() / 255


if __name__ == "__main__":
    exit_cleanly(main)
