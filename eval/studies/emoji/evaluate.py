"""Runs protocol emoji-2k: the teacher with 50 steps and with one, and each student, measured against the real pictures."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines import emoji
from pipelines.assets import EMOJI_CLIP, shown
from pipelines.common.errors import UserError
from pipelines.common.identity import sha256_of
from pipelines.common.provenance import git_commit, versions

from ...content import ExtractorFacts
from ...images.sampler import Sampler, load_sampler
from ...metrics.frechet import GaussianStats, frechet_distance
from ...metrics.samples import halves_floor
from ...networks.extractors import Clip
from ...networks.weights import find
from ..protocols import Protocol
from ..runs import Run
from . import prompts, teacher
from .drawing import Texts, Workers, blocks, clip_score, cores, draw, encode, is_guided, of_images, of_texts
from .teacher import PACKAGES, SHIPPED, STEPS, Kept, check_fits, load_teacher, with_one_step
from .timing import time_in_turn

FLOOR_SPLITS = 10
SHOWN = 64  # pictures of each model that a report can show


@dataclass(frozen=True)
class Real:
    """The real pictures and what is computed on them once: CLIP's statistics, the sha256 of their pixels, numbers for scale."""

    stats: GaussianStats
    sha256: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One model: its name, its numbers for report.json, the first pictures that it drew, its training run if it has one."""

    name: str
    numbers: dict[str, Any]
    samples: Tensor
    run: Run | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report is written from. started: time.perf_counter() at the start of the command."""

    protocol: Protocol
    captions: list[str]
    real: Real
    extractor: ExtractorFacts
    teacher: Measured
    one_step: Measured
    students: tuple[Measured, ...]
    machine: dict[str, float]
    started: float

    @property
    def models(self) -> tuple[Measured, ...]:
        """Teacher, teacher with one step, students: the order of rows and colours."""
        return (self.teacher, self.one_step, *self.students)

    def report(self) -> dict[str, Any]:
        """The contents of report.json."""
        p, base = self.protocol, self.teacher.numbers

        def beside_teacher(numbers: dict[str, Any]) -> dict[str, Any]:
            ratios = {f"{key}_over_teacher": numbers[key] / base[key] for key in ("fd", "clip_score")}
            return numbers | ratios | {"times_faster": base["seconds_per_image"] / numbers["seconds_per_image"]}

        return {
            "seconds_total": round(time.perf_counter() - self.started, 2),
            "protocol": {
                "name": p.name,
                "n": p.num_images,
                "standard": p.is_standard,
                "seed": p.seed,
                "batch_size": p.batch_size,
                "prompts_sha256": sha256_of(self.captions),
                "computed": self._sentence(),
            },
            "real": self.real.facts,
            "teacher": base,
            "teacher_one_step": beside_teacher(self.one_step.numbers),
            "students": {s.name: beside_teacher(s.numbers) for s in self.students},
            "extractor": self.extractor,
            "machine": self.machine,
            "versions": versions(PACKAGES),
            "git_commit": git_commit(),
        }

    def _sentence(self) -> str:
        p = self.protocol
        forced = "" if p.is_standard else f" (not the {p.standard_images:,} of the protocol)"
        return (
            f"FD-CLIP-mini (Fréchet distance on the {self.real.stats.dim} image features of assets/emoji_clip) and CLIP score "
            f"(mean cosine of picture and caption by the same network) of {p.num_images:,} pictures{forced}, one seed each from "
            f"seed {p.seed}, for as many names of training pictures; distance to {self.real.facts['n']:,} real pictures."
        )


