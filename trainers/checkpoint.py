"""Checkpoints: safetensors and JSON only, written whole or not at all, checked before they are believed.

    checkpoints/step_00000400/{networks,ema,optimizers}.safetensors, state.json, manifest.json (size and sha256 of each)

The number is that of completed steps. A folder appears under its final name by one rename, after everything in it is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.errors import UserError

from .ema import trained_parameters

PREFIX = "step_"


class CheckpointError(UserError):
    """A checkpoint that cannot be used, and what to do about it."""


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write folder/step_<step> atomically, then remove all others but the newest keep - 1.

    tensors: one safetensors file for each key. A checkpoint of the same step is replaced.
    """
    final = folder / f"{PREFIX}{step:08d}"
    partial = folder / f".partial_{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, group in tensors.items():
        save_file({k: v.detach().contiguous().cpu() for k, v in group.items()}, partial / f"{name}.safetensors")
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    manifest = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in partial.iterdir():
        _fsync(file)
    replaced = folder / f".replaced_{final.name}"
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
    _fsync(folder)
    others = [c for c in list_checkpoints(folder) if c != final]  # resumed from an older one, this may not be the highest number
    for old in others[: max(0, len(others) - (keep - 1))]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; what a killed save left behind is not among them."""
    return sorted(f for f in folder.glob(f"{PREFIX}*") if f.is_dir())


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors, state) as given to `save`. CheckpointError names the file that is missing, truncated or altered."""
    remedy = f"Remove {str(path)!r} to resume from the checkpoint before it, or give resume=<another checkpoint>."
    if not (path / "manifest.json").is_file():
        raise CheckpointError(f"{str(path)!r} is not a checkpoint: it has no manifest.json. {remedy}")
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{path / 'manifest.json'} is damaged: {error}. {remedy}") from error
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint file {str(file)!r} is missing. {remedy}")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"checkpoint file {str(file)!r} has {size} bytes, not {expected['bytes']}. {remedy}")
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"checkpoint file {str(file)!r} was altered: its sha256 has changed. {remedy}")
    tensors = {n.removesuffix(".safetensors"): load_file(path / n) for n in manifest if n.endswith(".safetensors")}
    return tensors, json.loads((path / "state.json").read_text())


# What goes in: networks and optimisers as flat, named tensors ---------------------------------------------------------


def network_tensors(networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    """'<role>/<parameter>' -> tensor, of the trained parameters only."""
    return {f"{role}/{n}": p for role, net in networks.items() for n, p in trained_parameters(net).items()}


@torch.no_grad()
def restore_tensors(into: dict[str, Tensor], saved: dict[str, Tensor], source: str) -> None:
    """Copy `saved` into the tensors of the same name; every name and shape must match."""
    missing, unexpected = sorted(into.keys() - saved.keys()), sorted(saved.keys() - into.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{source} was written by another configuration: missing {missing[:3]}, unexpected {unexpected[:3]}. "
            "Resume with the configuration of that run, or start a new output_dir."
        )
    for name, tensor in into.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(saved[name].shape)}, this configuration makes {tuple(tensor.shape)}. "
                "Resume with the network of that run, or start a new output_dir."
            )
        tensor.copy_(saved[name])


def optimizer_tensors(optimizers: dict[str, Optimizer], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    """'<role>/<parameter>/<moment>' -> tensor, of every parameter that has been stepped."""
    return {
        # bitsandbytes' code books are one tensor for all parameters, which a file cannot hold
        f"{role}/{name}/{moment}": value.clone() if moment.startswith("qmap") else torch.as_tensor(value)
        for role, optimizer in optimizers.items()
        for name, parameter in trained_parameters(networks[role]).items()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizers(
    optimizers: dict[str, Optimizer], networks: dict[str, nn.Module], saved: dict[str, Tensor], source: str
) -> None:
    parameters = {f"{role}/{n}": (role, p) for role in optimizers for n, p in trained_parameters(networks[role]).items()}
    for key, value in saved.items():
        name, moment = key.rsplit("/", 1)
        if name not in parameters:
            raise CheckpointError(f"{source}: the optimiser state of {name!r} fits no parameter of this configuration")
        role, parameter = parameters[name]
        # The file holds contiguous tensors; a moment must have its parameter's strides (channels_last), since fused kernels walk
        # both in memory order.
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        # bitsandbytes counts steps in an int, which the file holds as int64; torch's count is float32
        whole = value.dtype == torch.int64
        optimizers[role].state[parameter][moment] = int(value) if whole else value.to(parameter.device)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
