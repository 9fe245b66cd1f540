"""Text and images encoded once, for teachers that draw from text: what rows are made of, and what the cache knows them by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines import kinds
from pipelines import text_to_image as t2i
from pipelines.common.identity import network_identity, pipeline_identity, tokens_identity
from pipelines.denoiser import Condition
from pipelines.stock import StockPipeline

from ..cache import Encoded
from ..config.data import Captions, Prompts, TeacherSamples
from ..data.sources import CaptionRows, PromptRows, image_batch, load_rows
from ..engine.draws import derive_seed

TextData = Prompts | Captions | TeacherSamples
FORMAT = 2  # of what is encoded and how: a change of the rules below that changes the rows needs another number


def encode(source: str, data: TextData, folder: Path, accelerator: Accelerator, dtype: torch.dtype, **options: Any) -> Encoded:
    """The rows of a data section behind a cache in `folder`; options: those of Encoder."""
    rows = load_rows(data)
    return Encoded(rows, Encoder(source, data, rows, accelerator.device, dtype, **options), folder, accelerator)


class Encoder:
    """See cache.Encoder. Noise depends on the row alone, so neither shards nor processes show."""

    def __init__(
        self,
        source: str,
        data: TextData,
        rows: PromptRows,
        device: torch.device,
        dtype: torch.dtype,
        negative_prompt: str | None = None,
        variant: str | None = None,
        seed: int = 0,
    ) -> None:
        self.rows, self.data, self.device, self.seed, self.negative_prompt = rows, data, device, seed, negative_prompt
        index = t2i.read_index(source)
        self.kind = kind = kinds.kind_named(t2i.family_in(index, source))
        left_out = (kind.component,) if not isinstance(data, TeacherSamples) else ()
        self.pipe = pipe = t2i.load_pipeline(
            source, dtype, left_out if isinstance(data, Captions) else (*left_out, "vae"), variant
        )
        # sizes come from the network and the VAE, whose configurations are at hand without their weights
        self.config = t2i.network_config(source, kind)
        factor = t2i.vae_factor(source)
        pipe.vae_scale_factor = factor  # without its VAE a pipeline takes it for 8
        self.shape = kind.latent_shape(self.config, factor, data.image_size)
        self.image_size = self.shape[1] * factor
        self.size = (self.image_size, self.image_size)
        self.overlong, self.most_tokens = t2i.overlong(pipe, rows.prompts), kind.most_tokens(pipe)[1]
        self.identity = identity_of(pipe, data, rows.prompts, self.image_size, dtype, seed)
        pipe.to(device)

    def null(self) -> Condition:
        null = self.kind.null_condition(self.pipe, self.negative_prompt, self.device, self.config)
        return {k: v.cpu() for k, v in null.items()}

    def __call__(self, index: range) -> dict[str, Tensor]:
        prompts = [self.rows.prompts[i] for i in index]
        condition = self.kind.encode_prompts(self.pipe, prompts, self.size, self.device, self.config)
        data = self.data
        if isinstance(data, Prompts):
            return condition
        noise = torch.stack([self._noise(i) for i in index]).to(self.device)
        if isinstance(self.rows, CaptionRows):
            images, places = image_batch(self.rows, index, self.size[0])
            condition = self.kind.placed(condition, places, self.size)
            return condition | {"latents": t2i.encode_images(self.pipe.vae, images.to(self.device), noise)}
        if not isinstance(data, TeacherSamples):
            raise ValueError(f"data: {data.name!r} comes with images, and these rows have none")
        latents = self.pipe(
            prompts,
            height=self.size[0],
            width=self.size[1],
            num_inference_steps=data.num_inference_steps,
            guidance_scale=self.kind.stock_guidance(data.guidance_scale),
            latents=self.kind.packed(noise).to(kinds.network_of(self.pipe).dtype),
            output_type="latent",
        ).images
        return condition | {"latents": self.kind.unpacked(latents, self.shape).float()}

    def _noise(self, row: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "cache", row))
        return torch.randn(self.shape, generator=generator)


def identity_of(
    pipe: StockPipeline, data: TextData, prompts: list[str], image_size: int, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """What encoded rows depend on besides the prompts and images themselves. Of the networks those that take part: of the VAE its
    encoder, and only where there are images. The negative prompt is no part: the null condition is not in the cache.
    """
    images, samples = isinstance(data, Captions), isinstance(data, TeacherSamples)
    kind, encoders = kinds.kind_of(pipe), t2i.TEXT_ENCODERS
    found: dict[str, Any] = {"format": FORMAT, "kind": data.name, "dtype": str(dtype).removeprefix("torch.")}
    found |= pipeline_identity(pipe, (*encoders, kind.component) if samples else encoders, scheduler=samples, call=samples)
    found |= tokens_identity(pipe, prompts)
    if images:
        found |= network_identity("vae", pipe.vae, left_out=("decoder.", "post_quant_conv."))
    if images or samples or kind.reads_size(pipe):
        found["image_size"] = image_size
    if images or samples:
        found["seed"] = seed
    if isinstance(data, TeacherSamples):
        found |= {"steps": data.num_inference_steps, "guidance_scale": data.guidance_scale}
    return found
