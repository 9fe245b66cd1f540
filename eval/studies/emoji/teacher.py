"""The teacher: how it is called, and its numbers with 50 steps and with one, which take minutes and are therefore kept.

A file holds them with all that they depend on (pipelines.common.identity) and this module's FORMAT. assets/measured.json and
measured_one_step.json are part of the repository, for the embedded teacher; of any other <output>/teacher.json and
teacher_one_step.json are written. Where none fits they are measured anew.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline

from pipelines import emoji
from pipelines.assets import ASSETS, shown
from pipelines.common.atomic import write_text
from pipelines.common.errors import UserError
from pipelines.common.identity import differences
from pipelines.common.provenance import git_commit, versions
from pipelines.common.reading import read_json
from pipelines.variance_preserving import one_step_scheduler

from ...images.sampler import Sampler, load_sampler

STEPS, GUIDANCE = 50, 2.0
FORMAT = 1  # of how pictures are made and measured: a change of these rules needs another number
SHIPPED = ASSETS / "measured.json"
PACKAGES = ("torch", "numpy", "diffusers", "transformers", "peft")
NUMBERS = ("fd", "clip_score")


def load_teacher(path: str, steps: int = STEPS) -> tuple[Sampler, Sampler]:
    """The teacher with `steps` steps of DDIM and guidance, and with one step, called as its students are: their scheduler, no
    guidance. UserError unless it is a Stable Diffusion that draws pictures of the emoji's size.
    """
    many = load_sampler(path, steps=steps)
    check_fits(many, f"--teacher {path}")
    many.call["guidance_scale"] = GUIDANCE
    one = replace(many, pipe=copy.copy(many.pipe), call=many.call | {"num_inference_steps": 1, "guidance_scale": 1.0})
    one.pipe.scheduler = one_step_scheduler(many.pipe.scheduler)
    many.pipe.scheduler = DDIMScheduler.from_config(many.pipe.scheduler.config)
    return many, one


def check_fits(sampler: Sampler, name: str) -> None:
    """UserError unless the model is a Stable Diffusion of 32x32 pictures."""
    pipe = sampler.pipe
    if not isinstance(pipe, StableDiffusionPipeline):
        raise UserError(f"{name} is a {type(pipe).__name__}; this study is of a StableDiffusionPipeline and its students")
    side = sampler.call.get("height") or pipe.unet.config["sample_size"] * pipe.vae_scale_factor
    if (side, pipe.vae.config.out_channels) != (emoji.SIZE, 3):
        raise UserError(
            f"{name} draws {pipe.vae.config.out_channels} channels of {side} pixels a side, this study is of 3 of {emoji.SIZE}"
        )


@dataclass(frozen=True)
class Kept:
    """numbers: fd and clip_score; file: where they were found, None where they were measured now; seconds: that it took then."""

    numbers: dict[str, float]
    file: Path | None
    seconds: float

    def facts(self) -> dict[str, Any]:
        """For a report: the numbers and where they are from."""
        where = "now" if self.file is None else shown(self.file)
        return self.numbers | {"measured": where, "seconds_to_measure": round(self.seconds, 1)}


def with_one_step(file: Path) -> Path:
    """Where the numbers of one step lie, beside those of all.

    >>> with_one_step(Path("assets/measured.json")).name
    'measured_one_step.json'
    """
    return file.with_stem(f"{file.stem}_one_step")


def look_up(identity: dict[str, Any], files: Sequence[Path]) -> tuple[Kept | None, str]:
    """The numbers kept for this identity in one of `files`, or None and why: in what the first that is there differs.

    UserError for a file that is damaged.
    """
    reason = ""
    for file in filter(Path.is_file, files):
        remedy = f"remove it, and its numbers are measured anew (of assets: git checkout -- {shown(file)})"
        content = read_json(file, remedy)
        found, numbers = content.get("identity"), [content.get(key) for key in (*NUMBERS, "seconds")]
        if not (isinstance(found, dict) and all(isinstance(v, float) and math.isfinite(v) for v in numbers)):
            raise UserError(f"{shown(file)} does not hold what was measured of a teacher; {remedy}")
        faults = differences(found, identity)
        if not faults:
            return Kept(dict(zip(NUMBERS, numbers[:-1], strict=True)), file, numbers[-1]), ""
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        reason = reason or f"{shown(file)} is of something else: {'; '.join(faults[:3])}{more}"
    return None, reason or "none are kept yet"


def keep(file: Path, identity: dict[str, Any], numbers: dict[str, float], seconds: float) -> None:
    """Write fd and clip_score with what they depend on. seconds: that measuring them took. WriteError."""
    made = {"seconds": seconds, "versions": versions(PACKAGES), "git_commit": git_commit()}
    write_text(file, json.dumps(numbers | made | {"identity": identity}, indent=1) + "\n")
