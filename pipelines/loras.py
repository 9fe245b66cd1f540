"""LoRA weights as users have them: a file, a folder, a student's, a hub id. All of one is loaded, or it is refused by name."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from .common.errors import UserError
from .common.reading import damaged_weights
from .data.walk import examples
from .peft_layers import layers_with_adapters
from .stock import StockPipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"  # of students whose pipeline loads no LoRA
# What PEFT's own save_pretrained writes: it does not tell which network it is for, and its alpha stands in another file.
PEFT = (
    "as PEFT saves it; make it one of diffusers: network = PeftModel.from_pretrained(pipe.unet, <folder>), then "
    "StableDiffusionPipeline.save_lora_weights(<folder>, unet_lora_layers=get_peft_model_state_dict(network.base_model.model, "
    'adapter_name="default"), unet_lora_adapter_metadata=network.peft_config["default"].to_dict())'
)
OF_A_LAYER = re.compile(r"\.(lora|lokr|hada|dora)_")  # what follows a layer's name in a key


@dataclass(frozen=True)
class LoraSource:
    """Where weights lie. folder: a folder, or the hub id of somebody's LoRA; file: its name there, None to let diffusers find it;
    student: whether it is one of trainers.distill's (student.json beside it).
    """

    folder: str
    file: str | None = None
    student: bool = False

    @property
    def scheduler(self) -> Path | None:
        """The folder of a scheduler stored beside it."""
        stored = Path(self.folder) / "scheduler"
        return stored if (stored / "scheduler_config.json").is_file() else None


def find_lora(source: str | Path, option: str) -> LoraSource:
    """source: a .safetensors file, a folder that holds one, a run of trainers.distill or a hub id. A student's LoRA is known as
    one however it is named, since it means something at its noise level only. FileNotFoundError or UserError name what is wrong.
    """
    path = Path(source)
    if path.is_file():
        return _of_file(path, option)
    if path.is_dir():
        inside = path / "student"
        folder = inside if not (path / "student.json").is_file() and (inside / "student.json").is_file() else path
        return _of_student(folder, option) if (folder / "student.json").is_file() else _of_folder(folder, option)
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{option}: no such file or folder {str(source)!r}, and a hub id looks like owner/name")
    return _on_the_hub(str(source), option)


def _of_file(path: Path, option: str) -> LoraSource:
    if path.suffix != ".safetensors":
        raise UserError(f"{option}: {str(path)!r} is no .safetensors file; a pickle could run any code: save it as one")
    if not (path.parent / "student.json").is_file():
        return LoraSource(str(path.parent), path.name)
    own = _student_file(path.parent)
    if path.name != own:
        raise UserError(f"{option}: {str(path)!r} lies in a student's folder, whose LoRA is {own}; name the one you mean")
    return _of_student(path.parent, option)


def _of_folder(folder: Path, option: str) -> LoraSource:
    """Its one file of weights. diffusers would take any of several, and a pickle where there is no other."""
    if (folder / LORA_FILE).is_file():
        return LoraSource(str(folder), LORA_FILE)
    files = sorted(f.name for f in folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file() or files == [PEFT_FILE]:
        raise UserError(f"{option}: {str(folder)!r} holds an adapter {PEFT}")
    if len(files) > 1:
        raise UserError(
            f"{option}: {str(folder)!r} holds {len(files)} files of weights ({examples(files)}); name the one you mean"
        )
    if not files:
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".ckpt", ".pth"))
        found = f"only {examples(pickles)}, and a pickle could run any code: save it as one" if pickles else "none"
        raise FileNotFoundError(f"{option}: expected a .safetensors file of LoRA weights in {str(folder)!r}, which holds {found}")
    return LoraSource(str(folder), files[0])


def _of_student(folder: Path, option: str) -> LoraSource:
    if not (folder / _student_file(folder)).is_file():
        raise UserError(f"{option}: the student in {str(folder)!r} is a whole network, not a LoRA; give it as --model")
    return LoraSource(str(folder), _student_file(folder), student=True)


def _student_file(folder: Path) -> str:
    return PEFT_FILE if (folder / PEFT_FILE).is_file() else LORA_FILE


def _on_the_hub(name: str, option: str) -> LoraSource:
    try:
        hf_hub_download(name, "student.json")
        folder = snapshot_download(name, allow_patterns=[LORA_FILE, "adapter_*", "student.json", "scheduler/*", "unet/*"])
    except LocalEntryNotFoundError as error:  # the hub did not answer: then only what it said before is known
        if try_to_load_from_cache(name, "student.json") is _CACHED_NO_EXIST:
            return LoraSource(name)
        raise FileNotFoundError(
            f"{option}: {name!r} is no file or folder here, and the hub could not be asked for it; check the name and the "
            "connection (HF_HUB_OFFLINE must be unset), or give the path of a downloaded folder"
        ) from error
    except EntryNotFoundError:
        return LoraSource(name)
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{option}: {name!r} is no file or folder here, and the hub has none that can be read: {str(error).splitlines()[0]}"
        ) from error
    return _of_student(Path(folder), option)


def load_lora(pipe: StockPipeline, lora: LoraSource, adapter_name: str | None = None) -> None:
    """Put it on the pipeline's networks. UserError for weights made for another model, of which diffusers loads what fits, or
    nothing, and says so in a log at most.
    """
    before = {name: set(getattr(network, "peft_config", {})) for name, network in _networks(pipe).items()}
    options = {"weight_name": lora.file} if lora.file else {}
    where = str(Path(lora.folder) / lora.file) if lora.file else lora.folder
    unfit = f"{where!r} does not fit a {type(pipe).__name__}"
    try:
        with _diffusers_quiet():  # what it would warn of, text encoders without weights above all, is checked below
            pipe.load_lora_weights(lora.folder, adapter_name=adapter_name, **options)
        sdxl = {"unet", "text_encoder_2"} <= pipe.components.keys()
        config = {"unet_config": pipe.unet.config} if sdxl else {}  # as SDXL's own loader does
        stored = pipe.lora_state_dict(lora.folder, **options, **config)
    except RuntimeError as error:
        raise UserError(f"{unfit}: {_first_lines(error, 2)}; it was made for another model") from error
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{unfit}: {_first_lines(error, 1)}") from error
    state = stored[0] if isinstance(stored, tuple) else stored
    if any(key.startswith("base_model.model.") for key in state):
        raise UserError(f"{where!r} holds an adapter {PEFT}")
    damaged = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if damaged:
        raise UserError(
            f"{where!r} holds NaN or infinite values in {len(damaged)} tensors, the first {damaged[0]}; train it again"
        )
    missing: list[str] = []
    count = 0
    for name, layers in layers_by_network(state).items():
        network = _networks(pipe).get(name)
        added = set(getattr(network, "peft_config", {})) - before.get(name, set())
        missing += [f"{name}.{layer}" for layer in sorted(layers - adapted_layers(network, added))]
        count += len(layers)
    refuse_unfit(unfit, missing, count)


def load_peft(network: nn.Module, folder: Path, adapter_name: str) -> None:
    """A student's adapter in PEFT's own files, put on a network whose pipeline loads no LoRA. FileNotFoundError without its
    files, UserError for damaged ones, and for those of another network.
    """
    file = folder / PEFT_FILE
    for needed in (file, folder / "adapter_config.json"):
        if not needed.is_file():
            raise FileNotFoundError(f"no LoRA weights {str(needed)!r}")
    try:
        stored = load_file(file)
    except SafetensorError as error:
        raise damaged_weights(file, error) from error
    layers = {_plain(OF_A_LAYER.split(key.removeprefix("base_model.model."))[0]) for key in stored}
    unfit = f"{str(file)!r} does not fit a {type(network).__name__}"
    named = dict(network.named_modules())
    refuse_unfit(unfit, sorted(layers - named.keys()), len(layers))
    if damaged := [key for key, value in stored.items() if not bool(torch.isfinite(value).all())]:
        raise UserError(f"{str(file)!r} holds NaN or infinite values in {len(damaged)} tensors, the first {damaged[0]}")
    try:
        with warnings.catch_warnings():  # what it warns of is checked below
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            PeftModel.from_pretrained(network, folder, adapter_name=adapter_name)  # puts it into the network itself
    except RuntimeError as error:
        raise UserError(f"{unfit}: {_first_lines(error, 2)}; it was made for another model") from error
    if absent := sorted(adapted_layers(network, {adapter_name}) - layers):
        raise UserError(f"{str(file)!r} lacks {len(absent)} layers that its adapter_config.json names, the first {absent[0]}")


def refuse_unfit(unfit: str, missing: list[str], count: int) -> None:
    """UserError where some of the `count` layers that weights are for are missing, or where there are none."""
    if missing:
        absent = f"{len(missing)} of its {count} layers are not there, the first {missing[0]}"
        raise UserError(f"{unfit}: {absent}; it was made for another model")
    if not count:
        raise UserError(f"{unfit}: it holds no LoRA weights for any of its networks")


def load_scheduler(folder: Path) -> Any:
    """A scheduler of diffusers by the class that its configuration names."""
    name = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8")).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UserError(f"{str(folder)!r} holds a {name}, which is no scheduler of diffusers; remove that folder or mend it")
    return kind.from_pretrained(folder)


def layers_by_network(state: dict[str, Any]) -> dict[str, set[str]]:
    """Weights as a pipeline's lora_state_dict gives them -> the layers that they are for, by network."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        name, _, rest = key.partition(".")
        parts.setdefault(name, {})[rest] = value
    found = {}
    for name, part in parts.items():
        if not any(".lora_A" in key or ".lokr_" in key for key in part):
            part = (
                convert_unet_state_dict_to_peft(part)
                if name == "unet"
                else convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
            )
        found[name] = {_plain(OF_A_LAYER.split(key)[0]) for key in part}
    return found


def adapted_layers(network: nn.Module | None, adapters: Iterable[str]) -> set[str]:
    """Names of the layers that carry one of these adapters."""
    if network is None:
        return set()
    wanted = set(adapters)
    return {_plain(n) for n, layer in layers_with_adapters(network).items() if wanted & set(layer.r)}


def layers_in(file: Path) -> set[str]:
    """The layers of a U-Net that a file of PEFT weights is for; {} where its keys are of something else."""
    if not file.is_file():
        raise FileNotFoundError(f"no LoRA weights {str(file)!r}")
    try:
        with safe_open(file, framework="pt") as stored:
            return layers_by_network(dict.fromkeys(stored.keys())).get("unet", set())
    except SafetensorError as error:
        raise damaged_weights(file, error) from error


@contextmanager
def _diffusers_quiet() -> Iterator[None]:
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def _networks(pipe: StockPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _plain(layer: str) -> str:
    """transformers 5 has no `text_model` inside a text encoder, where files of before have one."""
    return layer.removeprefix("text_model.")


def _first_lines(error: BaseException, n: int) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:n])
