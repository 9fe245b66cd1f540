"""Encode text-to-image data once: `accelerate launch -m trainers.cache --config configs/X.yaml [a.b=value ...]`.

Takes the configuration of a distillation or of a Stable Diffusion teacher and makes the cache that it needs (data.cache), shared
out over all processes; stopped and started again, it goes on. The training commands do it themselves where it is not done.
"""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from pipelines import stable_diffusion as sd
from pipelines.errors import UserError, shown
from pipelines.identity import network_identity, pipeline_identity, tokens_identity
from pipelines.images import said_of
from pipelines.launch import user_errors
from pipelines.reading import loading
from pipelines.walk import say

from . import setup, shards
from .config import DistillConfig, TeacherConfig
from .config_data import TEXT_DATA, Captions, Prompts, TeacherSamples
from .config_file import read_raw
from .draws import derive_seed
from .sources import CaptionRows, PromptRows, image_batch, load_rows
from .teachers import teacher_folder

TextData = Prompts | Captions | TeacherSamples
FORMAT = 2  # of what is encoded and how: a change of the rules below that changes the rows needs another number


class Encoded:
    """The rows of a data section behind a cache, and the null condition: all that text encoders and VAE are needed for.

    They are freed when this is made; the cache in `folder` holds what they said.
    """

    def __init__(
        self,
        source: str,
        data: TextData,
        folder: Path,
        accelerator: Accelerator,
        dtype: torch.dtype,
        negative_prompt: str | None = None,
        variant: str | None = None,
        seed: int = 0,
    ) -> None:
        rows = load_rows(data)
        images, samples = isinstance(data, Captions), isinstance(data, TeacherSamples)
        left_out = ("unet",) if not samples else ()
        pipe = sd.load_pipeline(source, dtype, left_out if images else (*left_out, "vae"), variant)
        # sizes come from the network and the VAE, whose configurations are at hand without their weights
        with loading(f"{source!r}: the settings of unet/ cannot be read"):
            config = with_defaults(UNet2DConditionModel, UNet2DConditionModel.load_config(source, subfolder="unet"))
        factor = vae_factor(source)
        self.shape = latent_shape(config, factor, data.image_size)
        self.image_size = self.shape[1] * factor
        self.overlong = sd.overlong(pipe, rows.prompts)
        if self.overlong and accelerator.is_main_process:
            first, most = shown(rows.prompts[self.overlong[0]], 200), pipe.tokenizer.model_max_length
            print(f"{len(self.overlong)} of {len(rows)} prompts have more than {most} tokens and were cut; the first: {first}")
        identity = rows.identity | identity_of(pipe, data, rows.prompts, self.image_size, dtype, seed)
        pipe.to(accelerator.device)
        encoder = _Encoder(pipe, rows, data, self.shape, self.image_size, accelerator.device, seed)
        shards.build(folder, identity, len(rows), encoder, accelerator)
        if isinstance(rows, CaptionRows):
            notes = sum(map(Counter, gather_object([dict(rows.notes)])), Counter())  # of all processes
            say(said_of(notes, "data"))
        self.prompts = rows.prompts
        self.examples = shards.Cached(folder)
        self.null = {k: v.cpu() for k, v in sd.null_condition(pipe, negative_prompt, accelerator.device).items()}