def evaluate(
    protocol: Protocol,
    teacher_path: str,
    students: Sequence[Run],
    kept_in: Path,
    pictures: emoji.Pictures | None = None,
    steps: int = STEPS,
    say: Callable[[str], None] = tqdm.write,
    started: float | None = None,
) -> Evaluation:
    """Load all, draw, measure. kept_in: the file in which the teacher's numbers are looked for after assets/measured.json, and
    into which they are written where they had to be measured, those of one step into another beside it; pictures: default: those
    of assets/emoji; steps: the teacher's; started: time.perf_counter() at the start of the command (default: now).

    FileNotFoundError or UserError for a model that cannot be loaded or is of something else, and for a damaged file of kept
    numbers.
    """
    started = time.perf_counter() if started is None else started
    many, one = load_teacher(teacher_path, steps)
    samplers = [load_student(run, teacher_path) for run in students]
    judge = make_judge(protocol, many, pictures, say)

    kept = teacher_numbers(many, judge, (SHIPPED, kept_in), say)
    single = teacher_numbers(one, judge, (with_one_step(SHIPPED), with_one_step(kept_in)), say)
    timed = time_in_turn([many, one, *samplers], judge.captions, protocol.seed, protocol.batch_size)
    seconds = iter(timed.seconds)

    def model(name: str, sampler: Sampler, pixels: Tensor, numbers: dict[str, Any], run: Run | None = None) -> Measured:
        facts: dict[str, Any] = {"seconds_per_image": next(seconds), "n": protocol.num_images, "call": sampler.call}
        facts |= {"scheduler": type(sampler.pipe.scheduler).__name__}
        if run is not None:
            facts |= {"train_seconds": run.info.get("train_seconds"), "train_steps": run.info.get("steps")}
            facts |= {key: run.info.get(key) for key in ("objective", "estimator", "calls")}
        say(
            f"{name}: FD {numbers['fd']:.4f}, CLIP score {numbers['clip_score']:.3f}, "
            f"{1000 * facts['seconds_per_image']:.1f} ms a picture"
        )
        return Measured(name, numbers | facts, pixels[:SHOWN], run)

    first = model(f"teacher, {steps} steps", many, timed.first, kept.facts())
    second = model("teacher, 1 step", one, judge.first(one), single.facts())
    others = tuple(
        model(run.name, sampler, *judge.measure(sampler, run.name), run) for run, sampler in zip(students, samplers, strict=True)
    )
    machine = {"cores": judge.workers.count, "text_seconds_per_image": timed.text, "decoder_seconds_per_image": timed.decoder}
    return Evaluation(protocol, judge.captions, judge.real, judge.clip.describe(), first, second, others, machine, started)


@dataclass(frozen=True)
class Judge:
    """What all models of a study are measured with, made once: the prompts and what encoders make of them, the real pictures."""

    protocol: Protocol
    captions: list[str]
    real: Real
    texts: Texts
    clip: Clip
    workers: Workers

    def measure(self, sampler: Sampler, label: str) -> tuple[Tensor, dict[str, float]]:
        """All the pictures of a model that shares the teacher's text encoder, uint8 (n, 3, h, w); fd and clip_score."""
        parts = blocks(0, len(self.captions), self.protocol.batch_size)
        drawn = draw(sampler, parts, self.protocol.seed, self.texts, self.clip, self.workers, label)
        return drawn.pixels, drawn.numbers(self.real.stats, self.texts.units)

    def first(self, sampler: Sampler) -> Tensor:
        """The first pictures of such a model, those that a report can show: uint8 (n, 3, h, w)."""
        parts = blocks(0, min(SHOWN, len(self.captions)), self.protocol.batch_size)
        return draw(sampler, parts, self.protocol.seed, self.texts, self.clip, self.workers, "to show").pixels


