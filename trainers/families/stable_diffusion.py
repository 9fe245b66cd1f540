"""Stable Diffusion teachers: one frozen network, adapters for every other role, text and images encoded once."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from torch import Tensor, nn

from pipelines import stable_diffusion as sd
from pipelines.adapters import AdapterHead, Role, SharedNetwork, Whole, in_float32, last_layer, whole_copy
from pipelines.common.errors import UserError
from pipelines.common.identity import network_identity, pipeline_identity, tokens_identity, weights_sha256
from pipelines.common.reading import loading
from pipelines.denoiser import Condition, Denoiser, FeatureMaps, FewStepGenerator, check_readout
from pipelines.stock import StockPipeline
from pipelines.students import save_stable_diffusion

from ..cache import Encoded
from ..command import sharded
from ..config.data import TEXT_DATA, Captions, Prompts, TeacherSamples
from ..config.level_range import check_levels
from ..config.networks import Lora, Network
from ..config.run import DistillConfig, TeacherConfig
from ..data.examples import evenly
from ..data.shards import Cached
from ..data.sources import CaptionRows, PromptRows, image_batch, load_rows
from ..engine.draws import derive_seed
from ..objectives.base import Need
from ..posteriors import UNetPosterior
from ..posteriors.section import Posterior
from . import base, teacher_folder
from .base import Learner, add_role, build_covariance, refuse, unit_noise

# Every layer that the published one-step and few-step LoRAs of Stable Diffusion adapt (the LCM-LoRA set).
ALL_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)

TEXT_AND_IMAGES = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
NO_TEXT = "data: a Stable Diffusion teacher needs data.name prompts, captions or teacher_samples"
TextData = Prompts | Captions | TeacherSamples
FORMAT = 2  # of what is encoded and how: a change of the rules below that changes the rows needs another number


class Family(base.Family):
    """See base.Family."""

    called = "a Stable Diffusion teacher"
    teacher_keys = ("path", "guidance_scale", "negative_prompt", "dtype", "variant")
    student_keys = ("readout_t", "steps", "inputs", "lora")
    gives = ("lora", "posterior", "condition_vector")
    examples: Cached

    def __init__(self, config: DistillConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        t = config.teacher
        path = teacher_folder(t.source)
        index = sd.read_index(path)
        sd.check_parts(path)  # before its text encoders work, which may take hours
        schedule = sd.load_schedule(path)
        check_levels(config, schedule)
        self.sampling_range = schedule.t_range
        self.levels = self._levels(config, int(schedule.t_range[1]) + 1)
        for timestep in self.levels:
            check_readout(schedule, timestep)
        encoded = self.encoded(config, accelerator)
        self.examples, self.latent_shape, null = encoded.examples, encoded.shape, encoded.null
        kept = {"unet", "scheduler"} | ({"vae"} if config.sample_every or config.evaluation else set())
        left_out = [k for k in index if not k.startswith("_") and k not in kept]
        self.pipe = sd.load_pipeline(path, sd.DTYPES[t.dtype], left_out, t.variant)
        base_weights = weights_sha256({"unet": self.pipe.unet})
        self.base = SharedNetwork(self.pipe.unet)
        self.teacher = sd.denoiser(self.pipe, self.base.teacher(), t.guidance_scale, null)
        role = self._role("student", config.student.lora)
        self.trained = role.network if isinstance(role, Whole) else None
        self.student = FewStepGenerator(sd.denoiser(self.pipe, role), self.levels, inputs=config.inputs)
        if getattr(self.pipe, "vae", None) is not None:
            self.pipe.vae.to(self.device)  # type: ignore[arg-type]  # diffusers' wrapper of it hides its arguments
        self.facts = {
            "family": sd.FAMILIES[type(self.pipe).__name__],
            "weights": "lora" if config.student.lora else "unet",
            "readout_t": self.levels[0],
            **({"levels": self.levels} if len(self.levels) > 1 else {}),
            "guidance_scale": t.guidance_scale,
            "image_size": encoded.image_size,
            "base_weights": base_weights,
            "base_dtype": t.dtype,
        }

    @classmethod
    def check(cls, config: DistillConfig) -> None:
        if config.compile and sharded():
            raise UserError("compile: FSDP and compiled blocks do not go together; set compile: null, or use gpu_8.yaml")
        super().check(config)
        if config.teacher.guidance_scale == 1:
            unguided = "a teacher without guidance (guidance_scale 1)"
            refuse(unguided, {"teacher.negative_prompt": config.teacher.negative_prompt})
        if not isinstance(config.data, TEXT_DATA):
            raise UserError(NO_TEXT)

    @classmethod
    def refusal(cls, need: Need) -> str | None:
        if need.what != "posterior" or need.value == "adapter":
            return super().refusal(need)
        if not isinstance(need.value, Network):
            kind = repr(need.value) if isinstance(need.value, str) else "a section of this kind"
            return (
                f"{need.key}: {kind} is for EDM teachers; set adapter, or a section "
                "{channels: ..., channel_mult: [...]} for a small network of its own"
            )
        for key in ("patch_size", "dropout"):
            if getattr(need.value, key) != Network.model_fields[key].default:
                return f"{need.key}.{key} has no effect for {cls.called}; remove it"
        return None

    @staticmethod
    def _levels(config: DistillConfig, num_train_timesteps: int) -> list[int]:
        """The timesteps of the student's steps."""
        steps, readout_t = config.student.steps, config.student.readout_t
        if isinstance(steps, int):
            return [readout_t] if readout_t is not None else sd.student_levels(num_train_timesteps, steps)
        if odd := [t for t in steps if t != int(t)]:
            raise UserError(f"student.steps: {odd[0]:g} is no timestep; {config.teacher.path!r} knows whole ones")
        return [int(t) for t in steps]

    def _role(self, name: str, lora: Lora | None) -> Role | Whole:
        """An adapter on the teacher's weights, or a network of its own in float32."""
        if lora is None:
            return Whole(whole_copy(self.base.network))
        return add_role(self.base, name, lora, ALL_LAYERS, self.config.seed)

    def fake_score(self, section: Any) -> Denoiser:
        return sd.denoiser(self.pipe, self._role("aux", section.lora))

    def features(self) -> FeatureMaps:
        """Without guidance: x_t of either side is compared under its own condition."""
        network = self.base.network
        return FeatureMaps(sd.denoiser(self.pipe, self.base.teacher()), (network.mid_block, network.up_blocks[0]))

    def posterior(self, section: Posterior, with_mean: bool) -> UNetPosterior:
        p, own = section, self.base.network
        covariance = build_covariance(p, self.config.seed, self.latent_shape)
        out_channels = UNetPosterior.num_channels(covariance, with_mean)
        network: AdapterHead | TextUNet
        if isinstance(p.network, Network):
            network = small_unet(
                p.network, own, self.latent_shape, out_channels, derive_seed(self.config.seed, "init", "posterior")
            )
        else:
            network = AdapterHead(add_role(self.base, "aux", p.lora, ALL_LAYERS, self.config.seed), out_channels)
        posterior = UNetPosterior(network, covariance, self.teacher.sigma_data, with_mean, self.teacher.parameterization)
        if with_mean and p.network == "adapter":
            posterior.start_mean(last_layer(own))
        return posterior

    @torch.no_grad()
    def preview(self) -> Tensor:
        """The student's images for prompts of the data."""
        images = []
        for start, index in enumerate(self.shown(self.config.num_samples).split(8)):
            generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "preview", 8 * start))
            z = torch.randn(self.student.steps, len(index), *self.latent_shape, generator=generator).to(self.device)
            images.append(self.decode(self.student.sample(z, self.condition(index))).cpu())
        return torch.cat(images)

    def shown(self, count: int) -> Tensor:
        return evenly(count, len(self.examples))

    def condition(self, rows: Tensor) -> Condition:
        return {k: v.to(self.device) for k, v in self.examples.rows(rows % len(self.examples))[1].items()}

    def decode(self, x0: Tensor) -> Tensor:
        return sd.decode_latents(self.pipe.vae, x0) / 2 + 0.5

    @torch.no_grad()
    def images(self, index: range) -> Tensor:
        z = unit_noise(self.config, index, self.latent_shape).to(self.device)
        return self.decode(self.student.sample(z, self.condition(torch.tensor(index)))).cpu()

    @classmethod
    def in_training(cls, config: TeacherConfig, accelerator: Accelerator) -> Learner:
        return FurtherTeacher(config, accelerator)

    @classmethod
    def network_of(cls, path: str, dtype: torch.dtype, variant: str | None) -> nn.Module:
        return sd.load_pipeline(teacher_folder(path), dtype, TEXT_AND_IMAGES, variant).unet

    @classmethod
    def encoded(cls, config: DistillConfig | TeacherConfig, accelerator: Accelerator) -> Encoded:
        data = config.data
        if not isinstance(data, TEXT_DATA):
            raise UserError(NO_TEXT)
        folder = Path(data.cache or f"{config.output_dir}/cache")
        if isinstance(config, TeacherConfig):
            return encode(pipeline_of(config), data, folder, accelerator, torch.float32, seed=config.seed)
        t = config.teacher
        options = {"negative_prompt": t.negative_prompt, "variant": t.variant, "seed": config.seed}
        return encode(teacher_folder(t.source), data, folder, accelerator, sd.DTYPES[t.dtype], **options)

    def shard(self) -> None:
        self.base.shard()

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        scheduler = sd.one_step_scheduler(self.pipe.scheduler)
        if self.config.student.lora:
            save_stable_diffusion(folder, type(self.pipe), scheduler, info, adapter=(self.base.network, "student"))
        else:
            save_stable_diffusion(folder, type(self.pipe), scheduler, info, network=self.trained)


