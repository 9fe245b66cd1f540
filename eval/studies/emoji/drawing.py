"""Pictures by the batch, on all cores at once, each batch on one of them.

So small a network is fastest so, and a picture is then the same to the bit on any number of cores: it depends on its own seed and
on the batch that it is in, which follows from its number alone.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.stock import StockPipeline

from ...images.sampler import Sampler
from ...metrics.frechet import GaussianStats, frechet_distance
from ...networks.extractors import Clip
from ..digits.features import one_thread

T = TypeVar("T")
MOST_THREADS = 8  # python itself runs one at a time


def cores() -> int:
    """How many batches are drawn at once: as many as torch would use threads (OMP_NUM_THREADS, else the cores), 8 at most."""
    return max(1, min(MOST_THREADS, torch.get_num_threads(), os.cpu_count() or 1))


class Workers:
    """Threads of Python that run jobs side by side, with one thread of torch each."""

    def __init__(self, count: int) -> None:
        self.count = count

    def run(self, jobs: Sequence[Callable[[], T]], label: str | None = None, sizes: Sequence[int] | None = None) -> list[T]:
        """What the jobs return, in their order. label, sizes: of a progress bar, which counts pictures. The first error of a job
        is raised, and no further job begun.
        """
        with one_thread(), ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            stop = threading.Event()

            def unless_stopped(job: Callable[[], T]) -> list[T]:
                if stop.is_set():
                    return []  # which nobody will read: the error that stopped it is raised
                try:
                    return [job()]
                except BaseException:
                    stop.set()
                    raise

            futures = {pool.submit(unless_stopped, job): size for job, size in zip(jobs, sizes or [1] * len(jobs), strict=True)}
            bar = tqdm(total=sum(futures.values()), desc=label, unit="image", disable=label is None)
            try:
                with bar:
                    for done in as_completed(futures):
                        done.result()
                        bar.update(futures[done])
            except BaseException:  # Ctrl-C comes to this thread
                stop.set()
                raise
            return [made for future in futures for made in future.result()]


@dataclass(frozen=True)
class Texts:
    """What text encoders make of n prompts: embeds (n, l, d) and of the empty one (1, l, d), as the pipeline takes them; units
    (n, d'), CLIP's unit vectors.
    """

    embeds: Tensor
    empty: Tensor
    units: Tensor


@dataclass(frozen=True)
class Drawn:
    """pixels uint8 (n, 3, h, w); units (n, d), CLIP's of the pictures."""

    pixels: Tensor
    units: Tensor

    def numbers(self, reference: GaussianStats, texts: Tensor) -> dict[str, float]:
        """fd and clip_score. texts (n, d): CLIP's unit vectors of the captions."""
        return {"fd": frechet_distance(GaussianStats.of(self.units), reference), "clip_score": clip_score(self.units, texts)}


def clip_score(units: Tensor, texts: Tensor) -> float:
    """The mean cosine of pictures and their captions, unit vectors (n, d) each: from -1 to 1, not times 100.

    >>> clip_score(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    0.5
    """
    return (units.double() * texts.double()).sum(1).mean().item()


def blocks(first: int, last: int, size: int) -> list[range]:
    """first .. last - 1 in ranges of `size` or, at the end, less.

    >>> blocks(0, 5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(i, min(i + size, last)) for i in range(first, last, size)]


def twin(pipe: StockPipeline) -> StockPipeline:
    """The same networks with a scheduler and a tokenizer of its own: those have a state, so two threads cannot share them."""
    twins = copy.copy(pipe)
    twins.scheduler, twins.tokenizer = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.tokenizer)
    return twins


def encode(pipe: StockPipeline, captions: Sequence[str], units: Tensor, batch_size: int, workers: Workers) -> Texts:
    """All n prompts once, for all models that share the text encoder. units (n, d): CLIP's of them."""
    parts = blocks(0, len(captions), batch_size)

    def embed(part: range) -> Tensor:
        with torch.no_grad():
            return twin(pipe).encode_prompt(captions[part.start : part.stop], "cpu", 1, False)[0]

    with torch.no_grad(), one_thread():
        empty = twin(pipe).encode_prompt([""], "cpu", 1, False)[0]
    found = workers.run([partial(embed, part) for part in parts])
    return Texts(torch.cat(found), empty, units)


def of_images(clip: Clip, pixels: Tensor, batch_size: int, workers: Workers) -> Tensor:
    """CLIP's unit vectors of pictures, (n, d)."""
    return torch.cat(workers.run([partial(clip.of_images, part) for part in pixels.split(batch_size)]))


def of_texts(clip: Clip, captions: Sequence[str], batch_size: int, workers: Workers) -> Tensor:
    """CLIP's unit vectors of captions, (n, d)."""
    clip.of_texts(captions[:1])  # which sets the tokenizer's padding and truncation: no thread has to, while another one reads
    parts = blocks(0, len(captions), batch_size)
    return torch.cat(workers.run([partial(clip.of_texts, captions[part.start : part.stop]) for part in parts]))


def is_guided(sampler: Sampler) -> bool:
    """Whether a network call has two rows for each picture, one of them for the empty prompt."""
    return sampler.call["guidance_scale"] > 1


def draw(
    sampler: Sampler, batches: Sequence[range], seed: int, texts: Texts, clip: Clip, workers: Workers, label: str | None = None
) -> Drawn:
    """The pictures of the numbers in `batches`, by a stock call of the pipeline for each batch, and CLIP's view of them. Picture
    i depends on the seed, its batch and row i of `texts`. UserError for NaN.
    """
    guided = is_guided(sampler)

    def one(batch: range) -> tuple[Tensor, Tensor]:
        own = replace(sampler, pipe=twin(sampler.stock))
        encoded: dict[str, Any] = {"prompt_embeds": texts.embeds[batch.start : batch.stop]}
        if guided:
            encoded["negative_prompt_embeds"] = texts.empty.expand(len(batch), -1, -1)
        pixels = own(batch, seed, encoded=encoded)
        return pixels, clip.of_images(pixels)

    found = workers.run([partial(one, batch) for batch in batches], label, [len(batch) for batch in batches])
    pixels, units = zip(*found, strict=True)
    return Drawn(torch.cat(pixels), torch.cat(units))
