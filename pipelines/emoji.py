"""The emoji of assets/emoji: pictures with transparency, names, backgrounds, captions, and which of them are held out."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .assets import EMOJI, remedy, shown
from .common.errors import UserError

FILE = EMOJI / "emoji_32.parquet"
SIZE = 32
STYLES = ("noto", "twemoji", "fluent flat", "fluent 3d")
# What the teacher is trained on: a person can name these at 32x32. The autoencoder and CLIP see all groups.
GROUPS = ("smileys-emotion", "animals-nature", "food-drink")
BACKGROUNDS = {
    "light blue": (200, 222, 246),
    "light pink": (248, 212, 222),
    "light green": (208, 236, 208),
    "light yellow": (250, 242, 200),
    "light purple": (222, 208, 244),
    "light gray": (226, 226, 228),
}
HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class Pictures:
    """rgba uint8 (n, 4, 32, 32) and, for each, its name ("red apple"), style, group, keywords and emoji code."""

    rgba: Tensor
    names: list[str]
    styles: list[str]
    groups: list[str]
    keywords: list[list[str]]
    codes: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def only(self, rows: list[int]) -> Pictures:
        """Those of these rows."""
        names, styles, groups, codes = ([v[i] for i in rows] for v in (self.names, self.styles, self.groups, self.codes))
        return Pictures(self.rgba[rows], names, styles, groups, [self.keywords[i] for i in rows], codes)

    def part(self, held_out: bool, groups: tuple[str, ...] | None = None) -> Pictures:
        """Those held out or those not, of some groups or of all."""
        rows = [i for i, code in enumerate(self.codes) if is_held_out(code) == held_out]
        return self.only([i for i in rows if groups is None or self.groups[i] in groups])


def is_held_out(code: str) -> bool:
    """By a hash of the emoji's code, so that its four styles, and machines, agree."""
    return int(hashlib.sha256(code.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def load(file: str | Path = FILE) -> Pictures:
    from PIL import Image
    from pyarrow.parquet import read_table

    if not Path(file).is_file():
        raise UserError(f"{shown(Path(file))} is missing; {remedy([Path(file)])}")
    rows = read_table(file).to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(r["image"]["bytes"])).convert("RGBA")) for r in rows]
    rgba = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    columns = ([r[key] for r in rows] for key in ("caption", "style", "group", "keywords", "code"))
    return Pictures(rgba, *columns)


def on_background(rgba: Tensor, colours: Tensor) -> Tensor:
    """rgba uint8 (b, 4, h, w), colours (b, 3) of 0..255 -> float32 (b, 3, h, w) in [-1, 1]."""
    alpha = rgba[:, 3:].float() / 255
    return (rgba[:, :3].float() * alpha + colours[:, :, None, None] * (1 - alpha)) / 127.5 - 1


def palette() -> Tensor:
    """(backgrounds, 3) of 0..255, in the order of BACKGROUNDS."""
    return torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)


def caption(name: str, style: str | None, background: str | None) -> str:
    """ "red apple, noto style, on light blue"; None leaves a part out."""
    parts = [name, *([f"{style} style"] if style else []), *([f"on {background}"] if background else [])]
    return ", ".join(parts)


def moved(images: Tensor, mirror: Tensor, shift: Tensor) -> Tensor:
    """images (b, c, h, w) mirrored where `mirror` (b,) says so, and rolled by shift (b, 2) pixels.

    Rolled before they are put on a background, where the margin is transparent.
    """
    b, _, h, w = images.shape
    y = (torch.arange(h) + shift[:, :1]) % h
    x = (torch.arange(w) + shift[:, 1:]) % w
    x = torch.where(mirror[:, None], w - 1 - x, x)
    rows = torch.arange(b)[:, None, None]
    return images.permute(0, 2, 3, 1)[rows, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
