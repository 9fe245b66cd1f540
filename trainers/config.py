"""Configurations: one frozen, strict model for each command; unknown keys are errors. config_file.py reads them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipelines import noise
from pipelines.edm.layout import ARCHITECTURES

from .config_data import TEXT_DATA, Data, Idle, PositiveFloat, PositiveInt, Prompts, Strict, UserPath
from .config_file import KINDS
from .config_levels import Levels
from .posteriors import COVARIANCES
from .posteriors.flow import TRANSFORMS

Weight = Literal[tuple(noise.WEIGHTINGS)]


# Networks and optimisers ----------------------------------------------------------------------------------------------


class Network(Strict):
    """pipelines.edm.PatchUNet without what the data decide (resolution, channels, classes)."""

    channels: Annotated[int, Field(gt=0, multiple_of=2)] = 64
    channel_mult: Annotated[list[PositiveInt], Field(min_length=1)] = [1]
    num_blocks: PositiveInt = 2
    attention_levels: list[int] = []
    patch_size: PositiveInt = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _levels_exist(self):
        for level in self.attention_levels:
            if not 0 <= level < len(self.channel_mult):
                last = len(self.channel_mult) - 1
                raise ValueError(f"attention_levels: there is no level {level}; channel_mult {self.channel_mult} has 0 to {last}")
        return self


class EDMNetwork(Strict):
    """pipelines.edm.EDMUNet without what the data decide. None: the architecture's own, as Karras et al. 2022 have it."""

    architecture: Literal["ddpmpp", "ncsnpp", "adm"]
    model_channels: Annotated[int, Field(gt=0, multiple_of=4)] | None = None
    channel_mult: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    num_blocks: PositiveInt | None = None
    attention_resolutions: list[PositiveInt] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def options(self) -> dict[str, Any]:
        """Keyword arguments of EDMUNet."""
        given = {k: v for k, v in self.model_dump(exclude={"architecture"}).items() if v is not None}
        return ARCHITECTURES[self.architecture] | given


class PointNetwork(Strict):
    """pipelines.edm.PointNet, for points."""

    width: PositiveInt
    layers: Annotated[int, Field(ge=2)] = 4
    frequencies: Annotated[int, Field(ge=0)] = 0

    def options(self) -> dict[str, Any]:
        return self.model_dump()


def kind_of_network(value: Any) -> str:
    """Networks are told apart by a key that only they have, names by their type: a fault is one of the kind that was meant."""
    if isinstance(value, str):
        return KINDS[0]
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", ())
    return KINDS[2] if "architecture" in keys else KINDS[3] if "width" in keys else KINDS[1]


AnyNetwork = Annotated[Network, Tag(KINDS[1])] | Annotated[EDMNetwork, Tag(KINDS[2])] | Annotated[PointNetwork, Tag(KINDS[3])]
NewNetwork = Annotated[AnyNetwork, Discriminator(kind_of_network)]


class Optimizer(Strict):
    """Adam (decoupled weight decay). The rate rises linearly over `warmup_steps` and follows `schedule` down to final_ratio * lr.

    Both count the updates of its own network, as a scheduler of PyTorch does. For the student these are the run's steps; a
    posterior or fake score makes `warmup_updates` before the first step, which are the first of its `warmup_steps`, and then all
    of its updates in each step. A decay ends with its last update. `<role>/lr` in metrics.jsonl is the rate of the latest one.
    """

    idle = (Idle("final_ratio", "schedule linear or cosine", lambda o: o.schedule != "constant"),)
    lr: PositiveFloat
    bits: Literal[8, 32] = 32  # of each moment; 8 needs bitsandbytes
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: PositiveFloat | None = 10.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _installed(self):
        if self.bits == 8 and find_spec("bitsandbytes") is None:
            raise ValueError('bits: 8 needs bitsandbytes, which is not installed; pip install -e ".[8bit]", or use 32')
        return self


class Run(Strict):
    """What every training run has. batch_size is for one update over all processes; micro_batch_size is for one
    process and one backward pass (default: all of its share), so the loop accumulates as often as it takes."""

    output_dir: UserPath
    seed: Annotated[int, Field(ge=0)] = 0
    steps: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    ema_halflife: PositiveInt | None = None  # instead of ema_decay: in images, as in EDM, which ramps it up (see ema.py)
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
    pipeline: UserPath | None = None  # or: a Stable Diffusion pipeline whose network is trained further, on captioned images
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
        return self


# Distillation ---------------------------------------------------------------------------------------------------------


class Teacher(Strict):
    path: UserPath | None = None  # a pipeline folder (EDM, Stable Diffusion), the output_dir of train_teacher, or a hub id
    # instead: nothing learned. density: the exact score of the mixture in `data`; samples: that of the noised data set itself
    exact: Literal["density", "samples"] | None = None
    guidance_scale: float = 1.0
    negative_prompt: str | None = None  # Stable Diffusion only; None: what the stock pipeline takes for no prompt
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen weights; adapters are float32
    variant: str | None = None  # of the weight files, e.g. fp16

    @model_validator(mode="after")
    def _one_teacher(self):
        if (self.path is None) == (self.exact is None):
            raise ValueError("path, exact: give one of them")
        return self


