"""Stable Diffusion 1.x, 2.x and XL: U-Nets, variance-preserving noise, their text and sizes, their one-step scheduler.

Conditions: `encoder_hidden_states` (b, l, d), and for SDXL `text_embeds` (b, d') and `time_ids` (b, 6) = (original height, width,
crop top, left, target height, width).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from .adapters import UNET, Anatomy
from .common.errors import UserError
from .common.reading import loading
from .noise import PredictionType, VPSchedule
from .stock import StockPipeline
from .text_to_image import Kind, family_name

PREDICTION_TYPES = ("epsilon", "v_prediction")


class StableDiffusion(Kind):
    """See text_to_image.Kind."""

    called = "a Stable Diffusion teacher"
    component, network, scheduler = "unet", UNet2DConditionModel, LCMScheduler
    # Every layer that the published one-step and few-step LoRAs of Stable Diffusion adapt (the LCM-LoRA set).
    layers = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
        *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )
    any_readout = whole_levels = has_features = True

    def anatomy(self, config: Mapping[str, Any], guidance_scale: float) -> Anatomy:
        return UNET

    def feature_layers(self, network: Any) -> tuple[nn.Module, ...]:
        return network.mid_block, network.up_blocks[0]

    def text_width(self, config: Mapping[str, Any]) -> int:
        return config["cross_attention_dim"]

    def check_scheduler(self, scheduler: Any, source: str) -> None:
        check_scheduler_config(scheduler, source)

    def schedule(self, scheduler: Any) -> VPSchedule:
        """The noise levels of its training, which are those of the one-step sampler."""
        return VPSchedule(one_step_scheduler(scheduler).alphas_cumprod)

    def prediction(self, scheduler: Any) -> PredictionType:
        return scheduler.config.get("prediction_type", "epsilon")

    def student_levels(self, scheduler: Any, steps: int) -> list[int]:
        return student_levels(scheduler.config["num_train_timesteps"], steps)

    def student_scheduler(self, scheduler: Any, levels: Sequence[float]) -> LCMScheduler:
        return one_step_scheduler(scheduler)

    def call(self, levels: Sequence[float], scheduler: Any) -> dict[str, Any]:
        if list(levels) == self.student_levels(scheduler, len(levels)):
            return {"num_inference_steps": len(levels)}
        return {"timesteps": list(levels)}

    def start(self, scheduler: Any, levels: Sequence[float]) -> bool:
        call = self.call(levels, scheduler)
        scheduler.set_timesteps(call.get("num_inference_steps"), **{k: v for k, v in call.items() if k == "timesteps"})
        return [int(t) for t in scheduler.timesteps] == list(levels)

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


def check_scheduler_config(scheduler: Any, source: str) -> None:
    """The noise schedule must be one of the VP family whose last level can be read out."""
    config = scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"{source!r}: its scheduler is {type(scheduler).__name__}, which has no alphas_cumprod")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"{source!r}: prediction_type {prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}")
    with loading(f"{source!r}: its noise schedule, beta_schedule {config.get('beta_schedule')!r}, has no one-step scheduler"):
        alphas = one_step_scheduler(scheduler).alphas_cumprod
        VPSchedule(alphas)  # which refuses what is none
        last = alphas[-1]  # Euler and DPM would put 2^-24 there for 0
    if float(last) == 0 and prediction_type == "epsilon":
        raise UserError(
            f"{source!r}: rescale_betas_zero_snr leaves no signal at the last timestep, where noise prediction says nothing of "
            "x0; a one-step student needs a v_prediction teacher there, or a schedule without that rescaling"
        )


def time_ids(original_and_crop: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> Tensor:
    """(height, width, top, left) of each image before it became one of `size` -> SDXL's micro-conditioning (b, 6)."""
    return torch.tensor([(*row, *size) for row in original_and_crop], dtype=torch.float32)


def one_step_scheduler(scheduler: Any) -> LCMScheduler:
    """The teacher's noise schedule behind the stock scheduler whose single step returns x0 itself, at t = T - 1 by default."""
    config = dict(scheduler.config) | {"clip_sample": False, "thresholding": False, "timestep_spacing": "leading"}
    config["original_inference_steps"] = config["num_train_timesteps"]  # any other that does not divide T skips t = T - 1
    config["timestep_scaling"] = 1e6  # its skip connection, sigma_data^2 / ((t scaling)^2 + sigma_data^2), is then 0 in float32
    known = inspect.signature(LCMScheduler.__init__).parameters  # an unknown key would be complained of at every loading
    return LCMScheduler.from_config({k: v for k, v in config.items() if k in known})


def student_levels(num_train_timesteps: int, steps: int) -> list[int]:
    """The timesteps at which a stock pipeline with that scheduler calls its network for num_inference_steps=steps. UserError for
    more steps than timesteps.

    >>> student_levels(1000, 1), student_levels(1000, 4)
    ([999], [999, 749, 499, 249])
    """
    if steps > num_train_timesteps:
        raise UserError(f"{steps} steps are more than the {num_train_timesteps} timesteps of the teacher")
    return [num_train_timesteps - 1 - i * num_train_timesteps // steps for i in range(steps)]


KIND = StableDiffusion()
