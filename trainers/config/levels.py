"""The `levels` sections of configurations: at which noise levels t an objective or a teacher's loss is evaluated.

`sampler(steps)`, for a run of so many steps, is a function (u, progress) -> t of uniform numbers and of the share that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator
from torch import Tensor

from pipelines import noise
from pipelines.common.strict import PositiveFloat, PositiveInt, Strict

LevelSampler = Callable[[Tensor, float], Tensor]  # (u, progress) -> t


class Law(Strict):
    """shift: what is drawn, t in [0, 1], becomes s t / (1 + (s - 1) t), for flow matching (Esser et al. 2024, Eq. 23); 3 is SD3's
    at 1024 pixels. None: none.
    """

    shift: PositiveFloat | None = None

    def sampler(self, steps: int = 1) -> LevelSampler:
        law, shift = self.law(steps), self.shift
        return law if shift is None else lambda u, progress: noise.shifted_t(law(u, progress), shift)

    def law(self, steps: int) -> LevelSampler:
        """What is drawn before the shift."""
        raise NotImplementedError


class Range(Law):
    low: PositiveFloat
    high: PositiveFloat

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class UniformLevels(Range):
    name: Literal["uniform"]

    def law(self, steps: int) -> LevelSampler:
        return lambda u, progress: noise.uniform_t(u, self.low, self.high)


class LogUniformLevels(Range):
    name: Literal["log_uniform"]

    def law(self, steps: int) -> LevelSampler:
        return lambda u, progress: noise.log_uniform_t(u, self.low, self.high)


class LogNormalLevels(Law):
    """ln sigma ~ N(mean, std^2), cut off where the network knows no more (level_range.py)."""

    name: Literal["log_normal"]
    mean: float = -1.2
    std: PositiveFloat = 1.2

    def law(self, steps: int) -> LevelSampler:
        return lambda u, progress: noise.log_normal_t(u, self.mean, self.std)


class LogitNormalLevels(Law):
    """ln(t / (1 - t)) ~ N(mean, std^2), for flow matching; SD3 was trained at 0, 1 (Esser et al. 2024, Eq. 19)."""

    name: Literal["logit_normal"]
    mean: float = 0.0
    std: PositiveFloat = 1.0

    def law(self, steps: int) -> LevelSampler:
        return lambda u, progress: noise.logit_normal_t(u, self.mean, self.std)


class KarrasLevels(Range):
    name: Literal["karras"]
    rho: PositiveFloat = 7.0

    def law(self, steps: int) -> LevelSampler:
        return lambda u, progress: noise.karras_t(u, self.low, self.high, self.rho)


class PowerLevels(Range):
    """t = low + u^p (high - low), p annealed linearly from `start` to `end`, which it reaches at progress `until`, or after
    until_steps steps, which may be more than the run has (VarDiU's code: 190,000).
    """

    name: Literal["power"]
    start: PositiveFloat = 0.1
    end: PositiveFloat = 2.0
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    until_steps: PositiveInt | None = None  # instead of until

    @model_validator(mode="after")
    def _one_end(self):
        if self.until_steps is not None and self.until != type(self).model_fields["until"].default:
            raise ValueError("until, until_steps: give one of them")
        return self

    def law(self, steps: int) -> LevelSampler:
        until = self.until_steps / steps if self.until_steps else self.until
        exponent = partial(noise.annealed_power, start=self.start, end=self.end, until=until)
        return lambda u, progress: noise.power_t(u, self.low, self.high, exponent(progress))


AnyLevels = UniformLevels | LogUniformLevels | LogNormalLevels | LogitNormalLevels | KarrasLevels | PowerLevels
Levels = Annotated[AnyLevels, Field(discriminator="name")]


class Use(NamedTuple):
    """A `levels` section by its key, and the weightings, by theirs, that are computed at what it draws."""

    key: str
    levels: Levels
    weightings: Mapping[str, noise.Weight]
