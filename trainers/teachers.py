"""Teachers by source, each behind the one Denoiser interface."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pipelines.edm import EDMPipeline, EDMUNet, PatchUNet, PointNet
from pipelines.errors import UserError
from pipelines.identity import weights_sha256
from pipelines.reading import damaged_weights, loading, read_json, refuse_single_file
from pipelines.stable_diffusion import FAMILIES, load_pipeline, read_index

TEXT_AND_IMAGES = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def teacher_folder(path: str) -> str:
    """The pipeline folder that a path means: an output_dir of train_teacher is its teacher/; hub ids are left alone."""
    folder = Path(path)
    inside = (folder / "teacher" / "model_index.json").is_file() and not (folder / "model_index.json").is_file()
    return str(folder / "teacher") if inside else path


def family_of(path: str) -> str:
    """One of edm, sd, sdxl: what a pipeline folder (see teacher_folder) or hub id says it holds."""
    path = teacher_folder(path)
    refuse_single_file(path, "teacher.path")
    try:
        name = read_index(path).get("_class_name")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"teacher.path: {error}; give a pipeline folder or hub id, or train a teacher with `accelerate launch -m "
            "trainers.train_teacher --config configs/digits_teacher.yaml`"
        ) from error
    families = {"EDMPipeline": "edm"} | FAMILIES
    if name not in families:
        raise UserError(f"teacher.path: {path!r} holds a {name}; expected one of {', '.join(families)}")
    return families[name]


def base_weights(path: str, dtype: torch.dtype, variant: str | None) -> str:
    """The hash of a teacher's network that its students note as base_weights."""
    if family_of(path) == "edm":
        return weights_sha256({"unet": load_edm_teacher(path).unet})
    return weights_sha256({"unet": load_pipeline(teacher_folder(path), dtype, TEXT_AND_IMAGES, variant).unet})


def load_edm_teacher(path: str) -> EDMPipeline:
    """An EDMPipeline folder, or the output_dir of train_teacher that holds one in teacher/.

    FileNotFoundError / ValueError name what is missing or damaged, before anything is loaded.
    """
    folder = Path(path)
    refuse_single_file(folder, "teacher.path")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"teacher.path: no such folder {path!r}; train one with `accelerate launch -m trainers.train_teacher "
            "--config configs/digits_teacher.yaml` or give an EDMPipeline folder"
        )
    if not (folder / "model_index.json").is_file() and (folder / "teacher").is_dir():
        folder = folder / "teacher"
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"teacher.path: {str(folder)!r} is not an EDMPipeline folder: it has no {name}")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(
            f"teacher.path: {str(folder)!r} has no weights: expected {weights.name} in unet/ (safetensors; pickles are refused)"
        )
    again = "copy or train it again"
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        try:
            read_json(folder / name, again)
        except UserError as error:
            raise UserError(f"teacher.path: {error}") from error
    named = read_json(folder / "model_index.json", again).get("unet")
    networks = {cls.__name__: cls for cls in (EDMUNet, PatchUNet, PointNet)}
    if not isinstance(named, list) or named[-1] not in networks:
        raise UserError(f"teacher.path: {str(folder)!r} has {named!r} as unet; expected one of {', '.join(networks)}")
    network = networks[named[-1]]
    try:
        with safe_open(weights, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"teacher.path: {damaged_weights(weights, error)}") from error
    with loading(f"teacher.path: {str(folder / 'unet' / 'config.json')!r} makes no network", again), torch.device("meta"):
        expected = {n: tuple(t.shape) for n, t in network.from_config(network.load_config(folder / "unet")).state_dict().items()}
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            raise UserError(
                f"teacher.path: {str(weights)!r} does not fit its config.json: {name} is {stored.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such tensor')}; copy or train it again"
            )
    with loading(f"teacher.path: {str(folder)!r} cannot be loaded", again):
        return EDMPipeline.from_pretrained(folder, use_safetensors=True)