class TextUNet(nn.Module):
    """A small U-Net of its own that reads x_t, t and the prompt's tokens; SDXL's further conditions are left to the teacher."""

    def __init__(self, network: UNet2DConditionModel) -> None:
        super().__init__()
        self.network, self.out_channels = network, network.config["out_channels"]

    @property
    def conv_out(self) -> nn.Conv2d:
        return self.network.conv_out

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, **condition: Tensor) -> Tensor:
        with in_float32(self.network.conv_out):
            return self.network(x_t, t, encoder_hidden_states.to(x_t.dtype)).sample


def small_unet(network: Network, base: ModelMixin, shape: tuple[int, int, int], out_channels: int, seed: int) -> TextUNet:
    """UNet2DConditionModel with the widths of a `network` section; its last layer starts at zero."""
    levels = range(len(network.channel_mult))
    down = tuple("CrossAttnDownBlock2D" if i in network.attention_levels else "DownBlock2D" for i in levels)
    up = tuple(reversed([d.replace("Down", "Up") for d in down]))
    widths = tuple(network.channels * m for m in network.channel_mult)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=shape[1],
            in_channels=shape[0],
            out_channels=out_channels,
            down_block_types=down,
            up_block_types=up,
            block_out_channels=widths,
            layers_per_block=network.num_blocks,
            cross_attention_dim=base.config["cross_attention_dim"],
            norm_num_groups=next(g for g in (32, 16, 8, 4, 2, 1) if all(w % g == 0 for w in widths)),
        )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return TextUNet(unet)


