"""Runs a protocol: images from the teacher and each student, measured against the real ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.common.errors import UserError
from pipelines.common.provenance import git_commit, versions
from pipelines.common.reading import loading
from pipelines.data.images import ImageSet, load_digits, to_unit

from ...metrics.frechet import GaussianStats, frechet_distance
from ...metrics.samples import (
    NeighbourCheck,
    class_balance,
    energy_distance,
    halves_floor,
    nearest_neighbour_check,
    pixel_std,
    random_halves,
)
from ..protocols import Protocol
from ..runs import Role, Run
from .features import EXTRACTORS, FeatureExtractor
from .generate import Generated, generate

DATASETS: dict[str, Callable[[], ImageSet]] = {"digits": load_digits}
PACKAGES = ("torch", "numpy", "diffusers")
FLOOR_SPLITS = 10
CURVE_IMAGES = 2000  # for each snapshot: enough to see the trend, and labelled as what it is


@dataclass(frozen=True)
class Reference:
    """The real images with all that is computed on them once: features (m, d), their statistics, the floor."""

    images: ImageSet
    features: Tensor
    stats: GaussianStats
    floor: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One model's numbers (for report.json) and a sample of its images (for the pictures)."""

    run: Run
    numbers: dict[str, Any]
    samples: Tensor
    neighbours: NeighbourCheck


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report is written from."""

    protocol: Protocol
    extractor: FeatureExtractor
    reference: Reference
    teacher: Measured
    students: tuple[Measured, ...]

    def report(self) -> dict[str, Any]:
        """The contents of report.json."""
        floor, teacher_fd = self.reference.floor, self.teacher.numbers["fd"]
        base = max(teacher_fd, floor["fd"])
        students = {s.run.name: {**s.numbers, "fd_over_base": s.numbers["fd"] / base} for s in self.students}
        return {
            "protocol": {
                "name": self.protocol.name,
                "n": self.protocol.num_images,
                "standard": self.protocol.is_standard,
                "seed": self.protocol.seed,
                "computed": self._sentence(),
                "reference": {
                    "dataset": self.protocol.dataset,
                    "n": len(self.reference.images),
                    "sha256": hashlib.sha256(self.reference.images.pixels.numpy().tobytes()).hexdigest(),
                    "pixel_std": pixel_std(self.reference.images.pixels),
                    "class_balance": _balance(self.reference.images),
                    "class_names": list(self.reference.images.class_names),
                },
            },
            "floor_fd": floor["fd"],
            "floor": floor,
            "base_fd": base,
            "teacher": {**self.teacher.numbers, "fd_over_base": teacher_fd / base},
            "students": students,
            "extractor": self.extractor.describe(),
            "versions": versions(PACKAGES),
            "git_commit": git_commit(),
        }

    def _sentence(self) -> str:
        p = self.protocol
        forced = "" if p.is_standard else f" (not the {p.standard_images:,} of the protocol)"
        return (
            f"Fréchet distance between {p.num_images:,} generated images{forced}, one seed each from seed {p.seed}, "
            f"and all {len(self.reference.images):,} real images of {p.dataset}, on the {self.extractor.dim} features "
            f"of {p.extractor}."
        )


def measure_reference(images: ImageSet, extractor: FeatureExtractor) -> Reference:
    """Features and statistics of the real images, and what every metric reads between two halves of them (FLOOR_SPLITS times)."""
    features = extractor(images.pixels)
    fd, fd_std = halves_floor(features, torch.Generator().manual_seed(0), FLOOR_SPLITS)
    unit = to_unit(images.pixels).flatten(1)
    halves = random_halves(len(images), FLOOR_SPLITS, torch.Generator().manual_seed(0))
    energy = torch.tensor([energy_distance(unit[a], unit[b]) for a, b in halves], dtype=torch.float64)
    floor = {
        "fd": fd,
        "fd_std": fd_std,
        "energy_distance": energy.mean().item(),
        "energy_distance_std": energy.std().item(),
        "splits": FLOOR_SPLITS,
        "half_size": len(images) // 2,
    }
    return Reference(images, features, GaussianStats.of(features), floor)


def measure(run: Run, generated: Generated, reference: Reference, extractor: FeatureExtractor) -> Measured:
    """All metrics of one model's images, by the keys of report.json. ValueError, UserError: see the metrics."""
    pixels, real = generated.pixels, reference.images
    stats = GaussianStats(extractor.dim)
    predicted = []
    for part in pixels.split(2048):
        stats.update(extractor(part))
        predicted.append(extractor.classify(part))
    classes = torch.cat(predicted)
    neighbours = nearest_neighbour_check(pixels, real.pixels)
    numbers: dict[str, Any] = {
        "fd": frechet_distance(stats, reference.stats),
        "energy_distance": energy_distance(to_unit(pixels).flatten(1), to_unit(real.pixels).flatten(1)),
        "class_balance": class_balance(classes, len(real.class_names)).tolist(),
        "pixel_std": pixel_std(pixels),
        "nearest_neighbour": neighbours.summary(),
        "seconds_per_image": generated.seconds_per_image,
        "calls_per_image": generated.calls,
        "n": len(pixels),
    }
    if generated.labels is not None:  # a conditional model: how often the image shows the class that was asked for
        numbers["label_accuracy"] = (classes == generated.labels).double().mean().item()
    for key in ("objective", "steps", "train_seconds", "calls"):
        numbers[key] = run.info.get(key)
    return Measured(run, numbers, pixels[:64], neighbours)


