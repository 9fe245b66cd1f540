"""A U-Net of diffusers in two parts: what its way down hands to its way up, so that another role runs the way up alone.

A posterior on the teacher's frozen encoder reads what the teacher's own call at the same x_t has just made. It costs the way up,
forward and backward, where an adapter on the whole network costs both ways.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn

from .adapters import Role, in_float32, last_layer, output


@dataclass(frozen=True)
class UpInputs:
    """What a network's up blocks were called with: the first one's input (b, c, h, w), and each one's other arguments (the maps
    that skip to it, the embedding of time, text).
    """

    first: Tensor
    given: tuple[Mapping[str, Any], ...]

    def second_half(self) -> UpInputs:
        """Of the batch: the conditional samples of a guided call."""
        half = len(self.first) // 2

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(cut, value))
            return value[half:] if isinstance(value, Tensor) else value

        return UpInputs(self.first[half:], tuple({k: cut(v) for k, v in one.items()} for one in self.given))


def call(
    network: ModelMixin, x: Tensor, time: Tensor, condition: Mapping[str, Tensor], return_features: bool = False, **options: Any
) -> Any:
    """As adapters.output; with return_features the result has `features`, an UpInputs, beside its sample."""
    if not return_features:
        return output(network, x, time, condition, **options)
    seen: list[dict[str, Any]] = []
    with ExitStack() as hooks:
        for block in network.up_blocks:
            hook = block.register_forward_pre_hook(lambda module, args, given: seen.append(dict(given)), with_kwargs=True)
            hooks.callback(hook.remove)
        sample = output(network, x, time, condition, **options).sample
    inputs = [given.pop("hidden_states") for given in seen]
    return SimpleNamespace(sample=sample, features=UpInputs(inputs[0], tuple(seen)))


def layers_of(network: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """The full names of the layers of the way up whose names end so."""
    names = (name for name, _ in network.named_modules() if name.startswith("up_blocks."))
    return [name for name in names if name.endswith(tuple(f".{ending}" for ending in endings))]


class UpHalf(nn.Module):
    """The way up of a shared U-Net under a role's adapter, with a last layer of its own: UpInputs -> (b, out_channels, h, w) in
    float32, zero at first. The role's adapter has to lie on the way up alone (layers_of).
    """

    on_teacher_features = True

    def __init__(self, role: Role, out_channels: int) -> None:
        super().__init__()
        self.role, self.out_channels = role, out_channels
        network = role.shared.network
        # a copy, which a network that is split over processes does not gather for us
        self.norm = copy.deepcopy(network.conv_norm_out).requires_grad_(False)
        own = last_layer(network)
        if not isinstance(own, nn.Conv2d):
            raise ValueError(f"a {type(network).__name__} ends with a {type(own).__name__}; a convolution takes its place here")
        height, width = own.kernel_size
        self.conv_out = nn.Conv2d(own.in_channels, out_channels, (height, width), padding=own.padding)  # type: ignore[arg-type]  # of any length
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    @property
    def replaced(self) -> nn.Module:
        """The layer in whose place conv_out is."""
        return last_layer(self.role.shared.network)

    def enable_gradient_checkpointing(self) -> None:
        self.role.enable_gradient_checkpointing()

    def forward(self, features: UpInputs) -> Tensor:
        h = features.first
        with self.role.shared.running(self.role.name) as network:
            for block, given in zip(network.up_blocks, features.given, strict=True):
                h = block(hidden_states=h, **given)
            h = network.conv_act(self.norm(h.to(self.norm.weight.dtype)))
        with in_float32(self.conv_out):
            return self.conv_out(h.to(self.conv_out.weight.dtype))
