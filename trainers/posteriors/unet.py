"""q_phi(z | x_t, t, c) for image-shaped z: a conditional U-Net over x_t with a Gaussian head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelines.denoiser import Condition
from pipelines.edm import EDMUNet
from pipelines.noise import Level

from .gaussian import COVARIANCES, Full


class PosteriorOutput(NamedTuple):
    """log_q (b, k) of the z given; z (b, K, c, h, w) and log_q_z (b, K) of the samples asked for; None where not asked."""

    log_q: Tensor | None
    z: Tensor | None
    log_q_z: Tensor | None


class UNetPosterior(nn.Module):
    """The network sees x_t scaled to unit variance and ln(sigma/alpha)/4, so any schedule fits.

    Mean and log-variance are maps of the U-Net's output; "full" covariance reads them off all features by one linear layer.
    """

    def __init__(self, unet: EDMUNet, covariance: str, sigma_data: float) -> None:
        super().__init__()
        config = unet.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.covariance = COVARIANCES[covariance](config.in_channels * config.sample_size**2)
        self.unet, self.sigma_data = unet, sigma_data
        self.head = None
        if isinstance(self.covariance, Full):
            side = config.sample_size // config.patch_size
            self.head = nn.Linear(config.channels * config.channel_mult[0] * side**2, self.covariance.num_outputs)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            unet.conv_out.requires_grad_(False)
        elif config.out_channels != 2 * config.in_channels:
            raise ValueError("the posterior's U-Net needs out_channels = 2 in_channels: mean and log standard deviation")

    def forward(
        self,
        x_t: Tensor,
        level: Level,
        condition: Condition = None,
        z: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> PosteriorOutput:
        """log q of z (b, k, c, h, w), and samples made from standard normal noise (b, K, c, h, w), in one network call."""
        density = self.covariance(self._outputs(x_t, level, condition or {}))
        log_q = density.log_prob(z.flatten(2)) if z is not None else None
        if noise is None:
            return PosteriorOutput(log_q, None, None)
        sample, log_q_z = density.sample(noise.flatten(2))
        return PosteriorOutput(log_q, sample.unflatten(2, self.shape), log_q_z)

    def _outputs(self, x_t: Tensor, level: Level, condition: dict[str, Tensor]) -> Tensor:
        x = x_t * (level.alpha.square() * self.sigma_data**2 + level.sigma.square()).rsqrt()
        time = (level.sigma / level.alpha).log().flatten() / 4
        if self.head is None:
            out = self.unet(x, time, **condition).sample.flatten(1)
        else:
            out = self.head(self.unet.features(x, time, **condition).flatten(1))
        return out.to(torch.promote_types(out.dtype, torch.float32))  # densities are never taken in half precision
