"""One convention for every diffusion family: x_t = alpha x0 + sigma eps.

Shapes: b samples; images are (b, c, h, w) (vectors are (b, d, 1, 1)); per-sample scalars are *born* (b, 1, 1, 1), so that
a product with an image broadcasts over the right axis or raises.

A network output is `a x0 + b eps` for known (a, b); with x_t that is a 2x2 linear system, so one solve serves them all:

    x0 = (b x_t - sigma out) / (b alpha - a sigma)      epsilon (0, 1)   v_prediction (-sigma, alpha)   flow (-1, 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

PredictionType = Literal["sample", "epsilon", "v_prediction", "flow"]


def widen(value: Tensor) -> Tensor:
    """(b,) -> (b, 1, 1, 1); anything that is not one number per sample raises ValueError.

    >>> widen(torch.tensor([0.5, 2.0])).shape
    torch.Size([2, 1, 1, 1])
    """
    if value.ndim != 1:
        raise ValueError(f"a per-sample quantity must have shape (b,), got {tuple(value.shape)}")
    return value.reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Level:
    """Noise level of each sample in a batch: alpha and sigma (b, 1, 1, 1), and t (b,), the schedule's own time.

    Make one with a schedule's `level(t)`, which widens; objectives see only alpha and sigma.
    """

    alpha: Tensor
    sigma: Tensor
    t: Tensor

    def __post_init__(self) -> None:
        b = self.t.shape[0] if self.t.ndim == 1 else -1
        for name in ("alpha", "sigma"):
            shape = tuple(getattr(self, name).shape)
            if shape != (b, 1, 1, 1):
                raise ValueError(f"Level.{name} must have shape (b, 1, 1, 1) with t of shape (b,); got {shape}")

    def __len__(self) -> int:
        return self.t.shape[0]

    def repeat_interleave(self, k: int) -> Level:
        """Every sample's level k times in a row: (b k, 1, 1, 1)."""
        return Level(*(v.repeat_interleave(k, 0) for v in (self.alpha, self.sigma, self.t)))

    def repeat(self, k: int) -> Level:
        """The whole batch k times: (k b, 1, 1, 1)."""
        return Level(*(torch.cat([v] * k) for v in (self.alpha, self.sigma, self.t)))


