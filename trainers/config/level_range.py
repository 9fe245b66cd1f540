"""Whether a teacher knows the noise levels that a configuration draws: asked before anything expensive is done.

Bounds must lie within the schedule's t_range. A distribution without bounds, log_normal, is cut off there: what is drawn is the
same density inside, if the range holds nearly all of it.
"""

from __future__ import annotations

import math
import warnings
from typing import Protocol

import torch

from pipelines.common.errors import UserError
from pipelines.noise import RectifiedFlowSchedule, Schedule, VPSchedule, weight

from .levels import Levels, LevelSampler, LogNormalLevels, Range, Use

MOST_CUT = 0.05  # share of a log_normal that may lie outside what the network knows
SAID = 0.001  # of which this much is not worth a word
SLACK = 1 + 1e-6  # a bound that was read from a file may be rounded


class Levelled(Protocol):
    """A configuration of a training command."""

    steps: int

    def uses(self) -> list[Use]:
        """All levels that are drawn."""


def sampler(levels: Levels, steps: int, t_range: tuple[float, float]) -> LevelSampler:
    """(u, progress) -> t for a run of so many steps, without what a distribution has outside t_range."""
    whole, (below, above) = levels.sampler(steps), outside(levels, t_range)
    if not below and not above:
        return whole
    # the clamp is for rounding: near u = 1 float32 has few digits
    return lambda u, progress: whole(below + u * (1 - below - above), progress).clamp(*t_range)


def outside(levels: Levels, t_range: tuple[float, float]) -> tuple[float, float]:
    """Shares of a distribution without bounds below and above t_range; of others 0, since theirs must lie inside."""
    if not isinstance(levels, LogNormalLevels):
        return 0.0, 0.0
    low, high = ((math.log(t) - levels.mean) / levels.std if t > 0 else -math.inf for t in t_range)
    below, above = (float(torch.special.ndtr(torch.tensor(v, dtype=torch.float64))) for v in (low, -high))
    return below, above


def check_levels(config: Levelled, schedule: Schedule, sampled: tuple[float, float] | None = None) -> None:
    """UserError for levels that the teacher does not know, that are another family's, or where a weight is not finite.

    sampled: the sigmas at which an EDM teacher is sampled; levels mostly outside them are no sigmas.
    """
    for use in config.uses():
        check_law(use, schedule)
        if isinstance(schedule, VPSchedule):
            check_timesteps(use, schedule)
        check_bounds(use, schedule)
        if sampled is not None:
            check_sigmas(use, config.steps, sampled)
        check_weights(use, config.steps, schedule)


def bounds(levels: Levels) -> dict[str, float]:
    return {key: getattr(levels, key) for key in ("low", "high") if hasattr(levels, key)}


def check_law(use: Use, schedule: Schedule) -> None:
    """Time shift and logit_normal are of flow matching, whose levels are 0 to 1, and karras, whose are sigmas of EDM, is not."""
    flow = isinstance(schedule, RectifiedFlowSchedule)
    known = "teachers of flow matching, whose levels are 0 to 1, and this is none"
    if use.levels.shift is not None and not flow:
        raise UserError(f"{use.key}.shift: {use.levels.shift:g} is for {known}; remove it")
    if use.levels.name == "logit_normal" and not flow:
        raise UserError(f"{use.key}.name: 'logit_normal' is for {known}; set another, e.g. uniform")
    if use.levels.name == "karras" and flow:
        raise UserError(
            f"{use.key}.name: 'karras' draws noise levels sigma, for EDM teachers; this teacher's levels are 0 to 1; set "
            f"{use.key}='{{name: logit_normal}}'"
        )


def check_timesteps(use: Use, schedule: VPSchedule) -> None:
    """Levels of Stable Diffusion are whole numbers; log_normal and karras are laws of sigma."""
    known = f"this teacher's levels are timesteps, whole numbers up to {schedule.t_range[1]:g}"
    instead = f"set {use.key}='{{name: uniform, low: 20, high: 980}}'"
    if use.levels.name in ("log_normal", "karras"):
        raise UserError(f"{use.key}.name: {use.levels.name!r} draws noise levels sigma, for EDM teachers; {known}; {instead}")
    for key, bound in bounds(use.levels).items():
        if bound != round(bound):
            raise UserError(f"{use.key}.{key}: {bound:g} is no timestep but looks like a noise level sigma; {known}; {instead}")


def check_bounds(use: Use, schedule: Schedule) -> None:
    low, high = schedule.t_range
    for key, bound in bounds(use.levels).items():
        if not low / SLACK <= bound <= high * SLACK:
            raise UserError(
                f"{use.key}.{key}: {bound:g} is outside the teacher's levels, {low:g} to {high:g}; set it within them"
            )
    cut = sum(outside(use.levels, schedule.t_range))
    law = f"{use.key}: {cut:.1%} of what {use.levels.name} draws is outside the teacher's levels, {low:g} to {high:g}"
    if cut > MOST_CUT:
        raise UserError(f"{law}; set mean and std so that nearly all is inside, or {{name: log_uniform, low: ..., high: ...}}")
    if cut > SAID:
        warnings.warn(f"{law}; it is drawn inside them only", stacklevel=3)


def check_sigmas(use: Use, steps: int, sampled: tuple[float, float]) -> None:
    """More than half of the draws beyond where a teacher is ever sampled are a mistake, such as Stable Diffusion's timesteps."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = torch.stack([use.levels.sampler(steps)(u, progress) for progress in (0.0, 0.5, 1.0)])
    beyond = float(((t < sampled[0]) | (t > sampled[1])).double().mean())
    if beyond > 0.5:
        raise UserError(
            f"{use.key}: {beyond:.0%} of what {use.levels.name} draws is outside {sampled[0]:g} to {sampled[1]:g}, where this "
            "teacher is sampled. An EDM teacher's levels are noise levels sigma, not timesteps"
        )


def check_weights(use: Use, steps: int, schedule: Schedule) -> None:
    """At both ends of what can be drawn: at alpha = 0, the last level of flow matching and of zero SNR, some are infinite."""
    u = torch.tensor([2.0**-24, 1.0 if isinstance(use.levels, Range) else 1 - 2.0**-24])
    for progress in (0.0, 1.0):
        drawn = sampler(use.levels, steps, schedule.t_range)(u, progress)
        level = schedule.level(schedule.nearest(drawn.clamp(*schedule.t_range)))  # a bound of log_uniform may be rounded
        ones = torch.ones_like(level.sigma)
        for key, name in use.weightings.items():
            finite = weight(name, level, ones, 0 * ones, 1.0).isfinite().flatten()
            if not bool(finite.all()):
                t = float(level.t[~finite][0])
                raise UserError(
                    f"{key}: {name!r} is not finite at t={t:g}, which {use.key} draws; keep {use.key} away from it, or set "
                    "another weighting"
                )
