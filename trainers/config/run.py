"""Configurations: one frozen, strict model for each command; pipelines/common/config.py reads files into them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from pipelines.common.strict import Idle, PositiveFloat, PositiveInt, StockGuidance, Strict, UserPath
from pipelines.noise import Weight

from ..objectives import CONFIGS, AnyObjective
from .data import TEXT_DATA, Captions, Data, Prompts, TeacherSamples
from .levels import Levels, Use
from .networks import EDMNetwork, Lora, NewNetwork, Optimizer

ON_DATA = ", ".join(name for name, objective in CONFIGS.items() if objective.built.needs_data)
UNSCORED = ", ".join(name for name, objective in CONFIGS.items() if not objective.follows_score)


class Run(Strict):
    """What every training run has. batch_size is for one update over all processes; micro_batch_size is for one
    process and one backward pass (default: all of its share), so the loop accumulates as often as it takes."""

    output_dir: UserPath
    seed: Annotated[int, Field(ge=0)] = 0
    steps: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    ema_halflife: PositiveInt | None = None  # instead of ema_decay: in images, as in EDM, which ramps it up (see engine/ema.py)
    log_every: PositiveInt = 50
    sample_every: PositiveInt | None = None
    num_samples: PositiveInt = 64
    checkpoint_every: PositiveInt | None = None  # to resume from
    snapshot_every: PositiveInt | None = None  # loadable models, to measure progress
    keep_checkpoints: PositiveInt = 2
    resume: UserPath = "no"  # "no", "latest", or the path of a checkpoint
    trackers: list[str] = []  # any that accelerate knows, e.g. tensorboard
    gradient_checkpointing: bool = False  # recompute each block in backward: about a third more time, a fraction of the memory
    compile: str | None = None  # a torch.compile backend, e.g. inductor, for the blocks that a network repeats

    @field_validator("resume", mode="before")
    @classmethod
    def _resume_as_yaml_reads_it(cls, value: Any) -> Any:
        """YAML reads `no` and `off` as false, `yes` and `on` as true, and an empty value as null."""
        if value is True or value is None:
            raise ValueError("give latest, no or the folder of a checkpoint")
        return "no" if value is False else value

    @field_validator("compile", mode="before")
    @classmethod
    def _compile_as_yaml_reads_it(cls, value: Any) -> Any:
        if value is True:
            raise ValueError("give a backend, e.g. inductor, or no")
        return None if value is False else value

    @model_validator(mode="after")
    def _one_average(self):
        if self.ema_halflife is not None and self.ema_decay != Run.model_fields["ema_decay"].default:
            raise ValueError("ema_halflife, ema_decay: give one of them")
        return self

    @model_validator(mode="after")
    def _backend_exists(self):
        if self.compile is not None and self.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise ValueError(f"compile: no backend {self.compile!r}; torch has {', '.join(known)}")
        return self


class TeacherConfig(Run):
    """`accelerate launch -m trainers.train_teacher`."""

    idle = (
        Idle(
            "label_dropout",
            "labels: set data.labels or data.label_column",
            lambda c: c.pipeline or getattr(c.data, "labels", False) or getattr(c.data, "label_column", None),
        ),
    )
    data: Data
    network: NewNetwork | None = None  # a new network: small, by `architecture` one of the EDM paper's, by `width` one for points
    pipeline: UserPath | None = None  # or: a text-to-image pipeline whose network is trained further, on captioned images
    guidance_scale: StockGuidance | None = None  # with pipeline: of the pictures of samples/; None: the stock pipeline's own
    sigma_data: PositiveFloat = 0.5
    levels: Levels
    weighting: Weight = "edm"
    augment: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability of each of EDM's augmentations; the network is told of them
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1  # share trained with the null label, for guidance
    optimizer: Optimizer
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    sampling_steps: PositiveInt = 18

    @model_validator(mode="after")
    def _one_network(self):
        if (self.network is None) == (self.pipeline is None):
            raise ValueError("network, pipeline: give one of them: a new network for images, or the pipeline to train further")
        if isinstance(self.data, TEXT_DATA) != (self.pipeline is not None):
            raise ValueError(
                f"data: {self.data.name!r} does not fit; a Stable Diffusion pipeline trains on captions, a new network on images"
            )
        if isinstance(self.data, Prompts):
            raise ValueError("data: a teacher learns from images; 'prompts' has none")
        if self.augment and not isinstance(self.network, EDMNetwork):
            raise ValueError("augment: only a network with network.architecture can be told of it; set it, or augment=0")
        if self.pipeline is not None:
            for key in ("sigma_data", "sigma_min", "sigma_max", "sampling_steps"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} has no effect with pipeline; remove it")
        elif self.guidance_scale is not None:
            raise ValueError("guidance_scale has no effect without pipeline; remove it")
        return self

    def uses(self) -> list[Use]:
        return [Use("levels", self.levels, {"weighting": self.weighting})]


# Distillation ---------------------------------------------------------------------------------------------------------


class Teacher(Strict):
    """Without path and exact there is none: the student learns from data alone, from scratch."""

    path: UserPath | None = None  # a pipeline folder (EDM, text-to-image), the output_dir of train_teacher, or a hub id
    # instead: nothing learned. density: the exact score of the mixture in `data`; samples: that of the noised data set itself
    exact: Literal["density", "samples"] | None = None
    guidance_scale: float = 1.0
    # with guidance, of stock pipelines: predictions keep the conditional one's norm, token by token, as in Qwen-Image's pipeline
    guidance_normalization: bool = False
    negative_prompt: str | None = None  # with text and guidance; None: what the stock pipeline takes for no prompt
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen weights; adapters are float32
    variant: str | None = None  # of the weight files, e.g. fp16

    @model_validator(mode="after")
    def _one_teacher(self):
        if self.path is not None and self.exact is not None:
            raise ValueError("path, exact: give one of them")
        return self

    @property
    def given(self) -> bool:
        return self.path is not None or self.exact is not None

    @property
    def source(self) -> str:
        """`path`, of a teacher that is not exact."""
        if self.path is None:
            raise ValueError("teacher.path: there is none")
        return self.path


class Student(Strict):
    """sigma_init and image_range are for pixel models, readout_t for Stable Diffusion; see denoiser.FewStepGenerator."""

    idle = (
        Idle("sigma_init", "steps as a number: a list of them begins with it", lambda s: not isinstance(s.steps, list)),
        Idle("readout_t", "steps=1: other steps have levels of their own", lambda s: s.steps == 1),
        Idle("inputs", "a second step: set steps", lambda s: s.num_steps > 1),
    )

    network: NewNetwork | None = None  # a new one, where no teacher has one to copy: for exact teachers, and from scratch
    preconditioning: Literal["edm", "sample"] | None = None  # of that network: EDM's, or x0 as it comes out; None: edm
    sigma_init: PositiveFloat | None = None  # the noise level of the one step; None: 2.5, of new networks sigma_data
    image_range: bool | None = None  # train the clamped image, which is what the pipeline gives; None: yes
    readout_t: Annotated[int, Field(ge=0)] | None = None  # the timestep of the one step; None: the last, as stock pipelines do
    # network calls an image: how many, at the sampler's own levels, or the levels themselves, the most noise first
    steps: PositiveInt | Annotated[list[PositiveFloat], Field(min_length=1)] = 1
    # what later steps learn from: their own earlier ones (simulated) or noised data; None: data where the objective needs them
    inputs: Literal["simulated", "data"] | None = None
    lora: Lora | None = None  # None: all weights are trained
    optimizer: Optimizer

    @property
    def num_steps(self) -> int:
        return len(self.steps) if isinstance(self.steps, list) else self.steps


class Evaluation(Strict):
    """Every `every` steps the averaged student draws num_images images from fixed seeds; see eval/in_training.py."""

    every: PositiveInt
    num_images: Annotated[int, Field(ge=2)] = 1000
    metrics: Annotated[list[str], Field(min_length=1)] = ["fid"]
    reference: UserPath | None = None  # images (folder, .zip, .parquet, hub) or statistics (python -m eval reference, EDM's .npz)
    protocol: str = "custom"  # how images are prepared; its number of images is not used
    inception_mode: Literal["clean", "legacy_tensorflow"] | None = None  # protocol custom only; None: clean
    weights_dir: UserPath | None = None  # None: $ONE_STEP_WEIGHTS, else ~/.cache/one-step-distill
    inception: UserPath | None = None  # files or folders instead of the published networks
    clip: UserPath | None = None
    clip_336: UserPath | None = None
    dinov2: UserPath | None = None
    batch_size: PositiveInt = 64


class DistillConfig(Run):
    """`accelerate launch -m trainers.distill`."""

    idle = (
        Idle(
            "teacher.guidance_scale",
            f"an objective that follows the teacher's score; {UNSCORED} matches data",
            lambda c: c.objective.follows_score,
        ),
        *(
            Idle(
                f"data.{key}",
                f"points that are drawn: teacher.exact=samples, or objective {ON_DATA}",
                lambda c: c.objective.built.needs_data or c.teacher.exact != "density",
            )
            for key in ("num_samples", "seed")
        ),
    )
    teacher: Teacher = Teacher()
    student: Student
    objective: AnyObjective
    data: Data | None = None
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _evaluation_fits(self):
        e = self.evaluation
        if e and e.every % self.log_every:
            raise ValueError(f"evaluation.every ({e.every}) must be a multiple of log_every ({self.log_every})")
        if e and "clip_score" in e.metrics and not isinstance(self.data, TEXT_DATA):
            raise ValueError("evaluation.metrics: clip_score needs prompts; this data has none")
        return self

    @model_validator(mode="after")
    def _objective_has_what_it_needs(self):
        o = self.objective
        if o.follows_score and not self.teacher.given:
            raise ValueError(
                f"teacher: objective {o.name!r} follows the teacher's score: give teacher.path; from scratch, of data alone, "
                f"learns {UNSCORED}"
            )
        if o.built.needs_data and self.data is None:
            raise ValueError(f"data: objective {o.name!r} matches samples of data; add a data section, e.g. data.name=digits")
        if o.built.needs_data and isinstance(self.data, Prompts):
            raise ValueError(f"data: objective {o.name!r} needs images; 'prompts' has none: use captions or teacher_samples")
        if self.batch_size < o.least_batch.size:
            raise ValueError(f"batch_size: {self.batch_size}, expected at least {o.least_batch.size}; {o.least_batch.reason}")
        return self

    @model_validator(mode="after")
    def _steps_can_be_taught(self):
        if self.student.num_steps == 1:
            return self
        if reason := self.objective.few_steps_refusal():
            raise ValueError(f"student.steps={self.student.steps}: {reason}")
        images = self.objective.built.needs_data or isinstance(self.data, Captions | TeacherSamples)
        if self.student.inputs == "data" and not images:
            raise ValueError(
                f"student.inputs: data needs images, which objective {self.objective.name!r} has with data.name captions or "
                "teacher_samples alone; use inputs=simulated"
            )
        return self

    @property
    def inputs(self) -> Literal["simulated", "data"]:
        return self.student.inputs or ("data" if self.objective.built.needs_data else "simulated")

    def uses(self) -> list[Use]:
        return self.objective.uses()
