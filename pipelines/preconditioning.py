"""How a network's input and output relate to x_t and x0: D = c_skip x_t + c_out F(c_in x_t, c_noise).

Prediction types of diffusers and the four preconditioners of Karras et al. 2022 (Table 1), with their parameters as fields. All
are pure functions of a Level, whose dtype they compute in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from .noise import Level, PredictionType, edm_coefficients, to_x0

ALL_LEVELS = (0.0, math.inf)


class Preconditioner(Protocol):
    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise-to-signal ratios that the network was made for, both inclusive."""

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """x_t (b, c, h, w) -> the network's input (b, c, h, w) and time (b,)."""

    def x0(self, out: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """The network's output (b, c', h, w) at x_t -> x0 (b, c, h, w)."""

    def nearest(self, sigma: Tensor) -> Tensor:
        """The noise levels, of any shape, that the network knows and that are nearest to these."""


Parameterization = Literal["edm", "sample", "epsilon", "v_prediction", "flow"] | Preconditioner


class Continuous:
    """Any noise level."""

    @property
    def sigma_range(self) -> tuple[float, float]:
        return ALL_LEVELS

    def nearest(self, sigma: Tensor) -> Tensor:
        """Any sigma is known."""
        return sigma


@dataclass(frozen=True)
class Prediction(Continuous):
    """A diffusers prediction type: the network sees x_t and the schedule's own t."""

    prediction_type: PredictionType

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """x_t (b, c, h, w) and its level as they are: (network's input, network's time (b,))."""
        return x_t, level.t

    def x0(self, out: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """The network's output (b, c, h, w) -> x0, by its prediction type."""
        return to_x0(out, x_t, level, self.prediction_type)


@dataclass(frozen=True)
class EDM(Continuous):
    """Unit variance in and out at every level, for any alpha; c_noise = ln(sigma / alpha) / 4."""

    sigma_data: float = 0.5
    sigma_range: tuple[float, float] = ALL_LEVELS

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        c_in, _, _ = edm_coefficients(level, self.sigma_data)
        return c_in * x_t, (level.sigma / level.alpha).flatten().log() / 4

    def x0(self, out: Tensor, x_t: Tensor, level: Level) -> Tensor:
        _, c_skip, c_out = edm_coefficients(level, self.sigma_data)
        return c_skip * x_t + c_out * out


@dataclass(frozen=True)
class VP(Continuous):
    """DDPM's linear beta, where F predicts eps: c_in = 1 / sqrt(sigma^2 + 1), c_noise = (M - 1) t(sigma). alpha = 1."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self._sigma(self.epsilon_t), self._sigma(1.0)

    def _sigma(self, t: float) -> float:
        # in float32, as the networks' own bounds: at epsilon_t that rounds .0010005 to .0009766
        return float(((0.5 * self.beta_d * torch.tensor(t) ** 2 + self.beta_min * t).exp() - 1).sqrt())

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        # not log1p: in float32 it differs below sigma = .01, and the networks were trained on times computed so
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + level.sigma**2).log()).sqrt()
        time = (self.M - 1) * ((root - self.beta_min) / self.beta_d)
        return x_t / (level.sigma**2 + 1).sqrt(), time.flatten()

    def x0(self, out: Tensor, x_t: Tensor, level: Level) -> Tensor:
        return x_t - level.sigma * out


@dataclass(frozen=True)
class VE(Continuous):
    """c_in = 1, c_out = sigma, c_noise = ln(sigma / 2). alpha = 1."""

    sigma_range: tuple[float, float] = (0.02, 100.0)

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return x_t, (0.5 * level.sigma).flatten().log()

    def x0(self, out: Tensor, x_t: Tensor, level: Level) -> Tensor:
        return x_t + level.sigma * out


@dataclass(frozen=True)
class IDDPM:
    """Nichol & Dhariwal's cosine schedule: M + 1 noise levels u_0 > ... > u_M = 0, c_noise = M - 1 - (index of the nearest).

    The first half of the output channels is F, the other half a variance that no sampler here uses. alpha = 1.
    """

    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    @cached_property
    def levels(self) -> Tensor:
        """u (M + 1,) float32, by the recursion of Table 1 in that precision, as in the networks' own tables."""
        alpha_bar = (0.5 * math.pi * torch.arange(self.M + 1) / self.M / (self.C_2 + 1)).sin() ** 2
        u = torch.zeros(self.M + 1)
        for j in range(self.M, 0, -1):
            u[j - 1] = ((u[j] ** 2 + 1) / (alpha_bar[j - 1] / alpha_bar[j]).clip(min=self.C_1) - 1).sqrt()
        return u

    @property
    def sigma_range(self) -> tuple[float, float]:
        return float(self.levels[self.M - 1]), float(self.levels[0])

    def index(self, sigma: Tensor) -> Tensor:
        """Of the level nearest to each sigma (n,)."""
        levels = self.levels.to(sigma.device)
        return torch.cdist(sigma.float().reshape(1, -1, 1), levels.reshape(1, -1, 1)).argmin(2).flatten()

    def nearest(self, sigma: Tensor) -> Tensor:
        return self.levels.to(sigma)[self.index(sigma)].reshape(sigma.shape)

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        time = self.M - 1 - self.index(level.sigma).to(level.sigma.dtype)
        return x_t / (level.sigma**2 + 1).sqrt(), time

    def x0(self, out: Tensor, x_t: Tensor, level: Level) -> Tensor:
        return x_t - level.sigma * out[:, : x_t.shape[1]]


PRECONDITIONERS: dict[str, Callable[..., EDM | Prediction | VP | VE | IDDPM]] = {
    "edm": EDM,
    "sample": partial(Prediction, "sample"),
    "vp": VP,
    "ve": VE,
    "iddpm": IDDPM,
}


def make_preconditioner(parameterization: Parameterization, sigma_data: float) -> Preconditioner:
    """Names stand for Prediction(name) and EDM(sigma_data).

    >>> make_preconditioner("edm", sigma_data=0.5)
    EDM(sigma_data=0.5, sigma_range=(0.0, inf))
    >>> make_preconditioner("v_prediction", sigma_data=1.0)
    Prediction(prediction_type='v_prediction')
    """
    if not isinstance(parameterization, str):
        return parameterization
    return EDM(sigma_data) if parameterization == "edm" else Prediction(parameterization)
