"""What is asked for in protocol emoji-2k, and the real pictures: a function of the pictures in assets/emoji alone.

Of the emoji in the groups that the teacher is trained on, those not held out, each style of each is one picture. They are sorted
by the sha256 of "<code>|<style>"; the same hash chooses one of the six backgrounds. All of them so, and then all of them again on
the next background, are the reference; their whole captions, "red apple, noto style, on light blue", in this order are the
prompts, as many as the protocol has images. The held-out ones, made so on each of the six backgrounds, show what new pictures of
the same kind measure.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines import emoji
from pipelines.common.errors import UserError
from pipelines.data.images import to_pixels


@dataclass(frozen=True)
class Captioned:
    """pixels uint8 (n, 3, 32, 32) and the caption of each: its name."""

    pixels: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def reference(pictures: emoji.Pictures) -> Captioned:
    """The pictures that the teacher is trained on, each on two backgrounds. The first n captions are the prompts."""
    return _captioned(pictures.part(held_out=False, groups=emoji.GROUPS), turns=2)


def held_out(pictures: emoji.Pictures) -> Captioned:
    """The pictures of the same groups that nothing was trained on, each on all backgrounds."""
    return _captioned(pictures.part(held_out=True, groups=emoji.GROUPS), turns=len(emoji.BACKGROUNDS))


def prompts(real: Captioned, n: int) -> list[str]:
    """The first n captions. UserError where there are fewer."""
    if n > len(real):
        raise UserError(f"num-images is {n:,}; there are captions of {len(real):,} pictures, so at most as many can be drawn")
    return real.captions[:n]


def _captioned(pictures: emoji.Pictures, turns: int) -> Captioned:
    """turns: how many backgrounds each is put on, from the one of its hash on; a turn of all before the next."""
    digests = [hashlib.sha256(f"{c}|{s}".encode()).digest() for c, s in zip(pictures.codes, pictures.styles, strict=True)]
    order = sorted(range(len(pictures)), key=lambda i: digests[i])
    rows = order * turns
    colours = emoji.palette()
    backgrounds = [(int.from_bytes(digests[i][-4:]) + turn) % len(colours) for turn in range(turns) for i in order]
    pixels = to_pixels(emoji.on_background(pictures.rgba[rows], colours[torch.tensor(backgrounds, dtype=torch.long)]))
    return Captioned(pixels, [pictures.names[i] for i in rows])
