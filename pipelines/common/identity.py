"""What something stored depends on: hashes of weights and texts, settings by name. Equal identities mean equal results.

An identity is a flat dict of JSON values: `{"vae.weights": sha256, "vae.scaling_factor": 0.13, ...}`. It holds what changes a
result and nothing else: no paths, no times, no names of files, no version that wrote them, no setting that is at its default.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

# Settings that change no output of a trained network: how it was initialised or trained, how it is to be stored, default sizes of
# images (which every caller here gives).
NO_EFFECT = {"architectures", "transformers_version", "dtype", "torch_dtype", "initializer_range", "initializer_factor"}
NO_EFFECT |= {"attention_dropout", "dropout", "use_cache", "return_dict", "gradient_checkpointing", "sample_size"}


def sha256_of(value: Any) -> str:
    """SHA-256 in hexadecimal digits of any JSON value, so that ["a", "b c"] and ["a b", "c"] differ.

    >>> sha256_of({"b": 1, "a": 2}) == sha256_of({"a": 2, "b": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights_sha256(
    modules: Mapping[str, nn.Module | None], left_out: tuple[str, ...] = (), dtype: torch.dtype | None = None
) -> str:
    """Of the weights of several networks, by name, dtype and value, but those whose names begin with one of left_out.

    dtype: the hash that they would have in it.
    """
    digest = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for key, value in sorted(module.state_dict().items()) if module is not None else ():
            if key.startswith(left_out):  # false for no beginnings
                continue
            value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            digest.update(f"{name}.{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_of(component: Any) -> dict[str, Any]:
    """Class and settings of a network or scheduler of diffusers or transformers, without defaults and what has no effect."""
    if hasattr(component.config, "to_dict"):
        return {"class": type(component).__name__} | config_settings(component.config)
    defaults = {k: p.default for k, p in inspect.signature(type(component).__init__).parameters.items()}
    return {"class": type(component).__name__} | _changed(component.config, defaults)


def config_settings(config: Any) -> dict[str, Any]:
    """Settings of a configuration of transformers; those of one inside another under its name."""
    inner = {k: v for k, v in vars(config).items() if hasattr(v, "to_dict")}
    given = {k: v for k, v in config.to_dict().items() if k not in inner}
    try:
        defaults = type(config)().to_dict()
    except (TypeError, ValueError):  # one that cannot be made of nothing
        defaults = dict.fromkeys(given)
    found = _changed(given, defaults)
    for name, part in inner.items():
        found |= _under(name, config_settings(part))
    return found


def processor_settings(processor: Any) -> dict[str, Any]:
    """How an image processor of transformers makes tensors of images."""
    kept = ("do_", "size", "crop", "image_mean", "image_std", "resample", "rescale")
    return {k: _plain(v) for k, v in processor.to_dict().items() if k.startswith(kept)}


def tokenizer_sha256(tokenizer: Any) -> str:
    """Of its rules and vocabulary, where there are no texts to try it on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    rules = {k: v for k, v in rules.items() if k not in ("truncation", "padding")}  # left over from the last call
    return sha256_of([rules, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id])


def network_identity(name: str, module: nn.Module, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Weights and settings of a network, and the strength of the LoRA on it, if any, which is no weight.

    left_out: beginnings of the names of weights that take no part.
    """
    found = {"weights": weights_sha256({name: module}, left_out)} | (settings_of(module) if hasattr(module, "config") else {})
    scales = {n: m.scaling for n, m in module.named_modules() if isinstance(getattr(m, "scaling", None), dict) and m.scaling}
    if scales:
        found["lora_scale"] = sha256_of(scales)
    return _under(name, found)


def scheduler_identity(scheduler: Any) -> dict[str, Any]:
    """What images depend on of a scheduler: its class and all of its settings."""
    return _under("scheduler", settings_of(scheduler))


def tokens_identity(pipe: Any, texts: Sequence[str]) -> dict[str, Any]:
    """What the tokenizers of a pipeline make of texts; whatever else their files hold changes nothing."""
    found: dict[str, Any] = {}
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None:
            continue
        digest = hashlib.sha256()
        for start in range(0, len(texts), 4096):
            block = list(texts[start : start + 4096])
            digest.update(json.dumps(tokenizer(block, truncation=False, padding=False, verbose=False).input_ids).encode())
        kept = ("model_max_length", "pad_token_id", "padding_side", "truncation_side")
        found |= _under(name, {"tokens": digest.hexdigest()} | {k: getattr(tokenizer, k) for k in kept})
    return found


def pipeline_identity(
    pipe: Any,
    networks: Iterable[str] | None = None,
    scheduler: bool = True,
    call: bool = True,
    left_out: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """Networks (names; None: all), the scheduler, and, where the pipeline is called as a whole, what it itself is told.

    left_out: see network_identity, by network.
    """
    found: dict[str, Any] = {"pipeline": type(pipe).__name__}
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, nn.Module) and (networks is None or name in networks):
            found |= network_identity(name, component, (left_out or {}).get(name, ()))
    if scheduler:
        found |= scheduler_identity(pipe.scheduler)
    if call:
        told = ("force_zeros_for_empty_prompt", "requires_aesthetics_score", "is_distilled")
        found |= {key: pipe.config[key] for key in told if pipe.config.get(key) is not None}
    return found


def differences(found: Mapping[str, Any], needed: Mapping[str, Any], causes: Mapping[str, str] | None = None) -> list[str]:
    """What differs, one phrase a key: `vae.scaling_factor is 0.18, needed 0.13`; of hashes only that they differ.

    causes: {end of a key: key}; where the latter differs, the former differs because of it and is left out.

    >>> differences({"dtype": "float32", "steps": 1}, {"dtype": "bfloat16", "steps": 1})
    ["dtype is 'float32', needed 'bfloat16'"]
    """
    different = [k for k in sorted(found.keys() | needed.keys()) if found.get(k) != _plain(needed.get(k))]
    active = tuple(end for end, cause in (causes or {}).items() if cause in different)
    caused = {k for k in different if k.endswith(active)}
    return [_phrase(k, found.get(k), _plain(needed.get(k))) for k in different if k not in caused]


def _changed(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    changed = {k: v for k, v in given.items() if k in defaults and _plain(v) != _plain(defaults[k])}
    return {k: _plain(v) for k, v in changed.items() if not k.startswith("_") and k not in NO_EFFECT}


def _phrase(key: str, found: Any, needed: Any) -> str:
    if _is_hash(found) and _is_hash(needed):
        return f"{key} differ" if key.endswith("s") else f"{key} differs"
    return f"{key} is {_short(found)}, needed {_short(needed)}"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def _short(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:40]}..."


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists there."""
    return json.loads(json.dumps(value, default=str))


def _under(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": _plain(value) for key, value in found.items()}
