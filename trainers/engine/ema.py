"""Exponential moving average of a network's trained parameters, counted in updates of that network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Decay = Callable[[int], float]


def constant_decay(decay: float) -> Decay | None:
    """`decay`, but at most (1 + n) / (10 + n), so that an early average forgets its first weights; None for 0."""
    return (lambda n: min(decay, (1 + n) / (10 + n))) if decay else None


def halflife_decay(halflife: int, batch_size: int, rampup: float = 0.05) -> Decay:
    """What halves a weight's share after `halflife` images, or after 5 % of the images seen so far if that is less (EDM)."""
    return lambda n: 0.5 ** (batch_size / min(halflife, n * batch_size * rampup)) if n else 0.0


class Ema:
    """average <- d average + (1 - d) parameter, d = decay(n) at the n-th update (n = 0, 1, ...).

    With decay None the average is the parameter itself: no copy is held, and swapping does nothing.
    """

    def __init__(self, module: nn.Module, decay: Decay | None) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        kept = trained_parameters(module) if decay else {}
        self.average = {n: p.detach().clone() for n, p in kept.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the network: average <- decay average + (1 - decay) weights."""
        self.updates += 1
        if self.decay is None or not self.average:
            return
        decay = self.decay(self.updates - 1)
        parameters = trained_parameters(self.module)
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [parameters[n].detach() for n in self.average], 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """The module with the averages in place of its parameters, which come back afterwards."""
        self._swap()
        try:
            yield self.module
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        parameters = trained_parameters(self.module)
        for name, average in self.average.items():
            kept = parameters[name].detach().clone()
            parameters[name].copy_(average)
            average.copy_(kept)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those that require a gradient, by name."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}
