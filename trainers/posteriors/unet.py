"""q_phi(z | x_t, t, c) for image-shaped z: a conditional U-Net over x_t with a Gaussian head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelines.denoiser import Condition
from pipelines.edm import EDMUNet
from pipelines.noise import Level

from .gaussian import COVARIANCES, Density, Full


class PosteriorOutput(NamedTuple):
    """log_q (b, k) of the z given; z (b, K, c, h, w) and log_q_z (b, K) of the samples asked for; None where not asked.

    calibration (b, 2 c, h, w): the gate and the residual of a calibrated posterior mean; None unless built with it.
    """

    log_q: Tensor | None
    z: Tensor | None
    log_q_z: Tensor | None
    calibration: Tensor | None = None


class UNetPosterior(nn.Module):
    """The network sees x_t scaled to unit variance and ln(sigma/alpha)/4, so any schedule fits.

    Mean and log-variance are maps of the U-Net's output; "full" covariance reads them off FULL_MAPS such maps by a linear layer.
    The last 2c channels of a calibrated posterior are the calibration of the resampled score (objectives/vardiu.py).
    """

    FULL_MAPS = 8

    def __init__(self, unet: EDMUNet, covariance: str, sigma_data: float, calibrated: bool = False) -> None:
        super().__init__()
        config = unet.config
        expected = self.num_channels(config.in_channels, covariance, calibrated)
        if config.out_channels != expected:
            raise ValueError(
                f"a posterior with covariance={covariance!r}, calibrated={calibrated} over {config.in_channels} channels needs a "
                f"U-Net with out_channels={expected}, not {config.out_channels}"
            )
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.covariance = COVARIANCES[covariance](config.in_channels * config.sample_size**2)
        self.unet, self.sigma_data = unet, sigma_data
        self.num_calibration = 2 * config.in_channels if calibrated else 0
        self.head = nn.Identity()
        if isinstance(self.covariance, Full):  # the U-Net's last layer starts at zero, so this one must not
            self.head = nn.Linear(self.FULL_MAPS * config.sample_size**2, self.covariance.num_outputs)
            nn.init.zeros_(self.head.bias)

    @classmethod
    def num_channels(cls, in_channels: int, covariance: str, calibrated: bool) -> int:
        """out_channels of the U-Net for images of in_channels."""
        return (cls.FULL_MAPS if covariance == "full" else 2 * in_channels) + (2 * in_channels if calibrated else 0)

    def forward(
        self, x_t: Tensor, level: Level, condition: Condition = None, z: Tensor | None = None, noise: Tensor | None = None
    ) -> PosteriorOutput:
        """log q of z (b, k, c, h, w), and samples made from standard normal noise (b, K, c, h, w), in one network call."""
        x = x_t * (level.alpha.square() * self.sigma_data**2 + level.sigma.square()).rsqrt()
        maps = self.unet(x, (level.sigma / level.alpha).log().flatten() / 4, **(condition or {})).sample
        gaussian, calibration = maps.split([maps.shape[1] - self.num_calibration, self.num_calibration], dim=1)
        outputs = self.head(gaussian.flatten(1))
        density: Density = self.covariance(outputs.to(torch.promote_types(outputs.dtype, torch.float32)))
        log_q = density.log_prob(z.flatten(2)) if z is not None else None
        sample = log_q_z = None
        if noise is not None:
            sample, log_q_z = density.sample(noise.flatten(2))
            sample = sample.unflatten(2, self.shape)
        return PosteriorOutput(log_q, sample, log_q_z, calibration if self.num_calibration else None)
