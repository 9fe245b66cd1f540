"""The noise levels an EDM model is sampled at, stored beside the weights as scheduler_config.json."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor


class EDMScheduler(SchedulerMixin, ConfigMixin):
    """sigma_data: the data's standard deviation, part of the preconditioning. sigma_min/sigma_max/rho: the grid (Eq. 5).

    sampler "heun": EDM's deterministic second-order sampler (Algorithm 1 without churn), for teachers.
    sampler "renoise": x0 = D(x; sigma_i), then x = x0 + sigma_{i+1} eps, for one- and few-step students, whose readout
    level is sigma_max. num_inference_steps is the default number of steps.
    """

    @register_to_config
    def __init__(
        self,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sampler: str = "heun",
        num_inference_steps: int = 18,
    ) -> None:
        if sampler not in ("heun", "renoise"):
            raise ValueError(f"scheduler.sampler is {sampler!r}; expected 'heun' or 'renoise'")

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """(n,) float64 descending from sigma_max; to sigma_min when n > 1 (Karras et al. 2022, Eq. 5)."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        c = self.config
        ramp = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
        high, low = c.sigma_max ** (1 / c.rho), c.sigma_min ** (1 / c.rho)
        return (high + ramp * (low - high)) ** c.rho
