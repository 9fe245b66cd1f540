"""What a family of teachers is to the commands: it loads, checks, builds roles, conditions, encodes, previews and exports.

Each file of this folder has a class `Family`; nothing else asks which one it is. Shared by them: the functions below.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor, nn

from pipelines.adapters import Role, SharedNetwork
from pipelines.common.errors import UserError
from pipelines.denoiser import Condition, Denoiser, FeatureMaps
from pipelines.edm import EDMPipeline
from pipelines.stock import StockPipeline

from ..config.networks import Lora
from ..config.run import DistillConfig, TeacherConfig
from ..data.examples import Examples, shown_classes
from ..engine.draws import derive_seed
from ..objectives.base import Need, Parts
from ..posteriors import COVARIANCES, Covariance
from ..posteriors.section import Posterior

if TYPE_CHECKING:
    from ..cache import Encoded


class Family(Parts):
    """A teacher that is distilled, and all that is made of it. Family(config, accelerator) refuses what does not fit, before
    anything is loaded where that can be told, and loads it. What is not overridden is that of a model of images without text.

    called: in messages; component: what a pipeline calls the network; teacher_keys, student_keys: of these sections, what it has;
    gives: what an objective may ask (Need.what).
    sampling_range: the lowest and the highest t at which the teacher is sampled; facts: of the student, for student.json.
    has_teacher: False where there is none: then neither `teacher` nor `sampling_range`.
    """

    called: ClassVar[str]
    component: ClassVar[str] = "unet"
    teacher_keys: ClassVar[tuple[str, ...]]
    student_keys: ClassVar[tuple[str, ...]]
    gives: ClassVar[tuple[str, ...]]
    has_teacher: ClassVar[bool] = True
    num_classes = 0
    sampling_range: tuple[float, float]
    examples: Examples | None
    facts: dict[str, Any]

    def __init__(self, config: DistillConfig, accelerator: Accelerator | None = None) -> None:
        self.config = config
        self.device = accelerator.device if accelerator else torch.device("cpu")
        self.check(config)

    @classmethod
    def check(cls, config: DistillConfig) -> None:
        """UserError for a setting that this family does not have, and for what an objective asks of it in vain."""
        for name, keys in (("teacher", cls.teacher_keys), ("student", (*cls.student_keys, "optimizer"))):
            section = getattr(config, name)
            given = {k: getattr(section, k) for k, f in type(section).model_fields.items() if getattr(section, k) != f.default}
            refuse(cls.called, {f"{name}.{k}": value for k, value in given.items() if k not in keys})
        for need in config.objective.needs():
            if need.value and (reason := cls.refusal(need)):
                raise UserError(reason)

    @classmethod
    def refusal(cls, need: Need) -> str | None:
        """Why an objective cannot have what it asks for, or None."""
        return None if need.what in cls.gives else f"{need.key} has no effect for {cls.called}; remove it"

    def condition(self, rows: Tensor) -> Condition:
        """The condition of pictures `rows` (b,) of the preview, from the first again where there are fewer."""
        return {"class_labels": rows % self.num_classes} if self.num_classes else None

    def shown(self, count: int) -> Tensor:
        """The rows whose pictures a run shows, `count` at most: (n,)."""
        return shown_classes(count, self.num_classes) if self.num_classes else torch.arange(count)

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (b, c, h, w) -> images (b, c, h, w) in [0, 1], float32."""
        return (x0 / 2 + 0.5).clamp(0, 1).float()

    def features(self) -> FeatureMaps:
        raise UserError(f"objective.features: {self.called} has no feature maps; remove it")

    def preview(self) -> Tensor:
        """Images (n, c, h, w) in [0, 1] of the rows that are shown, from fixed noise."""
        raise NotImplementedError

    def images(self, index: range) -> Tensor:
        """The student's images (b, c, h, w) in [0, 1]; image i depends on the seed and i alone."""
        raise NotImplementedError

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        """The student as users load it."""
        raise NotImplementedError

    def shard(self) -> None:
        """Split frozen weights over the processes, once every role has been built."""
        raise UserError(f"FSDP has no effect for {self.called}, whose networks are small; use configs/accelerate/gpu_8.yaml")

    @classmethod
    def in_training(cls, config: TeacherConfig, accelerator: Accelerator) -> Learner:
        """A teacher of this family that is trained (trainers.train_teacher)."""
        raise UserError(f"trainers.train_teacher does not train {cls.called}")

    @classmethod
    def network_of(cls, path: str, dtype: torch.dtype, variant: str | None) -> nn.Module:
        """The frozen network of a teacher at `path`, whose hash its students note as base_weights."""
        raise NotImplementedError

    @classmethod
    def encoded(cls, config: DistillConfig | TeacherConfig, accelerator: Accelerator) -> Encoded:
        """The cache of its data, made where it is not there yet (trainers.cache)."""
        given = config.data.name if config.data else None
        raise UserError(f"data: {given!r} is for text-to-image teachers, and this is {cls.called}; nothing is encoded")


class Given(Protocol):
    """What a student is distilled on: conditions, latents (c, h, w) = shape of images of image_size^2 pixels where there are any,
    and null, the condition that guidance leads away from, unbatched.
    """

    shape: tuple[int, int, int]
    image_size: int
    null: Condition

    @property
    def examples(self) -> Examples: ...


class Learner(Protocol):
    """A teacher in training: its denoiser, with a graph, and the pipeline that is saved of it. null_condition: see DrawSource."""

    denoiser: Denoiser
    latent_shape: tuple[int, int, int]
    facts: dict[str, Any]

    @property
    def pipeline(self) -> StockPipeline | EDMPipeline: ...

    @property
    def examples(self) -> Examples: ...

    @property
    def null_condition(self) -> Condition: ...

    def preview(self) -> Tensor:
        """Images (n, c, h, w) in [0, 1] of the rows that are shown, from fixed noise."""


def unit_noise(config: DistillConfig, index: range, shape: tuple[int, int, int]) -> Tensor:
    """The noise of each step (n, b, c, h, w) of evaluation images, each image's from a seed of its own."""
    seeds = (derive_seed(config.seed, "evaluation", i) for i in index)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack(
        [torch.stack([torch.randn(shape, generator=g) for g in generators]) for _ in range(config.student.num_steps)]
    )


def add_role(base: SharedNetwork, name: str, lora: Lora, layers: Sequence[str], seed: int) -> Role:
    """An adapter whose initial weights depend on the seed and its name alone. layers: targets where `lora` names none."""
    alpha = lora.rank if lora.alpha is None else lora.alpha
    targets = list(layers if lora.targets is None else lora.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", name))
        config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]  # alpha: any number
        return base.add_adapter(name, config)


def build_covariance(p: Posterior, seed: int, shape: tuple[int, int, int]) -> Covariance:
    """The posterior's covariance over latents (c, h, w); what it draws to start with depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", "covariance"))
        return COVARIANCES[p.covariance](shape, **p.covariance_options())


def refuse(family: str, settings: dict[str, Any]) -> None:
    """ValueError for settings, by their key, that are given (not None) and would be ignored."""
    for key, value in settings.items():
        if value is not None:
            raise UserError(f"{key} has no effect for {family}; remove it")