class _Encoder:
    """Row numbers -> what the cache keeps of them. Noise depends on the row alone, so neither shards nor processes show."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        rows: PromptRows,
        data: TextData,
        shape: tuple[int, int, int],
        image_size: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.pipe, self.rows, self.data, self.shape, self.size = pipe, rows, data, shape, (image_size, image_size)
        self.device, self.seed = device, seed

    def __call__(self, index: range) -> dict[str, Tensor]:
        prompts = [self.rows.prompts[i] for i in index]
        condition = sd.encode_prompts(self.pipe, prompts, self.size, self.device)
        if isinstance(self.data, Prompts):
            return condition
        noise = torch.stack([self._noise(i) for i in index]).to(self.device)
        if isinstance(self.rows, CaptionRows):
            images, places = image_batch(self.rows, index, self.size[0])
            if "time_ids" in condition:
                condition["time_ids"] = sd.time_ids(places, self.size)
            return condition | {"latents": sd.encode_images(self.pipe.vae, images.to(self.device), noise)}
        latents = self.pipe(
            prompts,
            height=self.size[0],
            width=self.size[1],
            num_inference_steps=self.data.num_inference_steps,
            guidance_scale=self.data.guidance_scale,
            latents=noise.to(self.pipe.unet.dtype),
            output_type="latent",
        ).images
        return condition | {"latents": latents.float()}

    def _noise(self, row: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "cache", row))
        return torch.randn(self.shape, generator=generator)


def identity_of(
    pipe: DiffusionPipeline, data: TextData, prompts: list[str], image_size: int, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """What encoded rows depend on besides the prompts and images themselves. Of the networks those that take part: of the VAE its
    encoder, and only where there are images. The negative prompt is no part: the null condition is not in the cache.
    """
    images, samples = isinstance(data, Captions), isinstance(data, TeacherSamples)
    encoders = ("text_encoder", "text_encoder_2")
    found = {"format": FORMAT, "kind": data.name, "dtype": str(dtype).removeprefix("torch.")}
    found |= pipeline_identity(pipe, (*encoders, "unet") if samples else encoders, scheduler=samples, call=samples)
    found |= tokens_identity(pipe, prompts)
    if images:
        found |= network_identity("vae", pipe.vae, left_out=("decoder.", "post_quant_conv."))
    if images or samples or sd.FAMILIES[type(pipe).__name__] == "sdxl":  # it is in SDXL's time_ids
        found["image_size"] = image_size
    if images or samples:
        found["seed"] = seed
    if samples:
        found |= {"steps": data.num_inference_steps, "guidance_scale": data.guidance_scale}
    return found


def vae_factor(source: str) -> int:
    """Pixels a latent, on a side."""
    if sd.read_index(source).get("vae", [None])[0] is None:
        return 1
    with loading(f"{source!r}: the settings of vae/ cannot be read"):
        config = with_defaults(AutoencoderKL, AutoencoderKL.load_config(source, subfolder="vae"))
        return 2 ** (len(config["block_out_channels"]) - 1)


def with_defaults(kind: type, config: dict[str, Any]) -> dict[str, Any]:
    """A network's settings, those that its file leaves out as diffusers would take them."""
    parameters = inspect.signature(kind.__init__).parameters
    return {name: config.get(name, p.default) for name, p in parameters.items() if name != "self"}


def latent_shape(config: dict[str, Any], factor: int, image_size: int | None) -> tuple[int, int, int]:
    """(c, h, w) of the latents of square images, by default of the network's own size; ValueError for one that does not fit."""
    channels, side = config["in_channels"], config["sample_size"]
    if image_size is not None:
        side, rest = divmod(image_size, factor)
        steps = 2 ** (len(config["block_out_channels"]) - 1)
        if rest or side % steps:
            raise UserError(f"data.image_size={image_size} must be a multiple of {factor * steps} for this teacher")
    return channels, side, side


def open_cache(config: DistillConfig | TeacherConfig, accelerator: Accelerator) -> Encoded:
    """The cache of a configuration, made where it is not there yet."""
    folder = Path(config.data.cache or f"{config.output_dir}/cache")
    if isinstance(config, TeacherConfig):
        return Encoded(config.pipeline, config.data, folder, accelerator, torch.float32, seed=config.seed)
    t = config.teacher
    source, dtype = teacher_folder(t.path), sd.DTYPES[t.dtype]
    return Encoded(source, config.data, folder, accelerator, dtype, t.negative_prompt, t.variant, config.seed)


def kind_of(argv: list[str] | None) -> type[DistillConfig] | type[TeacherConfig]:
    """A teacher's configuration is one that names a pipeline to train further."""
    return TeacherConfig if read_raw(*setup.arguments(__doc__, argv)).get("pipeline") is not None else DistillConfig


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        config = setup.parse(kind_of(argv), __doc__, argv)
        if not isinstance(config.data, TEXT_DATA):
            raise UserError("data: only prompts, captions and teacher_samples are encoded; this configuration has none of them")
        accelerator = setup.make_accelerator(config)
        encoded = open_cache(config, accelerator)
        if accelerator.is_main_process:
            print(f"{len(encoded.examples)} rows in {config.data.cache or f'{config.output_dir}/cache'}")
        accelerator.end_training()


if __name__ == "__main__":
    main()