def evaluate(
    protocol: Protocol,
    teacher: Run,
    students: Sequence[Run],
    load: Callable[[Path, Role], Any] | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> Evaluation:
    """Generate and measure. load: model folder and role -> pipeline; say: gets a line for each finished part.

    Before minutes of work: FileNotFoundError or UserError for a model that cannot be loaded or makes images of another shape.
    """
    if load is None:
        load = load_pipeline
        c, h, w = DATASETS[protocol.dataset]().pixels.shape[1:]
        models: list[tuple[Run, Role]] = [(teacher, "teacher"), *((student, "student") for student in students)]
        for run, role in models:  # before minutes of work
            check_fits(load(run.model, role), run, role, (c, h, w))
    extractor = EXTRACTORS[protocol.extractor]()
    reference = measure_reference(DATASETS[protocol.dataset](), extractor)
    say(f"real images against themselves (halves): FD {reference.floor['fd']:.3f} +- {reference.floor['fd_std']:.3f}")

    def point(snapshot: Run, role: Role, name: str) -> dict[str, Any]:
        pipe = load(snapshot.model, role)
        n = min(CURVE_IMAGES, protocol.num_images)
        label = f"{name} at step {snapshot.info['steps']}"
        generated = generate(pipe, n, protocol.seed, protocol.batch_size, pipe.unet.config.num_classes, label)
        fd = frechet_distance(GaussianStats.of(extractor(generated.pixels)), reference.stats)
        return {"step": snapshot.info["steps"], "seconds": snapshot.info["train_seconds"], "fd": fd, "n": n}

    def one(run: Run, role: Role) -> Measured:
        pipe = load(run.model, role)
        generated = generate(
            pipe,
            protocol.num_images,
            protocol.seed,
            protocol.batch_size,
            num_classes=pipe.unet.config.num_classes,
            progress=run.name,
        )
        measured = measure(run, generated, reference, extractor)
        measured.numbers["curve"] = [point(snapshot, role, run.name) for snapshot in run.snapshots]
        say(
            f"{run.name}: FD {measured.numbers['fd']:.3f}, {generated.calls:g} network calls and "
            f"{1000 * generated.seconds_per_image:.2f} ms an image"
        )
        return measured

    first = one(teacher, "teacher")
    return Evaluation(protocol, extractor, reference, first, tuple(one(student, "student") for student in students))


def check_fits(pipe: object, run: Run, role: Role, shape: tuple[int, int, int]) -> None:
    """UserError unless the pipeline makes images of this shape (c, h, w)."""
    from pipelines.edm import EDMPipeline

    if not isinstance(pipe, EDMPipeline):
        raise UserError(f"{role} {run.name!r}: {run.model} is a {type(pipe).__name__}, this study is of EDM pipelines")
    config = pipe.unet.config
    made = (config["out_channels"], config["sample_size"], config["sample_size"])
    if made != shape:
        raise UserError(
            f"{role} {run.name!r}: {run.model} makes images of {made}, the study is of {shape} (channels, height, width)"
        )


def load_pipeline(folder: Path, role: Role) -> Any:
    """The pipeline stored in a teacher's or a student's model folder, without its own progress bar. UserError where it cannot be
    loaded.
    """
    if role == "student":
        from pipelines.students import load_student

        pipe = load_student(folder)
    else:
        from pipelines.edm import EDMPipeline

        with loading(f"teacher: {str(folder)!r} cannot be loaded", "copy or train it again"):
            pipe = EDMPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _balance(images: ImageSet) -> list[float]:
    if images.labels is None:
        raise ValueError("images without labels have no balance of classes")
    return class_balance(images.labels, len(images.class_names)).tolist()
