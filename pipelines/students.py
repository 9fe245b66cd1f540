"""How a trained model is stored, described and found again: a diffusers folder, one JSON of facts, a model card."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from . import kinds, text_to_image
from .common import atomic
from .common.errors import UserError, shown
from .common.identity import weights_sha256
from .common.reading import BY_FILES, loading, read_json, reason_of, refuse_single_file
from .edm import EDMPipeline, PointNet
from .kinds import Kind
from .loras import LORA_FILE, PEFT_FILE, LoraSource, load_lora, load_peft
from .stock import StockPipeline
from .text_to_image import levels_of, steps_text

# readouts at alpha = .07 amplify float32 rounding; a scheduler that does something else is off by 0.03 and more
ONE_STEP_TOLERANCE = 1e-3
RESAVE = "save or copy the student again"

CARD = """---
library_name: diffusers
tags: [{tags}]
---
# {title}

{facts}

```python
{use}
```
"""

CARD_USE = {
    "student": """from pipelines.students import load_student

pipe = load_student("{folder}")
{call}""",
    "teacher": """from {module} import {pipeline}

pipe = {pipeline}.from_pretrained("{folder}")""",
}

EDM_LORA_USE = """from pipelines.edm import EDMPipeline

pipe = EDMPipeline.from_pretrained("{base_model}")
pipe.load_lora_weights("{folder}")  # with its scheduler: {steps}, at the noise it was trained for
{call}"""

IMAGES, POINTS = "images = pipe(batch_size=16).images", 'points = pipe(10_000, output_type="latent").images.flatten(1)'

TEXT_TO_IMAGE_CARD = """---
library_name: diffusers
base_model: {base_model}
tags: [{tags}]
---
# {title} of {base_model}

{facts}

```python
from diffusers import {pipeline}, {scheduler}{more_imports}

pipe = {pipeline}.from_pretrained("{base_model}"{without})
{load}
pipe.scheduler = {scheduler}.from_pretrained("{folder}", subfolder="scheduler")
image = pipe({call}).images[0]
```

