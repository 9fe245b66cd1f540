"""VarDiU's networks of points, as the authors store them -> PointNet: names, one column less, and their settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .bounds import SnapshotError, listed
from .torch_pickles import Array

LINEAR = re.compile(r"net\.([0-9]+)\.(weight|bias)")
# the spread of the forty modes and the levels that the published network was trained on
SCHEDULER = {
    "preconditioning": "sample",  # it predicts x0 from x_t and sigma as they are
    "sigma_data": 23.08,
    "sigma_min": 0.1,
    "sigma_max": 20.0,
    "sampler": "heun",
    "num_inference_steps": 100,
}


def is_point_network(tensors: Mapping[str, Array]) -> bool:
    """Whether all names are those of linear layers in a sequence with activations between them."""
    return bool(tensors) and all(LINEAR.fullmatch(name) for name in tensors)


def point_network(tensors: Mapping[str, Array]) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """(PointNet's configuration, EDMScheduler's, weights). SnapshotError names a tensor that does not fit."""
    count = len(tensors) // 2
    expected = [f"net.{2 * i}.{kind}" for i in range(count) for kind in ("weight", "bias")]
    if sorted(tensors) != sorted(expected) or count < 3:
        raise SnapshotError(f"the file holds {listed(sorted(tensors))}; expected a weight and a bias of net.0, net.2, ...")
    for name in expected:
        if len(tensors[name].shape) != (2 if name.endswith("weight") else 1):
            raise SnapshotError(f"tensor {name!r} is {tensors[name].shape}; expected that of a linear layer")
    values = {name: finite(name, tensors[name]).astype(np.float32) for name in expected}
    width, d = values["net.0.weight"].shape[0], values[f"net.{2 * count - 2}.weight"].shape[0]
    for i in range(count):
        shape = (d if i == count - 1 else width, 2 * d if i == 0 else width)
        for kind, wanted in (("weight", shape), ("bias", shape[:1])):
            if values[f"net.{2 * i}.{kind}"].shape != wanted:
                raise SnapshotError(f"tensor 'net.{2 * i}.{kind}' is {values[f'net.{2 * i}.{kind}'].shape}; expected {wanted}")
    layers = count - 1
    first = layers - layers // 2
    places = [f"enc.{i}.linear" for i in range(first)] + [f"dec.layers.{i}.linear" for i in range(layers // 2)]
    weights = {
        f"{place}.{kind}": values[f"net.{2 * i}.{kind}"]
        for i, place in enumerate([*places, "dec.conv_out"])
        for kind in ("weight", "bias")
    }
    # sigma is repeated for each dimension: columns that see the same number are one column
    columns = weights["enc.0.linear.weight"]
    weights["enc.0.linear.weight"] = np.concatenate([columns[:, :d], columns[:, d:].sum(1, keepdims=True)], 1)
    weights["dec.conv_out.weight"] = weights["dec.conv_out.weight"][:, :, None, None]
    unet = {"in_channels": d, "out_channels": d, "width": width, "layers": layers, "sample_size": 1, "num_classes": 0}
    return unet, dict(SCHEDULER), weights


def finite(name: str, tensor: Array) -> np.ndarray:
    """The numbers of a tensor, none NaN or infinite."""
    if tensor.storage.dtype.kind != "f":
        raise SnapshotError(f"tensor {name!r} holds {tensor.storage.dtype}; expected floating point numbers")
    value = tensor.numpy()
    if not np.isfinite(value).all():
        raise SnapshotError(f"tensor {name!r} holds NaN or infinite values")
    if value.dtype.itemsize > 4 and np.abs(value).max() > np.finfo(np.float32).max:
        raise SnapshotError(f"tensor {name!r} holds numbers beyond float32")
    return value