class FurtherTeacher:
    """The network of a Stable Diffusion pipeline, all of its weights, on encoded images and captions. See base.Learner."""

    def __init__(self, config: TeacherConfig, accelerator: Accelerator) -> None:
        self.config, self.device = config, accelerator.device
        source = pipeline_of(config)
        sd.check_parts(source)  # before its text encoders work, which may take hours
        check_levels(config, sd.load_schedule(source))
        encoded = Family.encoded(config, accelerator)
        self.examples, self.latent_shape, self.null_condition = encoded.examples, encoded.shape, encoded.null
        self.pipeline = sd.load_pipeline(source)
        unet = self.pipeline.unet.requires_grad_(True).train()
        self.denoiser = sd.denoiser(self.pipeline, Whole(unet))
        self.prompts = [encoded.prompts[i] for i in evenly(config.num_samples, len(encoded.prompts))]
        self.image_size = encoded.image_size
        self.facts = {"image_size": encoded.image_size, "base_model": config.pipeline}

    @torch.no_grad()
    def preview(self) -> Tensor:
        self.pipeline.to(self.device).unet.eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        options = {"height": self.image_size, "width": self.image_size, "num_inference_steps": 25, "output_type": "pt"}
        options |= {} if self.config.guidance_scale is None else {"guidance_scale": self.config.guidance_scale}
        drawn = self.pipeline(self.prompts, generator=generator, **options).images
        self.pipeline.unet.train()
        return drawn.float()


def pipeline_of(config: TeacherConfig) -> str:
    """What is trained further; ValueError where the configuration names a new network instead."""
    if config.pipeline is None:
        raise ValueError("pipeline: a teacher that is trained further needs one")
    return config.pipeline


