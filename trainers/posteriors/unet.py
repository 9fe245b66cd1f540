"""q_phi(z | x_t, t, c) for image-shaped z: a conditional U-Net over x_t, whose output a Covariance turns into a density."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelines.denoiser import Condition, Parameterization
from pipelines.edm.features import Features
from pipelines.last_blocks import BlockInputs
from pipelines.noise import Level
from pipelines.preconditioning import make_preconditioner
from pipelines.up_half import UpInputs

from .density import Covariance, Density


class PosteriorOutput(NamedTuple):
    """log_q (b, k) of the z given; z (b, K, c, h, w) and log_q_z (b, K) of the samples asked for; None where not asked.

    x0_mean (b, c, h, w): E[g(z) | x_t], for a posterior built with that output.
    """

    log_q: Tensor | None
    z: Tensor | None
    log_q_z: Tensor | None
    x0_mean: Tensor | None = None


class UNetPosterior(nn.Module):
    """network: what turns x_t into `num_channels` maps (b, num_channels, h, w). One of

    - a second decoder on the teacher's encoder, or an adapter on the last part of its own
      (UpHalf, LastBlocks), whose features `forward` is given;
    - an AdapterHead on the teacher's weights, a copy of the teacher's network or one from scratch, which see x_t as
      `parameterization` says: with "edm" it fits any schedule.

    The first output channels are the covariance's maps, zero at first, so that q starts as the prior. with_mean: the last c
    channels are x0_mean, read out by `parameterization`; `start_mean` gives them the teacher's last layer, so that it
    starts there.
    """

    def __init__(
        self,
        network: nn.Module,
        covariance: Covariance,
        sigma_data: float,
        with_mean: bool = False,
        parameterization: Parameterization = "edm",
    ) -> None:
        super().__init__()
        expected = self.num_channels(covariance, with_mean)
        out_channels = network.out_channels
        if out_channels != expected:
            raise ValueError(
                f"a posterior with {type(covariance).__name__} covariance and with_mean={with_mean} over {covariance.shape[0]} "
                f"channels needs a network with out_channels={expected}, not {out_channels}"
            )
        self.network, self.covariance = network, covariance
        self.preconditioner = make_preconditioner(parameterization, sigma_data)
        self.num_means = expected - covariance.num_maps
        self.on_teacher_features = getattr(network, "on_teacher_features", False)

    @staticmethod
    def num_channels(covariance: Covariance, with_mean: bool) -> int:
        """out_channels of the network."""
        return covariance.num_maps + (covariance.shape[0] if with_mean else 0)

    @torch.no_grad()
    def start_mean(self, conv_out: nn.Module) -> None:
        """Copy the teacher's last layer, its outputs channel by channel, into the rows that make x0_mean (further channels of its
        are no mean).
        """
        own = self.network.conv_out
        if not isinstance(own, nn.Conv2d | nn.Linear):
            raise ValueError(f"the posterior's last layer is a {type(own).__name__}, where a convolution makes x0_mean")
        rows = len(own.weight) * self.num_means // (self.covariance.num_maps + self.num_means)
        for mine, theirs in zip(own.parameters(), conv_out.parameters(), strict=True):
            mine[-rows:] = theirs[:rows]

    def forward(
        self,
        x_t: Tensor,
        level: Level,
        condition: Condition = None,
        features: Features | UpInputs | BlockInputs | None = None,
        z: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> PosteriorOutput:
        """log q of z (b, k, c, h, w), and samples made from standard normal noise (b, K, c, h, w), in one network call."""
        density, mean = self.density(x_t, level, condition, features)
        log_q = density.log_prob(z) if z is not None else None
        sample, log_q_z = density.sample(noise) if noise is not None else (None, None)
        x0_mean = None
        if self.num_means:
            mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
            x0_mean = self.preconditioner.x0(mean, x_t, level)
        return PosteriorOutput(log_q, sample, log_q_z, x0_mean)

    def density(
        self,
        x_t: Tensor,
        level: Level,
        condition: Condition = None,
        features: Features | UpInputs | BlockInputs | None = None,
    ) -> tuple[Density, Tensor]:
        """q(. | x_t), and the maps (b, c or 0, h, w) that the preconditioner turns into x0_mean."""
        if self.on_teacher_features:
            maps = self.network(features)
        else:
            out = self.network(*self.preconditioner.inputs(x_t, level), **(condition or {}))
            maps = getattr(out, "sample", out)
        maps, mean = maps.split([self.covariance.num_maps, self.num_means], dim=1)
        return self.covariance(maps), mean
