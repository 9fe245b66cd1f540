"""Teachers by source, each behind the one Denoiser interface."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipelines.edm import EDMPipeline


def load_edm_teacher(path: str) -> EDMPipeline:
    """An EDMPipeline folder, or the output_dir of train_teacher that holds one in teacher/.

    FileNotFoundError / ValueError name what is missing or damaged, before anything is loaded.
    """
    folder = Path(path)
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
    try:
        with safe_open(weights, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"teacher.path: {str(weights)!r} is damaged ({error}); copy or train it again") from error
    return EDMPipeline.from_pretrained(folder, use_safetensors=True)
