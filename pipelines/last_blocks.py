"""The last third of a transformer's blocks as a role of its own, on what the teacher's call at the same x_t has made before them.

What up_half.py is to U-Nets: a posterior, or a fake score, costs a third of the blocks, forward and backward, in place of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from diffusers import ModelMixin
from torch import Tensor, nn

from . import up_half
from .adapters import AdapterHead, Anatomy, Role
from .common.errors import UserError
from .denoiser import AllSeen
from .up_half import UpHalf


@dataclass(frozen=True)
class BlockInputs:
    """What a network was called with, x (b, c, h, w), time (b,) and condition, and what its last block but a third put out."""

    x: Tensor
    time: Tensor
    condition: Mapping[str, Tensor]
    out: Tensor | tuple[Tensor, ...]

    def second_half(self) -> BlockInputs:
        """Of the batch: the conditional samples of a guided call."""
        half = len(self.x) // 2
        out = self.out[half:] if isinstance(self.out, Tensor) else tuple(v[half:] for v in self.out)
        return BlockInputs(self.x[half:], self.time[half:], {k: v[half:] for k, v in self.condition.items()}, out)


def split_blocks(network: ModelMixin, lists: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The names of all blocks in the order that they run: those before the last third, and that; UserError for a single one.

    lists: the network's lists of blocks, in the order that they run.
    """
    names = [f"{name}.{i}" for name in lists for i, _ in network.get_submodule(name).named_children()]
    if len(names) < 2:
        raise UserError(f"network=shared: this {type(network).__name__} has a single block, of which nothing can be shared")
    first = len(names) - max(1, len(names) // 3)
    return names[:first], names[first:]


def layers_of(network: ModelMixin, lists: tuple[str, ...], endings: tuple[str, ...]) -> list[str]:
    """The full names of the layers of the last third whose names end so."""
    last = tuple(f"{name}." for name in split_blocks(network, lists)[1])
    names = (name for name, _ in network.named_modules() if name.startswith(last))
    return [name for name in names if name.endswith(tuple(f".{ending}" for ending in endings))]


def layers_of_last_part(network: ModelMixin, anatomy: Anatomy, endings: tuple[str, ...]) -> list[str]:
    """Of a transformer's last third, or of a U-Net's way up, the full names of the layers whose names end so."""
    return layers_of(network, anatomy.repeats, endings) if anatomy.repeats else up_half.layers_of(network, endings)


def last_part(role: Role, out_channels: int) -> LastBlocks | UpHalf:
    """That part of the role's network with a last layer of its own."""
    lists = role.shared.anatomy.repeats
    return LastBlocks(role, out_channels, lists) if lists else UpHalf(role, out_channels)


class InPlaceOf(nn.Module):
    """A module that stands for a block; what else the network asks of it, it asks of the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple: no part of this module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)


class Watched(InPlaceOf):
    """Keeps what the block puts out; stop: then ends the call of the network. A hook would be missed by a compiled block."""

    def __init__(self, block: nn.Module, stop: bool) -> None:
        super().__init__(block)
        self.stop = stop
        self.seen: list[Any] = []

    def forward(self, *args: Any, **given: Any) -> Any:
        self.seen.append(self._block[0](*args, **given))
        if self.stop:
            raise AllSeen
        return self.seen[-1]


class Given(InPlaceOf):
    """Puts out what the block did in the teacher's call."""

    def __init__(self, block: nn.Module, out: Tensor | tuple[Tensor, ...]) -> None:
        super().__init__(block)
        self.out = out

    def forward(self, *args: Any, **given: Any) -> Any:
        if isinstance(self.out, tuple):
            return self.out
        # Z-Image pads its sequences to the longest of the batch, of which a guided one has more
        return self.out[:, : next(iter((*args, *given.values()))).shape[1]]


@contextmanager
def blocks_of(network: ModelMixin, lists: tuple[str, ...], names: list[str], replaced: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the network's lists hold the blocks of these names alone, or what is to replace them."""
    whole = {name: network.get_submodule(name) for name in lists}
    kept = {name: [n for n in names if n.startswith(f"{name}.")] for name in lists}
    made = {name: [replaced[n] if n in replaced else network.get_submodule(n) for n in kept[name]] for name in lists}
    network._modules.update({name: nn.ModuleList(blocks) for name, blocks in made.items()})
    try:
        yield
    finally:
        network._modules.update(whole)


def reading(call: Callable[..., Any], lists: tuple[str, ...]) -> Callable[..., Any]:
    """`call` of an Anatomy, that knows return_features: then its result has `features`, BlockInputs, beside its sample. "only":
    the last third is not run, and there is no sample.
    """

    def read(
        network: ModelMixin,
        x: Tensor,
        time: Tensor,
        condition: Mapping[str, Tensor],
        return_features: bool | Literal["only"] = False,
    ) -> Any:
        if not return_features:
            return call(network, x, time, condition)
        before, last = split_blocks(network, lists)
        watched = Watched(network.get_submodule(before[-1]), return_features == "only")
        sample = None
        with blocks_of(network, lists, before + last, {before[-1]: watched}), suppress(AllSeen):
            sample = call(network, x, time, condition).sample
        return SimpleNamespace(sample=sample, features=BlockInputs(x, time, condition, watched.seen[0]))

    return read


class LastBlocks(AdapterHead):
    """The last third of a shared transformer under a role's adapter, with a last layer of its own: BlockInputs -> (b,
    out_channels, h, w) in float32, zero at first. The role's adapter has to lie on that third alone (layers_of).
    """

    on_teacher_features = True

    def __init__(self, role: Role, out_channels: int, lists: tuple[str, ...]) -> None:
        super().__init__(role, out_channels)
        self.lists = lists

    def enable_gradient_checkpointing(self) -> None:
        self.role.enable_gradient_checkpointing()

    def forward(self, features: BlockInputs) -> Tensor:  # type: ignore[override]  # what it reads is what has been made of x_t
        network = self.role.shared.network
        before, last = split_blocks(network, self.lists)
        given = Given(network.get_submodule(before[0]), features.out)
        with blocks_of(network, self.lists, [before[-1], *last], {before[-1]: given}):
            return super().forward(features.x, features.time, **features.condition)
