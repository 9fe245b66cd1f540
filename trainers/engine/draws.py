"""All randomness of training as a function of (seed, key): a resumed run draws what an uninterrupted one would have.

Every process makes the random numbers of the *whole* batch, once for an update, and keeps its rows, so that any number of
processes and any number of micro-batches give the same update. The masks of a network's dropout layers are the exception: torch
draws them layer by layer, so each micro-batch has its own, from a seed of its own.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from torch import Tensor

from pipelines.common.errors import UserError
from pipelines.denoiser import Condition

from ..data.augment import NUMBERS, augment
from ..data.examples import Examples, without


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from any tuple of numbers and names; the same on every machine.

    >>> derive_seed(0, "init", "student") == derive_seed(0, "init", "student") != derive_seed(0, "init", "posterior")
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def split(batch_size: int, world_size: int, micro_batch_size: int | None) -> tuple[int, int]:
    """(each process's share of the batch, the micro-batches it falls into); UserError where they are not of one size.

    >>> split(batch_size=64, world_size=2, micro_batch_size=8), split(64, 2, None)
    ((32, 8), (32, 32))
    """
    if batch_size % world_size:
        raise UserError(f"batch_size={batch_size} is not a multiple of the number of processes, {world_size}")
    share = batch_size // world_size
    if share % (micro_batch_size or share):
        raise UserError(
            f"micro_batch_size={micro_batch_size} does not divide each process's share of the batch, {share} "
            f"(batch_size={batch_size} over {world_size} processes)"
        )
    return share, micro_batch_size or share


class DrawSource:
    """Makes the draws of each update.

    shape: (c, h, w) of z and eps. examples: where x0 and conditions come from; `dropout` of the conditions become null_condition.
    augmentation: probability of each change to x0 (data/augment.py), of which condition["augment_labels"] then tells.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        shape: tuple[int, int, int],
        device: torch.device,
        examples: Examples | None = None,
        null_condition: Condition = None,
        dropout: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
        augmentation: float = 0.0,
    ) -> None:
        share, self.micro_batch_size = split(batch_size, world_size, micro_batch_size)
        self.seed, self.batch_size, self.shape, self.device = seed, batch_size, shape, device
        self.examples, self.null_condition, self.dropout = examples, null_condition, dropout
        self.augmentation = augmentation
        self.first_row, self.share = rank * share, share

    def batch(self, key: tuple[int | str, ...], progress: float) -> list[MicroDraw]:
        """This process's micro-batches for the update named by `key`."""
        numbers = Numbers(self, (self.seed, *key))
        return [MicroDraw(self, numbers, progress, start) for start in range(0, self.share, self.micro_batch_size)]


class Numbers:
    """The random numbers of one update, this process's rows of them: all micro-batches take theirs from here.

    Each is drawn for the whole batch, once. What has many numbers a sample is drawn when the first micro-batch asks for it and
    forgotten when the last has taken its rows, so accumulating needs no more memory than one batch's numbers.
    """

    def __init__(self, source: DrawSource, key: tuple[int | str, ...]) -> None:
        self.source, self.key = source, key
        self.mine = slice(source.first_row, source.first_row + source.share)
        self._held: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        u = self._uniform("u")
        # ndtri and log need u inside (0, 1); rand gives [0, 1)
        u = u.clamp_min(torch.finfo(u.dtype).tiny)
        self.u, self.shared_u = u[self.mine], u[0]
        if source.examples is not None:
            self.index = self.drawn_examples(source.examples, "data")
        if source.dropout:
            self.dropped = self._uniform("label_dropout")[self.mine] < source.dropout

    def normal(self, start: int, name: str, *shape: int) -> Tensor:
        """(m, *shape) for the micro-batch that begins at row `start` of this process's share."""
        source, stream = self.source, (name, shape)
        rows = self._held.pop(stream, None)
        if rows is None:
            size = (source.batch_size, *shape)
            rows = torch.randn(size, generator=self._generator(name), device=source.device)[self.mine]
            if source.share < source.batch_size:
                rows = rows.clone()  # a view would keep the rows of all processes in memory
        stop = start + source.micro_batch_size
        if stop < source.share:
            self._held[stream] = rows
        return rows[start:stop]

    def drawn_examples(self, examples: Examples, name: str) -> Tensor:
        """(share,): which of the examples are this process's."""
        size = (self.source.batch_size,)
        return torch.randint(len(examples), size, generator=self._generator(name, "cpu"))[self.mine]

    @cached_property
    def step_u(self) -> Tensor:
        """(batch_size,): of the whole batch, asked for by students of several steps alone."""
        return self._uniform("step")

    def _uniform(self, name: str) -> Tensor:
        return torch.rand(self.source.batch_size, generator=self._generator(name), device=self.source.device)

    def _generator(self, name: str, device: str | None = None) -> torch.Generator:
        return torch.Generator(device or self.source.device).manual_seed(derive_seed(*self.key, name))


class MicroDraw:
    """One micro-batch: rows [start, start + micro_batch_size) of this process's share. See objectives.base.Draw."""

    def __init__(self, source: DrawSource, numbers: Numbers, progress: float, start: int) -> None:
        self._numbers, self._start = numbers, start
        self.progress, self.first_row = progress, source.first_row
        rows = slice(start, start + source.micro_batch_size)
        self.z, self.eps = self.normal("z", *source.shape), self.normal("eps", *source.shape)
        self.u, self.shared_u = numbers.u[rows], numbers.shared_u
        self._rows = rows
        self.x0: Tensor | None = None
        self.condition: Condition = None
        if source.examples is not None:
            x0, condition = self._examples(source.examples, numbers.index)
            if condition is not None and source.dropout:
                if source.null_condition is None:
                    raise ValueError("dropout of conditions needs the null_condition that takes their place")
                condition = without(condition, source.null_condition, numbers.dropped[rows])
            if source.augmentation:
                if x0 is None:
                    raise ValueError("augmentation changes data, and these examples have none")
                x0, labels = augment(x0, self.normal("augment", NUMBERS), source.augmentation)
                condition = (condition or {}) | {"augment_labels": labels}
            self.x0, self.condition = x0, condition

    def _examples(self, examples: Examples, index: Tensor) -> tuple[Tensor | None, Condition]:
        """The rows of this micro-batch, where the source is."""
        x0, condition = examples.rows(index[self._rows])
        device = self._numbers.source.device
        moved = None if condition is None else {k: v.to(device) for k, v in condition.items()}
        return None if x0 is None else x0.to(device), moved

    def further_data(self, k: int) -> tuple[Tensor, Condition]:
        source = self._numbers.source
        if source.examples is None or source.dropout or source.augmentation:
            raise ValueError("further data are plain examples: neither dropped nor augmented, and there must be some")
        x0, condition = self._examples(source.examples, self._numbers.drawn_examples(source.examples, f"data_{k}"))
        if x0 is None:
            raise ValueError("further data are asked for, and the examples have none")
        return x0, condition

    @property
    def step_u(self) -> Tensor:
        return self._numbers.step_u[self._numbers.mine][self._rows]

    @property
    def shared_step_u(self) -> Tensor:
        return self._numbers.step_u[0]

    @property
    def seed(self) -> int:
        """For torch's global generator, which dropout draws from: masks are the micro-batch's own."""
        return derive_seed(*self._numbers.key, "dropout", self.first_row + self._start)

    def normal(self, name: str, *shape: int) -> Tensor:
        return self._numbers.normal(self._start, name, *shape)
