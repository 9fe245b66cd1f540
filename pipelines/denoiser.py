"""Every network wrapped once: x0 = D(x_t, level, condition). The teacher, the student and a fake score are all one.

A condition is a dict of tensors whose first axis is the batch, passed to the network by keyword (`class_labels` (b,) integers or
(b, num_classes) floats, `encoder_hidden_states` (b, l, d), ...), or None for an unconditional call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common.errors import UserError
from .noise import Level, Schedule, add_noise, widen
from .preconditioning import Parameterization, make_preconditioner

Condition = dict[str, Tensor] | None


class Denoiser(nn.Module):
    """E[x0 | x_t, condition] from a network `network(x, time, **condition) -> object with .sample or tensor`.

    parameterization: a preconditioner, or by name "edm" (Karras et al. 2022 Eq. 7 with sigma_data), or the network's prediction
    type. With guidance_scale w != 1 the estimate is D_null + w (D_cond - D_null)
    (Ho & Salimans 2022 in x0), both in one batch; null_condition holds one unbatched tensor for each condition key that guidance
    turns off; other keys (an image's size) are the same in both. keep_norm: a side of squares of latents; then what the network
    puts out is guided, and in each square brought back to the conditional output's norm, as Qwen-Image's pipeline does (side 2).
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization = "edm",
        sigma_data: float = 0.5,
        guidance_scale: float = 1.0,
        null_condition: Condition = None,
        keep_norm: int | None = None,
    ) -> None:
        super().__init__()
        if guidance_scale != 1.0 and null_condition is None:
            raise UserError(
                f"guidance_scale={guidance_scale} needs a null condition; "
                "use guidance_scale=1 (no guidance) or a teacher trained with condition dropout"
            )
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.preconditioner = make_preconditioner(parameterization, sigma_data)
        self.sigma_data = sigma_data
        self.guidance_scale = guidance_scale
        self.null_condition = null_condition
        self.keep_norm = keep_norm

    @property
    def calls_per_sample(self) -> int:
        """How often the network is evaluated for each x_t."""
        return 1 if self.guidance_scale == 1.0 else 2

    @property
    def collective(self) -> bool:
        """Whether its network is sharded: all processes call it together, and each call runs to its end."""
        shared = getattr(self.network, "shared", None)
        return shared is not None and shared.sharded

    def forward(self, x_t: Tensor, level: Level, condition: Condition = None, return_features: bool = False) -> Any:
        """x_t (b, c, h, w) -> x0 (b, c, h, w) in float32 or x_t's dtype if wider.

        With return_features, which the network must know too: (x0, features), under guidance those of the conditional call.
        """
        if self.guidance_scale == 1.0:
            x0, features = self._denoise(x_t, level, condition, return_features)
            return (x0, features) if return_features else x0
        if condition is None or self.null_condition is None:
            raise ValueError("guidance needs a condition; got None")
        nulls = self.null_condition
        null = {k: null_rows(nulls[k], v) if k in nulls else v for k, v in condition.items()}
        both = {k: torch.cat([null[k], v]) for k, v in condition.items()}
        twice, levels = torch.cat([x_t, x_t]), level.repeat(2)
        if self.keep_norm is None:
            x0, features = self._denoise(twice, levels, both, return_features)
            null_x0, cond_x0 = x0.chunk(2)
            x0 = null_x0 + self.guidance_scale * (cond_x0 - null_x0)
        else:
            out, features = self._output(twice, levels, both, return_features)
            null_out, cond_out = out.chunk(2)
            guided = null_out + self.guidance_scale * (cond_out - null_out)
            x0 = self.preconditioner.x0(with_norm_of(cond_out, guided, self.keep_norm), x_t, level)
        return (x0, features.second_half()) if return_features else x0

    def _denoise(self, x_t: Tensor, level: Level, condition: Condition, return_features: bool) -> tuple[Tensor, Any]:
        out, features = self._output(x_t, level, condition, return_features)
        return self.preconditioner.x0(out, x_t, level), features

    def _output(self, x_t: Tensor, level: Level, condition: Condition, return_features: bool) -> tuple[Tensor, Any]:
        options = (condition or {}) | ({"return_features": True} if return_features else {})
        return self._call(*self.preconditioner.inputs(x_t, level), options)

    def _call(self, x: Tensor, time: Tensor, options: dict[str, Any]) -> tuple[Tensor, Any]:
        with getattr(self.network, "reading_out", nullcontext)():  # those that can put out float32 in half precision
            out = self.network(x, time, **options)
        features = getattr(out, "features", None)
        out = getattr(out, "sample", out)
        return out.to(torch.promote_types(out.dtype, torch.float32)), features  # autocast may hand back half precision


def with_norm_of(cond: Tensor, guided: Tensor, side: int) -> Tensor:
    """guided (b, c, h, w), brought to the norm of cond in each square of side x side latents, over all channels.

    >>> cond, guided = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1), torch.tensor([0.0, 10.0]).reshape(1, 2, 1, 1)
    >>> with_norm_of(cond, guided, 1).flatten().tolist()
    [0.0, 5.0]
    """
    cond_norm, norm = (F.avg_pool2d(v.square().sum(1, keepdim=True), side).sqrt() for v in (cond, guided))
    ratio = cond_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return guided * ratio.repeat_interleave(side, 2).repeat_interleave(side, 3)


def null_rows(null: Tensor, value: Tensor) -> Tensor:
    """An unbatched null condition in the place of each row of value (b, ...), in its dtype: of the same shape as value.

    A null class that is an index, num_classes for "none", in the place of rows of floats (b, num_classes): no class, all zeros.
    ValueError where a row of the condition has another shape.
    """
    if null.shape == value.shape[1:]:
        return null.to(value).expand_as(value)
    if null.ndim == 0 and not null.is_floating_point() and value.ndim == 2 and value.is_floating_point():
        classes = value.shape[1]
        return torch.nn.functional.one_hot(null, classes + 1)[:classes].to(value).expand_as(value)
    raise ValueError(f"the null condition has shape {tuple(null.shape)}, a row of the condition {tuple(value.shape[1:])}")


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


