"""Which layers an EDMUNet has, in plain Python: the network is built from this, and a converted snapshot is checked against it.

Layers have the names that they have in the paper's released networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import UserError


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
            layers.append(Layer(f"{name}conv", "conv", c, width))
            c = width
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
    c = width * mults[-1]
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
    factor = 2 ** (len(config["channel_mult"]) - 1)
    if config["sample_size"] % factor:
        raise UserError(f"sample_size {config['sample_size']} must be a multiple of 2^(levels-1) = {factor}")
    if len(config["resample_filter"]) % 2:
        raise UserError(f"resample_filter {list(config['resample_filter'])} must have an even number of taps")
    if config["model_channels"] % 4:
        raise UserError(f"model_channels {config['model_channels']} must be a multiple of 4")
