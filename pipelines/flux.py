"""Flux.1 (dev and schnell): FluxTransformer2DModel on packed latents, CLIP and T5. dev is told its guidance, schnell has none.

Conditions: `encoder_hidden_states` (b, 512, d), `pooled_projections` (b, d').
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, ModelMixin
from torch import Tensor

from .adapters import Anatomy, from_tokens, to_tokens
from .flow_matching import FlowMatching, last_layer, to_dtype
from .kinds import Guidance
from .last_blocks import reading
from .stock import StockPipeline

SIDE = 2  # latents on a side of the square that is one token
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
OWN_SIDE = 128  # latents on a side of the images that the stock pipeline draws by default


class Flux(FlowMatching):
    """See kinds.Kind."""

    called = "a Flux teacher"
    network = FluxTransformer2DModel
    # attention and feed-forward, as diffusers' own LoRA training; proj_mlp is the feed-forward of the single blocks
    layers = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    )
    t5 = ("text_encoder_2", "tokenizer_2")

    def guidance(self, config: Mapping[str, Any]) -> Guidance:
        return "input" if config["guidance_embeds"] else "none"

    def anatomy(self, config: Mapping[str, Any], guidance_scale: float) -> Anatomy:
        told = guidance_scale if config["guidance_embeds"] else None
        call = reading(partial(output, guidance_scale=told), BLOCKS)
        return Anatomy(call, last_layer, side=SIDE, by_channel=last_layer, repeats=BLOCKS)

    @torch.no_grad()
    def encode_prompts(
        self,
        pipe: StockPipeline,
        prompts: Sequence[str],
        size: tuple[int, int],
        device: torch.device,
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        embeds, pooled, _ = pipe.encode_prompt(list(prompts), device=device)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def latent_shape(self, config: Mapping[str, Any], factor: int, image_size: int | None) -> tuple[int, int, int]:
        side = self.side_of(image_size, factor, OWN_SIDE, SIDE)
        return config["in_channels"] // SIDE**2, side, side

    def packed(self, latents: Tensor) -> Tensor:
        return to_tokens(latents, SIDE)

    def unpacked(self, latents: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return from_tokens(latents, shape[1:], SIDE)


def output(
    network: ModelMixin,
    x: Tensor,
    time: Tensor,
    condition: Mapping[str, Tensor],
    guidance_scale: float | None,
    **options: Any,
) -> Any:
    """x (b, c, h, w), time (b,) in [0, 1] -> an object whose .sample is (b, c, h, w)."""
    (b, _, h, w), dtype = x.shape, network.dtype
    given = to_dtype(condition, dtype)
    rows, columns = torch.meshgrid(torch.arange(h // SIDE), torch.arange(w // SIDE), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(x.device, dtype)
    told = None if guidance_scale is None else torch.full((b,), guidance_scale, device=x.device)
    tokens = network(
        hidden_states=to_tokens(x, SIDE).to(dtype),
        timestep=(1000 * time).to(dtype) / 1000,  # rounded as by the stock pipeline
        guidance=told,
        img_ids=places,
        txt_ids=places.new_zeros(given["encoder_hidden_states"].shape[1], 3),
        **given,
        **options,
    ).sample
    return SimpleNamespace(sample=from_tokens(tokens, (h, w), SIDE))


KIND = Flux()
