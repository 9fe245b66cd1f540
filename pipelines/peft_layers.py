"""The one place that reaches into peft: how LoRA layers are found in a network, switched and named.

peft's own `set_adapter` and `disable_adapters` are not used for switching: they also flip requires_grad, so that a backward pass
after a switch finds no graph. What is used instead are two private attributes of its layers; tests/pipelines/test_peft_layers.py
holds the contract, so that a version of peft that breaks it is found out by name.
"""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.lora import LoraLayer
from torch import nn


def layers_with_adapters(network: nn.Module) -> dict[str, LoraLayer]:
    """The layers on which adapters sit, by name; the adapters on one are the keys of its `r`."""
    return {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer)}


def switch(layers: Iterable[LoraLayer], name: str | None) -> None:
    """Run these layers with one adapter alone, or with none. No parameter changes, nor whether it requires a gradient."""
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


def of_adapters(key: str) -> bool:
    """Whether a parameter or module, by its name in the network, belongs to an adapter."""
    return ".lora_" in key


def of_adapter(key: str, name: str) -> bool:
    """Whether a parameter, by its name in the network, belongs to the adapter of this name."""
    return f".{name}." in key


def own_layer(layer: nn.Module) -> nn.Module:
    """A network's own layer, also where adapters sit on it."""
    return getattr(layer, "base_layer", layer)


def own_name(key: str) -> str:
    """The name in the network, as it is without adapters, of one of its own layers or weights."""
    return key.replace(".base_layer", "")
