"""Z-Image: ZImageTransformer2DModel, one Qwen3 encoder. Its network is told 1 - t and puts out -v, and its stock pipeline counts
guidance from 0: pos + s (pos - neg), where others have neg + w (pos - neg); s = w - 1.

Conditions: `encoder_hidden_states` (b, 512, d), zeros behind a prompt's last token, and `attention_mask` (b, 512), 1 up to there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ModelMixin, ZImageTransformer2DModel
from torch import Tensor, nn

from .adapters import Anatomy, linear, reordered
from .flow_matching import FlowMatching
from .last_blocks import reading
from .stock import StockPipeline

SIDE = 2  # latents on a side of the square that is one token
BLOCKS = ("noise_refiner", "context_refiner", "layers")
OWN_SIDE = 128  # latents on a side of the images that the stock pipeline draws by default
TOKENS = 512  # of a prompt, with what stands around it


class ZImage(FlowMatching):
    """See kinds.Kind."""

    called = "a Z-Image teacher"
    network = ZImageTransformer2DModel
    layers = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    unguided = 0.0

    def anatomy(self, config: Mapping[str, Any], guidance_scale: float) -> Anatomy:
        return Anatomy(reading(output, BLOCKS), last_layer, side=SIDE, by_channel=by_channel, repeats=BLOCKS)

    def text_width(self, config: Mapping[str, Any]) -> int:
        return config["cap_feat_dim"]

    def check_folder(self, folder: Path, index: Mapping[str, Any], left_out: Iterable[str]) -> None:
        """It has no T5 that could be missing."""

    @torch.no_grad()
    def encode_prompts(
        self,
        pipe: StockPipeline,
        prompts: Sequence[str],
        size: tuple[int, int],
        device: torch.device,
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        rows: Any = pipe.encode_prompt(list(prompts), device, do_classifier_free_guidance=False)[0]
        embeds = rows[0].new_zeros(len(rows), TOKENS, rows[0].shape[1])
        mask = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        for i, row in enumerate(rows):
            embeds[i, : len(row)], mask[i, : len(row)] = row, 1
        return {"encoder_hidden_states": embeds, "attention_mask": mask}

    def most_tokens(self, pipe: StockPipeline) -> tuple[Any, int]:
        """What the chat template leaves of 512."""
        tokenizer: Any = pipe.tokenizer
        around = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return tokenizer, TOKENS - len(tokenizer(around).input_ids)

    def latent_shape(self, config: Mapping[str, Any], factor: int, image_size: int | None) -> tuple[int, int, int]:
        side = self.side_of(image_size, factor, OWN_SIDE, SIDE)
        return config["in_channels"], side, side


def output(network: ModelMixin, x: Tensor, time: Tensor, condition: Mapping[str, Tensor]) -> Any:
    """x (b, c, h, w), time (b,) in [0, 1] -> an object whose .sample is v (b, c, h, w)."""
    dtype, lengths = network.dtype, condition["attention_mask"].sum(1).tolist()
    text = [row[:n] for row, n in zip(condition["encoder_hidden_states"].to(dtype), lengths, strict=True)]
    told = (1000 - 1000 * time) / 1000  # rounded as by the stock pipeline
    made = network(list(x.to(dtype).unsqueeze(2)), told, text).sample
    return SimpleNamespace(sample=-torch.stack(made).squeeze(2))


def last_layer(network: ModelMixin) -> nn.Linear:
    """Its own last projection of squares, also where an adapter sits on it."""
    return linear(network.all_final_layer[f"{SIDE}-1"].linear)


def by_channel(network: ModelMixin) -> nn.Linear:
    """The last layer, which puts out -v in the order (row, column, channel) of each square: v, (channel, row, column)."""
    last = last_layer(network)
    made = reordered(last, torch.arange(last.out_features).reshape(SIDE, SIDE, -1).permute(2, 0, 1).flatten())
    made.weight.data.neg_(), made.bias.data.neg_()
    return made


KIND = ZImage()
