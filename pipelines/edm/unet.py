"""EDMUNet: the DDPM++, NCSN++ and ADM networks in the form that Karras et al. 2022 trained them (their Table 7).

DDPM++ and NCSN++ (architecture "song") are one design: blocks scaled by sqrt(1/2), one attention head, class and augmentation
labels added before the embedding's two layers. NCSN++ feeds the downsampled input into every level of the encoder
(encoder_type "residual"), filters with [1, 3, 3, 1], and embeds the noise level by random Fourier features. ADM ("adm",
Dhariwal & Nichol 2021) scales and shifts each block's norm, has heads of 64 channels, and adds the class after both layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  # diffusers looks for it in the module of the class that it loads
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .features import Decoder, EncoderDecoder, Features, channels_last, refuse_augment_labels
from .layout import STYLES, Layer, Style, check_layout, decoder_layers, encoder_layers, groups, has_projection


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """With the groups that NVlabs' networks have (layout.groups)."""
    return nn.GroupNorm(groups(channels), channels, eps)


class Resample(nn.Module):
    """Doubles or halves the resolution with a separable filter (layout.check_sizes); padding: of zeros, None for what fits."""

    kernel: Tensor  # (k, k)

    def __init__(self, taps: tuple[float, ...], up: bool, padding: int | None = None) -> None:
        super().__init__()
        self.up, self.box = up, tuple(taps) == (1, 1)
        self.padding = (len(taps) - 1) // 2 if padding is None else padding
        kernel = torch.tensor(taps, dtype=torch.float32)
        kernel = kernel.outer(kernel) / kernel.sum().square()
        self.register_buffer("kernel", kernel * 4 if up else kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.box:  # the same numbers, without a depthwise convolution
            return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        c = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(c, 1, -1, -1)
        convolve = F.conv_transpose2d if self.up else F.conv2d
        return convolve(x, kernel, stride=2, padding=self.padding, groups=c)


class UNetBlock(nn.Module):
    """norm, silu, [resample,] conv0; + embedding; norm, silu, dropout, conv1; + skip; [self-attention]."""

    def __init__(
        self, layer: Layer, style: Style, embedding_channels: int, dropout: float, resample_filter: tuple[float, ...]
    ) -> None:
        super().__init__()
        c, self.in_channels, self.out_channels, self.style = layer.c_out, layer.c_in, layer.c_out, style
        self.norm0 = group_norm(layer.c_in, style.eps)
        self.resample = Resample(resample_filter, up=layer.resample == "up") if layer.resample else None
        self.conv0 = nn.Conv2d(layer.c_in, c, 3, padding=1)
        self.affine = nn.Linear(embedding_channels, c * (2 if style.adaptive_scale else 1))
        self.norm1 = group_norm(c, style.eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(c, c, 3, padding=1)
        self.skip = nn.Conv2d(layer.c_in, c, 1) if has_projection(layer, style) else None
        self.heads = layer.heads
        if self.heads:
            self.norm2 = group_norm(c, style.eps)
            self.qkv = nn.Conv2d(c, 3 * c, 1)
            self.proj = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv0(h)
        shift = self.affine(embedding)[:, :, None, None]
        if self.style.adaptive_scale:
            scale, shift = shift.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + shift))
        h = self.conv1(self.dropout(h))
        h = (h + (x if self.skip is None else self.skip(x))) * self.style.skip_scale
        return self.attend(h) if self.heads else h

    def attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        qkv = self.qkv(self.norm2(x)).flatten(2).transpose(1, 2)  # (b, h w, 3 c): q of all heads, then k, then v
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = out.transpose(1, 2).unflatten(2, (height, width))
        return (self.proj(out) + x) * self.style.skip_scale


def side_layer(layer: Layer, resample_filter: tuple[float, ...]) -> nn.Module:
    """Of an encoder: what is no block."""
    if layer.kind == "aux_down":
        return Resample(resample_filter, up=False)
    if layer.kind == "aux_skip":
        return nn.Conv2d(layer.c_in, layer.c_out, 1)
    # aux_residual is convolved first, on a border wide enough for the filter that follows it (EDMUNet.fused)
    border = (len(resample_filter) - 1) // 2 if layer.kind == "aux_residual" else 0
    return nn.Conv2d(layer.c_in, layer.c_out, 3, padding=1 + border)


class PositionalEmbedding(nn.Module):
    """cos and sin of time (b,) at frequencies from 1 down to 1e-4 -> (b, channels); endpoint: 1e-4 itself is one of them."""

    def __init__(self, channels: int, endpoint: bool, sine_first: bool) -> None:
        super().__init__()
        self.pairs, self.endpoint, self.sine_first = channels // 2, endpoint, sine_first

    def forward(self, time: Tensor) -> Tensor:
        # Always from float32: times reach 999, where frequencies that are exact to 1e-16 would be other numbers than those that
        # the networks were trained with.
        exponents = torch.arange(self.pairs, dtype=torch.float32, device=time.device) / (self.pairs - self.endpoint)
        return waves(time, (1 / 10000) ** exponents, self.sine_first)


class FourierEmbedding(nn.Module):
    """cos and sin of time (b,) at random frequencies, drawn once -> (b, channels)."""

    freqs: Tensor  # (channels / 2,)

    def __init__(self, channels: int, sine_first: bool, scale: float = 16.0) -> None:
        super().__init__()
        self.sine_first = sine_first
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, time: Tensor) -> Tensor:
        return waves(time, 2 * math.pi * self.freqs, self.sine_first)


