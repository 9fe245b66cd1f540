"""What each command of `python -m eval` can be told: a model each, of which its options and its part of a --config file are made.

Parts that commands share come first; a docstring is a command's --help. pydantic takes the fields of the last base first.
Imports nothing heavy.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator

from pipelines.common.options import POSITIONAL, REPEATED, option
from pipelines.common.paths import user_path
from pipelines.common.strict import PositiveInt, Strict, UserPath

from .protocols import METRICS, PROTOCOLS, STUDIES, InceptionMode


def _named_path(text: str) -> str:
    name, equals, path = text.partition("=")
    return f"{name}={user_path(path)}" if equals else user_path(text)


MODEL = "pipeline or student: a folder, a run's output_dir or a hub id"
NamedPath = Annotated[str, AfterValidator(_named_path)]  # NAME=PATH or PATH


class Output(Strict):
    """Where results go."""

    output: UserPath = option("DIR", "where results go", ...)


class ByProtocol(Output):
    """Which protocol, and whether its number of images may be another."""

    protocol: str = option("NAME", f"one of: {', '.join((*PROTOCOLS, *STUDIES))}", ...)
    force: bool = option(None, "allow another number of images; every report says so", False)


class Drawn(Strict):
    """How many images, and from which texts."""

    num_images: int | None = option("N", "other than the protocol's; needs --force")
    draws: PositiveInt | None = option("D", "how many sets of seeds (default: the protocol's)")
    captions: UserPath | None = option("FILE", ".txt, .csv, .jsonl, .parquet, or COCO's captions_*.json")
    caption_column: str = option("C", "of --captions, where they have columns", "caption")


class Comparing(ByProtocol):
    """Which metrics, the networks behind them, and the real images."""

    metrics: list[str] | None = option("M", f"of: {', '.join(METRICS)} (default: the protocol's)", min_length=1)
    reference: UserPath | None = option("SRC", "real images, or statistics (a folder made by `reference`, EDM's .npz)")
    reference_column: str | None = option("C", "of --reference, where it has several")
    weights_dir: UserPath | None = option("DIR", "where weights are looked for first (or $ONE_STEP_WEIGHTS)")
    inception: UserPath | None = option("FILE", "this TorchScript file (or .pth for legacy_pytorch) instead of the published one")
    clip: UserPath | None = option("PATH", "the CLIP score's network, instead of the protocol's")
    clip_336: UserPath | None = option("DIR", "CMMD's network")
    dinov2: UserPath | None = option("DIR", "FD-DINOv2's network")
    clip_aesthetic: UserPath | None = option("DIR", "the aesthetic score's CLIP")
    aesthetic: UserPath | None = option("FILE", "the aesthetic score's last layers")
    feature_batch: PositiveInt = option("B", "images a network sees at a time", 64)
    workers: int = option("W", "processes that decode images", 0, ge=0)
    start_method: Literal["fork", "spawn", "forkserver"] | None = option(None, "of those processes")
    size: PositiveInt | None = option("PX", "custom: the side images must have")
    crop_to: PositiveInt | None = option("PX", "custom: largest centred square, Lanczos to this side")
    inception_mode: InceptionMode | None = option(None, "custom: how images reach 299 pixels")
    grayscale: bool = option(None, "custom: take grey photographs as grey RGB", False)


class Calls(Strict):
    """Which model draws images, and how it is called."""

    model: UserPath | None = option("M", MODEL)
    lora: UserPath | None = option("L", "a LoRA to put on it: a file, a folder, a student or a hub id")
    base_model: UserPath | None = option("M", "where a LoRA student's base model lies now")
    steps: PositiveInt | None = option("N", "sampling steps (default: the pipeline's; a student's is 1)")
    guidance_scale: float | None = option("W", "default: the pipeline's; a student's is 1")
    image_size: PositiveInt | None = option("PX", "height and width to ask for")
    dtype: Literal["float32", "bfloat16", "float16"] = option(None, "of the networks that draw", "float32")
    seed: int = option("S", "0 gives image i the seed i", 0, ge=0)
    batch_size: PositiveInt = option("B", "images drawn at a time", 64)
    exact: bool | None = option(None, "one image a call, so that bytes do not depend on the batch size (default: on a CPU)")


class Published(Strict):
    """Whose published numbers stand beside."""

    baselines: UserPath | None = option("FILE", "published numbers (default: docs/baselines.yaml)")


class Measuring(Published, Drawn, Comparing):
    """What is measured: of images that are there or that a model draws."""

    clip_model: str | None = option("ID", "custom: hub id or open_clip:model:tag")
    clip_prefix: str | None = option("TEXT", "custom: put before each caption")
    images: UserPath | None = option("SRC", "folder, .zip, .parquet or hub data set (owner/name:split)")
    image_column: str | None = option("C", "of --images, where it has several")


class Metrics(Measuring):
    """measure images that are there, report"""

    model: ClassVar[None] = None
    seed: ClassVar[int] = 0


class Run(Calls, Measuring):
    """generate images, measure them, report"""

    teacher: UserPath | None = option("M", "also time this model against --model")
    teacher_steps: PositiveInt = option("N", "sampling steps of --teacher", 50)
    latency_batch: PositiveInt = option("B", "images at a time when timing", 8)
    student: Annotated[list[NamedPath], REPEATED] = option(
        "NAME=RUN",
        f"{', '.join(STUDIES)}: a name for the report and a run folder, or its student/ folder; repeat for several",
        [],
    )


class Generate(Calls, Drawn, ByProtocol):
    """the images of a protocol alone; resumable, any number of processes"""

    model: UserPath = option("M", MODEL, ...)


class Reference(Comparing):
    """statistics of real images, for many evaluations"""

    reference: UserPath = option("SRC", "the real images: a folder, .zip, .parquet or hub data set", ...)


class Compare(Published, Output):
    """evaluations beside each other and beside published numbers"""

    runs: Annotated[list[NamedPath], POSITIONAL] = option("DIR", "--output folders of evaluations; NAME=DIR to name them", ...)
    force: bool = option(None, "put numbers side by side that are not comparable; the report says so", False)


class Points(Output):
    """a model of points against the mixture it should be"""

    model: UserPath = option("M", MODEL, ...)
    num_points: int = option("N", "how many are drawn", 10_000, ge=2)
    law: UserPath | None = option("FILE", "a configuration with the mixture as `data` (default: the run's own)")
    seed: int = option("S", "of the noise", 0, ge=0)