# Text and images -------------------------------------------------------------------------------------------------------


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
        left_out = ("unet",) if not isinstance(data, TeacherSamples) else ()
        self.pipe = pipe = sd.load_pipeline(
            source, dtype, left_out if isinstance(data, Captions) else (*left_out, "vae"), variant
        )
        # sizes come from the network and the VAE, whose configurations are at hand without their weights
        with loading(f"{source!r}: the settings of unet/ cannot be read"):
            config = with_defaults(UNet2DConditionModel, UNet2DConditionModel.load_config(source, subfolder="unet"))
        factor = vae_factor(source)
        self.shape = latent_shape(config, factor, data.image_size)
        self.image_size = self.shape[1] * factor
        self.size = (self.image_size, self.image_size)
        self.overlong, self.most_tokens = sd.overlong(pipe, rows.prompts), pipe.tokenizer.model_max_length
        self.identity = identity_of(pipe, data, rows.prompts, self.image_size, dtype, seed)
        pipe.to(device)

    def null(self) -> Condition:
        return {k: v.cpu() for k, v in sd.null_condition(self.pipe, self.negative_prompt, self.device).items()}

    def __call__(self, index: range) -> dict[str, Tensor]:
        prompts = [self.rows.prompts[i] for i in index]
        condition = sd.encode_prompts(self.pipe, prompts, self.size, self.device)
        data = self.data
        if isinstance(data, Prompts):
            return condition
        noise = torch.stack([self._noise(i) for i in index]).to(self.device)
        if isinstance(self.rows, CaptionRows):
            images, places = image_batch(self.rows, index, self.size[0])
            if "time_ids" in condition:
                condition["time_ids"] = sd.time_ids(places, self.size)
            return condition | {"latents": sd.encode_images(self.pipe.vae, images.to(self.device), noise)}
        if not isinstance(data, TeacherSamples):
            raise ValueError(f"data: {data.name!r} comes with images, and these rows have none")
        latents = self.pipe(
            prompts,
            height=self.size[0],
            width=self.size[1],
            num_inference_steps=data.num_inference_steps,
            guidance_scale=data.guidance_scale,
            latents=noise.to(self.pipe.unet.dtype),
            output_type="latent",
        ).images
        return condition | {"latents": latents.float()}

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
    encoders = ("text_encoder", "text_encoder_2")
    found: dict[str, Any] = {"format": FORMAT, "kind": data.name, "dtype": str(dtype).removeprefix("torch.")}
    found |= pipeline_identity(pipe, (*encoders, "unet") if samples else encoders, scheduler=samples, call=samples)
    found |= tokens_identity(pipe, prompts)
    if images:
        found |= network_identity("vae", pipe.vae, left_out=("decoder.", "post_quant_conv."))
    if images or samples or sd.FAMILIES[type(pipe).__name__] == "sdxl":  # it is in SDXL's time_ids
        found["image_size"] = image_size
    if images or samples:
        found["seed"] = seed
    if isinstance(data, TeacherSamples):
        found |= {"steps": data.num_inference_steps, "guidance_scale": data.guidance_scale}
    return found


def vae_factor(source: str) -> int:
    """Pixels a latent, on a side."""
    if sd.read_index(source).get("vae", [None])[0] is None:
        return 1
    with loading(f"{source!r}: the settings of vae/ cannot be read"):
        config = with_defaults(AutoencoderKL, AutoencoderKL.load_config(source, subfolder="vae"))
        return 2 ** (len(config["block_out_channels"]) - 1)


def with_defaults(kind: type[ModelMixin], config: dict[str, Any]) -> dict[str, Any]:
    """A network's settings, those that its file leaves out as diffusers would take them."""
    return {name: config.get(name, p.default) for name, p in inspect.signature(kind).parameters.items()}


def latent_shape(config: dict[str, Any], factor: int, image_size: int | None) -> tuple[int, int, int]:
    """(c, h, w) of the latents of square images, by default of the network's own size; ValueError for one that does not fit."""
    channels, side = config["in_channels"], config["sample_size"]
    if image_size is not None:
        side, rest = divmod(image_size, factor)
        steps = 2 ** (len(config["block_out_channels"]) - 1)
        if rest or side % steps:
            raise UserError(f"data.image_size={image_size} must be a multiple of {factor * steps} for this teacher")
    return channels, side, side