The scheduler matters: most others do not return x0 in {of_steps}. {guidance}
"""
DISTILLED = "guidance_scale stays {value:g}: guidance is distilled\ninto the student."
TOLD = "guidance_scale stays {value}: the network\nis told it, and was trained with this value."


def save_model(folder: Path, pipeline: StockPipeline | EDMPipeline, kind: str, info: dict[str, Any]) -> None:
    """Write the pipeline, <kind>.json and README.md to `folder`, replacing it whole. kind: "student" or "teacher"."""
    title = called(info) if kind == "student" else f"Teacher, {type(pipeline).__name__}"
    tags = tags_of(info) if kind == "student" else "diffusion"
    module = "pipelines.edm" if isinstance(pipeline, EDMPipeline) else "diffusers"
    use = CARD_USE[kind].format(folder=folder.name, pipeline=type(pipeline).__name__, module=module, call=call_of(pipeline))
    card = CARD.format(title=title, tags=tags, facts=facts_list(info), use=use)
    replace_folder(folder, pipeline.save_pretrained, kind, info, card)


def called(info: dict[str, Any]) -> str:
    """A student in the title of its card."""
    count = len(levels_of(info))
    return "One-step student" if count == 1 else f"Student of {count} steps"


def tags_of(info: dict[str, Any]) -> str:
    """Under which the hub finds it."""
    return f"{'one' if len(levels_of(info)) == 1 else 'few'}-step, distillation"


def call_of(pipeline: StockPipeline | EDMPipeline) -> str:
    """The line of a card that draws."""
    return POINTS if isinstance(getattr(pipeline, "unet", None), PointNet) else IMAGES


def save_edm_student(folder: Path, pipeline: EDMPipeline, info: dict[str, Any], adapter: str | None = None) -> None:
    """A student of an EDM teacher: the whole pipeline, or with `adapter`, its name on the network, LoRA weights and scheduler."""
    if adapter is None:
        return save_model(folder, pipeline, "student", info)

    def write(partial: Path) -> None:
        pipeline.scheduler.save_pretrained(partial / "scheduler")
        save_lora(partial, type(pipeline), pipeline.unet, adapter)

    card = CARD.format(
        title=f"{called(info)} of {info['base_model']}",
        tags=tags_of(info),
        facts=facts_list(info),
        use=EDM_LORA_USE.format(
            folder=folder.name, base_model=info["base_model"], call=call_of(pipeline), steps=steps_text(len(levels_of(info)))
        ),
    )
    return replace_folder(folder, write, "student", info, card)


def save_lora(
    folder: Path,
    pipeline: type[StockPipeline] | type[EDMPipeline],
    network: ModelMixin,
    adapter: str,
    component: str = "unet",
) -> None:
    """pytorch_lora_weights.safetensors. The raw PEFT state dict with its metadata is the one form that keeps alpha, and all of
    the layers (convolutions too); of a pipeline that loads no LoRA, PEFT's own files. component: what the pipeline calls the
    network.
    """
    layers = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(network, adapter_name=adapter).items()}
    if not hasattr(pipeline, "save_lora_weights"):
        save_file({f"base_model.model.{k}": v for k, v in layers.items()}, folder / PEFT_FILE)
        network.peft_config[adapter].save_pretrained(folder)
        return
    metadata = network.peft_config[adapter].to_dict()
    given = {f"{component}_lora_layers": layers, f"{component}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(folder, **given)


def save_text_to_image(
    folder: Path,
    pipeline: type[StockPipeline],
    scheduler: Any,
    info: dict[str, Any],
    adapter: tuple[ModelMixin, str] | None = None,
    network: ModelMixin | None = None,
) -> None:
    """A student of a text-to-image teacher: LoRA weights (adapter: the network and the name on it) or a whole network in unet/ or
    transformer/, beside the scheduler that makes the steps of a stock pipeline its own. info: facts for student.json; "without":
    parts that the base model has not, where diffusers wants to be told.
    """
    kind = kinds.kind_of(pipeline)
    made = adapter[0] if adapter is not None else network
    if made is None:
        raise ValueError("give the adapter or the network that is the student")

    def write(partial: Path) -> None:
        scheduler.save_pretrained(partial / "scheduler")
        if adapter is not None:
            save_lora(partial, pipeline, *adapter, kind.component)
        elif network is not None:
            network.save_pretrained(partial / kind.component)

    call = text_to_image.student_call(kind, made.config, scheduler, info)
    imports = "" if kind.loads_loras else "\nfrom peft import PeftModel"
    card = TEXT_TO_IMAGE_CARD.format(
        base_model=info["base_model"],
        tags=f"{tags_of(info)}, {'lora' if adapter else 'full'}",
        facts=facts_list({key: value for key, value in info.items() if key != "without"}),
        pipeline=pipeline.__name__,
        without="".join(f", {part}=None" for part in info.get("without", ())),
        scheduler=type(scheduler).__name__,
        more_imports=imports if adapter else f", {kind.network.__name__}",
        load=loading_line(kind, folder.name, adapter is not None),
        folder=folder.name,
        call=", ".join((kind.example, *(f"{key}={value}" for key, value in call.items()))),
        guidance=(DISTILLED if kind.guidance(made.config) != "input" else TOLD).format(value=call["guidance_scale"]),
        title=called(info),
        of_steps="a single step" if len(levels_of(info)) == 1 else "these steps",
    )
    replace_folder(folder, write, "student", info, card)


def loading_line(kind: Kind, folder: str, lora: bool) -> str:
    """The line of a card that puts a student on its base model."""
    part = kind.component
    if not lora:
        return f'pipe.{part} = {kind.network.__name__}.from_pretrained("{folder}", subfolder="{part}")'
    if kind.loads_loras:
        return f'pipe.load_lora_weights("{folder}")'
    return f'PeftModel.from_pretrained(pipe.{part}, "{folder}").merge_and_unload()  # in place'


def replace_folder(folder: Path, write: Callable[[Path], None], kind: str, info: dict[str, Any], card: str) -> None:
    """Put what `write` makes, <kind>.json and README.md in place of `folder`, at once."""
    with atomic.new_folder(folder) as partial:
        write(partial)
        (partial / f"{kind}.json").write_text(json.dumps(info, indent=1) + "\n")
        (partial / "README.md").write_text(card)


def facts_list(info: dict[str, Any]) -> str:
    def shown(value: Any) -> Any:
        return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value

    return "\n".join(f"- {key}: {shown(value)}" for key, value in info.items())


def load_student(
    source: str | Path, base_model: str | None = None, scheduler: Any = None, dtype: torch.dtype = torch.float32
) -> StockPipeline | EDMPipeline:
    """The stock pipeline of a student, ready for its steps: of its folder, of a run's output_dir (student/ in it) or of a hub id.

    One of a text-to-image teacher is loaded on its base model, as the adapter "student"; base_model: where that lies, if not
    where it did. Call it as its README.md says: num_inference_steps=1, and guidance_scale=1 but for networks that are told
    their guidance (text_to_image.student_call). scheduler: another one than the student's own;
    UserWarning if its steps are not the student's. FileNotFoundError says which file is missing, ValueError which damaged.
    """
    folder = find_student(source)
    info = read_info(folder, "student")
    if info.get("family") not in kinds.KINDS:
        if scheduler is not None:
            raise UserError(f"scheduler has no effect for the student in {str(folder)!r}: it comes with its own")
        with loading(f"{str(folder)!r} is not complete or damaged", RESAVE):
            edm = EDMPipeline.from_pretrained(folder, base_model=base_model, use_safetensors=True, dtype=dtype)
        if info.get("weights") == "lora":
            base = EDMPipeline.from_pretrained(base_model or info["base_model"], use_safetensors=True, dtype=dtype).unet
            check_base(base, info, folder)
        return edm
    for key in ("base_model", "weights", "readout_t"):
        if key not in info:
            raise UserError(f"{str(folder / 'student.json')!r} does not say {key!r}; {RESAVE}")
    kind = kinds.kind_named(info["family"])
    check_levels_of(info, folder, kind)
    whole = info["weights"] == kind.component
    text_to_image.check_weights(folder, [kind.component if whole else ""])
    incomplete = f"{str(folder)!r} is not complete or does not fit its base model"
    components: dict[str, Any] = {}
    if whole:
        # given to the pipeline when it is made: of one that was made without, it would know no size, and would save none
        with loading(incomplete, RESAVE):
            how = {"subfolder": kind.component, "use_safetensors": True, "dtype": dtype}
            components[kind.component] = kind.network.from_pretrained(folder, **how)
    try:
        pipe = text_to_image.load_pipeline(base_model or info["base_model"], dtype, **components)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the base model of {str(folder)!r}: {error}; give base_model=<where it lies now>") from error
    network = kinds.network_of(pipe)
    prediction = text_to_image.denoiser(pipe, network)
    if not whole:
        check_base(network, info, folder, kind.component)
        with loading(incomplete, RESAVE):
            if kind.loads_loras:
                load_lora(pipe, LoraSource(str(folder), LORA_FILE), "student")
            else:
                load_peft(network, folder, "student")
    if scheduler is None:
        if not (folder / "scheduler" / "scheduler_config.json").is_file():
            raise FileNotFoundError(f"{str(folder)!r} has no scheduler/scheduler_config.json; save the student again")
        with loading(incomplete, RESAVE):
            scheduler = kind.scheduler.from_pretrained(folder, subfolder="scheduler")
    pipe.scheduler = scheduler
    levels, last = levels_of(info), prediction.schedule.t_range[1]
    if levels[0] > last:
        raise UserError(
            f"the student in {str(folder)!r} reads out at timestep {levels[0]}, its base model has none after {last:g}; "
            "give base_model=<the one that it was distilled from>"
        )
    off = text_to_image.steps_error(kind, scheduler, prediction, levels)
    if off > ONE_STEP_TOLERANCE:
        warnings.warn(
            f"{steps_text(len(levels))} of {type(scheduler).__name__} "
            f"{'is' if len(levels) == 1 else 'are'} not the x0 that the student was trained for (off by {off:.2g}"
            f"{kind.why_not(scheduler)}); use the scheduler stored in {str(folder / 'scheduler')!r}",
            stacklevel=2,
        )
    return pipe


def check_levels_of(info: dict[str, Any], folder: Path, kind: Kind) -> None:
    """UserError where what student.json says of the steps cannot be."""
    where, first, levels = repr(str(folder / "student.json")), info["readout_t"], info.get("levels")
    known = (int,) if kind.whole_levels else (int, float)

    def possible(t: Any) -> bool:
        return type(t) in known and t >= 0 and math.isfinite(t)

    if not possible(first):
        raise UserError(f"{where}: readout_t is {shown(first)}, no timestep; {RESAVE}")
    if levels is None:
        return
    whole = isinstance(levels, list) and all(map(possible, levels))
    if not (whole and levels[:1] == [first] and all(t > following for t, following in pairwise(levels))):
        raise UserError(f"{where}: levels are {shown(levels)}, expected descending timesteps from readout_t={first}; {RESAVE}")


def check_base(network: nn.Module, info: dict[str, Any], folder: Path, component: str = "unet") -> None:
    """UserWarning where a LoRA is put on other weights than it was trained on. component: what its pipeline calls the network.

    Students of earlier versions do not say theirs, and of weights in lower precision than at training it cannot be told.
    """
    trained = getattr(torch, str(info.get("base_dtype")), None)
    mine = next(network.parameters()).dtype
    if "base_weights" not in info or trained is None or torch.promote_types(mine, trained) != mine:
        return
    if weights_sha256({component: network}, dtype=trained) != info["base_weights"]:
        warnings.warn(
            f"the student in {str(folder)!r} was trained on other weights than those now at its base model "
            f"({shown(info['base_model'])} then); its images will be others",
            stacklevel=3,
        )


def find_student(source: str | Path) -> Path:
    """The folder with student.json: of itself, of student/ in it, or of a hub id. FileNotFoundError if there is none."""
    folder = Path(source)
    if not folder.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        try:
            return Path(snapshot_download(str(source)))
        except BY_FILES as error:
            raise FileNotFoundError(
                f"{str(source)!r} is no folder here, and the hub could not be asked for it: {reason_of(error)}"
            ) from error
    refuse_single_file(folder, "the student")
    if not (folder / "student.json").is_file():
        folder = folder / "student"
    if not (folder / "student.json").is_file():
        raise FileNotFoundError(f"{str(folder.parent)!r} holds no student: expected student.json in it or in its student/")
    return folder


def read_info(folder: str | Path, kind: str) -> dict[str, Any]:
    """The facts stored beside a model by `save_model`; {} where there are none (a converted teacher). ValueError if damaged."""
    file = Path(folder) / f"{kind}.json"
    if not file.is_file():
        return {}
    return read_json(file, "save the model again")
