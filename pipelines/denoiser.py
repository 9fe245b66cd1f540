"""Every network wrapped once: x0 = D(x_t, level, condition). The teacher, the student and a fake score are all one.

A condition is a dict of tensors whose first axis is the batch, passed to the network by keyword (`class_labels` (b,),
`encoder_hidden_states` (b, l, d), ...), or None for an unconditional call.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .noise import Level, Schedule, to_x0

Condition = dict[str, Tensor] | None
Parameterization = Literal["edm", "sample", "epsilon", "v_prediction", "flow"]


def repeat_condition(condition: Condition, k: int) -> Condition:
    """Every sample's condition k times in a row, matching Level.repeat_interleave."""
    return None if condition is None else {name: v.repeat_interleave(k, 0) for name, v in condition.items()}


class Denoiser(nn.Module):
    """E[x0 | x_t, condition] from a network `network(x, time, **condition) -> object with .sample or tensor`.

    parameterization "edm" is Karras et al. 2022 Eq. 7 with Table 1's coefficients (alpha = 1); the others are the
    network's prediction type, solved for x0. With guidance_scale w != 1 the estimate is D_null + w (D_cond - D_null)
    (Ho & Salimans 2022 in x0), both in one batch; null_condition holds one unbatched tensor for each condition key.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization = "edm",
        sigma_data: float = 0.5,
        guidance_scale: float = 1.0,
        null_condition: Condition = None,
    ) -> None:
        super().__init__()
        if guidance_scale != 1.0 and null_condition is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a null condition; "
                "use guidance_scale=1 (no guidance) or a teacher trained with condition dropout"
            )
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.sigma_data = sigma_data
        self.guidance_scale = guidance_scale
        self.null_condition = null_condition

    def forward(self, x_t: Tensor, level: Level, condition: Condition = None) -> Tensor:
        """x_t (b, c, h, w) -> x0 (b, c, h, w) in float32 or x_t's dtype if wider."""
        if self.guidance_scale == 1.0:
            return self._denoise(x_t, level, condition)
        if condition is None:
            raise ValueError("guidance needs a condition; got None")
        null = {k: self.null_condition[k].to(v).expand_as(v) for k, v in condition.items()}
        both = {k: torch.cat([null[k], v]) for k, v in condition.items()}
        x0_null, x0_cond = self._denoise(torch.cat([x_t, x_t]), level.repeat(2), both).chunk(2)
        return x0_null + self.guidance_scale * (x0_cond - x0_null)

    def _denoise(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        condition = condition or {}
        if self.parameterization != "edm":
            return to_x0(self._call(x_t, level.t, condition), x_t, level, self.parameterization)
        sigma, sd2 = level.sigma, self.sigma_data**2
        total = sigma.square() + sd2
        out = self._call(x_t * total.rsqrt(), level.t.log() / 4, condition)
        return (sd2 / total) * x_t + (sigma * self.sigma_data * total.rsqrt()) * out

    def _call(self, x: Tensor, time: Tensor, condition: dict[str, Tensor]) -> Tensor:
        out = self.network(x, time, **condition)
        out = getattr(out, "sample", out)
        return out.to(torch.promote_types(out.dtype, torch.float32))  # autocast may hand back half precision


class ClampToImageRange(torch.autograd.Function):
    """Forward: clamp to [-1, 1]. Backward: projected gradient, which stops only what would push a value further out."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        outward = ((x > 1) & (gradient < 0)) | ((x < -1) & (gradient > 0))  # descent moves against the gradient
        return gradient.masked_fill(outward, 0)


class OneStepGenerator(nn.Module):
    """g(z, condition) = D(noise(z); t): a denoiser read out once, at one fixed high noise level t.

    image_range: x0 is an image in [-1, 1], and every pipeline ends by clamping it. With it the clamp is part of g, so that the
    distribution that is trained is the one that is seen: pixels that are black in the data can be exactly black.
    """

    def __init__(self, denoiser: Denoiser, readout_t: float, image_range: bool = False) -> None:
        super().__init__()
        low, high = denoiser.schedule.t_range
        if not low <= readout_t <= high:
            raise ValueError(f"the readout level t={readout_t} is outside the schedule's range [{low}, {high}]")
        self.denoiser = denoiser
        self.readout_t = readout_t
        self.image_range = image_range

    def forward(self, z: Tensor, condition: Condition = None) -> Tensor:
        """z ~ N(0, I) (b, c, h, w) -> x0 (b, c, h, w)."""
        # bfloat16 would round a readout at t = 999 to 1000
        t = torch.full((z.shape[0],), self.readout_t, device=z.device, dtype=torch.promote_types(z.dtype, torch.float32))
        level = self.denoiser.schedule.level(t)
        x0 = self.denoiser(self.denoiser.schedule.initial_noise(z, level).to(z.dtype), level, condition)
        return ClampToImageRange.apply(x0) if self.image_range else x0
