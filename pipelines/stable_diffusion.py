"""Stable Diffusion 1.x, 2.x and XL: U-Nets, variance-preserving noise, their text and sizes, their one-step scheduler.

Conditions: `encoder_hidden_states` (b, l, d), and for SDXL `text_embeds` (b, d') and `time_ids` (b, 6) = (original height, width,
crop top, left, target height, width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .adapters import UNET, Anatomy
from .common.errors import UserError
from .kinds import family_name
from .stock import StockPipeline
from .up_half import call
from .variance_preserving import VariancePreserving


class StableDiffusion(VariancePreserving):
    """See kinds.Kind."""

    called = "a Stable Diffusion teacher"
    component, network = "unet", UNet2DConditionModel
    # Every layer that the published one-step and few-step LoRAs of Stable Diffusion adapt (the LCM-LoRA set).
    layers = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
        *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )
    has_features = True

    def anatomy(self, config: Mapping[str, Any], guidance_scale: float) -> Anatomy:
        # of its up blocks, parts that are called when the network itself is not
        return UNET._replace(call=call, apart=("Transformer2DModel", "Upsample2D"))

    def feature_layers(self, network: Any) -> tuple[nn.Module, ...]:
        return network.mid_block, network.up_blocks[0]

    def text_width(self, config: Mapping[str, Any]) -> int:
        return config["cross_attention_dim"]

    @torch.no_grad()
    def encode_prompts(
        self,
        pipe: StockPipeline,
        prompts: Sequence[str],
        size: tuple[int, int],
        device: torch.device,
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """SDXL's time_ids are those of an uncropped image of `size` (h, w)."""
        if not self.reads_size(pipe):
            embeds, _ = pipe.encode_prompt(list(prompts), device, 1, False)
            return {"encoder_hidden_states": embeds}
        embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), None, device, 1, False)
        ids = time_ids([(*size, 0, 0)] * len(prompts), size).to(device)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": ids}

    def null_condition(
        self, pipe: StockPipeline, negative_prompt: str | None, device: torch.device, config: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """The empty prompt, or zeros where an SDXL pipeline says force_zeros_for_empty_prompt. It has no time_ids: those are the
        condition's own.
        """
        condition = self.encode_prompts(pipe, [negative_prompt or ""], (0, 0), device, config)
        condition.pop("time_ids", None)
        if negative_prompt is None and pipe.config.get("force_zeros_for_empty_prompt", False):
            condition = {k: torch.zeros_like(v) for k, v in condition.items()}
        return {k: v[0] for k, v in condition.items()}

    def reads_size(self, pipe: StockPipeline) -> bool:
        return family_name(pipe) == "sdxl"

    def placed(
        self, condition: dict[str, Tensor], places: Sequence[tuple[int, int, int, int]], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        return condition | {"time_ids": time_ids(places, size)} if "time_ids" in condition else condition

    def latent_shape(self, config: Mapping[str, Any], factor: int, image_size: int | None) -> tuple[int, int, int]:
        channels, side = config["in_channels"], config["sample_size"]
        if image_size is not None:
            side, rest = divmod(image_size, factor)
            steps = 2 ** (len(config["block_out_channels"]) - 1)
            if rest or side % steps:
                raise UserError(f"data.image_size={image_size} must be a multiple of {factor * steps} for this teacher")
        return channels, side, side


def time_ids(original_and_crop: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> Tensor:
    """(height, width, top, left) of each image before it became one of `size` -> SDXL's micro-conditioning (b, 6)."""
    return torch.tensor([(*row, *size) for row in original_and_crop], dtype=torch.float32)


KIND = StableDiffusion()
