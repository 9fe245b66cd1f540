"""Checkpoints: safetensors and JSON only, written whole or not at all, checked before they are believed.

    checkpoints/step_00000400/{networks,ema,optimizers}.safetensors
                              state.json, config.json (of the run that wrote it)
                              metrics.jsonl, timings.jsonl, pictures.jsonl (until then)
                              manifest.json (size and sha256 of each)

The number is that of completed steps. A folder appears under its final name by one rename, after everything in it is on disk.
Only folders of such a name that a run has written are resumed as `latest` or removed; a copy under another name is the user's.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.common import atomic
from pipelines.common.errors import UserError

from .ema import trained_parameters

PREFIX = "step_"


class CheckpointError(UserError):
    """A checkpoint that cannot be used, and what to do about it."""


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    config: dict[str, Any],
    logs: Sequence[Path],
    keep: int,
) -> Path:
    """Write folder/step_<step> atomically, then remove all others but the newest keep - 1.

    tensors: one safetensors file for each key; logs: files that are copied. A checkpoint of the same step is replaced.
    WriteError, with all other checkpoints as they were, if it cannot be written.
    """
    final = folder / f"{PREFIX}{step:08d}"
    with atomic.new_folder(final) as partial:
        for name, group in tensors.items():
            save_file({k: v.detach().contiguous().cpu() for k, v in group.items()}, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        for log in (file for file in logs if file.is_file()):
            shutil.copyfile(log, partial / log.name)
        manifest = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    others = [c for c in list_checkpoints(folder) if c != final and _is_whole(c)]
    for old in others[: max(0, len(others) - (keep - 1))]:
        shutil.rmtree(old)
    return final


def number_of(name: str) -> int | None:
    """The step in a name as `save` makes them; None for any other, such as step_00000400_good."""
    found = re.fullmatch(rf"{PREFIX}(\d{{8,}})", name)
    return int(found[1]) if found and name == f"{PREFIX}{int(found[1]):08d}" else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders with a checkpoint's name, oldest first; neither copies under other names nor links, which are the user's."""
    numbered = ((number_of(f.name), f) for f in folder.glob(f"{PREFIX}*") if f.is_dir() and not f.is_symlink())
    return [f for _, f in sorted((n, f) for n, f in numbered if n is not None)]


def named(path: str, key: str) -> Path:
    """The checkpoint folder that a user's `key` names. UserError says what the path is instead."""
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{key}: {path!r} is a file; give the checkpoint's folder")
    if not folder.is_dir():
        raise UserError(f"{key}: no such checkpoint folder {path!r}; give 'latest', 'no' or a folder")
    if not (folder / "manifest.json").exists():
        for parent in (folder / "checkpoints", folder):
            if found := [c for c in list_checkpoints(parent) if (c / "manifest.json").exists()]:
                kind = "a run's folder" if parent != folder else "a folder of checkpoints"
                raise UserError(
                    f"{key}: {path!r} is {kind}, not a checkpoint; give {key}={found[-1]}, the newest there, or output_dir=<the "
                    f"run> {key}=latest"
                )
        if any((folder / f"{kind}.json").exists() for kind in ("student", "teacher")):
            raise UserError(
                f"{key}: {path!r} is a finished model, not a checkpoint: it has no optimiser to go on with; give a folder in "
                "checkpoints/ of its run"
            )
    return folder


def describe(path: Path, explicit: bool = True) -> tuple[int, dict[str, Any] | None]:
    """(step, the configuration that wrote it, None in one of an older version), after a look at each file's size.

    explicit: the user named this one, it was not taken as the newest. CheckpointError as of `load`.
    """
    manifest, remedy = _manifest(path, explicit)
    for name in manifest:
        _check_size(path / name, manifest[name]["bytes"], remedy)
    read = {}
    for name in ("state.json", "config.json"):
        if name in manifest:
            _check_content(path / name, manifest[name]["sha256"], remedy)
            read[name] = json.loads((path / name).read_text())
    step, number = read["state.json"]["step"], number_of(path.name)
    if number is not None and number != step:
        raise CheckpointError(
            f"{str(path)!r} is at step {step}, so it is a copy that a run could take for its own. Give it a name that does not "
            f"look like a checkpoint's, such as {str(path.with_name(f'copy_of_{PREFIX}{step:08d}'))!r}"
        )
    return step, read.get("config.json")


def load(path: Path, explicit: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors, state) as given to `save`. CheckpointError names the file that is missing, truncated or altered."""
    manifest, remedy = _manifest(path, explicit)
    for name, expected in manifest.items():
        _check_size(path / name, expected["bytes"], remedy)
        _check_content(path / name, expected["sha256"], remedy)
    tensors = {n.removesuffix(".safetensors"): load_file(path / n) for n in manifest if n.endswith(".safetensors")}
    return tensors, json.loads((path / "state.json").read_text())


def _manifest(path: Path, explicit: bool) -> tuple[dict[str, dict[str, Any]], str]:
    """What the files must be, and what to do where they are not."""
    remedy = _remedy(path, explicit)
    file = path / "manifest.json"
    if not file.is_file():
        raise CheckpointError(f"{str(path)!r} is not a checkpoint: it has no manifest.json. {remedy}")
    try:
        manifest = json.loads(file.read_text())
        sizes = {name: (expected["bytes"], expected["sha256"]) for name, expected in manifest.items()}
        if "state.json" not in sizes:
            raise ValueError("it names no state.json")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. {remedy}") from error
    return manifest, remedy


def _check_size(file: Path, expected: int, remedy: str) -> None:
    if not file.is_file():
        raise CheckpointError(f"checkpoint file {str(file)!r} is missing. {remedy}")
    if (size := file.stat().st_size) != expected:
        raise CheckpointError(f"checkpoint file {str(file)!r} has {size} bytes, not {expected}. {remedy}")


def _check_content(file: Path, expected: str, remedy: str) -> None:
    if _sha256(file) != expected:
        raise CheckpointError(f"checkpoint file {str(file)!r} was altered: its sha256 has changed. {remedy}")


def _remedy(path: Path, explicit: bool) -> str:
    """What helps against a damaged checkpoint: nothing of a user's is to be removed where that would not help."""
    if explicit:
        return "Give resume=<another checkpoint>, or resume=latest."
    if list_checkpoints(path.parent)[0] != path:
        return f"Remove {str(path)!r} to resume from the checkpoint before it, or give resume=<another checkpoint>."
    return "There is no checkpoint before it: put back a copy of this one, or start again in a new output_dir."


def _is_whole(path: Path) -> bool:
    """Whether a run has written this folder: that its name is its step, and all of its files are there."""
    try:
        describe(path)
    except CheckpointError:
        return False
    return True


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
    """Moments and step counters of each optimizer; UserError where they are of other parameters."""
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
