"""What network a snapshot is: read off the names and shapes of its tensors, and compared with all that the file says."""

from __future__ import annotations

import re
from functools import reduce
from math import gcd, isclose
from typing import Any

import numpy as np

from ...common.errors import UserError
from ..layout import STYLES, check_layout, decoder_layers, encoder_layers, groups
from .bounds import RESOLUTION, SnapshotError, is_number, shown
from .snapshots import MODELS, Snapshot

LEVEL = re.compile(r"(?:enc|dec)\.([0-9]{1,6})x\1_")
TAPS = 64  # of a filter, at most


def describe(snapshot: Snapshot) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(EDMUNet's configuration, what of the file is left out). SnapshotError where the file contradicts itself."""
    tensors = snapshot.tensors
    if any("aux_up" in name for name in (*tensors, *snapshot.objects)):
        raise SnapshotError(
            "decoder_type 'skip' is not supported: its output is a sum over all levels, without the last layer that posteriors "
            "and second decoders read; no published network has it"
        )

    def shape(name: str, dimensions: int = 4) -> tuple[int, ...]:
        if name not in tensors:
            raise SnapshotError(f"the file has no tensor {name!r}, which every such network has")
        if len(tensors[name].shape) != dimensions:
            raise SnapshotError(f"tensor {name!r} is {tensors[name].shape}; expected {dimensions} dimensions")
        return tensors[name].shape

    def columns(name: str) -> int:
        return shape(name, 2)[1] if name in tensors else 0

    sizes = resolutions(snapshot)
    size = sizes[0]
    architecture = "adm" if "out_norm.weight" in tensors else "song"
    first, in_channels = shape(f"enc.{size}x{size}_conv.weight")[:2]
    emb, noise = shape("map_layer0.weight", 2)
    width = noise if architecture == "adm" else first  # "adm": the first convolution is as wide as its level
    blocks = 0
    while f"dec.{size}x{size}_block{blocks + 1}.conv0.weight" in tensors:
        blocks += 1
    if blocks * len(sizes) > len(tensors):
        raise SnapshotError(f"{len(tensors):,} tensors are too few for {len(sizes)} levels of {blocks:,} blocks")
    last = "out_conv.weight" if architecture == "adm" else f"dec.{size}x{size}_aux_conv.weight"
    # the last block of a level, on its way up, is there in every network, and has attention if any has
    ends = {s: f"dec.{s}x{s}_block{blocks}" for s in sizes}
    unet = {
        "sample_size": size,
        "in_channels": in_channels,
        "out_channels": shape(last)[0],
        "num_classes": columns("map_label.weight"),
        "augment_dim": columns("map_augment.weight"),
        "architecture": architecture,
        "model_channels": width,
        "channel_mult": [shape(f"{ends[s]}.conv0.weight")[0] // width for s in sizes],
        "channel_mult_emb": emb // width,
        "channel_mult_noise": noise // width,
        "num_blocks": blocks,
        "attention_resolutions": [s for s in sizes if f"{ends[s]}.qkv.weight" in tensors],
        "dropout": 0.0,
        "embedding_type": "fourier" if "map_noise.freqs" in tensors else "positional",
        "encoder_type": next((t for t in ("skip", "residual") if any(f"aux_{t}" in n for n in tensors)), "standard"),
        "resample_filter": filter_taps(snapshot),
    }
    try:
        check_layout(unet)
    except UserError as error:
        raise SnapshotError(f"the tensors are those of no EDM network: {error}") from error
    left_out = []
    if snapshot.model is not None:
        unet["dropout"] = compare(snapshot, unet)
        rate = snapshot.model.state.get("label_dropout", 0)
        if not is_number(rate) or not 0 <= rate <= 1:
            raise SnapshotError(f"label_dropout is {shown(rate)}; expected a number between 0 and 1")
        if rate:
            left_out.append(f"label_dropout {rate} (of training only)")
    if any(name.startswith("logvar_linear.") for name in tensors):
        left_out.append("logvar_linear (FastGen's uncertainty, of training only)")
    return unet, tuple(left_out)


def resolutions(snapshot: Snapshot) -> list[int]:
    """Of the levels, from the names: each half of the one before, rounded down."""
    found = sorted({int(m[1]) for name in snapshot.tensors if (m := LEVEL.match(name))}, reverse=True)
    if not found:
        raise SnapshotError("no tensor is named after a resolution, as enc.32x32_conv.weight; this is no EDM network")
    if found[0] > RESOLUTION:
        raise SnapshotError(f"a network of {found[0]}x{found[0]} pixels, by its tensors' names; expected {RESOLUTION} at most")
    if found != [found[0] >> level for level in range(len(found))] or found[-1] < 1:
        raise SnapshotError(f"resolutions {', '.join(map(str, found[:12]))}; in an EDM network each is half of the one before")
    return found


def filter_taps(snapshot: Snapshot) -> list[float]:
    """The taps whose outer product, divided by the square of their sum, all stored filters are; small integers, if so."""
    first: np.ndarray | None = None
    for name, tensor in snapshot.tensors.items():
        if not name.endswith(".resample_filter"):
            continue
        shape = tensor.shape
        if len(shape) != 4 or shape[:2] != (1, 1) or shape[2] != shape[3] or shape[2] > TAPS or tensor.storage.dtype.kind != "f":
            raise SnapshotError(f"{name} is {tensor.storage.dtype}, {shape}; expected numbers, (1, 1, n, n) with n up to {TAPS}")
        kernel = tensor.numpy()[0, 0].astype(np.float64)
        row = kernel.sum(1)  # the taps over their sum
        if not np.isfinite(kernel).all() or np.abs(kernel - np.outer(row, row)).max() > 1e-6 * max(1, np.abs(kernel).max()):
            raise SnapshotError(f"{name} is not a separable filter")
        if first is None:
            first, taps = kernel, row
        if first.shape != kernel.shape or not np.array_equal(first, kernel):
            raise SnapshotError(f"{name} differs from the other filters")
    return [1, 1] if first is None else small_integers(taps)


def small_integers(taps: np.ndarray) -> list[float]:
    """The smallest that are in these proportions, to float32; the taps themselves where none below 64 times the least are."""
    least = np.abs(taps[np.abs(taps) > 1e-6]).min()
    for factor in range(1, 65):
        scaled = taps / least * factor
        whole = np.rint(scaled).astype(int)
        if np.abs(scaled - whole).max() < 1e-5 * max(factor, np.abs(whole).max()):
            return (whole // reduce(gcd, whole.tolist())).tolist()
    return taps.tolist()


def compare(snapshot: Snapshot, unet: dict[str, Any]) -> float:
    """Everything that the objects say of themselves must be what EDMUNet does with these tensors; gives the dropout."""
    style = STYLES[unet["architecture"]]

    def same(name: str, state: dict[str, Any], key: str, expected: Any) -> None:
        stored_value = state.get(key, expected)
        close = is_number(stored_value) and is_number(expected) and isclose(stored_value, expected, rel_tol=1e-7)
        if stored_value != expected and not close:
            raise SnapshotError(f"{name}{key} is {shown(stored_value)}, where such a network has {expected!r}")

    network, model = snapshot.network, snapshot.model
    if network is None or model is None:
        raise SnapshotError("the file has tensors without the objects that they belong to")
    if MODELS[model.class_name] != unet["architecture"]:
        raise SnapshotError(f"a {model.class_name} with the tensors of architecture {unet['architecture']!r}")
    given = network.state.get("_init_kwargs") or {}
    if type(given) is not dict:
        raise SnapshotError(f"init_kwargs is {shown(given)}; expected a dictionary")
    if network.state.get("_init_args"):
        raise SnapshotError("the network was made with positional arguments, which NVlabs' training never does")
    for theirs, ours in (
        ("img_resolution", "sample_size"),
        ("img_channels", "in_channels"),
        ("label_dim", "num_classes"),
        ("augment_dim", "augment_dim"),
        ("model_channels", "model_channels"),
        ("channel_mult", "channel_mult"),
        ("channel_mult_emb", "channel_mult_emb"),
        ("channel_mult_noise", "channel_mult_noise"),
        ("num_blocks", "num_blocks"),
        ("embedding_type", "embedding_type"),
    ):
        same("init_kwargs.", given, theirs, unet[ours])
    if len(unet["channel_mult"]) > 1:  # a single level has nothing to resample, and no side path
        same("init_kwargs.", given, "encoder_type", unet["encoder_type"])
        same_filter(given.get("resample_filter", unet["resample_filter"]), unet["resample_filter"])
    dropouts: list[float] = []
    layers = [("enc.", layer) for layer in encoder_layers(unet)] + [("dec.", layer) for layer in decoder_layers(unet)]
    for prefix, layer in layers:
        name = f"{prefix}{layer.name}."
        if layer.kind != "block" or name not in snapshot.objects:
            continue  # a missing one is missed with its tensors
        block = snapshot.objects[name].state
        same(name, block, "num_heads", layer.heads)
        same(name, block, "skip_scale", style.skip_scale)
        same(name, block, "adaptive_scale", style.adaptive_scale)
        rate = block.get("dropout", 0)
        if not is_number(rate) or not 0 <= rate <= 1 or rate != (dropouts or [rate])[0]:
            raise SnapshotError(f"blocks with dropout {shown(rate)}; expected one rate for all, between 0 and 1")
        dropouts = [rate]
    for name, module in snapshot.objects.items():
        if module.class_name == "GroupNorm":
            weight = snapshot.tensors.get(f"{name}weight")
            same(name, module.state, "eps", 1e-6 if name.endswith("aux_norm.") else style.eps)
            if weight is not None and weight.shape:
                same(name, module.state, "num_groups", groups(weight.shape[0]))
        if module.class_name == "PositionalEmbedding":
            same(name, module.state, "endpoint", unet["architecture"] == "song")
            same(name, module.state, "max_positions", 10000)
    return float((dropouts or [0])[0])


def same_filter(given: Any, taps: list[float]) -> None:
    """The filter that the network was made with, at any scale, must be the one that is stored."""
    fits = type(given) in (list, tuple) and len(given) == len(taps) and all(map(is_number, given)) and sum(given) != 0
    if not fits or any(abs(g / sum(given) - t / sum(taps)) > 1e-6 for g, t in zip(given, taps, strict=True)):
        stored_value = [*map(shown, given)] if type(given) in (list, tuple) and len(given) <= TAPS else shown(given)
        raise SnapshotError(f"init_kwargs.resample_filter is {stored_value}, where the stored filters have {taps}")
