"""Seconds a picture, of all models in turn.

The speed of a machine changes from one second to the next, by half and more where others use it too. So each model is timed
several times, all of them at about the same moments, and medians are compared. Nothing runs beside it: threads of Python that
run side by side wait for one another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ...images.sampler import Sampler
from ..digits.features import one_thread
from .drawing import blocks, is_guided

T = TypeVar("T")
TURNS = 2  # times that the first model draws a batch: it is slow
BATCHES = 3  # of each other one, before its first turn and after each


@dataclass(frozen=True)
class Timed:
    """Seconds a picture on one core, called as users do, prompt to pixels. text, decoder: of them the text encoder's and the
    decoder's. first: what the first model drew, uint8 (n, 3, h, w), from picture 0 on.
    """

    seconds: tuple[float, ...]
    text: float
    decoder: float
    first: Tensor


def time_in_turn(samplers: Sequence[Sampler], captions: Sequence[str], seed: int, batch_size: int) -> Timed:
    """The pictures of the first captions. batch_size: rows of a network call, of which a guided one has two for each picture."""
    batches = [blocks(0, len(captions), max(1, batch_size // (1 + is_guided(s)))) for s in samplers]
    pipe = samplers[0].stock
    side, channels = pipe.unet.config["sample_size"], pipe.unet.config["in_channels"]
    taken: list[list[float]] = [[] for _ in samplers]
    text: list[float] = []
    decoder: list[float] = []
    drawn: list[Tensor] = []

    def once(model: int, turn: int) -> Tensor:
        batch = batches[model][turn % len(batches[model])]
        pixels, seconds = timed(lambda: samplers[model](batch, seed, captions[batch.start : batch.stop]))
        taken[model].append(seconds / len(batch))
        return pixels

    with one_thread(), torch.no_grad():
        for turn in range(TURNS + 1):
            for number in range(BATCHES):
                for model in range(1, len(samplers)):
                    once(model, number)
                some = captions[:batch_size]
                text.append(timed(partial(pipe.encode_prompt, some, "cpu", 1, False))[1] / len(some))
                latents = torch.zeros(batch_size, channels, side, side)
                decoder.append(timed(partial(pipe.vae.decode, latents))[1] / batch_size)
            if turn < TURNS:
                drawn.append(once(0, turn))
    pixels = torch.cat(drawn[: len(batches[0])])  # with few captions a turn draws the same ones again
    return Timed(tuple(map(statistics.median, taken)), statistics.median(text), statistics.median(decoder), pixels)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and the seconds that it took."""
    start = time.perf_counter()
    return call(), time.perf_counter() - start
