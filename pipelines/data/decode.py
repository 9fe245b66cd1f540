"""The one decoder: a picture as users have it -> 8-bit RGB, with what had to be done to it.

Colour profiles are not applied, as nearly nowhere in training and evaluation; CMYK becomes RGB as Pillow's convert says.
"""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, __version__
from PIL.TiffImagePlugin import TiffImageFile

from ..common.errors import UserError, message

# Formats of Pillow that are no pictures (stubs, which name a file and cannot decode it) or are programs run by another program.
NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
DEEP = re.compile(r";(16[BLNR]?|12)$")  # endings of 16-bit raw modes; BMP's "BGR;16" is 5, 6 and 5 bits
OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # of 16 bits: big, little, native endian
# Exif 2.32, tag 274: how a picture that lies so is put upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 274
PHOTOMETRIC = 262  # TIFF 6.0
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
WITHOUT_COLOUR = ("L", "LA", "La", "1", "CMYK")  # and 16-bit grey; CMYK: photographs that become RGB by convention only


@dataclass(frozen=True)
class Rules:
    """What is done with a picture that is no upright 8-bit RGB one. The defaults are those of training.

    background: the colour on which transparent pictures are put, by name or #rrggbb; None refuses them. upright: turned as its
    EXIF orientation says. deep: 16 bits a channel are scaled to 8; False refuses them. grey: pictures without colour and CMYK
    become RGB; False refuses them. frames: of an animation or several pages the first; False refuses them. Pictures whose
    alpha is 255 everywhere lose nothing and are never refused for it; palettes are colours.
    """

    background: str | None = "white"
    upright: bool = True
    deep: bool = True
    grey: bool = True
    frames: bool = True


TRAINING = Rules()


@dataclass(frozen=True)
class Decoded:
    """image: mode RGB; notes: what had to be done, in words that can be counted over a set."""

    image: Image.Image
    notes: tuple[str, ...] = ()


@cache
def formats() -> tuple[str, ...]:
    """The formats that are read, by Pillow's names. A plugin that is registered before the first call counts."""
    Image.init()
    return tuple(f for f in Image.OPEN if f not in NO_PICTURES)


@cache
def suffixes() -> frozenset[str]:
    """What names of pictures end in, in lower case, with the dot."""
    read = (*formats(), "MPO")  # several JPEGs in one, which the JPEG reader opens
    return frozenset(s.lower() for s, f in Image.registered_extensions().items() if f in read)


def decode(file: str | Path | bytes, where: str, rules: Rules = TRAINING) -> Decoded:
    """file: a path or the content of one; where: what a message calls it. UserError names what cannot be decoded or is refused.

    By content, not by suffix. 16 bits keep their rounding: Pillow itself would cut off colours' low byte and make grey white.
    """
    try:
        with _open(file) as opened:
            return _decode(opened, file, where, rules)
    except UserError:
        raise
    except Exception as error:  # Pillow's formats raise whatever a damaged file leads them to, from struct.error to RuntimeError
        raise UserError(f"{where} cannot be decoded: {_reason(error, file)}; mend or remove it") from error


def _decode(opened: ImageFile.ImageFile, file: str | Path | bytes, where: str, rules: Rules) -> Decoded:
    raw, notes = _raw_mode(opened), []
    if opened.format not in ("MPO", "PSD") and getattr(opened, "is_animated", False):  # those are one photo, with more beside it
        if not rules.frames:
            raise _refusal(where, opened, "several frames or pages")
        notes.append("the first of several frames or pages taken")
    opened.load()
    image: Image.Image = opened
    deep = _is_deep(opened, raw)
    if not rules.deep and (deep or image.mode in ("I", "F")):
        raise _refusal(where, image, "more than 8 bits a channel")
    if deep:
        image = _eight_bits(opened, file, raw, where)
        notes.append("16 bits a channel scaled to 8")
    if image.mode in ("I", "F"):
        kind = "floating point" if image.mode == "F" else "integers of 32 bits"
        raise UserError(
            f"{where} has {kind} for pixels (mode {image.mode}), and no file says which value is white; save it with 8 or 16 "
            "bits a channel"
        )
    turn, unread = _turn(opened) if rules.upright else (None, False)
    if unread:
        notes.append("EXIF data that cannot be read, left as it lies")
    if turn is not None:
        image = image.transpose(turn)
        notes.append("turned upright by EXIF")
    image, shines = _with_alpha(image)
    if shines and rules.background is None:
        raise _refusal(where, opened, "transparency")
    if not rules.grey and opened.mode in WITHOUT_COLOUR:
        what = "CMYK colours" if opened.mode == "CMYK" else "no colour channels"
        raise _refusal(where, opened, what, " (--grayscale takes such photographs)")
    if shines:
        image = Image.alpha_composite(Image.new("RGBA", image.size, rules.background), image)
        notes.append(f"transparency put on {rules.background}")
    return Decoded(image if image.mode == "RGB" else image.convert("RGB"), tuple(notes))


