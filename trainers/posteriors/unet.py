"""q_phi(z | x_t, t, c) for image-shaped z: a conditional U-Net over x_t, whose output a Covariance turns into a density."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelines.denoiser import Condition
from pipelines.edm import EDMDecoder, EDMUNet
from pipelines.edm.unet import Features
from pipelines.noise import Level, edm_coefficients

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
    """network: a U-Net of its own, or a decoder of its own on the teacher's encoder, whose features `forward` is then given.

    A U-Net sees x_t scaled to unit variance and ln(sigma/alpha)/4, so any schedule fits. The first output channels are the
    covariance's maps, zero at first, so that q starts as the prior. with_mean: the last c channels are x0_mean in EDM's
    preconditioning (Karras et al. 2022, Eq. 7); `start_mean` gives them the teacher's last layer, so that it starts there.
    """

    def __init__(self, network: EDMUNet | EDMDecoder, covariance: Covariance, sigma_data: float, with_mean: bool = False) -> None:
        super().__init__()
        expected = self.num_channels(covariance, with_mean)
        if network.out_channels != expected:
            raise ValueError(
                f"a posterior with {type(covariance).__name__} covariance and with_mean={with_mean} over {covariance.shape[0]} "
                f"channels needs a network with out_channels={expected}, not {network.out_channels}"
            )
        self.network, self.covariance, self.sigma_data = network, covariance, sigma_data
        self.num_means = expected - covariance.num_maps
        self.on_teacher_features = isinstance(network, EDMDecoder)

    @staticmethod
    def num_channels(covariance: Covariance, with_mean: bool) -> int:
        """out_channels of the network."""
        return covariance.num_maps + (covariance.shape[0] if with_mean else 0)

    @torch.no_grad()
    def start_mean(self, conv_out: nn.Conv2d) -> None:
        """Copy the teacher's last convolution into the rows that make x0_mean."""
        rows = len(conv_out.weight)
        for mine, theirs in zip(self.network.conv_out.parameters(), conv_out.parameters(), strict=True):
            mine[-rows:] = theirs

    def forward(
        self,
        x_t: Tensor,
        level: Level,
        condition: Condition = None,
        features: Features | None = None,
        z: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> PosteriorOutput:
        """log q of z (b, k, c, h, w), and samples made from standard normal noise (b, K, c, h, w), in one network call."""
        c_in, c_skip, c_out = edm_coefficients(level, self.sigma_data)
        if self.on_teacher_features:
            maps = self.network(features)
        else:
            maps = self.network(c_in * x_t, (level.sigma / level.alpha).log().flatten() / 4, **(condition or {})).sample
        maps, mean = maps.split([self.covariance.num_maps, self.num_means], dim=1)
        density: Density = self.covariance(maps)
        log_q = density.log_prob(z) if z is not None else None
        sample, log_q_z = density.sample(noise) if noise is not None else (None, None)
        x0_mean = c_skip * x_t + c_out * mean.to(c_out.dtype) if self.num_means else None
        return PosteriorOutput(log_q, sample, log_q_z, x0_mean)
