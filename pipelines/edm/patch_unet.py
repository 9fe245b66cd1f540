"""A small convolutional U-Net for 8x8 to 32x32 images, sized to train on a CPU in minutes.

Stock UNet2DModel costs 1.7 times as much for the same widths; narrow 1x1 convolutions at the skip connections and, where it is
wanted, work on `patch_size` x `patch_size` blocks (space-to-depth) make the difference.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  # diffusers looks for it in the module of the class that it loads
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..common.errors import UserError
from .features import Decoder, EncoderDecoder, Features, channels_last, refuse_augment_labels


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """At most `groups` groups of at least 4 channels: a group of one would take the noise embedding out again."""
    most = max(1, min(groups, channels // 4))
    return nn.GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + embedding))), the last convolution starting at zero."""

    def __init__(self, in_channels: int, channels: int, embedding_channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.embed = nn.Linear(embedding_channels, channels)
        self.norm2 = group_norm(groups, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.embed(embedding)[:, :, None, None]
        skip = x if self.skip is None else self.skip(x)
        return skip + self.conv2(self.dropout(F.silu(self.norm2(h))))


class SelfAttention(nn.Module):
    """Residual single-head attention over the h w positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        for parameter in self.proj.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)  # (b, 1, h w, c)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out.squeeze(1).transpose(1, 2).reshape(b, c, h, w))


class PatchDecoder(Decoder):
    """The way up: 1x1 convolutions that take up a skip connection, blocks and upsampling, in order."""

    def __init__(self, up: list[nn.Module], width: int, out_channels: int, patch_size: int, groups: int) -> None:
        super().__init__()
        self.up, self.patch_size = nn.ModuleList(up), patch_size
        self.norm_out = group_norm(groups, width)
        self.conv_out = nn.Conv2d(width, out_channels * patch_size**2, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def maps(self, features: Features) -> Tensor:
        h, skips = features.bottom, list(features.skips)
        for layer in self.up:
            if isinstance(layer, ResidualBlock | SelfAttention):
                h = self.run(layer, h, features.embedding)
            else:  # a LoRA adapter may sit around the convolution
                h = layer(h) if isinstance(layer, nn.Upsample) else layer(torch.cat([h, skips.pop()], dim=1))
        return F.silu(self.norm_out(h))


class PatchUNet(EncoderDecoder):
    """F(x, c_noise, class_labels): the raw network inside EDM preconditioning.

    x (b, in_channels, s, s) with s a multiple of patch_size 2^(levels-1); timestep (b,) is c_noise = ln(sigma)/4;
    class_labels (b,) in [0, num_classes], where num_classes is the null label (also used when they are None).
    Output: (b, out_channels, s, s). The last convolution starts at zero, so an untrained network gives 0.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("ResidualBlock", "SelfAttention")  # what compile_repeated_blocks compiles
    _no_split_modules = ("ResidualBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: int = 64,
        channel_mult: tuple[int, ...] = (1,),
        num_blocks: int = 2,
        attention_levels: tuple[int, ...] = (),
        patch_size: int = 1,
        num_classes: int = 0,
        dropout: float = 0.0,
        norm_groups: int = 8,
    ) -> None:
        super().__init__()
        factor = patch_size * 2 ** (len(channel_mult) - 1)
        if sample_size % factor:
            raise UserError(f"sample_size {sample_size} must be a multiple of patch_size 2^(levels-1) = {factor}")
        emb = 2 * channels
        self.embed_noise = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.embed_class = nn.Embedding(num_classes + 1, emb) if num_classes else None
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)

        widths = [channels * m for m in channel_mult]
        c, skips = channels, [channels]
        self.down, up = nn.ModuleList(), list[nn.Module]()
        self.bottom = nn.Identity()  # where FeatureMaps listens: a hook on a compiled block would not be heard
        for level, width in enumerate(widths):
            if level:  # halve the resolution: average pooling, then the next block widens
                self.down.append(nn.AvgPool2d(2))
                skips.append(c)
            for _ in range(num_blocks):
                self.down.append(ResidualBlock(c, width, emb, dropout, norm_groups))
                if level in attention_levels:
                    self.down.append(SelfAttention(width, norm_groups))
                c = width
                skips.append(c)
        for level in reversed(range(len(widths))):
            for i in range(num_blocks + 1):
                up.append(nn.Conv2d(c + skips.pop(), widths[level], 1))  # take up one skip connection
                c = widths[level]
                if i < num_blocks:
                    up.append(ResidualBlock(c, c, emb, dropout, norm_groups))
                    if level in attention_levels:
                        up.append(SelfAttention(c, norm_groups))
            if level:
                up.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.dec = PatchDecoder(up, c, out_channels, patch_size, norm_groups)

    def encode(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Features:
        refuse_augment_labels(augment_labels)
        embedding = self.embed_noise(fourier_features(timestep, self.config["channels"]).to(sample.dtype))
        if self.embed_class is not None:
            if class_labels is None:
                class_labels = timestep.new_full((len(sample),), self.config["num_classes"], dtype=torch.long)
            embedding = embedding + self.embed_class(class_labels)
        elif class_labels is not None:
            raise ValueError("class_labels were given to an unconditional network (num_classes=0)")
        embedding = F.silu(embedding)
        h = self.conv_in(channels_last(F.pixel_unshuffle(sample, self.config["patch_size"])))
        skips = [h]
        for layer in self.down:
            block = isinstance(layer, ResidualBlock | SelfAttention)
            h = self.run(layer, h, embedding) if block else layer(h)
            if isinstance(layer, SelfAttention):
                skips[-1] = h
            else:
                skips.append(h)
        return Features(self.bottom(h), tuple(skips), embedding)


def fourier_features(time: Tensor, dim: int) -> Tensor:
    """cos and sin of time (b,) at dim/2 frequencies from 1/8 to 8 cycles a unit -> (b, dim).

    c_noise = ln(sigma)/4 moves by about 2.7 over the whole range of noise, hence the low frequencies.
    """
    frequencies = 2 * math.pi * torch.logspace(-3, 3, dim // 2, base=2, device=time.device, dtype=time.dtype)
    angle = time[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)