def make_judge(
    protocol: Protocol,
    teacher: Sampler,
    pictures: emoji.Pictures | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> Judge:
    """Read the pictures and CLIP, encode the prompts, measure the real pictures. pictures: default: those of assets/emoji; say:
    gets a line on it. UserError for more prompts than there are captions.
    """
    pictures = pictures or emoji.load()
    real = prompts.reference(pictures)
    captions = prompts.prompts(real, protocol.num_images)
    clip = Clip(EMOJI_CLIP.name, find(EMOJI_CLIP.name, str(EMOJI_CLIP), EMOJI_CLIP), ("features", "cosine"))
    workers, size = Workers(cores()), protocol.batch_size
    units = of_texts(clip, real.captions, size, workers)
    measured_real = measure_real(real, units, prompts.held_out(pictures), clip, size, workers)
    texts = encode(teacher.stock, captions, units[: len(captions)], size, workers)
    say(f"real pictures against themselves (halves): FD {measured_real.facts['fd']:.4f}")
    return Judge(protocol, captions, measured_real, texts, clip, workers)


def load_student(run: Run, base_model: str) -> Sampler:
    """The stock pipeline of the teacher with the student's LoRA and scheduler, called as the student's card says.

    The LoRA is fused into the weights, as one does who draws many pictures: a call then takes what the teacher's takes. UserError
    for a student of something else.
    """
    if run.info.get("family") != "sd":
        raise UserError(f"student {run.name!r}: {run.model} is no student of a StableDiffusionPipeline, which this study is of")
    sampler = load_sampler(str(run.model), base_model=base_model)
    check_fits(sampler, f"student {run.name!r}")
    if run.info.get("weights") == "lora":
        sampler.stock.fuse_lora()
        sampler.stock.unload_lora_weights()
    return sampler


def measure_real(
    real: prompts.Captioned, texts: Tensor, held_out: prompts.Captioned, clip: Clip, size: int, workers: Workers
) -> Real:
    """What a perfect model could read: two halves of the real pictures against each other, real pictures with their captions; and
    pictures of the same kind that nothing was trained on against the reference. texts (n, d): CLIP's of the real captions; size:
    of a batch.
    """
    units = of_images(clip, torch.cat([real.pixels, held_out.pixels]), size, workers)
    mine, others = units.split([len(real), len(held_out)])
    stats = GaussianStats.of(mine)
    fd, fd_std = halves_floor(mine.double(), torch.Generator().manual_seed(0), FLOOR_SPLITS)
    digest = hashlib.sha256(real.pixels.numpy().tobytes()).hexdigest()

    facts = {"n": len(real), "sha256": digest, "fd": fd, "fd_std": fd_std, "splits": FLOOR_SPLITS, "half_size": len(real) // 2}
    facts["clip_score"] = clip_score(mine, texts)
    facts["held_out"] = {
        "n": len(held_out),
        "fd": frechet_distance(GaussianStats.of(others), stats),
        "clip_score": clip_score(others, of_texts(clip, held_out.captions, size, workers)),
    }
    return Real(stats, digest, facts)


def teacher_numbers(sampler: Sampler, judge: Judge, files: tuple[Path, Path], say: Callable[[str], None]) -> Kept:
    """fd and clip_score of the teacher, kept ones where one of the files has those that fit; else they are measured and kept in
    the second. UserError for a file of kept numbers that is damaged.
    """
    protocol, texts, workers = judge.protocol, judge.texts, judge.workers
    found = identity(sampler, judge)
    kept, why = teacher.look_up(found, files)
    n, steps, start = protocol.num_images, sampler.call["num_inference_steps"], time.perf_counter()
    label = f"teacher, {steps} step{'s' * (steps > 1)}"
    if kept is not None and kept.file is not None:
        say(f"{label}: FD and CLIP score are those kept in {shown(kept.file)}, measured in {kept.seconds:.0f} s")
        return kept
    say(f"{label}: no numbers to use again ({why}); drawing all {n:,} pictures now, this once")
    # a guided call of the network has two rows a picture: so it has as many rows as a call of the students
    size = max(1, protocol.batch_size // 2) if is_guided(sampler) else protocol.batch_size
    drawn = draw(sampler, blocks(0, n, size), protocol.seed, texts, judge.clip, workers, label)
    numbers, seconds = drawn.numbers(judge.real.stats, texts.units), time.perf_counter() - start
    teacher.keep(files[1], found, numbers, seconds)
    return Kept(numbers, None, seconds)


def identity(many: Sampler, judge: Judge) -> dict[str, Any]:
    """All that the teacher's numbers depend on, part by part."""
    protocol = judge.protocol
    measuring = {f"clip.{key}": value for key, value in judge.clip.describe().items() if key not in ("file", "published")}
    chosen: dict[str, Any] = {"n": protocol.num_images, "seed": protocol.seed, "batch_size": protocol.batch_size}
    chosen |= {"format": teacher.FORMAT, "captions": sha256_of(judge.captions), "reference": judge.real.sha256}
    return many.identity(judge.captions) | measuring | chosen
