"""A model that draws images: any pipeline that this project writes or that stock diffusers loads, with how it is called."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from pipelines.common.errors import UserError, shown
from pipelines.common.identity import pipeline_identity, tokens_identity
from pipelines.common.reading import loading
from pipelines.edm import EDMPipeline, PointNet
from pipelines.kinds import family_of, kind_named, kind_of, network_of
from pipelines.loras import LoraSource, find_lora, load_lora, load_scheduler
from pipelines.stock import StockPipeline
from pipelines.students import load_student, read_info
from pipelines.text_to_image import (
    UNUSED,
    absent_text,
    check_weights,
    levels_of,
    only_variant,
    own_noise,
    read_index,
    steps_text,
    student_call,
)

from ..content import Speed
from .seeds import image_generator, image_label

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Sampler:
    """pipe with the arguments of its calls; facts: where the model came from, for reports.

    takes: "prompt", "class_labels" or "nothing".
    """

    pipe: StockPipeline | EDMPipeline
    takes: str
    call: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Classes of a conditional EDM model or of a DiT; 0 for others."""
        if isinstance(self.pipe, EDMPipeline):
            return self.pipe.unet.config["num_classes"] or 0
        return kind_of(self.pipe).num_classes(network_of(self.pipe).config) if self.takes == "class_labels" else 0

    @property
    def stock(self) -> StockPipeline:
        """The pipeline, where it is one of diffusers' own; ValueError for an EDMPipeline."""
        if isinstance(self.pipe, EDMPipeline):
            raise ValueError(f"an EDMPipeline is no text-to-image pipeline: {self.facts.get('model')}")
        return self.pipe

    def __call__(
        self,
        indices: Sequence[int],
        seed: int = 0,
        captions: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        encoded: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The images of these indices, uint8 (b, c, h, w); captions, labels: one for each of them. labels: classes, None: drawn.
        encoded: in place of captions, the arguments that give the pipeline what its text encoder has made of them.

        UserError for NaN and for a model of points; ValueError without captions that are needed, or for a pipeline that returns
        no images.
        """
        inputs: dict[str, Any] = {"generator": [image_generator(seed, i) for i in indices]}
        if encoded is not None:
            inputs |= encoded
        elif self.takes == "prompt":
            if captions is None:
                raise ValueError("this model draws from text; give a caption for each index")
            inputs["prompt"] = list(captions)
        elif isinstance(self.pipe, EDMPipeline):
            inputs["batch_size"] = len(indices)
        if self.num_classes:
            drawn = [image_label(seed, i, self.num_classes) for i in indices]
            inputs["class_labels"] = drawn if labels is None else list(labels)
        if isinstance(getattr(self.pipe, "unet", None), PointNet):
            raise UserError(f"--model: {self.facts['model']!r} makes points, not images; use `python -m eval points`")
        with own_noise(self.pipe, inputs["generator"]):
            output = self.pipe(**inputs, **self.call, output_type="np")
        images = torch.from_numpy(output[0] if isinstance(output, tuple) else output.images)
        if images.ndim != 4 or len(images) != len(indices):
            raise ValueError(f"the pipeline returned {tuple(images.shape)}, expected {len(indices)} images (h, w, c)")
        if not bool(torch.isfinite(images).all()):
            raise UserError(f"the pipeline made NaN or infinite pixels for images {list(indices)}; try --dtype float32")
        return (images.permute(0, 3, 1, 2) * 255).round().clamp(0, 255).to(torch.uint8)

    def identity(self, captions: Sequence[str] | None) -> dict[str, Any]:
        """What images depend on besides their numbers and seeds, part by part (pipelines.common.identity)."""
        unused = {"vae": ("encoder.", "quant_conv.")} if isinstance(getattr(self.pipe, "vae", None), AutoencoderKL) else {}
        found = pipeline_identity(self.pipe, left_out=unused) | {f"call.{key}": value for key, value in self.call.items()}
        found |= {"dtype": self.facts.get("dtype"), "device": self.pipe.device.type}
        if getattr(self.pipe, "watermark", None) is not None:
            found["watermark"] = True
        return found | (tokens_identity(self.pipe, captions) if captions is not None else {})

    def describe(self) -> dict[str, Any]:
        """What reports say of the model: facts, the classes of pipeline and scheduler, the arguments of its call."""
        return self.facts | {
            "pipeline": type(self.pipe).__name__,
            "scheduler": type(self.pipe.scheduler).__name__,
            "call": self.call,
        }


def load_sampler(
    model: str,
    lora: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    base_model: str | None = None,
    image_size: int | None = None,
) -> Sampler:
    """model: a folder or hub id of a pipeline or student, or a run's output_dir; lora: a file, folder, run or hub id of a LoRA to
    put on it; a student's comes with its scheduler and its one step, and another goes beside a student's own.

    A student is called as it was trained: one step, its own scheduler, no guidance. Others: steps and guidance_scale, or the
    pipeline's own. FileNotFoundError or UserError say what is wrong with the folder, or which option would have no effect.
    """
    path, kwargs = Path(model), {"dtype": DTYPES[dtype]}
    folder = next((path / sub for sub in ("student", "teacher") if (path / sub).is_dir()), path)
    facts: dict[str, Any] = {"model": model, "lora": lora, "dtype": dtype}
    student = folder if (folder / "student.json").is_file() else None
    added = find_lora(lora, "--lora") if lora is not None else None
    if added is not None and added.student:
        if student is not None:
            raise UserError(f"--lora: {lora!r} is a student, and so is --model {model!r}; give the model it was distilled from")
        if base_model is not None:
            raise UserError(f"--base-model has no effect with a student as --lora: its base model is --model {model!r}")
        student, base_model, added = Path(added.folder), str(folder), None
    if student is not None:
        pipe, info = load_student(student, base_model, **kwargs), read_info(student, "student")
        facts["student"] = {k: info.get(k) for k in ("objective", "estimator", "steps", "train_seconds", "git_commit")}
    elif base_model is not None:
        raise UserError(f"--base-model has no effect: --model {model!r} is no student on a base model")
    else:
        pipe, info = _load_pipeline(folder, model, kwargs), {}
    if added is not None and lora is not None:
        _add_lora(pipe, added, lora, student)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return Sampler(pipe, _takes(pipe), _call(pipe, info, steps, guidance_scale, image_size), facts)


def _load_pipeline(folder: Path, model: str, kwargs: dict[str, Any]) -> StockPipeline | EDMPipeline:
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"--model: {model!r} has no model_index.json, student.json, student/ or teacher/ in it")
    source = str(folder) if folder.is_dir() else model
    with loading(f"--model: {shown(model, 300)} cannot be loaded"):
        index = _index(source)
        if index.get("_class_name") == "EDMPipeline":
            return EDMPipeline.from_pretrained(source, use_safetensors=True, **kwargs)
        if "requires_safety_checker" in index:  # it would blacken images
            kwargs = kwargs | {"safety_checker": None, "requires_safety_checker": False}
        kwargs = kwargs | absent_text(index)
        if folder.is_dir():
            parts = [k for k, v in index.items() if isinstance(v, list) and k not in UNUSED]
            check_weights(folder, parts)
            kwargs = kwargs | {"variant": only_variant(folder, parts)}
        return DiffusionPipeline.from_pretrained(source, use_safetensors=True, **kwargs)  # type: ignore[return-value]  # see stock.py


def _index(source: str) -> dict[str, Any]:
    try:
        return read_index(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--model: {error}") from error
    except UserError as error:
        raise UserError(f"--model: {error}") from error


def _add_lora(pipe: StockPipeline | EDMPipeline, added: LoraSource, lora: str, student: Path | None) -> None:
    """A LoRA that is no student's. A scheduler stored beside it comes with it, but a student keeps its own, and its adapter."""
    if not hasattr(pipe, "load_lora_weights") or (student is not None and isinstance(pipe, EDMPipeline)):
        raise UserError(f"--lora: a {type(pipe).__name__}{' of a student' if student else ''} takes no LoRA")
    with loading(f"--lora: {shown(lora, 300)} cannot be loaded"):
        if isinstance(pipe, EDMPipeline):
            pipe.load_lora_weights(lora)
            return
        load_lora(pipe, added, "added")
    if student is None and added.scheduler is not None:
        pipe.scheduler = load_scheduler(added.scheduler)
    if student is not None and "student" in getattr(network_of(pipe), "peft_config", {}):
        pipe.set_adapters(["student", "added"])  # the second to be loaded would be the only one that acts


def _takes(pipe: StockPipeline | EDMPipeline) -> str:
    known = inspect.signature(pipe.__call__).parameters
    if "prompt" in known:
        return "prompt"
    family = family_of(type(pipe).__name__)
    if family is not None and kind_named(family).takes == "class_labels":
        return "class_labels"
    if "batch_size" not in known:
        raise UserError(f"a {type(pipe).__name__} takes neither prompts nor a batch_size: what to ask it for is not known")
    return "class_labels" if "class_labels" in known and pipe.unet.config.get("num_classes", 0) else "nothing"


def _call(pipe: StockPipeline | EDMPipeline, info: dict[str, Any], steps, guidance_scale, image_size) -> dict[str, Any]:
    """Keyword arguments of every call: written out even where they are the pipeline's defaults, so that reports tell them."""
    known = inspect.signature(pipe.__call__).parameters
    call: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    if info and steps is not None and steps != len(levels := levels_of(info)):
        own = f"{steps_text(len(levels))} (at {', '.join(f'{t:g}' for t in levels)})"
        raise UserError(f"--steps: this student makes {own}, not {steps}; train one with student.steps={steps}")
    if info and not isinstance(pipe, EDMPipeline):
        trained = student_call(kind_of(pipe), network_of(pipe).config, pipe.scheduler, info)
        call |= {key: value for key, value in trained.items() if key != "guidance_scale"}
    elif steps is not None:
        call["num_inference_steps"] = steps
    elif isinstance(pipe, EDMPipeline):
        call["num_inference_steps"] = pipe.scheduler.config["num_inference_steps"]
    else:
        call["num_inference_steps"] = known["num_inference_steps"].default
    if "guidance_scale" in known:
        call["guidance_scale"] = trained.get("guidance_scale") if guidance_scale is None else guidance_scale
        if call["guidance_scale"] is None:
            call["guidance_scale"] = known["guidance_scale"].default
        elif (none := _unguided(pipe)) is not None and call["guidance_scale"] < none:
            name = type(pipe).__name__
            raise UserError(
                f"guidance scale {guidance_scale:g}: a {name} takes all below {none:g} for {none:g}, none; give {none:g}"
            )
    elif guidance_scale is not None:
        raise UserError(f"--guidance-scale: a {type(pipe).__name__} has none")
    if image_size and "height" not in known:
        raise UserError(f"--image-size has no effect: a {type(pipe).__name__} makes images of one size; remove it")
    size = image_size or info.get("image_size")
    if "height" in known and size:
        call |= {"height": size, "width": size}
    return call


def _unguided(pipe: StockPipeline | EDMPipeline) -> float | None:
    """The guidance_scale that means none, and below which all does; None of a pipeline of which that is not known."""
    family = family_of(type(pipe).__name__)
    if family is not None:
        return kind_named(family).unguided
    return 1.0 if hasattr(type(pipe), "do_classifier_free_guidance") else None


def latency(samplers: Sequence[Sampler], batch_size: int, repeats: int = 3, captions: Sequence[str] | None = None) -> list[Speed]:
    """Seconds an image and images a second of each, of the fastest of `repeats` batches after one to warm up. They are called in
    turn: the speed of a machine changes from one second to the next.
    """
    texts = [captions[i % len(captions)] for i in range(batch_size)] if captions else None
    seconds: list[list[float]] = [[] for _ in samplers]
    for _ in range(repeats + 1):
        for sampler, taken in zip(samplers, seconds, strict=True):
            start = time.perf_counter()
            sampler(range(batch_size), 0, texts)  # ends with a copy to the CPU, which waits for the device
            taken.append(time.perf_counter() - start)
    return [
        {
            "seconds_per_image": min(taken[1:]) / batch_size,
            "images_per_s": batch_size / min(taken[1:]),
            "batch_size": batch_size,
            "repeats": repeats,
            "device": str(sampler.pipe.device),
            "call": sampler.call,
        }
        for sampler, taken in zip(samplers, seconds, strict=True)
    ]
