"""Stable Diffusion 3 and 3.5 (medium, with its second attention, and large): SD3Transformer2DModel, three text encoders.

Conditions: `encoder_hidden_states` (b, 77 + 256, d), `pooled_projections` (b, d'). Without T5 zeros are in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ModelMixin, SD3Transformer2DModel
from torch import Tensor, nn

from .adapters import Anatomy, reordered
from .common.errors import UserError
from .flow_matching import FlowMatching, last_layer, to_dtype
from .last_blocks import reading
from .stock import StockPipeline

BLOCKS = ("transformer_blocks",)


class StableDiffusion3(FlowMatching):
    """See kinds.Kind."""

    called = "a Stable Diffusion 3 teacher"
    network = SD3Transformer2DModel
    # attention and feed-forward of images and text, as published LoRAs for few steps; SD3.5-M's second attention ends alike
    layers = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    t5 = optional = ("text_encoder_3", "tokenizer_3")

    def anatomy(self, config: Mapping[str, Any], guidance_scale: float) -> Anatomy:
        call = reading(output, BLOCKS)
        return Anatomy(call, last_layer, ("JointTransformerBlock",), config["patch_size"], by_channel, repeats=BLOCKS)

    @torch.no_grad()
    def encode_prompts(
        self,
        pipe: StockPipeline,
        prompts: Sequence[str],
        size: tuple[int, int],
        device: torch.device,
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        stands_in = pipe.text_encoder_3 is None and pipe.transformer is None
        if stands_in:  # the stock pipeline asks the network how wide its zeros are to be
            if config is None:
                raise ValueError("without T5 and without its network the pipeline's text has no width: give the settings")
            pipe.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        try:
            options = {"device": device, "do_classifier_free_guidance": False}
            embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), None, None, **options)
        finally:
            if stands_in:
                pipe.transformer = None
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def latent_shape(self, config: Mapping[str, Any], factor: int, image_size: int | None) -> tuple[int, int, int]:
        patch = config["patch_size"]
        side = self.side_of(image_size, factor, config["sample_size"], patch)
        if side > (most := patch * config["pos_embed_max_size"]):
            raise UserError(f"data.image_size={image_size}: this teacher has places for {most * factor} pixels a side")
        return config["in_channels"], side, side


def output(network: ModelMixin, x: Tensor, time: Tensor, condition: Mapping[str, Tensor], **options: Any) -> Any:
    """x (b, c, h, w), time (b,) in [0, 1] -> an object whose .sample is (b, c, h, w)."""
    given = to_dtype(condition, network.dtype)
    return network(hidden_states=x.to(network.dtype), timestep=1000 * time, **given, **options)


def by_channel(network: ModelMixin) -> nn.Linear:
    """The last layer, which puts out (row, column, channel) of each square, in the order (channel, row, column)."""
    last, side = last_layer(network), network.config["patch_size"]
    return reordered(last, torch.arange(last.out_features).reshape(side, side, -1).permute(2, 0, 1).flatten())


KIND = StableDiffusion3()
