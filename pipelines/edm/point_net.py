"""PointNet: points of a few dimensions, images of d channels and one pixel, for studies where everything can be known."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  # diffusers looks for it in the module of the class that it loads
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..common.errors import UserError
from .features import Decoder, EncoderDecoder, Features, refuse_augment_labels


class Layer(nn.Module):
    """SiLU of a linear map of rows (b, n)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return F.silu(self.linear(h))


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of one pixel as the matrix product that it is, which takes a CPU a fifth of the time."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]


class PointDecoder(Decoder):
    """The second half of the layers, and the last map."""

    def __init__(self, width: int, layers: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, width) for _ in range(layers)])
        self.conv_out = PointwiseConv(width, out_channels, 1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_out.weight.dtype

    def maps(self, features: Features) -> Tensor:
        h = features.bottom.flatten(1)
        for layer in self.layers:
            h = self.run(layer, h, features.embedding)
        return h[:, :, None, None]


class PointNet(EncoderDecoder):
    """F(x, c_noise): d + 1 -> width x layers -> out_channels, SiLU between (Wang et al. 2025 use 400 x 4).

    x (b, in_channels, 1, 1); timestep (b,), one more number to the first layer. The first half of the layers is the encoder.
    frequencies: the first layer also sees cos and sin of each coordinate at so many octaves, from wavelength 4 on: detail that
    a network of the coordinates alone is slow to learn (Tancik et al. 2020).
    The last map starts at zero, so an untrained network gives 0.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("Layer",)
    _no_split_modules = ("Layer",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        out_channels: int = 2,
        width: int = 400,
        layers: int = 4,
        frequencies: int = 0,
        sample_size: int = 1,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if layers < 2 or sample_size != 1 or num_classes:
            raise UserError(f"PointNet is for points without classes and has two layers or more, not {layers=} {sample_size=}")
        first = layers - layers // 2
        inputs = in_channels * (1 + 2 * frequencies) + 1
        self.enc = nn.ModuleList([Layer(inputs, width), *(Layer(width, width) for _ in range(first - 1))])
        self.bottom = nn.Identity()
        self.dec = PointDecoder(width, layers // 2, out_channels)

    def encode(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Features:
        refuse_augment_labels(augment_labels)
        if class_labels is not None:
            raise ValueError("class_labels were given to an unconditional network (num_classes=0)")
        embedding = timestep.to(sample.dtype)[:, None]
        x = sample.flatten(1)
        waves = [wave(math.pi / 2 * 2**i * x) for i in range(self.config["frequencies"]) for wave in (torch.cos, torch.sin)]
        h = torch.cat([x, *waves, embedding], 1)
        for layer in self.enc:
            h = self.run(layer, h, embedding)
        return Features(self.bottom(h[:, :, None, None]), (), embedding)
