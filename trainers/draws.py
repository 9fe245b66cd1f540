"""All randomness of training as a function of (seed, key): a resumed run draws what an uninterrupted one would have.

Every process makes the random numbers of the *whole* batch and keeps its rows, so that any number of processes and any
number of micro-batches give the same update.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pipelines.denoiser import Condition
from pipelines.errors import UserError

from .augment import NUMBERS, augment
from .data import Examples, without


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from any tuple of numbers and names; the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class DrawSource:
    """Makes the draws of each update.

    shape: (c, h, w) of z and eps. examples: where x0 and conditions come from; `dropout` of the conditions become null_condition.
    augmentation: probability of each change to x0 (augment.py), of which condition["augment_labels"] then tells.
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
        if batch_size % world_size:
            raise UserError(f"batch_size={batch_size} is not a multiple of the number of processes, {world_size}")
        share = batch_size // world_size
        self.micro_batch_size = micro_batch_size or share
        if share % self.micro_batch_size:
            raise UserError(
                f"micro_batch_size={self.micro_batch_size} does not divide each process's share of the batch, {share} "
                f"(batch_size={batch_size} over {world_size} processes)"
            )
        self.seed, self.batch_size, self.shape, self.device = seed, batch_size, shape, device
        self.examples, self.null_condition, self.dropout = examples, null_condition, dropout
        self.augmentation = augmentation
        self.first_row, self.share = rank * share, share

    def batch(self, key: tuple[int | str, ...], progress: float) -> list[MicroDraw]:
        """This process's micro-batches for the update named by `key`."""
        return [
            MicroDraw(self, (self.seed, *key), progress, self.first_row + start)
            for start in range(0, self.share, self.micro_batch_size)
        ]


class MicroDraw:
    """One micro-batch: rows [row, row + micro_batch_size) of the whole batch. See objectives.base.Draw."""

    def __init__(self, source: DrawSource, key: tuple[int | str, ...], progress: float, row: int) -> None:
        self._source, self._key = source, key
        self._rows = slice(row, row + source.micro_batch_size)
        self.progress, self.first_row = progress, source.first_row
        self.z, self.eps = self.normal("z", *source.shape), self.normal("eps", *source.shape)
        u = self._uniform("u")
        # ndtri and log need u inside (0, 1); rand gives [0, 1)
        u = u.clamp_min(torch.finfo(u.dtype).tiny)
        self.u, self.shared_u = u[self._rows], u[0]
        self.x0, self.condition = None, None
        if source.examples is not None:
            index = torch.randint(len(source.examples), (source.batch_size,), generator=self._generator("data", "cpu"))
            x0, condition = source.examples.rows(index[self._rows])
            self.x0 = None if x0 is None else x0.to(source.device)
            if condition is not None:
                condition = {k: v.to(source.device) for k, v in condition.items()}
            if condition is not None and source.dropout:
                dropped = self._uniform("label_dropout")[self._rows] < source.dropout
                condition = without(condition, source.null_condition, dropped)
            if source.augmentation:
                self.x0, labels = augment(self.x0, self.normal("augment", NUMBERS), source.augmentation)
                condition = (condition or {}) | {"augment_labels": labels}
            self.condition = condition

    @property
    def seed(self) -> int:
        """For torch's global generator, which dropout draws from."""
        return derive_seed(*self._key, "dropout", self._rows.start)

    def normal(self, name: str, *shape: int) -> Tensor:
        source = self._source
        whole = torch.randn(source.batch_size, *shape, generator=self._generator(name), device=source.device)
        return whole[self._rows]

    def _uniform(self, name: str) -> Tensor:
        return torch.rand(self._source.batch_size, generator=self._generator(name), device=self._source.device)

    def _generator(self, name: str, device: str | None = None) -> torch.Generator:
        return torch.Generator(device or self._source.device).manual_seed(derive_seed(*self._key, name))
