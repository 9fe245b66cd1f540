"""What one family of stock pipelines, which draw from text or from classes, is to this project (`Kind`), and their registry.

A new family is a file with a Kind, and a line of KINDS; nothing else asks which one it is. Conditions are dicts of tensors with
the batch first, as everywhere; their keys are the kind's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from .adapters import Anatomy
from .noise import PredictionType, Schedule
from .stock import StockPipeline

# null: two calls, with and without the prompt; input: a number that the network is told; none: it knows no guidance
Guidance = Literal["null", "input", "none"]


class Entry(NamedTuple):
    """module: of this package, with a KIND; pipeline: the class of diffusers, as model_index.json has it."""

    module: str
    pipeline: str


# what student.json calls the family of a base model -> where it is
KINDS: dict[str, Entry] = {
    "sd": Entry("stable_diffusion", "StableDiffusionPipeline"),
    "sdxl": Entry("stable_diffusion", "StableDiffusionXLPipeline"),
    "sd3": Entry("stable_diffusion_3", "StableDiffusion3Pipeline"),
    "flux": Entry("flux", "FluxPipeline"),
    "zimage": Entry("z_image", "ZImagePipeline"),
    "dit": Entry("dit", "DiTPipeline"),
}


class Kind:
    """What a family of stock pipelines is: its network, its noise, its text, its latents and its one step.

    called: in messages; component, network: the pipeline's part that is distilled, and its class; layers: those that LoRA adapts
    by default, as in published LoRAs; scheduler: the stock class whose steps are x0; optional: text encoders that a folder may do
    without; time_scale: a schedule's t times this is what a network of sinusoids is told; any_readout: whether a student of one
    step may read out elsewhere than at the schedule's last level (student.readout_t); whole_levels: whether levels are whole
    numbers; step_dtype: in which schedulers are tried; forgets_generator: the stock pipeline does not hand its generator to
    the scheduler, which draws noise between steps from torch's own; has_features: whether it has feature_layers; takes: what its
    pipeline draws from, and example: one, as it is written in a call; loads_loras: whether its pipeline loads LoRAs;
    unguided: the guidance_scale of its pipeline's call that means none.
    """

    called: str
    component: str
    network: type[ModelMixin]
    layers: tuple[str, ...]
    scheduler: type[Any]
    optional: tuple[str, ...] = ()
    time_scale = 1.0
    any_readout = whole_levels = False
    step_dtype = torch.float64
    forgets_generator = False
    has_features = False
    takes: Literal["prompt", "class_labels"] = "prompt"
    example = '"a prompt"'
    loads_loras = True
    unguided = 1.0

    # The network

    def anatomy(self, config: Mapping[str, Any], guidance_scale: float) -> Anatomy:
        """How a network of these settings is called. guidance_scale: what it is told, where that is an input of it."""
        raise NotImplementedError

    def guidance(self, config: Mapping[str, Any]) -> Guidance:
        """How a network of these settings is guided."""
        return "null"

    def stock_guidance(self, guidance_scale: float) -> float:
        """What its pipeline's call takes for null + guidance_scale (cond - null)."""
        return guidance_scale - 1.0 + self.unguided

    def feature_layers(self, network: Any) -> tuple[nn.Module, ...]:
        """Layers whose outputs are maps (b, c, h, w), at the lowest resolution and the next, where has_features says so."""
        raise NotImplementedError

    def text_width(self, config: Mapping[str, Any]) -> int:
        """Of encoder_hidden_states (b, l, width)."""
        raise NotImplementedError

    def num_classes(self, config: Mapping[str, Any]) -> int:
        """How many a network of these settings draws; 0 for one of text."""
        return 0

    # Noise

    def check_folder(self, folder: Path, index: Mapping[str, Any], left_out: Iterable[str]) -> None:
        """What can be told of a pipeline's folder before anything of it is loaded."""

    def check_scheduler(self, scheduler: Any, source: str) -> None:
        """UserError for a noise schedule that has no exact single step."""
        raise NotImplementedError

    def schedule(self, scheduler: Any) -> Schedule:
        """The noise levels of a teacher with that scheduler."""
        raise NotImplementedError

    def prediction(self, scheduler: Any) -> PredictionType:
        """What its network puts out."""
        raise NotImplementedError

    def student_levels(self, scheduler: Any, steps: int) -> list[Any]:
        """The levels of so many steps: those at which the stock scheduler calls the network. UserError for more than it has."""
        raise NotImplementedError

    def check_steps(self, scheduler: Any, levels: Sequence[float]) -> None:
        """UserError for levels at which the stock pipeline cannot be made to call its network. scheduler: the teacher's."""

    def student_scheduler(self, scheduler: Any, levels: Sequence[float]) -> Any:
        """The stock scheduler, made of the teacher's, whose steps are x0 and fresh noise, at these levels."""
        raise NotImplementedError

    def call(self, levels: Sequence[float], scheduler: Any) -> dict[str, Any]:
        """The arguments of a stock pipeline's call that make it those steps."""
        raise NotImplementedError

    def start(self, scheduler: Any, levels: Sequence[float]) -> bool:
        """Set a scheduler's timesteps as a stock pipeline does for these steps; whether they are then those of the levels."""
        raise NotImplementedError

    def why_not(self, scheduler: Any) -> str:
        """What makes a scheduler's step another one, where that can be said: ends a message."""
        return ""

    # Text

    def encode_prompts(
        self,
        pipe: StockPipeline,
        prompts: Sequence[str],
        size: tuple[int, int],
        device: torch.device,
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The condition of each prompt, without guidance, as the stock pipeline makes it for images of `size` (h, w).

        config: the network's settings, of a pipeline that is without it.
        """
        raise NotImplementedError

    def null_condition(
        self, pipe: StockPipeline, negative_prompt: str | None, device: torch.device, config: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """What guidance leads away from, unbatched. None means what the stock pipeline takes for no prompt."""
        raise NotImplementedError

    def reads_size(self, pipe: StockPipeline) -> bool:
        """Whether conditions depend on the size of the images."""
        return False

    def placed(
        self, condition: dict[str, Tensor], places: Sequence[tuple[int, int, int, int]], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The condition of images that were cut out of others at places (height, width, top, left)."""
        return condition

    def most_tokens(self, pipe: StockPipeline) -> tuple[Any, int]:
        """The tokenizer that keeps most of a prompt, and how many tokens it keeps."""
        return pipe.tokenizer, pipe.tokenizer.model_max_length

    # Latents

    def latent_shape(self, config: Mapping[str, Any], factor: int, image_size: int | None) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square images, factor pixels to a side of one; image_size None: the network's own size.
        UserError for a size that does not fit.
        """
        raise NotImplementedError

    def packed(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) -> the form in which the stock pipeline takes latents."""
        return latents

    def unpacked(self, latents: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The stock pipeline's latents -> (b, c, h, w)."""
        return latents


def kind_named(family: str) -> Kind:
    """By the name in KINDS."""
    return import_module(f".{KINDS[family].module}", __package__).KIND


def family_of(pipeline: str) -> str | None:
    """The name in KINDS of a pipeline's class; None for one that is no text-to-image pipeline that this project knows."""
    return next((name for name, entry in KINDS.items() if entry.pipeline == pipeline), None)


def family_name(pipe: StockPipeline | type[StockPipeline]) -> str:
    """The name in KINDS of a pipeline or its class; ValueError for one that has none."""
    pipeline = pipe.__name__ if isinstance(pipe, type) else type(pipe).__name__
    family = family_of(pipeline)
    if family is None:
        raise ValueError(f"a {pipeline} is no text-to-image pipeline of KINDS")
    return family


def kind_of(pipe: StockPipeline | type[StockPipeline]) -> Kind:
    return kind_named(family_name(pipe))


def network_of(pipe: Any) -> Any:
    """The part of a pipeline that is distilled, a ModelMixin; of one that is not of KINDS its U-Net."""
    family = family_of(type(pipe).__name__)
    return getattr(pipe, kind_named(family).component if family else "unet")
