"""A U-Net of diffusers in two parts: what its way down hands to its way up, so that another role runs the way up alone.

A posterior on the teacher's frozen encoder reads what the teacher's own call at the same x_t has just made. It costs the way up,
forward and backward, where an adapter on the whole network costs both ways.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from .adapters import AdapterHead, Role, in_float32, last_layer, output
from .denoiser import AllSeen, Condition, Denoiser
from .noise import Level


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
    network: ModelMixin,
    x: Tensor,
    time: Tensor,
    condition: Mapping[str, Tensor],
    return_features: bool | Literal["only"] = False,
    **options: Any,
) -> Any:
    """As adapters.output; with return_features the result has `features`, an UpInputs, beside its sample. "only": the way up is
    not run, and there is no sample.
    """
    if not return_features:
        return output(network, x, time, condition, **options)
    seen: list[dict[str, Any]] = []
    sample = None
    with ExitStack() as hooks:
        for block in network.up_blocks:
            hook = block.register_forward_pre_hook(lambda module, args, given: seen.append(dict(given)), with_kwargs=True)
            hooks.callback(hook.remove)
            if return_features == "only":  # each block hands on what it was given
                block.forward = lambda hidden_states, **given: hidden_states
                hooks.callback(block.__dict__.pop, "forward")
        if return_features == "only":
            hooks.callback(network.conv_norm_out.register_forward_pre_hook(_stop).remove)
            hooks.enter_context(suppress(AllSeen))
        sample = output(network, x, time, condition, **options).sample
    inputs = [given.pop("hidden_states") for given in seen]
    return SimpleNamespace(sample=sample, features=UpInputs(inputs[0], tuple(seen)))


def _stop(module: nn.Module, args: Any) -> None:
    raise AllSeen


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


class WayDown(nn.Module):
    """What a denoiser's network hands to its last part, of one call without guidance and without a graph."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    @torch.no_grad()
    def forward(self, x_t: Tensor, level: Level, condition: Condition = None) -> Any:
        """x_t (b, c, h, w) -> what an UpHalf or LastBlocks reads."""
        how = True if self.denoiser.collective else "only"  # the weights of a sharded network are given back at its end
        options = (condition or {}) | {"return_features": how}
        return self.denoiser.network(*self.denoiser.preconditioner.inputs(x_t, level), **options).features


class UpDenoiser(nn.Module):
    """A score network on the teacher's features: x0 (b, c, h, w) in float32. It starts as the teacher without guidance."""

    on_teacher_features = True

    def __init__(self, part: UpHalf | AdapterHead, teacher: Denoiser) -> None:
        super().__init__()
        self.way_up, self.preconditioner = part, teacher.preconditioner
        with torch.no_grad():
            for mine, theirs in zip(part.conv_out.parameters(), part.replaced.parameters(), strict=True):
                mine.copy_(theirs)

    def forward(self, x_t: Tensor, level: Level, features: Any) -> Tensor:
        """features: of x_t at this level."""
        return self.preconditioner.x0(self.way_up(features), x_t, level)