class Lora(Strict):
    """Low-rank adapters, W + alpha/rank B A, on every layer whose name ends with a target.

    targets None: the layers of the published LoRAs (Stable Diffusion), all layers of all blocks (EDM).
    """

    rank: PositiveInt = 64
    alpha: PositiveFloat | None = None  # None: rank
    targets: Annotated[list[str], Field(min_length=1)] | None = None


class Student(Strict):
    """sigma_init and image_range are for pixel models, readout_t for Stable Diffusion; see denoiser.OneStepGenerator."""

    network: NewNetwork | None = None  # a new one, for exact teachers, which have none
    preconditioning: Literal["edm", "sample"] | None = None  # of that network: EDM's, or x0 as it comes out; None: edm
    sigma_init: PositiveFloat | None = None  # the noise level of the one step; None: 2.5, of exact teachers sigma_data
    image_range: bool | None = None  # train the clamped image, which is what the pipeline gives; None: yes
    readout_t: Annotated[int, Field(ge=0)] | None = None  # the timestep of the one step; None: the last, as stock pipelines do
    lora: Lora | None = None  # None: all weights are trained
    optimizer: Optimizer


class FakeScore(Strict):
    optimizer: Optimizer
    network: NewNetwork | None = None  # for exact teachers: a new one; None: of the student's kind
    lora: Lora | None = None  # an adapter on the teacher's weights; None: a copy of the teacher
    levels: Levels
    weighting: Weight = "edm"
    updates: PositiveInt = 1
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    augment: Annotated[float, Field(ge=0, le=1)] = 0.0  # of what it learns from, not of the student: as in SiD, for EDM networks


class FlowOptions(Strict):
    blocks: PositiveInt = 4  # couplings at each scale
    transform: Literal[tuple(TRANSFORMS)] = "affine"
    hidden: PositiveInt = 32  # channels inside a coupling's network


PosteriorNetwork = Annotated[
    Annotated[Literal["shared", "copy", "adapter"], Tag(KINDS[0])] | AnyNetwork, Discriminator(kind_of_network)
]


class Posterior(Strict):
    # shared: a decoder of its own on the teacher's frozen encoder (EDM); adapter: LoRA and a last layer of its own on the
    # teacher's frozen weights (Stable Diffusion); copy: the teacher's network, copied; or a section: one from scratch
    network: PosteriorNetwork = "shared"
    lora: Lora = Lora()  # adapter only
    covariance: Literal[tuple(COVARIANCES)] = "linear"
    rank: PositiveInt = 8  # lowrank only: correlated directions
    block: PositiveInt | None = None  # learned only: side of a block; None: the largest of 4, 2, 1 that divides both sides
    flow: FlowOptions = FlowOptions()
    optimizer: Optimizer
    updates: Annotated[int, Field(ge=0)] = 0  # of the posterior alone, before each joint update
    warmup_updates: Annotated[int, Field(ge=0)] = 500
    min_information: float = 0.05  # nats; below it the run is reported as collapsed

    @model_validator(mode="after")
    def _options_fit_the_covariance(self):
        if self.lora != Lora() and self.network != "adapter":
            raise ValueError("lora has no effect unless network=adapter; remove it")
        for key, covariance in (("rank", "lowrank"), ("block", "learned"), ("flow", "flow")):
            if getattr(self, key) != type(self).model_fields[key].default and self.covariance != covariance:
                raise ValueError(f"{key} has no effect with covariance={self.covariance!r}; remove it (it is for {covariance})")
        return self

    def covariance_options(self) -> dict[str, Any]:
        """Keyword arguments of COVARIANCES[self.covariance]."""
        return {"lowrank": {"rank": self.rank}, "learned": {"block": self.block}, "flow": self.flow.model_dump()}.get(
            self.covariance, {}
        )


class DiffInstructConfig(Strict):
    name: Literal["diff_instruct"]
    levels: Levels
    weighting: Weight = "sigma2"
    joint: bool = False  # one update of both networks on the same student samples, instead of two updates on two batches
    fake_score: FakeScore

    @model_validator(mode="after")
    def _augmentation_fits(self):
        if self.joint and self.fake_score.augment:
            raise ValueError("fake_score.augment and joint exclude each other: in a joint update both see the same samples")
        alone = not self.joint or self.fake_score.updates > 1 or self.fake_score.warmup_updates
        if not alone and self.fake_score.levels != self.levels:
            raise ValueError(
                "fake_score.levels have no effect: every update is joint, at the objective's levels; give it the same, or set "
                "joint=false, fake_score.updates above 1 or fake_score.warmup_updates"
            )
        return self


