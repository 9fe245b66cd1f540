"""A network of NVlabs' EDM code base -> the folder of an EDMPipeline. Needs numpy and safetensors alone, runs nothing of theirs.

Three containers hold the same tensors under the same names (snapshots.py): the pickles of EDM and of SiD (a persistent object
with all of its modules), and FastGen's .pth (torch.save's zip of a state dict). The architecture is read off the names and shapes
of the tensors (describe.py), and everything else that the file says is compared with it. A .pth may also hold a network of points
(convert_points.py).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ...common.atomic import new_folder
from ..layout import decoder_layers, encoder_layers, state_shapes
from .bounds import DAMAGE, SnapshotError, reason
from .convert_points import finite, is_point_network, point_network
from .describe import describe
from .describe_levels import choose_preconditioning, describe_scheduler
from .snapshots import Snapshot, open_snapshot
from .torch_pickles import Array

NETWORKS = {"EDMUNet": "pipelines.edm.unet", "PointNet": "pipelines.edm.point_net"}


@dataclass(frozen=True)
class Converted:
    """What a folder holds: the configurations of the network and of the scheduler, its size, what was left out, and what the file
    does not say and was taken for it.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    parameters: int
    left_out: tuple[str, ...]
    assumed: str | None = None


def convert(source: str | Path, output: str | Path, preconditioning: str | None = None) -> Converted:
    """Write the EDMPipeline in `source` to the folder `output`, whole or not at all.

    preconditioning (edm, vp, ve, iddpm): of a .pth, which holds tensors alone; None: edm, unless the tensors say otherwise.
    SnapshotError: the file is not such a snapshot (the global, opcode or offset is named). FileExistsError: output is there.
    """
    source, output = Path(source), Path(output)
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{str(output)!r} exists already; name another folder, or remove it")
    try:
        with np.errstate(all="ignore"):  # what overflows is found and said
            name, unet, scheduler, weights, left_out, assumed = read(source, preconditioning)
    except SnapshotError:
        raise
    except DAMAGE as error:
        raise SnapshotError(f"the file is damaged or holds another network ({reason(error)})") from error
    count = sum(math.prod(w.shape) for key, w in weights.items() if key != "map_noise.freqs")
    with new_folder(output) as partial:
        write(partial, name, unet, scheduler, weights)
    return Converted(unet, scheduler, count, left_out, assumed)


def read(source: Path, preconditioning: str | None) -> tuple[str, dict, dict, dict[str, np.ndarray], tuple[str, ...], str | None]:
    """(class of the network, its configuration, the scheduler's, weights, what is left out, what is assumed)."""
    snapshot = open_snapshot(source)
    if is_point_network(snapshot.tensors):
        if preconditioning is not None:
            raise SnapshotError(f"a network of points, which has no preconditioning {preconditioning!r}; leave it out")
        return "PointNet", *point_network(snapshot.tensors), (), None
    chosen, assumed = choose_preconditioning(snapshot, preconditioning)
    unet, left_out = describe(snapshot)
    tensors, scheduler = renamed(snapshot, unet), describe_scheduler(snapshot, unet, chosen)
    return "EDMUNet", unet, scheduler, arrays(unet, tensors), left_out, assumed


# Writing ----------------------------------------------------------------------------------------------------------------------


def renamed(snapshot: Snapshot, unet: dict[str, Any]) -> dict[str, Array]:
    """EDMUNet's names -> the file's tensors; SnapshotError for one too many, one missing or one of another shape."""
    found: dict[str, Array] = {}
    for name, tensor in snapshot.tensors.items():
        if name.endswith(".resample_filter") or name.startswith("logvar_linear.") or name == "u":
            continue
        new = re.sub(r"^(dec\.\d+x\d+_aux_|out_)(norm|conv)\.", r"dec.\2_out.", name)
        new = re.sub(r"^dec\.(\d+x\d+_)", r"dec.blocks.\1", new)
        if new in found:
            raise SnapshotError(f"tensor {name!r} is there twice, under another name too")
        found[new] = tensor
    expected = state_shapes(unet)
    for name in sorted(found.keys() | expected.keys()):
        shape = found[name].shape if name in found else "missing"
        if shape != expected.get(name):
            raise SnapshotError(f"tensor {name!r} is {shape}; expected {expected.get(name, 'no such tensor')}")
    return found


def arrays(unet: dict[str, Any], tensors: dict[str, Array]) -> dict[str, np.ndarray]:
    """EDMUNet's weights."""
    heads = {f"enc.{layer.name}": layer.heads for layer in encoder_layers(unet)}
    heads |= {f"dec.blocks.{layer.name}": layer.heads for layer in decoder_layers(unet)}
    weights = {}
    for name, tensor in tensors.items():
        value = finite(name, tensor)
        if ".qkv." in name:
            value = separated(value, heads[name.split(".qkv.")[0]])
        weights[name] = np.ascontiguousarray(value, np.float32 if value.dtype == np.float16 else value.dtype)
    return weights


def write(folder: Path, name: str, unet: dict[str, Any], scheduler: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """The three configurations and the weights of a network of class `name`, as EDMPipeline.save_pretrained lays them out."""
    (folder / "unet").mkdir()
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    index = {"unet": [NETWORKS[name], name], "scheduler": ["pipelines.edm.scheduler", "EDMScheduler"]}
    for file, content in (
        ("unet/config.json", {"_class_name": name} | unet),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMScheduler"} | scheduler),
        ("model_index.json", {"_class_name": "EDMPipeline"} | index),
    ):
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def separated(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows (head, channel, {q, k, v}) -> ({q, k, v}, head, channel), which attention reads without copying."""
    rows = value.reshape(heads, -1, 3, *value.shape[1:])
    return np.moveaxis(rows, 2, 0).reshape(value.shape)
