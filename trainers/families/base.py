"""What a family of teachers is to the commands: it loads, checks, builds roles, conditions, encodes, previews and exports.

Each file of this folder has a class `Family`; nothing else asks which one it is. Shared by them: the functions below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from pipelines.adapters import Role, SharedNetwork
from pipelines.denoiser import Condition, Denoiser
from pipelines.errors import UserError

from ..config import DistillConfig, TeacherConfig
from ..config_networks import Lora
from ..data import Examples
from ..draws import derive_seed
from ..objectives.base import Need, Parts
from ..posteriors import COVARIANCES, Covariance
from ..posteriors.section import Posterior

if TYPE_CHECKING:
    from ..cache import Encoded


class Family(Parts, Protocol):
    """A teacher that is distilled, and all that is made of it: Family(config, accelerator) refuses what does not fit, before
    anything is loaded where that can be told, and loads it.

    sampling_range: the lowest and the highest t at which the teacher is sampled; facts: of the student, for student.json.
    """

    sampling_range: tuple[float, float]
    examples: Examples | None
    facts: dict[str, Any]

    def preview(self) -> Tensor:
        """Images (n, c, h, w) in [0, 1] from fixed noise."""

    def condition(self, rows: Tensor) -> Condition:
        """The condition of pictures `rows` (b,) of the preview, from the first again where there are fewer."""

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (b, c, h, w) -> images (b, c, h, w) in [0, 1], float32."""

    def images(self, index: range) -> Tensor:
        """The student's images (b, c, h, w) in [0, 1]; image i depends on the seed and i alone."""

    @staticmethod
    def in_training(config: TeacherConfig, accelerator: Accelerator) -> Learner:
        """A teacher of this family that is trained (trainers.train_teacher). Only of families that can be."""

    @staticmethod
    def network_of(path: str, dtype: torch.dtype, variant: str | None) -> nn.Module:
        """The frozen network of a teacher at `path`, whose hash its students note as base_weights."""

    @staticmethod
    def encoded(config: DistillConfig | TeacherConfig, accelerator: Accelerator) -> Encoded:
        """The cache of its data, made where it is not there yet (trainers.cache). Only of text-to-image families."""

    def shard(self) -> None:
        """Split frozen weights over the processes, once every role has been built."""

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        """The student as users load it."""


class Learner(Protocol):
    """A teacher in training: its denoiser, with a graph, and the pipeline that is saved of it. null_condition: see DrawSource."""

    denoiser: Denoiser
    pipeline: DiffusionPipeline
    latent_shape: tuple[int, int, int]
    examples: Examples
    null_condition: Condition
    facts: dict[str, Any]

    def preview(self) -> Tensor:
        """Images (n, c, h, w) in [0, 1] from fixed noise."""


def pixels(x0: Tensor) -> Tensor:
    """x0 of a model of images, in [-1, 1] and possibly beyond -> images in [0, 1], float32."""
    return (x0 / 2 + 0.5).clamp(0, 1).float()


def unit_noise(config: DistillConfig, index: range, shape: tuple[int, int, int]) -> Tensor:
    """z (b, c, h, w) of evaluation images, each from a seed of its own."""
    seeds = (derive_seed(config.seed, "evaluation", i) for i in index)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def add_role(base: SharedNetwork, name: str, lora: Lora, layers: Sequence[str], seed: int) -> Role:
    """An adapter whose initial weights depend on the seed and its name alone. layers: targets where `lora` names none."""
    alpha = lora.rank if lora.alpha is None else lora.alpha
    targets = list(layers if lora.targets is None else lora.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", name))
        return base.add_adapter(name, LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=True))


def build_covariance(p: Posterior, seed: int, shape: tuple[int, int, int]) -> Covariance:
    """The posterior's covariance over latents (c, h, w); what it draws to start with depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", "covariance"))
        return COVARIANCES[p.covariance](shape, **p.covariance_options())


def check_needs(needs: Iterable[Need], refusal: Callable[[Need], str | None]) -> None:
    """UserError for the first thing that an objective asks for and a family has not: refusal(need) says why, or None."""
    for need in needs:
        if need.value and (reason := refusal(need)):
            raise UserError(reason)


def check_settings(family: str, config: DistillConfig, teacher: set[str], student: set[str]) -> None:
    """UserError for a setting of these sections that is given, and that the family does not have."""
    for name, keys in (("teacher", teacher), ("student", student | {"optimizer"})):
        section = getattr(config, name)
        foreign = {k: f for k, f in type(section).model_fields.items() if k not in keys}
        refuse(family, {f"{name}.{k}": getattr(section, k) for k, f in foreign.items() if getattr(section, k) != f.default})


def refuse(family: str, settings: dict[str, Any]) -> None:
    """ValueError for settings, by their key, that are given (not None) and would be ignored."""
    for key, value in settings.items():
        if value is not None:
            raise UserError(f"{key} has no effect for {family}; remove it")
