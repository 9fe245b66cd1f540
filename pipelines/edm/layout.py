"""Which layers an EDMUNet has, in plain Python: the network is built from this, and a converted snapshot is checked against it.

Layers have the names that they have in the paper's released networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..common.errors import UserError


@dataclass(frozen=True)
class Style:
    """What a block of an architecture is like. head_channels None: one head."""

    eps: float
    skip_scale: float
    adaptive_scale: bool  # the embedding scales and shifts the norm, instead of being added before it
    projects_resampled: bool  # a 1x1 convolution on the skip of an up- or downsampling block
    head_channels: int | None
    init_zero: float  # factor of the initial weights of the last layer of each branch
    init_attention: float

    def heads(self, channels: int) -> int:
        """ADM's have 64 channels, so that a narrower block has none."""
        return 1 if self.head_channels is None else channels // self.head_channels


STYLES = {
    "song": Style(1e-6, math.sqrt(0.5), False, True, None, 1e-5, math.sqrt(0.2)),
    "adm": Style(1e-5, 1.0, True, False, 64, 0.0, 1.0),
}

# EDMUNet's arguments by the names of the networks (Karras et al. 2022, Table 7; their CIFAR-10 and ImageNet-64 sizes).
CIFAR = {"model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4, "attention_resolutions": [16]}
RESIDUAL = {"encoder_type": "residual", "embedding_type": "fourier", "resample_filter": [1, 3, 3, 1], "channel_mult_noise": 2}
IMAGENET = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attention_resolutions": [32, 16, 8]}
# of each preconditioner (preconditioning.py): what it takes, as the networks of the papers have it
PRECONDITIONING = {
    "edm": {"sigma_data": 0.5},
    "vp": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "ve": {},
    "sample": {},
    "iddpm": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}
# least and most of each; float32 has no such noise levels, or no square of such a number, beyond
SETTINGS = {
    "sigma_data": (1e-6, 1e6),
    "beta_d": (1e-3, 150),
    "beta_min": (0, 50),
    "epsilon_t": (1e-9, 0.5),
    "C_1": (1e-6, 0.99),
    "C_2": (0, 10),
    "M": (2, 100_000),
}
ARCHITECTURES = {
    "ddpmpp": {"architecture": "song", **CIFAR},
    "ncsnpp": {"architecture": "song", **CIFAR, **RESIDUAL},
    "adm": {"architecture": "adm", **IMAGENET},
}


class Layer(NamedTuple):
    """kind: conv, block, or of the encoder's side path: aux_down, aux_skip, aux_residual. heads: of self-attention, 0: none."""

    name: str
    kind: str
    c_in: int
    c_out: int
    heads: int = 0
    resample: str | None = None  # "up", "down"


def encoder_layers(config: Mapping[str, Any]) -> list[Layer]:
    layers: list[Layer] = []
    style, width = STYLES[config["architecture"]], config["model_channels"]
    c = aux = config["in_channels"]
    for level, mult in enumerate(config["channel_mult"]):
        resolution = config["sample_size"] >> level
        name = f"{resolution}x{resolution}_"
        if level == 0:
            # "adm" starts at the width of its first level, "song" at model_channels
            layers.append(Layer(f"{name}conv", "conv", c, width * mult if config["architecture"] == "adm" else width))
            c = layers[0].c_out
        else:
            layers.append(Layer(f"{name}down", "block", c, c, resample="down"))
            if config["encoder_type"] == "skip":
                layers += [Layer(f"{name}aux_down", "aux_down", aux, aux), Layer(f"{name}aux_skip", "aux_skip", aux, c)]
            if config["encoder_type"] == "residual":
                layers.append(Layer(f"{name}aux_residual", "aux_residual", aux, c))
                aux = c
        for i in range(config["num_blocks"]):
            heads = style.heads(width * mult) if resolution in config["attention_resolutions"] else 0
            layers.append(Layer(f"{name}block{i}", "block", c, width * mult, heads))
            c = width * mult
    return layers


def decoder_layers(config: Mapping[str, Any]) -> list[Layer]:
    layers: list[Layer] = []
    style, width, mults = STYLES[config["architecture"]], config["model_channels"], config["channel_mult"]
    skips = [layer.c_out for layer in encoder_layers(config) if not layer.kind.startswith("aux")]
    c = skips[-1]  # model_channels * channel_mult[-1], if there are blocks on the way down
    for level, mult in reversed(list(enumerate(mults))):
        resolution = config["sample_size"] >> level
        name = f"{resolution}x{resolution}_"
        if level == len(mults) - 1:
            layers += [Layer(f"{name}in0", "block", c, c, style.heads(c)), Layer(f"{name}in1", "block", c, c)]
        else:
            layers.append(Layer(f"{name}up", "block", c, c, resample="up"))
        for i in range(config["num_blocks"] + 1):
            # "song" has attention in the last block of a level only
            attends = resolution in config["attention_resolutions"] and (
                i == config["num_blocks"] or config["architecture"] == "adm"
            )
            layers.append(
                Layer(f"{name}block{i}", "block", c + skips.pop(), width * mult, style.heads(width * mult) if attends else 0)
            )
            c = width * mult
    return layers


def groups(channels: int) -> int:
    """Of a group norm: at most 32, of at least 4 channels."""
    return min(32, channels // 4)


def has_projection(layer: Layer, style: Style) -> bool:
    """Whether a block's skip connection is a 1x1 convolution."""
    return layer.c_in != layer.c_out or (layer.resample is not None and style.projects_resampled)


def state_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of EDMUNet.state_dict() and its shape."""
    style, song = STYLES[config["architecture"]], config["architecture"] == "song"
    noise = config["model_channels"] * config["channel_mult_noise"]
    emb = config["model_channels"] * config["channel_mult_emb"]
    shapes: dict[str, tuple[int, ...]] = {}

    def affine(name: str, *weight: int) -> None:
        """weight and bias."""
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (weight[0],)

    if config["embedding_type"] == "fourier":
        shapes["map_noise.freqs"] = (noise // 2,)
    if config["augment_dim"]:
        shapes["map_augment.weight"] = (noise, config["augment_dim"])
    affine("map_layer0", emb, noise)
    affine("map_layer1", emb, emb)
    if config["num_classes"]:
        affine("map_label", noise if song else emb, config["num_classes"])
        if not song:
            del shapes["map_label.bias"]
    blocks = [("enc.", layer) for layer in encoder_layers(config)] + [("dec.blocks.", layer) for layer in decoder_layers(config)]
    for prefix, layer in blocks:
        name, c_in, c_out = prefix + layer.name, layer.c_in, layer.c_out
        if layer.kind in ("conv", "aux_residual"):
            affine(name, c_out, c_in, 3, 3)
        elif layer.kind == "aux_skip":
            affine(name, c_out, c_in, 1, 1)
        elif layer.kind == "block":
            affine(f"{name}.norm0", c_in)
            affine(f"{name}.conv0", c_out, c_in, 3, 3)
            affine(f"{name}.affine", c_out * (1 + style.adaptive_scale), emb)
            affine(f"{name}.norm1", c_out)
            affine(f"{name}.conv1", c_out, c_out, 3, 3)
            if has_projection(layer, style):
                affine(f"{name}.skip", c_out, c_in, 1, 1)
            if layer.heads:
                affine(f"{name}.norm2", c_out)
                affine(f"{name}.qkv", 3 * c_out, c_out, 1, 1)
                affine(f"{name}.proj", c_out, c_out, 1, 1)
    affine("dec.norm_out", blocks[-1][1].c_out)
    affine("dec.conv_out", config["out_channels"], blocks[-1][1].c_out, 3, 3)
    return shapes


def check_layout(config: Mapping[str, Any]) -> None:
    """ValueError for a configuration that no network has, naming the key."""
    for key, known in (
        ("architecture", tuple(STYLES)),
        ("embedding_type", ("positional", "fourier")),
        ("encoder_type", ("standard", "skip", "residual")),
    ):
        if config[key] not in known:
            raise UserError(f"{key} is {config[key]!r}; expected one of {', '.join(known)}")
    if config["architecture"] == "adm":
        only = {"embedding_type": "positional", "encoder_type": "standard", "resample_filter": [1, 1], "channel_mult_noise": 1}
        for key, value in only.items():
            given = list(config[key]) if isinstance(value, list) else config[key]
            if given != value:
                raise UserError(f"{key} is {given!r}; architecture 'adm' has {value!r}")
    check_sizes(config)
    check_widths(config)


def check_sizes(config: Mapping[str, Any]) -> None:
    """Up must undo down: with an even number of taps s -> s / 2 -> s, with an odd one s -> (s + 1) / 2 -> s."""
    size, taps, levels = config["sample_size"], list(config["resample_filter"]), len(config["channel_mult"])
    if not taps or not math.isfinite(sum(taps)) or abs(sum(taps)) < 1e-3 * max(map(abs, taps)):
        raise UserError(f"resample_filter {taps} must be numbers whose sum is not 0: it is divided by it")
    odd = len(taps) % 2
    for _ in range(levels - 1):
        if size % 2 != odd or size < 2:
            if odd:
                needed = f"must have an even number of taps: with an odd one no size but 2^k + 1 can be halved {levels - 1} times"
                raise UserError(f"resample_filter {taps} {needed}, and sample_size is {config['sample_size']}")
            factor = 2 ** (levels - 1)
            raise UserError(f"sample_size {config['sample_size']} must be a multiple of 2^(levels-1) = {factor}")
        size = (size + odd) // 2


def check_widths(config: Mapping[str, Any]) -> None:
    """Groups of norms and heads of attention must divide their channels; sines and cosines come in pairs."""
    width, style = config["model_channels"], STYLES[config["architecture"]]
    if width * config["channel_mult_noise"] % 2:
        raise UserError(f"model_channels {width} times channel_mult_noise {config['channel_mult_noise']} must be even")
    for layer in [*encoder_layers(config), *decoder_layers(config)]:
        if layer.kind != "block":
            continue
        for c in (layer.c_in, layer.c_out):
            if c < 4 or c % groups(c):
                four = "model_channels {} must be a multiple of 4" if width % 4 else "model_channels {}"
                cannot = f"a norm of {layer.name} has {c} channels, which cannot be in {max(1, groups(c))} groups of 4 or more"
                raise UserError(f"{four.format(width)}: with channel_mult {list(config['channel_mult'])}, {cannot}")
        if layer.heads and layer.c_out % layer.heads:
            raise UserError(
                f"model_channels {width}: {layer.c_out} channels of {layer.name} cannot be in {layer.heads} heads; "
                f"expected a multiple of {style.head_channels}"
            )


def check_preconditioning(name: str, settings: Mapping[str, Any]) -> None:
    """UserError for settings (PRECONDITIONING) with which nothing can be denoised, naming the key."""
    for key in PRECONDITIONING[name]:
        value, (least, most) = settings[key], SETTINGS[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:  # NaN too
            raise UserError(f"{key} is {value!r}; expected a number from {least:g} to {most:g}")
        if key == "M" and value != int(value):
            raise UserError(f"M is {value!r}; expected a whole number")
