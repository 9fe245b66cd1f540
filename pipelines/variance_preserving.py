"""What networks of variance-preserving noise have in common (Stable Diffusion, DiT): x_t = alpha x0 + sigma eps, whole timesteps.

A student's steps are those of LCMScheduler with its skip connection switched off: x0, then fresh noise to the next level.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import LCMScheduler

from .common.errors import UserError
from .common.reading import loading
from .kinds import Kind
from .noise import PredictionType, VPSchedule

PREDICTION_TYPES = ("epsilon", "v_prediction")


class VariancePreserving(Kind):
    """See kinds.Kind."""

    scheduler = LCMScheduler
    any_readout = whole_levels = True

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


def one_step_scheduler(scheduler: Any, first: int | None = None) -> LCMScheduler:
    """The teacher's noise schedule behind the stock scheduler whose single step returns x0 itself, at t = T - 1 by default, or at
    `first`, where that is above T / 2.
    """
    config = dict(scheduler.config) | {"clip_sample": False, "thresholding": False, "timestep_spacing": "leading"}
    # with T, or any k above T / 2, of its grid of k timesteps each is one below the last, and the first is k - 1
    config["original_inference_steps"] = config["num_train_timesteps"] if first is None else first + 1
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