def says_turned(content: bytes) -> bool:
    """Whether a file's header asks to be turned. Decodes nothing; False for what is no picture."""
    try:
        with _open(content) as image:
            return "exif" in image.info and _turn(image)[0] is not None
    except Exception:  # as in decode, which names it
        return False


def _open(file: str | Path | bytes) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats())


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How pixels lie in the file ("RGB;16B"), which Pillow keeps in its tiles; "" where it does not."""
    args = image.tile[0].args if image.tile else ""
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) else ""


def _is_deep(image: Image.Image, raw: str) -> bool:
    """Whether a loaded picture has 16 bits a channel of a known range. A .pgm of more than 8 is scaled to 16 by Pillow."""
    known = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    return known or (bool(DEEP.search(raw)) and not raw.startswith("BGR"))


def _turn(image: Image.Image) -> tuple[Image.Transpose | None, bool]:
    """What puts the picture upright, and whether its EXIF data are too damaged to say."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1)), False
    except Exception:  # Pillow: SyntaxError, struct.error, TypeError and others
        return None, True


def _eight_bits(opened: ImageFile.ImageFile, file: str | Path | bytes, raw: str, where: str) -> Image.Image:
    """A loaded picture of 16 bits a channel -> 8 bits, rounded: v / 257, so that what a program made of 8 bits by v * 257 comes
    back exactly. A transparent colour becomes an alpha channel.

    Pillow holds 16-bit grey as it is. Of 16-bit colours it keeps the high byte; the same file read with the other byte order
    gives the low one. Grey with alpha fills the four bytes of an RGBA pixel.
    """
    if opened.mode.startswith("I"):
        values, mode = np.asarray(opened).astype(np.uint32), "L"
    elif raw == "LA;16B":
        quarters = _read_as(file, "RGBA").astype(np.uint32)
        values, mode = quarters[..., ::2] * 256 + quarters[..., 1::2], "LA"
    elif raw[:-1] in ("RGB;16", "RGBA;16", "RGBX;16", "CMYK;16"):
        high, low = np.asarray(opened).astype(np.uint32), _read_as(file, raw[:-1] + OTHER_BYTE[raw[-1]])
        values, mode = high * 256 + low, opened.mode
    else:
        raise UserError(f"{where} has 16 bits a channel in a form that is not read here ({raw}); save it with 8 bits a channel")
    white = 4095 if raw == "I;12" else 65_535
    if (
        isinstance(opened, TiffImageFile) and opened.tag_v2.get(PHOTOMETRIC) == 0
    ):  # white is 0; Pillow turns that round for 8 bits only
        values = white - values
    image = Image.fromarray(np.ascontiguousarray((values * 255 + white // 2) // white).astype(np.uint8), mode)
    key = opened.info.get("transparency")
    if key is not None:
        seen = values != np.asarray(key, dtype=np.uint32)
        image.putalpha(Image.fromarray((seen if seen.ndim == 2 else seen.any(-1)).astype(np.uint8) * 255))
    return image


def _read_as(file: str | Path | bytes, raw: str) -> np.ndarray:
    """The pixels of a file whose bytes are taken to lie as `raw` says."""
    with _open(file) as image:
        image.tile = [t._replace(args=(raw, *t.args[1:]) if isinstance(t.args, tuple) else raw) for t in image.tile]
        return np.asarray(image)


def _with_alpha(image: Image.Image) -> tuple[Image.Image, bool]:
    """RGBA where there is an alpha channel or a transparent colour, else the image; and whether something shines through."""
    if image.mode not in WITH_ALPHA and "transparency" not in image.info:
        return image, False
    if image.mode == "La":  # Pillow converts it in two steps only
        image = image.convert("LA")
    image = image.convert("RGBA")
    return image, bool((np.asarray(image.getchannel("A")) < 255).any())


def _refusal(where: str, image: Image.Image, what: str, hint: str = "") -> UserError:
    return UserError(
        f"{where} has {what} (mode {image.mode}), expected 8-bit RGB; convert it yourself: how is a choice that changes numbers"
        f"{hint}"
    )


def _reason(error: Exception, file: Any) -> str:
    """Why, in words for who has the file. Pillow's "cannot identify image file" says a stream's address instead."""
    if isinstance(error, Image.DecompressionBombError):
        return f"{str(error).split(',')[0]}, which are read; save it smaller"
    return _unknown(file) if isinstance(error, UnidentifiedImageError) else message(error)


def _unknown(file: str | Path | bytes) -> str:
    if isinstance(file, bytes):
        head = file[:64]
    else:
        with open(file, "rb") as stream:
            head = stream.read(64)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the picture; run git lfs pull"
    if head[4:8] == b"ftyp":
        return "it is a HEIC photo or a film; save it as JPEG or PNG"
    if head.lstrip()[:1] in (b"<", b"{") or head.startswith(b"%"):
        return "it holds text (HTML, SVG, PDF, ...), no pixels"
    return f"it begins as no picture that Pillow {__version__} reads"
