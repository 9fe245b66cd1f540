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


class Range(Strict):
    low: PositiveFloat
    high: PositiveFloat

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class UniformLevels(Range):
    name: Literal["uniform"]

    def sampler(self, steps: int = 1):
        return lambda u, progress: noise.uniform_t(u, self.low, self.high)


class LogUniformLevels(Range):
    name: Literal["log_uniform"]

    def sampler(self, steps: int = 1):
        return lambda u, progress: noise.log_uniform_t(u, self.low, self.high)


class LogNormalLevels(Strict):
    """ln sigma ~ N(mean, std^2), cut off where the network knows no more (level_range.py)."""

    name: Literal["log_normal"]
    mean: float = -1.2
    std: PositiveFloat = 1.2

    def sampler(self, steps: int = 1):
        return lambda u, progress: noise.log_normal_t(u, self.mean, self.std)


class KarrasLevels(Range):
    name: Literal["karras"]
    rho: PositiveFloat = 7.0

    def sampler(self, steps: int = 1):
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

    def sampler(self, steps: int = 1):
        until = self.until_steps / steps if self.until_steps else self.until
        exponent = partial(noise.annealed_power, start=self.start, end=self.end, until=until)
        return lambda u, progress: noise.power_t(u, self.low, self.high, exponent(progress))


Levels = Annotated[UniformLevels | LogUniformLevels | LogNormalLevels | KarrasLevels | PowerLevels, Field(discriminator="name")]


class Use(NamedTuple):
    """A `levels` section by its key, and the weightings, by theirs, that are computed at what it draws."""

    key: str
    levels: Levels
    weightings: Mapping[str, noise.Weight]