def add_noise(x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """x_t = alpha x0 + sigma eps, (b, c, h, w).

    >>> level = EDMSchedule().level(torch.tensor([2.0]))
    >>> add_noise(torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[1.0, -1.0]]]]), level).tolist()
    [[[[2.5, -1.5]]]]
    """
    return level.alpha * x0 + level.sigma * eps


def _output_coefficients(prediction_type: str, level: Level) -> tuple[Tensor | float, Tensor | float]:
    """(a, b) with network output = a x0 + b eps."""
    known: dict[str, tuple[Tensor | float, Tensor | float]] = {
        "epsilon": (0.0, 1.0),
        "v_prediction": (-level.sigma, level.alpha),
        "flow": (-1.0, 1.0),
    }
    if prediction_type not in known:
        raise ValueError(f"prediction_type {prediction_type!r} is unknown; expected sample, epsilon, v_prediction or flow")
    return known[prediction_type]


def to_x0(out: Tensor, x_t: Tensor, level: Level, prediction_type: PredictionType) -> Tensor:
    """Network output -> x0, (b, c, h, w). Singular only where it must be: epsilon at alpha = 0.

    ValueError for a prediction type that is not known.

    >>> level = RectifiedFlowSchedule().level(torch.tensor([0.5]))  # x_t = x0 / 2 + eps / 2
    >>> x0, eps = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), -1.0)
    >>> x_t = add_noise(x0, eps, level)
    >>> [to_x0(out, x_t, level, kind).item() for out, kind in ((x0, "sample"), (eps, "epsilon"), (eps - x0, "flow"))]
    [3.0, 3.0, 3.0]
    """
    if prediction_type == "sample":
        return out
    a, b = _output_coefficients(prediction_type, level)
    return (b * x_t - level.sigma * out) / (b * level.alpha - a * level.sigma)


def from_x0(x0: Tensor, x_t: Tensor, level: Level, prediction_type: PredictionType) -> Tensor:
    """x0 -> what a network of that prediction type would have put out, (b, c, h, w). Singular at sigma = 0.

    ValueError for a prediction type that is not known.

    >>> level = RectifiedFlowSchedule().level(torch.tensor([0.5]))
    >>> from_x0(torch.full((1, 1, 1, 1), 3.0), torch.ones(1, 1, 1, 1), level, "flow").item()  # eps - x0, of eps = -1
    -4.0
    """
    if prediction_type == "sample":
        return x0
    a, b = _output_coefficients(prediction_type, level)
    return a * x0 + b * to_eps(x0, x_t, level)


def to_eps(x0: Tensor, x_t: Tensor, level: Level) -> Tensor:
    """eps = (x_t - alpha x0) / sigma, (b, c, h, w); singular at sigma = 0.

    >>> to_eps(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 5.0), EDMSchedule().level(torch.tensor([2.0]))).item()
    2.0
    """
    return (x_t - level.alpha * x0) / level.sigma


def score(x0: Tensor, x_t: Tensor, level: Level) -> Tensor:
    """grad_{x_t} log p_t(x_t) = (alpha E[x0|x_t] - x_t) / sigma^2 (Tweedie), (b, c, h, w); singular at sigma = 0.

    >>> score(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 5.0), EDMSchedule().level(torch.tensor([2.0]))).item()
    -1.0
    """
    return (level.alpha * x0 - x_t) / level.sigma.square()


def edm_coefficients(level: Level, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """(c_in, c_skip, c_out), each (b, 1, 1, 1): D = c_skip x_t + c_out F(c_in x_t) (Karras et al. 2022, Table 1).

    Written for any alpha: with F of unit variance and x0 of standard deviation sigma_data, so are F's input and target.

    >>> level = EDMSchedule().level(torch.tensor([0.5]))
    >>> [round(c.item(), 4) for c in edm_coefficients(level, sigma_data=0.5)]
    [1.4142, 0.5, 0.3536]
    """
    alpha, sigma = level.alpha, level.sigma
    total = alpha.square() * sigma_data**2 + sigma.square()
    return total.rsqrt(), alpha * sigma_data**2 / total, sigma * sigma_data * total.rsqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: t -> Level


class Schedule(Protocol):
    """t_range is inclusive; `initial_noise` is what the network sees at pure noise z ~ N(0, I)."""

    t_range: tuple[float, float]

    def nearest(self, t: Tensor) -> Tensor:
        """The times, of any shape, that the network knows and that are nearest to these: what training draws is moved there."""

    def level(self, t: Tensor) -> Level:
        """t (b,) -> the level there."""

    def initial_noise(self, z: Tensor, level: Level) -> Tensor: ...


class EDMSchedule:
    """alpha = 1, sigma = t (Karras et al. 2022); the network's input at noise level sigma is sigma z.

    nearest: where the network knows some sigmas only (preconditioning.IDDPM), what moves others to them; `level` takes any.

    >>> level = EDMSchedule().level(torch.tensor([80.0, 0.5]))
    >>> level.alpha.flatten().tolist(), level.sigma.flatten().tolist()
    ([1.0, 1.0], [80.0, 0.5])
    """

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, nearest: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.t_range = (sigma_min, sigma_max)
        self._nearest = nearest

    def nearest(self, t: Tensor) -> Tensor:
        return t if self._nearest is None else self._nearest(t)

    def level(self, t: Tensor) -> Level:
        sigma = widen(t)
        return Level(torch.ones_like(sigma), sigma, t)

    def initial_noise(self, z: Tensor, level: Level) -> Tensor:
        return level.sigma * z


class RectifiedFlowSchedule:
    """alpha = 1 - t, sigma = t, t in [0, 1] (1 is noise), as in diffusers' FlowMatch schedulers.

    >>> level = RectifiedFlowSchedule().level(torch.tensor([0.25]))
    >>> level.alpha.item(), level.sigma.item()
    (0.75, 0.25)
    """

    t_range = (0.0, 1.0)

    def nearest(self, t: Tensor) -> Tensor:
        return t

    def level(self, t: Tensor) -> Level:
        sigma = widen(t)
        return Level(1 - sigma, sigma, t)

    def initial_noise(self, z: Tensor, level: Level) -> Tensor:
        return z


class VPSchedule:
    """alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), integer t, from any diffusers scheduler's `alphas_cumprod` (T,).

    These networks were trained at t = 0, 1, ..., T-1 alone, and DDPM, DDIM and LCM sample them there: a level between two of them
    is the nearest one, for alpha and sigma and for the time that the network is told.
    The one-step student reads out unit noise z at t = T-1, which is what a stock pipeline feeds its network.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        if alphas_cumprod.ndim != 1 or not bool(((alphas_cumprod >= 0) & (alphas_cumprod <= 1)).all()):
            raise ValueError("alphas_cumprod must be a vector of values in [0, 1], as a diffusers scheduler holds")
        self.alphas_cumprod = alphas_cumprod
        self.t_range = (0.0, float(len(alphas_cumprod) - 1))

    @classmethod
    def from_scheduler(cls, scheduler) -> VPSchedule:
        """From a diffusers scheduler; ValueError where it has no alphas_cumprod (flow matching, EDM)."""
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod: it is not variance preserving")
        return cls(scheduler.alphas_cumprod)

    def nearest(self, t: Tensor) -> Tensor:
        return t.round()

    def level(self, t: Tensor) -> Level:
        """ValueError outside [0, T-1]."""
        t = self.nearest(t)
        low, high = self.t_range
        if not bool(((t >= low) & (t <= high)).all()):  # also NaN; an index of -1 would be the last level
            raise ValueError(
                f"t must be in [{low:g}, {high:g}], the timesteps of this schedule; got {float(t.min()):g} to {float(t.max()):g}"
            )
        abar = self.alphas_cumprod.to(t.device)[t.long()]
        return Level(widen(abar.sqrt()), widen((1 - abar).sqrt()), t)

    def initial_noise(self, z: Tensor, level: Level) -> Tensor:
        return z


# ---------------------------------------------------------------------------------------------------------------------
# Samplers of t, as quantile functions: uniform u in (0, 1) of shape (b,) -> t of shape (b,). The randomness stays with the
# caller, so a run can be resumed exactly and u can be stratified.


def uniform_t(u: Tensor, low: float, high: float) -> Tensor:
    """t ~ U(low, high).

    >>> uniform_t(torch.tensor([0.0, 0.5]), 2.0, 4.0).tolist()
    [2.0, 3.0]
    """
    return low + u * (high - low)


def log_uniform_t(u: Tensor, low: float, high: float) -> Tensor:
    """log t ~ U(log low, log high)."""
    return torch.exp(math.log(low) + u * math.log(high / low))


def log_normal_t(u: Tensor, mean: float, std: float) -> Tensor:
    """log t ~ N(mean, std^2); EDM trains with mean -1.2, std 1.2 (Karras et al. 2022, Table 1)."""
    return torch.exp(mean + std * torch.special.ndtri(u))


def logit_normal_t(u: Tensor, mean: float, std: float) -> Tensor:
    """ln(t / (1 - t)) ~ N(mean, std^2), t in (0, 1).

    >>> logit_normal_t(torch.tensor([0.5]), 0.0, 1.0).tolist()
    [0.5]
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def shifted_t(t: Tensor, shift: float) -> Tensor:
    """t in [0, 1] -> s t / (1 + (s - 1) t), the time shift of flow matching: towards noise for s > 1, and 0 and 1 stay.

    >>> shifted_t(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist()
    [0.0, 0.75, 1.0]
    """
    return shift * t / (1 + (shift - 1) * t)


def karras_t(u: Tensor, low: float, high: float, rho: float = 7.0) -> Tensor:
    """t = (low^(1/rho) + u (high^(1/rho) - low^(1/rho)))^rho, the density of EDM's sampling steps (Eq. 5)."""
    return (low ** (1 / rho) + u * (high ** (1 / rho) - low ** (1 / rho))) ** rho


def power_t(u: Tensor, low: float, high: float, power: float) -> Tensor:
    """t = low + u^p (high - low); p < 1 favours high noise. VarDiU anneals p from 0.1 to 2 over training.

    >>> power_t(torch.tensor([0.25]), 0.0, 8.0, 0.5).tolist(), power_t(torch.tensor([0.25]), 0.0, 8.0, 2.0).tolist()
    ([4.0], [0.5])
    """
    return low + u**power * (high - low)


def annealed_power(progress: float, start: float, end: float, until: float) -> float:
    """The exponent at `progress` in [0, 1]: linear from `start`, reaching `end` at progress `until`.

    >>> [annealed_power(progress, 0.0, 2.0, until=0.5) for progress in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 1.0, 2.0, 2.0]
    """
    return start + (end - start) * min(progress / until, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Weightings of the gradient of the KL (a difference of scores) at a level, by name -> (b, 1, 1, 1).

Weight = Literal["uniform", "sigma", "sigma2", "sigma4", "inv_sigma", "snr", "edm", "dmd"]
Weighting = Callable[[Level, Tensor, Tensor, float], Tensor]

WEIGHTINGS: dict[Weight, Weighting] = {
    # x0: a sample, x0_hat: the teacher's denoised estimate of it, both (b, c, h, w).
    "uniform": lambda level, x0, x0_hat, sigma_data: torch.ones_like(level.sigma),
    "sigma": lambda level, x0, x0_hat, sigma_data: level.sigma,
    "sigma2": lambda level, x0, x0_hat, sigma_data: level.sigma.square(),
    "sigma4": lambda level, x0, x0_hat, sigma_data: level.sigma.square().square(),
    "inv_sigma": lambda level, x0, x0_hat, sigma_data: 1 / level.sigma,
    "snr": lambda level, x0, x0_hat, sigma_data: (level.alpha / level.sigma).square(),
    # Karras et al. 2022, Table 1: lambda(sigma / alpha), written so that it is 1 / sigma_data^2 at alpha = 0.
    "edm": lambda level, x0, x0_hat, sigma_data: (
        (level.sigma.square() + level.alpha.square() * sigma_data**2) / (level.sigma * sigma_data) ** 2
    ),
    # DMD, Eq. 8: the gradient in x0 becomes (x0_fake - x0_hat) / mean|x0 - x0_hat|; alpha^2/sigma^2 undoes the scores' scale.
    "dmd": lambda level, x0, x0_hat, sigma_data: (
        (level.sigma / level.alpha).square() / (x0 - x0_hat).abs().mean((1, 2, 3), keepdim=True)
    ),
}


def weight(name: Weight, level: Level, x0: Tensor, x0_hat: Tensor, sigma_data: float) -> Tensor:
    """w(t) by name, (b, 1, 1, 1), detached: a weight is a number, never a path for gradients.

    x0, x0_hat (b, c, h, w): a sample and the teacher's estimate of it, which "dmd" compares; sigma_data: the data's standard
    deviation, which "edm" needs. ValueError for a name that is not known.

    >>> level, x = EDMSchedule().level(torch.tensor([2.0])), torch.zeros(1, 1, 1, 1)
    >>> weight("sigma2", level, x, x, 0.5).item(), weight("edm", level, x, x, 0.5).item()
    (4.0, 4.25)
    """
    if name not in WEIGHTINGS:
        raise ValueError(f"weighting {name!r} is unknown; expected one of {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[name](level, x0, x0_hat, sigma_data).detach()
