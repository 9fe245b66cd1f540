"""What a family of teachers (EDM, Stable Diffusion) gives to the distillation command: networks, rows to draw, ways to save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig
from torch import Tensor

from pipelines.adapters import Role, SharedNetwork
from pipelines.denoiser import Condition
from pipelines.errors import UserError

from .config import DistillConfig
from .config_networks import Lora
from .data import Examples
from .draws import derive_seed
from .objectives.base import Need, Parts
from .posteriors import COVARIANCES, Covariance
from .posteriors.section import Posterior


class Models(Parts, Protocol):
    """sampling_range: the lowest and the highest t at which the teacher is sampled."""

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

    def shard(self) -> None:
        """Split frozen weights over the processes, once every role has been built."""

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        """The student as users load it."""


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


def refuse(family: str, settings: dict[str, Any]) -> None:
    """ValueError for settings, by their key, that are given (not None) and would be ignored."""
    for key, value in settings.items():
        if value is not None:
            raise UserError(f"{key} has no effect for {family}; remove it")
