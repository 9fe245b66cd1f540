"""Encode text-to-image data once: `accelerate launch -m trainers.cache --config configs/X.yaml [a.b=value ...]`.

Takes the configuration of a distillation or of a Stable Diffusion teacher and makes the cache that it needs (data.cache), shared
out over all processes; stopped and started again, it goes on. The training commands do it themselves where it is not done.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from pipelines import stable_diffusion as sd
from pipelines.errors import UserError
from pipelines.launch import user_errors

from . import setup, shards
from .config import DistillConfig, TeacherConfig
from .config_data import TEXT_DATA, Captions, Prompts, TeacherSamples
from .config_file import read_raw
from .draws import derive_seed
from .sources import CaptionRows, PromptRows, image_batch, load_rows
from .teachers import teacher_folder

TextData = Prompts | Captions | TeacherSamples


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
        config = UNet2DConditionModel.load_config(source, subfolder="unet")
        factor = vae_factor(source)
        self.shape = latent_shape(config, factor, data.image_size)
        self.image_size = self.shape[1] * factor
        self.overlong = sd.overlong(pipe, rows.prompts)
        if self.overlong and accelerator.is_main_process:
            first, most = rows.prompts[self.overlong[0]], pipe.tokenizer.model_max_length
            print(f"{len(self.overlong)} of {len(rows)} prompts have more than {most} tokens and were cut; the first: {first!r}")
        networks = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
        identity = rows.identity | {
            "weights": shards.weights_sha256(networks),
            "image_size": self.image_size,
            "dtype": str(dtype).removeprefix("torch."),
            "kind": data.name,
            "seed": seed if images or samples else None,
            "steps": data.num_inference_steps if samples else None,
            "guidance_scale": data.guidance_scale if samples else None,
            "scheduler": scheduler_sha256(pipe.scheduler) if samples else None,
        }
        pipe.to(accelerator.device)
        encoder = _Encoder(pipe, rows, data, self.shape, self.image_size, accelerator.device, seed)
        shards.build(folder, identity, len(rows), encoder, accelerator)
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


def scheduler_sha256(scheduler: Any) -> str:
    """Of its class and settings: what the teacher's samples depend on beside weights."""
    settings = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return hashlib.sha256(repr((type(scheduler).__name__, sorted(settings.items()))).encode()).hexdigest()


def vae_factor(source: str) -> int:
    """Pixels a latent, on a side."""
    if sd.read_index(source).get("vae", [None])[0] is None:
        return 1
    return 2 ** (len(AutoencoderKL.load_config(source, subfolder="vae")["block_out_channels"]) - 1)


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