class AllSeen(Exception):  # noqa: N818  # no error
    """Ends a call of a network whose further layers nobody looks at."""


class FeatureMaps(nn.Module):
    """x_t, level, condition -> what some layers of a denoiser's network put out on the way, each (b, c, h, w), float32 or wider.

    layers: modules inside the network; they stay the network's own, and are no parameters of this module. What comes after the
    last of them is not run, unless the network is sharded. conditional: whether the network is told of the condition.
    """

    def __init__(self, denoiser: Denoiser, layers: Sequence[nn.Module], conditional: bool = True) -> None:
        super().__init__()
        if denoiser.guidance_scale != 1.0:
            raise ValueError("feature maps are those of one call; with guidance there are two: give a denoiser without")
        self.denoiser, self._layers, self.conditional = denoiser, tuple(layers), conditional

    def forward(self, x_t: Tensor, level: Level, condition: Condition = None) -> list[Tensor]:
        """x_t (b, c, h, w) -> what each layer put out, in their order; under guidance there would be two."""
        seen: dict[nn.Module, Tensor] = {}
        whole = self.denoiser.collective

        def see(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            seen[layer] = out
            if len(seen) == len(self._layers) and not whole:
                raise AllSeen

        handles = [layer.register_forward_hook(see) for layer in self._layers]
        try:
            with suppress(AllSeen):
                self.denoiser(x_t, level, condition if self.conditional else None)
        finally:
            for handle in handles:
                handle.remove()
        return [seen[layer].to(x_t.dtype) for layer in self._layers]


def check_readout(schedule: Schedule, t: float) -> None:
    """UserError where the schedule has no level t."""
    low, high = schedule.t_range
    if not low <= t <= high:
        raise UserError(f"the readout level t={t} is outside the schedule's range [{low}, {high}]")
    nearest = float(schedule.nearest(torch.tensor(t, dtype=torch.float64)))
    if not math.isclose(nearest, t, rel_tol=1e-6):
        raise UserError(f"the readout level t={t} is none that the network knows; the nearest is {nearest:g}")


class Start(NamedTuple):
    """Where one step of a student begins, for each sample: step (b,), which of its levels, from 0; x0 (b, c, h, w), that of the
    step before, or data in its place; at step 0, which begins with noise alone, it is not read.
    """

    x0: Tensor
    step: Tensor


class FewStepGenerator(nn.Module):
    """A denoiser read out at fixed noise levels, one a step, from the most noise; of one step: g(z, condition) = D(noise(z); t).

        x0_1 = D(noise(z_1); t_1),    x0_i = D(alpha_i x0_{i-1} + sigma_i z_i; t_i),    z_1, z_2, ... ~ N(0, I)

    levels: t_1 > t_2 > ...; UserError for none that the network knows.
    image_range: x0 is an image in [-1, 1], and every pipeline ends by clamping it. With it the clamp is part of g, so that the
    distribution that is trained is the one that is seen: pixels that are black in the data can be exactly black.
    inputs: what steps after the first learn from, the student's own earlier steps (simulated) or noised data.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        levels: Sequence[float],
        image_range: bool = False,
        inputs: Literal["simulated", "data"] = "simulated",
    ) -> None:
        super().__init__()
        for t in levels:
            check_readout(denoiser.schedule, t)
        if not levels or any(t <= following for t, following in pairwise(levels)):
            raise UserError(f"the levels of a student must descend, from the most noise to the least; got {list(levels)}")
        self.denoiser = denoiser
        self.levels, self.image_range, self.inputs = tuple(levels), image_range, inputs

    @property
    def calls_per_sample(self) -> int:
        """How often the network is evaluated for each sample of one step."""
        return self.denoiser.calls_per_sample

    @property
    def steps(self) -> int:
        """How many network calls an image takes."""
        return len(self.levels)

    def forward(self, z: Tensor, condition: Condition = None, start: Start | None = None, between: bool = False) -> Tensor:
        """One step: z ~ N(0, I) (b, c, h, w), the noise that it adds -> x0 (b, c, h, w). start: None for the first step.
        between: as the next step begins with it, not clamped: pipelines clamp images at the end alone.
        """
        # bfloat16 would round a readout at t = 999 to 1000
        dtype = torch.promote_types(z.dtype, torch.float32)
        if start is None:
            t = torch.full((z.shape[0],), self.levels[0], device=z.device, dtype=dtype)
        else:
            t = torch.tensor(self.levels, device=z.device, dtype=dtype)[start.step]
        level = self.denoiser.schedule.level(t)
        x = self.denoiser.schedule.initial_noise(z, level).to(z.dtype)
        if start is not None:
            x = torch.where(widen(start.step > 0), add_noise(start.x0, z, level).to(z.dtype), x)
        x0 = self.denoiser(x, level, condition)
        return ClampToImageRange.apply(x0) if self.image_range and not between else x0

    def sample(self, z: Tensor, condition: Condition = None) -> Tensor:
        """All steps: z (n, b, c, h, w), the noise of each -> x0 (b, c, h, w), as pipelines make it."""
        if len(z) != self.steps:
            raise ValueError(f"a student of {self.steps} steps takes the noise of each; got {len(z)}")
        start = None
        for step, noise in enumerate(z[:-1].unbind(), 1):
            x0 = self(noise, condition, start, between=True)
            start = Start(x0, torch.full((len(noise),), step, device=noise.device))
        return self(z[-1], condition, start)
