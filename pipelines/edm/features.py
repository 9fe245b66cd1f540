"""U-Nets in two parts: what the encoder hands to the decoder, so that a second decoder can be put on the same encoder."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Unet = TypeVar("Unet", bound="EncoderDecoder")


class Features(NamedTuple):
    """An encoder's last output, the skip connections in the order they were made, the embedding of noise level and class."""

    bottom: Tensor
    skips: tuple[Tensor, ...]
    embedding: Tensor

    def second_half(self) -> Features:
        """Of the batch: the conditional samples of a guided call."""
        half = len(self.bottom) // 2
        return Features(self.bottom[half:], tuple(s[half:] for s in self.skips), self.embedding[half:])


@dataclass
class EDMUNetOutput(UNet2DOutput):
    features: Features | None = None


class Recomputing:
    """Runs blocks, and with gradient checkpointing runs them again in backward instead of keeping what is inside them."""

    gradient_checkpointing = False
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))

    def run(self, block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, h, embedding)
        return block(h, embedding)


class Decoder(Recomputing, nn.Module):
    """The way up of a U-Net: Features -> (b, out_channels, s, s). `maps` is all but the last convolution, conv_out."""

    conv_out: nn.Conv2d
    norm_out: nn.GroupNorm
    patch_size = 1
    on_teacher_features = True

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def maps(self, features: Features) -> Tensor:
        """The activated maps that the last convolution reads."""
        raise NotImplementedError

    def forward(self, features: Features) -> Tensor:
        return self.unpatch(self.conv_out(self.maps(features)))

    @property
    def out_channels(self) -> int:
        return self.conv_out.out_channels // self.patch_size**2

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's own weights, whatever an adapter's."""
        return self.norm_out.weight.dtype

    def unpatch(self, out: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(out, self.patch_size)


class EncoderDecoder(Recomputing, ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]  # their attributes disagree
    """What the U-Nets of this package share; `encode` and `dec` are their halves."""

    dec: Decoder
    # blocks that compile_repeated_blocks compiles, and that stay whole on one device: names of classes
    _repeated_blocks: tuple[str, ...]  # type: ignore[assignment]  # diffusers has a list
    _no_split_modules: tuple[str, ...]  # type: ignore[assignment]  # diffusers has None

    def encode(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Features:
        """sample (b, in_channels, s, s), timestep (b,) -> what the decoder reads."""
        raise NotImplementedError

    @property
    def conv_out(self) -> nn.Conv2d:
        """The last convolution."""
        return self.dec.conv_out

    @property
    def out_channels(self) -> int:
        return self.dec.out_channels

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        return_dict: bool = True,
        return_features: bool = False,
    ) -> EDMUNetOutput | tuple:
        """With return_features the output's `features` are what the encoder made, for a second decoder. Weights may be of half
        precision; timestep should not be.
        """
        features = self.encode(sample.to(self.dec.dtype), timestep, class_labels, augment_labels)
        out = self.dec(features)
        if not return_dict:
            return (out, features) if return_features else (out,)
        return EDMUNetOutput(sample=out, features=features if return_features else None)


def channels_last(x: Tensor) -> Tensor:
    """What an encoder starts from, whatever the layout of the weights: a CPU's convolutions are faster so, by 1.5 for small
    networks, and images have the same bits as in training, where the weights lie so too.
    """
    return x.contiguous(memory_format=torch.channels_last)


def refuse_augment_labels(augment_labels: Tensor | None) -> None:
    """ValueError for labels of augmentations, of a network that is not told of them."""
    if augment_labels is not None:
        raise ValueError("augment_labels were given to a network without them (augment_dim=0)")


def second_decoder(decoder: Decoder, out_channels: int) -> Decoder:
    """A trainable copy of a decoder, with a last convolution of its own that starts at zero.

    On the encoder that the first one belongs to it has about half of the network's weights and of its cost, and starts from
    features that already serve to denoise.
    """
    second = copy.deepcopy(decoder).requires_grad_(True)
    second.conv_out = blank(decoder.conv_out, out_channels * decoder.patch_size**2)
    return second


def with_outputs(unet: Unet, out_channels: int) -> Unet:
    """A trainable copy of a whole network, with a last convolution of its own that starts at zero."""
    made = copy.deepcopy(unet).requires_grad_(True)
    made.dec = second_decoder(made.dec, out_channels)
    return made


def blank(conv: nn.Conv2d, out_channels: int) -> nn.Conv2d:
    """A convolution like `conv` with another number of outputs, all zero."""
    height, width = conv.kernel_size
    made = type(conv)(conv.in_channels, out_channels, (height, width), padding=conv.padding)  # type: ignore[arg-type]  # of any length
    made.to(conv.weight.device, conv.weight.dtype)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made
