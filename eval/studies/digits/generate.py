"""Images from a pipeline: every image has its own seed, so that no number depends on the batch size."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.data.images import to_pixels

from ...images.seeds import image_generator, image_label


@dataclass(frozen=True)
class Generated:
    """pixels uint8 (n, c, h, w); labels long (n,) or None; seconds of sampling; calls: network evaluations an image."""

    pixels: Tensor
    labels: Tensor | None
    seconds: float
    calls: float

    @property
    def seconds_per_image(self) -> float:
        """The mean over the set."""
        return self.seconds / len(self.pixels)


class Draws(Protocol):
    """What draws images: EDMPipeline, or anything that is called like it."""

    @property
    def unet(self) -> nn.Module:
        """The network whose evaluations are counted."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def generate(
    pipe: Draws,
    n: int,
    seed: int = 0,
    batch_size: int = 500,
    num_classes: int | None = None,
    progress: str | None = None,
) -> Generated:
    """Draw n images with the pipeline's own default sampler.

    pipe: called as pipe(batch_size=, generator=[one an image], class_labels=, output_type="pt"); returns `.images`,
    float (b, c, h, w) in [0, 1]; pipe.unet is the network whose evaluations are counted. num_classes: draw labels for a
    conditional model. progress: what the progress bar is called; None for no bar.
    ValueError: sizes below 1, or images that are not finite, of the wrong shape or outside [0, 1].
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got n={n}, batch_size={batch_size}")
    parts, labels, seconds = [], [], 0.0
    bar = tqdm(total=n, desc=progress, unit="image", disable=progress is None)
    with bar, _count_calls(pipe.unet) as counter:
        for start in range(0, n, batch_size):
            indices = range(start, min(start + batch_size, n))
            classes = torch.tensor([image_label(seed, i, num_classes) for i in indices]) if num_classes else None
            begin = time.perf_counter()
            images = pipe(
                batch_size=len(indices),
                generator=[image_generator(seed, i) for i in indices],
                class_labels=classes,
                output_type="pt",
            ).images.cpu()  # the copy also waits for an asynchronous device, which the clock must include
            seconds += time.perf_counter() - begin
            parts.append(_checked_pixels(images, len(indices)))
            if classes is not None:
                labels.append(classes)
            bar.update(len(indices))
    return Generated(torch.cat(parts), torch.cat(labels) if labels else None, seconds, counter[0] / n)


def _checked_pixels(images: Tensor, b: int) -> Tensor:
    """Float images in [0, 1] -> uint8, rounded."""
    if images.ndim != 4 or len(images) != b or not images.is_floating_point():
        raise ValueError(f"the pipeline returned {images.dtype} {tuple(images.shape)}, expected float ({b}, c, h, w)")
    pixels = to_pixels(images.float() * 2 - 1)  # refuses NaN and infinities
    low, high = images.min().item(), images.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"the pipeline returned values in [{low:.3g}, {high:.3g}]; output_type='pt' means [0, 1]")
    return pixels


@contextmanager
def _count_calls(network: nn.Module) -> Iterator[list[int]]:
    """Counts evaluations of the network, one a sample of the batch, into the single entry of the list."""
    counter = [0]

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        counter[0] += len(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 4))

    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counter
    finally:
        handle.remove()
