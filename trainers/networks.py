"""New networks of EDM's kind, from the sections of a configuration."""

from __future__ import annotations

import torch

from pipelines.common.errors import UserError
from pipelines.edm import EDMUNet, PatchUNet, PointNet

from .config.networks import EDMNetwork, Network, PointNetwork
from .engine.draws import derive_seed


def build_unet(
    network: Network | EDMNetwork | PointNetwork, seed: int, role: str, sample_size: int, **shape: int
) -> PatchUNet | EDMUNet | PointNet:
    """A network whose initial weights depend on the seed and its role alone."""
    if isinstance(network, PointNetwork) != (sample_size == 1):
        raise UserError(
            f"network: {type(network).__name__} does not fit data of {sample_size}x{sample_size} pixels; "
            "points take {width: 400, layers: 4}, images one of the others"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", role))
        if isinstance(network, EDMNetwork):
            _check_attention(network, sample_size)
            return EDMUNet(sample_size=sample_size, **shape, **network.options())
        if isinstance(network, PointNetwork):
            return PointNet(**shape, **network.options())
        return PatchUNet(sample_size=sample_size, **shape, **network.model_dump())


def _check_attention(network: EDMNetwork, sample_size: int) -> None:
    """UserError for a resolution that is asked for attention and that no level has."""
    sides = [sample_size >> level for level in range(len(network.options()["channel_mult"]))]
    for side in network.attention_resolutions or ():
        if side not in sides:
            raise UserError(
                f"network.attention_resolutions: no level has {side}x{side} positions; "
                f"those of images of {sample_size}x{sample_size} are {', '.join(map(str, sides))}"
            )