class VarFlowConfig(Strict):
    name: Literal["varflow"]
    levels: Levels
    weighting: Weight = "sigma2"
    beta: Annotated[float, Field(gt=0, lt=2)] = 1.0
    cross: Literal["full", "paired"] = "paired"
    condition_scale: Annotated[float, Field(ge=0)] = 0.0  # of the condition in the distance; 0 matches images whatever they say
    features: bool = False  # compare the frozen teacher's feature maps of x_t too
    grids: Annotated[list[PositiveInt], Field(min_length=1)] = [1]  # n: a distance for each block of an n x n grid; 1: the whole
    samples_per_condition: PositiveInt = 1  # student samples for each data sample; above 1 they are matched with it alone

    @model_validator(mode="after")
    def _matching_fits(self):
        for key in ("cross", "condition_scale"):
            if self.samples_per_condition > 1 and key in self.model_fields_set:
                raise ValueError(f"{key} has no effect with samples_per_condition={self.samples_per_condition}; remove it")
        return self


class VarDiUConfig(Strict):
    """The estimators: trainers/objectives/{vardiu,resampled,amortized}.py."""

    name: Literal["vardiu"]
    estimator: Literal["bound", "multi_sample", "resampled_score", "amortized_score"] = "amortized_score"
    num_samples: Annotated[int, Field(ge=0)] | None = None  # K; None: 16, for amortized_score 0 (the batch is the pool)
    levels: Levels
    weighting: Weight = "sigma2"
    antithetic: bool = True  # +-eps for each z
    control_variate: bool = True
    target_ess: Annotated[float, Field(ge=1)] | None = None  # temper the weights until so many proposals count
    moves: Annotated[int, Field(ge=0)] = 0  # of z_0 among proposals, num_samples each time, before averaging
    ess_levels: bool = False  # draw levels in proportion to their effective sample size
    pool: Literal["batch", "own"] = "batch"  # what the target averages over; own: nothing but the sample itself
    noise_draws: PositiveInt = 2  # noised copies of each student sample
    regression_weight: PositiveFloat = 80.0  # of the posterior mean against log q, whose trunk it shares
    regression_weighting: Weight = "edm"  # of levels in that regression: edm is the error of v, snr that of the noise
    posterior: Posterior

    @model_validator(mode="after")
    def _options_fit_the_estimator(self):
        uses = {"num_samples": "multi_sample resampled_score amortized_score", "control_variate": "bound multi_sample"}
        uses |= dict.fromkeys(("target_ess", "moves", "ess_levels"), "resampled_score")
        uses |= dict.fromkeys(("noise_draws", "regression_weight", "regression_weighting", "pool"), "amortized_score")
        uses["antithetic"] = "bound multi_sample resampled_score"
        for key, estimators in uses.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.estimator not in estimators.split():
                raise ValueError(f"{key} has no effect with estimator={self.estimator!r}; remove it (it is for {estimators})")
        if self.num_samples == 0 and self.estimator in ("multi_sample", "resampled_score"):
            raise ValueError(f"num_samples must be at least 1 for estimator={self.estimator!r}; got 0")
        if self.pool == "own" and self.samples:
            raise ValueError("pool=own and num_samples > 0 exclude each other: proposals are a pool")
        if self.ess_levels and self.samples == 1:
            raise ValueError("ess_levels needs num_samples of at least 2: a single proposal always counts as one")
        if self.target_ess and self.target_ess > self.samples:
            raise ValueError(f"target_ess ({self.target_ess:g}) must not be above num_samples ({self.samples})")
        if self.target_ess and self.moves:
            raise ValueError("target_ess and moves exclude each other: moves are exact for untempered weights only")
        return self

    @property
    def samples(self) -> int:
        """K."""
        default = {"bound": 0, "amortized_score": 0}.get(self.estimator, 16)
        return default if self.num_samples is None else self.num_samples


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
            "teacher.guidance_scale", "an objective that follows the teacher's score; varflow matches data", lambda c: _scored(c)
        ),
        *(
            Idle(f"data.{key}", "points that are drawn: teacher.exact=samples, or objective varflow", lambda c: _drawn(c))
            for key in ("num_samples", "seed")
        ),
    )
    teacher: Teacher
    student: Student
    objective: Annotated[DiffInstructConfig | VarFlowConfig | VarDiUConfig, Field(discriminator="name")]
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
    def _data_given(self):
        if self.objective.name == "varflow" and self.data is None:
            raise ValueError("data: objective 'varflow' matches samples of data; add a data section, e.g. data.name=digits")
        if self.objective.name == "varflow" and isinstance(self.data, Prompts):
            raise ValueError("data: objective 'varflow' needs images; 'prompts' has none: use captions or teacher_samples")
        if self.objective.name == "varflow" and self.batch_size < 2:
            raise ValueError(f"batch_size: {self.batch_size}, expected at least 2; the energy distance needs pairs of samples")
        return self


def _scored(config: DistillConfig) -> bool:
    return config.objective.name != "varflow"


def _drawn(config: DistillConfig) -> bool:
    return config.objective.name == "varflow" or config.teacher.exact != "density"
