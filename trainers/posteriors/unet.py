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
    """log_q (b, k) of the z given; z (b, K, c, h, w) and log_q_z (b, K) of the samples asked for; None where not asked.

    calibration (b, 2 c, h, w): the gate and the residual of a calibrated posterior mean; None unless built with it.
    """

    log_q: Tensor | None
    z: Tensor | None
    log_q_z: Tensor | None
    calibration: Tensor | None = None


class UNetPosterior(nn.Module):
    """The network sees x_t scaled to unit variance and ln(sigma/alpha)/4, so any schedule fits.

    Mean and log-variance are maps of the U-Net's output, its first 2c channels; "full" covariance reads them off all features by
    one linear layer instead. With 2c channels more, those are the calibration of the resampled score (objectives/vardiu.py).
    """

    def __init__(self, unet: EDMUNet, covariance: str, sigma_data: float, calibrated: bool = False) -> None:
        super().__init__()
        config = unet.config
        c = config.in_channels
        self.shape = (c, config.sample_size, config.sample_size)
        self.covariance = COVARIANCES[covariance](c * config.sample_size**2)
        self.unet, self.sigma_data, self.calibrated = unet, sigma_data, calibrated
        if config.out_channels != self.num_channels(c, calibrated):
            raise ValueError(
                f"the posterior's U-Net needs out_channels={self.num_channels(c, calibrated)}, not {config.out_channels}"
            )
        self.head = None
        if isinstance(self.covariance, Full):
            side = config.sample_size // config.patch_size
            self.head = nn.Linear(config.channels * config.channel_mult[0] * side**2, self.covariance.num_outputs)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @staticmethod
    def num_channels(in_channels: int, calibrated: bool) -> int:
        """out_channels of the U-Net for images of in_channels."""
        return (4 if calibrated else 2) * in_channels

    def forward(
        self, x_t: Tensor, level: Level, condition: Condition = None, z: Tensor | None = None, noise: Tensor | None = None
    ) -> PosteriorOutput:
        """log q of z (b, k, c, h, w), and samples made from standard normal noise (b, K, c, h, w), in one network call."""
        x = x_t * (level.alpha.square() * self.sigma_data**2 + level.sigma.square()).rsqrt()
        features = self.unet.features(x, (level.sigma / level.alpha).log().flatten() / 4, **(condition or {}))
        maps = self.unet.head(features)
        # densities are never taken in half precision
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        gaussian, calibration = maps.split([2 * self.shape[0], maps.shape[1] - 2 * self.shape[0]], dim=1)
        outputs = gaussian.flatten(1) if self.head is None else self.head(features.flatten(1)).to(maps.dtype)
        density = self.covariance(outputs)
        log_q = density.log_prob(z.flatten(2)) if z is not None else None
        sample = log_q_z = None
        if noise is not None:
            sample, log_q_z = density.sample(noise.flatten(2))
            sample = sample.unflatten(2, self.shape)
        return PosteriorOutput(log_q, sample, log_q_z, calibration if self.calibrated else None)