def waves(time: Tensor, frequencies: Tensor, sine_first: bool) -> Tensor:
    angle = time[:, None] * frequencies.to(time.dtype)
    parts = (angle.sin(), angle.cos()) if sine_first else (angle.cos(), angle.sin())
    return torch.cat(parts, dim=1)


class EDMUNetDecoder(Decoder):
    """The decoder's blocks by name in `blocks`; a block takes up a skip connection where it has the channels for one."""

    def __init__(self, blocks: dict[str, UNetBlock], out_channels: int, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)
        width = list(blocks.values())[-1].out_channels
        self.norm_out = group_norm(width, eps)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def maps(self, features: Features) -> Tensor:
        h, skips = features.bottom, list(features.skips)
        for block in self.blocks.values():
            if h.shape[1] != block.in_channels:
                h = torch.cat([h, skips.pop()], dim=1)
            h = self.run(block, h, features.embedding)
        return F.silu(self.norm_out(h))


class EDMUNet(EncoderDecoder):
    """F(x, c_noise, class_labels, augment_labels): the raw network inside a preconditioner (preconditioning.py).

    x (b, in_channels, s, s), s = sample_size or another that can be halved as often; timestep (b,) is c_noise; class_labels
    either (b,) integers in [0, num_classes], where num_classes is the null label (also used when they are None), or
    (b, num_classes) floats; augment_labels (b, augment_dim), zero when None. Output (b, out_channels, s, s).

    model_channels and the lists mean what they do in the EDM paper: level i has model_channels * channel_mult[i] channels and
    resolution sample_size / 2^i, with self-attention where that is one of attention_resolutions.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("UNetBlock",)  # what compile_repeated_blocks compiles
    _no_split_modules = ("UNetBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        num_classes: int = 0,
        augment_dim: int = 0,
        architecture: str = "song",
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        channel_mult_emb: int = 4,
        channel_mult_noise: int = 1,
        num_blocks: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.0,
        embedding_type: str = "positional",
        encoder_type: str = "standard",
        resample_filter: tuple[float, ...] = (1, 1),
    ) -> None:
        super().__init__()
        check_layout(self.config)
        style, song = STYLES[architecture], architecture == "song"
        self.style = style
        noise, emb = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.map_noise = (
            PositionalEmbedding(noise, endpoint=song, sine_first=song)
            if embedding_type == "positional"
            else FourierEmbedding(noise, sine_first=song)
        )
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)
        self.map_label = nn.Linear(num_classes, noise if song else emb, bias=song) if num_classes else None

        def block(layer: Layer) -> UNetBlock:
            return UNetBlock(layer, style, emb, dropout, resample_filter)

        self.enc = nn.ModuleDict()
        for layer in encoder_layers(self.config):
            self.enc[layer.name] = block(layer) if layer.kind == "block" else side_layer(layer, resample_filter)
        self.fused = Resample(resample_filter, up=False, padding=0) if encoder_type == "residual" else nn.Identity()
        self.bottom = nn.Identity()  # where FeatureMaps listens: a hook on a compiled block would not be heard
        self.dec = EDMUNetDecoder({d.name: block(d) for d in decoder_layers(self.config)}, out_channels, style.eps)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Song: Glorot-uniform weights, zero biases; ADM: PyTorch's own, class embeddings N(0, 1). Branches end near zero."""
        song = self.config["architecture"] == "song"
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            if song:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
            last = name.split(".")[-1]
            zero = last in ("conv1", "proj", "conv_out") or (last == "map_augment" and not song)
            factor = self.style.init_zero if zero else self.style.init_attention if last == "qkv" else 1.0
            for parameter in module.parameters():
                parameter.mul_(factor)
            if name == "map_label" and not song:
                nn.init.normal_(module.weight)

    def encode(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Features:
        embedding = self.embed(sample, timestep, class_labels, augment_labels)
        h = aux = channels_last(sample)
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                h = skips[-1] = h + layer(aux)
            elif name.endswith("aux_residual"):
                h = skips[-1] = aux = (h + self.fused(layer(aux))) * math.sqrt(0.5)
            else:
                h = self.run(layer, h, embedding) if isinstance(layer, UNetBlock) else layer(h)
                skips.append(h)
        return Features(self.bottom(h), tuple(skips), embedding)

    def embed(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """(b, model_channels channel_mult_emb), activated."""
        dtype = sample.dtype
        time = timestep.to(torch.promote_types(timestep.dtype, torch.float32))
        emb = self.map_noise(time).to(dtype)
        label = self.class_vector(class_labels, len(sample), sample)
        song = self.config["architecture"] == "song"
        if label is not None and self.map_label is not None and song:
            emb = emb + self.map_label(label * math.sqrt(self.config["num_classes"]))
        if self.map_augment is None:
            refuse_augment_labels(augment_labels)
        elif augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if label is not None and self.map_label is not None and not song:
            emb = emb + self.map_label(label)
        return F.silu(emb)

    def class_vector(self, class_labels: Tensor | None, b: int, like: Tensor) -> Tensor | None:
        """(b, num_classes): one-hot, all zero for the null label; None for an unconditional network."""
        n = self.config["num_classes"]
        if not n:
            if class_labels is not None:
                raise ValueError("class_labels were given to an unconditional network (num_classes=0)")
            return None
        if class_labels is None:
            return like.new_zeros(b, n)
        if class_labels.is_floating_point():
            if class_labels.shape != (b, n):
                raise ValueError(f"class_labels have shape {tuple(class_labels.shape)}; expected ({b}, {n}), or ({b},) integers")
            return class_labels.to(like.dtype)
        return F.one_hot(class_labels, n + 1)[:, :n].to(like.dtype)
