"""DiT (Peebles and Xie 2023; DiT-XL/2 of ImageNet): a class-conditional transformer that predicts noise, and a variance.

Condition: `class_labels` (b,), of which num_classes stands for no class. DiTPipeline takes neither latents nor timesteps, hands
its generator to no scheduler, and loads no LoRA: a student's is in PEFT's own format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, LCMScheduler, ModelMixin
from torch import Tensor, nn

from .adapters import Anatomy, linear, reordered
from .common.errors import UserError
from .last_blocks import reading
from .variance_preserving import VariancePreserving, one_step_scheduler

BLOCKS = ("transformer_blocks",)


class DiT(VariancePreserving):
    """See kinds.Kind."""

    called, takes, example = "a DiT teacher", "class_labels", "[207]"
    component, network = "transformer", DiTTransformer2DModel
    layers = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")  # attention and feed-forward
    forgets_generator, loads_loras = True, False

    def anatomy(self, config: Mapping[str, Any], guidance_scale: float) -> Anatomy:
        # the embedding of time and class of the first block makes the last layer's scale and shift too
        apart = ("CombinedTimestepLabelEmbeddings",)
        call = reading(output, BLOCKS)
        return Anatomy(call, last_layer, ("BasicTransformerBlock",), config["patch_size"], by_channel, apart, BLOCKS)

    def num_classes(self, config: Mapping[str, Any]) -> int:
        return config["num_embeds_ada_norm"]

    def student_scheduler(self, scheduler: Any, levels: Sequence[float]) -> LCMScheduler:
        """Its own grid begins at the student's first timestep, since the stock pipeline can give it none."""
        return one_step_scheduler(scheduler, int(levels[0]))

    def call(self, levels: Sequence[float], scheduler: Any) -> dict[str, Any]:
        return {"num_inference_steps": len(levels)}

    def check_steps(self, scheduler: Any, levels: Sequence[float]) -> None:
        made, count = self.student_scheduler(scheduler, levels), len(levels)
        if 2 * (levels[0] + 1) <= scheduler.config["num_train_timesteps"]:
            least = scheduler.config["num_train_timesteps"] // 2
            raise UserError(
                f"the student's first timestep, {levels[0]:g}: DiTPipeline takes no timesteps, and LCMScheduler's own begin at "
                f"{least} or above; set student.readout_t or student.steps accordingly"
            )
        made.set_timesteps(count)
        if (own := made.timesteps.tolist()) != list(levels):
            raise UserError(
                f"student.steps: DiTPipeline takes no timesteps, and the {count} of its scheduler from {levels[0]:g} on are "
                f"{own}; give these"
            )

    def latent_shape(self, config: Mapping[str, Any], factor: int, image_size: int | None) -> tuple[int, int, int]:
        side = config["sample_size"]
        if image_size not in (None, side * factor):
            raise UserError(f"data.image_size={image_size}: this teacher makes images of {side * factor} pixels a side; set that")
        return config["in_channels"], side, side


def output(network: ModelMixin, x: Tensor, time: Tensor, condition: Mapping[str, Tensor]) -> Any:
    """x (b, c, h, w) at timesteps (b,) -> an object whose .sample is the predicted noise (b, c, h, w), without the variance."""
    made = network(x.to(network.dtype), timestep=time, class_labels=condition["class_labels"]).sample
    return SimpleNamespace(sample=made[:, : x.shape[1]])


def last_layer(network: ModelMixin) -> nn.Linear:
    """A DiT's own last projection, also where an adapter sits on it."""
    return linear(network.proj_out_2)


def by_channel(network: ModelMixin) -> nn.Linear:
    """The last layer, which puts out (row, column, channel) of each square, in the order (channel, row, column), noise alone."""
    side, channels = network.config["patch_size"], network.config["in_channels"]
    last = last_layer(network)
    order = torch.arange(last.out_features).reshape(side, side, -1).permute(2, 0, 1)[:channels]
    return reordered(last, order.flatten())


KIND = DiT()
