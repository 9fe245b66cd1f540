"""Stable Diffusion teachers: one frozen network, adapters for every other role, text and images encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pipelines import stable_diffusion as sd
from pipelines.adapters import AdapterHead, SharedNetwork, Whole, in_float32, last_layer, whole_copy
from pipelines.denoiser import Condition, Denoiser, FeatureMaps, OneStepGenerator, check_readout
from pipelines.errors import UserError
from pipelines.identity import weights_sha256
from pipelines.students import save_stable_diffusion

from .cache import open_cache
from .config import DistillConfig
from .config_data import TEXT_DATA
from .config_networks import Lora, Network
from .draws import derive_seed
from .levels import check_levels
from .models import add_role, build_covariance, check_needs, refuse, unit_noise
from .objectives.base import Need
from .posteriors import UNetPosterior
from .posteriors.section import Posterior
from .setup import sharded
from .teachers import teacher_folder

# Every layer that the published one-step and few-step LoRAs of Stable Diffusion adapt (the LCM-LoRA set).
ALL_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


class StableDiffusionModels:
    """See models.Models."""

    num_classes = 0

    def __init__(self, config: DistillConfig, accelerator: Accelerator) -> None:
        self.config, self.device = config, accelerator.device
        check(config)
        t = config.teacher
        path = teacher_folder(t.path)
        index = sd.read_index(path)
        sd.check_parts(path)  # before its text encoders work, which may take hours
        schedule = sd.load_schedule(path)
        check_levels(config, schedule)
        last = int(schedule.t_range[1])
        self.sampling_range = schedule.t_range
        self.readout_t = last if config.student.readout_t is None else config.student.readout_t
        check_readout(schedule, self.readout_t)
        encoded = open_cache(config, accelerator)
        self.examples, self.latent_shape, null = encoded.examples, encoded.shape, encoded.null
        kept = {"unet", "scheduler"} | ({"vae"} if config.sample_every or config.evaluation else set())
        left_out = [k for k in index if not k.startswith("_") and k not in kept]
        self.pipe = sd.load_pipeline(path, sd.DTYPES[t.dtype], left_out, t.variant)
        base_weights = weights_sha256({"unet": self.pipe.unet})
        self.base = SharedNetwork(self.pipe.unet)
        self.teacher = sd.denoiser(self.pipe, self.base.teacher(), t.guidance_scale, null)
        self.student = OneStepGenerator(sd.denoiser(self.pipe, self._role("student", config.student.lora)), self.readout_t)
        if getattr(self.pipe, "vae", None) is not None:
            self.pipe.vae.to(self.device)
        self.facts = {
            "family": sd.FAMILIES[type(self.pipe).__name__],
            "weights": "lora" if config.student.lora else "unet",
            "readout_t": self.readout_t,
            "guidance_scale": t.guidance_scale,
            "image_size": encoded.image_size,
            "base_weights": base_weights,
            "base_dtype": t.dtype,
        }

    def _role(self, name: str, lora: Lora | None) -> nn.Module:
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
        p, base = section, self.base.network
        covariance = build_covariance(p, self.config.seed, self.latent_shape)
        out_channels = UNetPosterior.num_channels(covariance, with_mean)
        if p.network == "adapter":
            network = AdapterHead(self._role("aux", p.lora), out_channels)
        else:
            network = small_unet(
                p.network, base, self.latent_shape, out_channels, derive_seed(self.config.seed, "init", "posterior")
            )
        posterior = UNetPosterior(network, covariance, self.teacher.sigma_data, with_mean, self.teacher.parameterization)
        if with_mean and p.network == "adapter":
            posterior.start_mean(last_layer(base))
        return posterior

    @torch.no_grad()
    def preview(self) -> Tensor:
        """The student's images for the first prompts of the data."""
        count = min(self.config.num_samples, len(self.examples))
        images = []
        for start in range(0, count, 8):
            index = torch.arange(start, min(start + 8, count))
            generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "preview", start))
            z = torch.randn(len(index), *self.latent_shape, generator=generator).to(self.device)
            images.append(self.decode(self.student(z, self.condition(index))).cpu())
        return torch.cat(images)

    def condition(self, rows: Tensor) -> Condition:
        return {k: v.to(self.device) for k, v in self.examples.rows(rows % len(self.examples))[1].items()}

    def decode(self, x0: Tensor) -> Tensor:
        return sd.decode_latents(self.pipe.vae, x0) / 2 + 0.5

    @torch.no_grad()
    def images(self, index: range) -> Tensor:
        z = unit_noise(self.config, index, self.latent_shape).to(self.device)
        return self.decode(self.student(z, self.condition(torch.tensor(index)))).cpu()

    def shard(self) -> None:
        self.base.shard()

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        scheduler = sd.one_step_scheduler(self.pipe.scheduler)
        if self.config.student.lora:
            save_stable_diffusion(folder, type(self.pipe), scheduler, info, adapter=(self.base.network, "student"))
        else:
            save_stable_diffusion(folder, type(self.pipe), scheduler, info, network=self.student.denoiser.network.network)


def check(config: DistillConfig) -> None:
    """What does not fit a Stable Diffusion teacher is refused, before anything is loaded."""
    s = config.student
    if config.compile and sharded():
        raise UserError("compile: FSDP and compiled blocks do not go together; set compile: null, or use gpu_8.yaml")
    refused = {
        "student.sigma_init": s.sigma_init,
        "student.image_range": s.image_range,
        "student.network": s.network,
        "student.preconditioning": s.preconditioning,
    }
    refuse("a Stable Diffusion teacher", refused)
    if config.teacher.guidance_scale == 1:
        refuse("a teacher without guidance (guidance_scale 1)", {"teacher.negative_prompt": config.teacher.negative_prompt})
    if not isinstance(config.data, TEXT_DATA):
        raise UserError("data: a Stable Diffusion teacher needs data.name prompts, captions or teacher_samples")
    check_needs(config.objective.needs(), refusal)


def refusal(need: Need) -> str | None:
    """Why an objective cannot have what it asks for, or None."""
    if need.what in ("network", "augment"):
        return f"{need.key} has no effect for a Stable Diffusion teacher; remove it"
    if need.what != "posterior" or need.value == "adapter":
        return None
    if isinstance(need.value, str):
        return (
            f"{need.key}: {need.value!r} is for EDM teachers; set adapter, or a section "
            "{channels: ..., channel_mult: [...]} for a small network of its own"
        )
    for key in ("patch_size", "dropout"):
        if getattr(need.value, key) != type(need.value).model_fields[key].default:
            return f"{need.key}.{key} has no effect for a Stable Diffusion teacher; remove it"
    return None


class TextUNet(nn.Module):
    """A small U-Net of its own that reads x_t, t and the prompt's tokens; SDXL's further conditions are left to the teacher."""

    def __init__(self, network: UNet2DConditionModel) -> None:
        super().__init__()
        self.network, self.out_channels = network, network.config.out_channels

    @property
    def conv_out(self) -> nn.Conv2d:
        return self.network.conv_out

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, **condition: Tensor) -> Tensor:
        with in_float32(self.network.conv_out):
            return self.network(x_t, t, encoder_hidden_states.to(x_t.dtype)).sample


def small_unet(network: Network, base: nn.Module, shape: tuple[int, int, int], out_channels: int, seed: int) -> TextUNet:
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
            cross_attention_dim=base.config.cross_attention_dim,
            norm_num_groups=next(g for g in (32, 16, 8, 4, 2, 1) if all(w % g == 0 for w in widths)),
        )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return TextUNet(unet)
