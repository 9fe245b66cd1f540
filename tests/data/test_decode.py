"""The decoder: pictures as cameras, scanners, designers and other programs leave them come out as a person sees them.

Through load_folder, as training reads them: square pictures are neither cut nor resized.
"""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.data.images import load_folder

SIDE = 7


def noise(*shape: int, top: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, shape)


def read(folder, content: bytes, name: str = "a.png", channels: int = 3, **options) -> np.ndarray:
    """(h, w, c) of a file's content."""
    (folder / name).write_bytes(content)
    return load_folder(str(folder), SIDE, channels, **options).pixels[0].permute(1, 2, 0).numpy()


def saved(image: Image.Image, kind: str = "png", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# Orientation ----------------------------------------------------------------------------------------------------------

# Exif 2.32, tag 274: on which side of the picture as seen the 0th row and the 0th column of what is stored lie. seen -> stored
STORED = {
    1: lambda seen: seen,  # top, left
    2: lambda seen: seen[:, ::-1],  # top, right
    3: lambda seen: seen[::-1, ::-1],  # bottom, right
    4: lambda seen: seen[::-1],  # bottom, left
    5: lambda seen: seen.swapaxes(0, 1),  # left, top
    6: lambda seen: seen[:, ::-1].swapaxes(0, 1),  # right, top: a phone held upright
    7: lambda seen: seen[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda seen: seen[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_photos_are_turned_as_their_camera_says(orientation, kind, tmp_path):
    seen, exif = noise(SIDE, SIDE, 3).astype(np.uint8), Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](seen)))
    content = saved(stored, kind, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    assert np.array_equal(read(tmp_path, content, f"a.{kind}"), seen)


def test_a_turned_photo_is_cut_from_its_own_middle(tmp_path, capsys):
    """Turned before it is cut, and said."""
    seen, exif = noise(SIDE, SIDE + 6, 3).astype(np.uint8), Image.Exif()
    exif[274] = 6
    content = saved(Image.fromarray(np.ascontiguousarray(STORED[6](seen))), exif=exif)
    assert np.array_equal(read(tmp_path, content), seen[:, 3:-3])
    assert "data.path: 1 pictures: turned upright by EXIF" in capsys.readouterr().err


@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"", b"Exif\0\0"])
def test_damaged_exif_does_no_harm(exif, tmp_path):
    seen = noise(SIDE, SIDE, 3).astype(np.uint8)
    assert np.array_equal(read(tmp_path, saved(Image.fromarray(seen), exif=exif)), seen)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_is_none_turns_nothing(orientation, tmp_path):
    seen, exif = noise(SIDE, SIDE, 3).astype(np.uint8), Image.Exif()
    exif[274] = orientation
    assert np.array_equal(read(tmp_path, saved(Image.fromarray(seen), exif=exif)), seen)


# 16 bits ---------------------------------------------------------------------------------------------------------------


def deep_png(values: np.ndarray, colour: int, *, key: tuple[int, ...] = ()) -> bytes:
    """A PNG of 16 bits a channel. colour: of the PNG specification (0 grey, 2 RGB, 4 grey and alpha, 6 RGBA)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    clear = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    body = chunk(b"IHDR", header) + clear + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_tiff(values: np.ndarray, order: str, photometric: int, deflate: bool = False) -> bytes:
    """A TIFF 6.0 of 16 bits a channel in one strip; order "<" or ">"; photometric 0 white is zero, 1 black is zero, 2 RGB."""
    h, w, c = values.shape
    data = values.astype(order + "u2").tobytes()
    data = zlib.compress(data) if deflate else data
    bits, entries = struct.pack(f"{order}{c}H", *[16] * c), 9
    start = 8 + 2 + 12 * entries + 4
    tags = [(256, "H", w), (257, "H", h), (258, "H" if c == 1 else "I", 16 if c == 1 else start)]
    tags += [(259, "H", 8 if deflate else 1), (262, "H", photometric), (273, "I", start + len(bits)), (277, "H", c)]
    tags += [(278, "H", h), (279, "I", len(data))]
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, entries)
    for tag, kind, value in tags:
        count = c if tag == 258 else 1
        field = (struct.pack(order + kind, value) + b"\0\0")[:4]
        out += struct.pack(order + "HHI", tag, 3 if kind == "H" or tag == 258 else 4, count) + field
    return out + struct.pack(order + "I", 0) + bits + data


DEEP = {
    "grey PNG": lambda v: deep_png(v[..., :1], 0),
    "RGB PNG": lambda v: deep_png(v, 2),
    "grey PNG with alpha": lambda v: deep_png(np.stack([v[..., 0], np.full_like(v[..., 0], 65_535)], -1), 4),
    "RGBA PNG": lambda v: deep_png(np.concatenate([v, np.full_like(v[..., :1], 65_535)], -1), 6),
    "grey TIFF": lambda v: deep_tiff(v[..., :1], "<", 1),
    "grey TIFF, big-endian": lambda v: deep_tiff(v[..., :1], ">", 1),
    "RGB TIFF": lambda v: deep_tiff(v, "<", 2),
    "RGB TIFF, big-endian": lambda v: deep_tiff(v, ">", 2),
    "RGB TIFF, deflated": lambda v: deep_tiff(v, "<", 2, deflate=True),
    "grey PGM": lambda v: b"P5 %d %d 65535\n" % (v.shape[1], v.shape[0]) + v[..., 0].astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_16_bits_are_scaled_to_8(kind, tmp_path, capsys):
    """65,535 is white and v / 257 is rounded: neither cut off (grey became white) nor cut down (colours lost their low byte)."""
    values = noise(SIDE, SIDE, 3, top=65_536)
    values[0, :4, 0] = 0, 65_535, 128, 129  # 128 / 257 is below one half, 129 / 257 above
    expected = np.floor(values / 257 + 0.5)
    got = read(tmp_path, DEEP[kind](values), "a.tif" if "TIFF" in kind else "a.png")
    assert np.array_equal(got, expected if "RGB" in kind else expected[..., :1].repeat(3, -1))
    assert "16 bits a channel scaled to 8" in capsys.readouterr().err


def test_8_bits_in_16_come_back_exactly(tmp_path):
    values = noise(SIDE, SIDE, 1)
    assert np.array_equal(read(tmp_path, deep_png(values * 257, 0), channels=1), values)


def test_a_16_bit_scan_whose_white_is_zero_is_no_negative(tmp_path):
    values = noise(SIDE, SIDE, 1, top=65_536)
    assert np.array_equal(read(tmp_path, deep_tiff(values, "<", 0), "a.tif", 1), np.floor((65_535 - values) / 257 + 0.5))


def test_a_transparent_colour_of_16_bits(tmp_path):
    values = noise(SIDE, SIDE, 3, top=65_536)
    values[2, 3], values[2, 4] = (0x1234, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9ABD)  # one of them differs in the last bit
    got = read(tmp_path, deep_png(values, 2, key=(0x1234, 0x5678, 0x9ABC)))
    assert got[2, 3].tolist() == [255, 255, 255]
    assert got[2, 4].tolist() == [round(v / 257) for v in values[2, 4]]


@pytest.mark.parametrize(("kind", "said"), [("float32", "floating point"), ("int32", "integers of 32 bits")])
def test_pixels_without_a_known_white_are_refused(kind, said, tmp_path):
    content = saved(Image.fromarray(noise(SIDE, SIDE).astype(kind)), "tiff")
    with pytest.raises(UserError, match=rf"data.path: 'a.tif' of .* has {said} .* save it with 8 or 16 bits a channel"):
        read(tmp_path, content, "a.tif")


# Transparency ------------------------------------------------------------------------------------------------------------


def cut_out(alpha: int, seed: int = 0) -> tuple[np.ndarray, Image.Image]:
    """Colours, and a picture in which they have one alpha."""
    colours = noise(SIDE, SIDE, 3, seed=seed).astype(np.uint8)
    return colours, Image.fromarray(np.concatenate([colours, np.full((SIDE, SIDE, 1), alpha, np.uint8)], -1))


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_colours_under_full_transparency_are_not_trained_on(kind, tmp_path, capsys):
    content = saved(cut_out(0)[1], kind, **({"lossless": True, "exact": True} if kind == "webp" else {}))
    assert (read(tmp_path, content, f"a.{kind}") == 255).all()
    assert "1 pictures: transparency put on white" in capsys.readouterr().err


@pytest.mark.parametrize(("background", "ground"), [("white", (255, 255, 255)), ("#103050", (16, 48, 80)), ("black", (0, 0, 0))])
def test_half_transparent_pictures_are_put_on_the_background(background, ground, tmp_path):
    colours, image = cut_out(153)  # .6
    expected = 0.6 * colours + 0.4 * np.array(ground)
    assert np.abs(read(tmp_path, saved(image), background=background) - expected).max() <= 1


def test_opaque_alpha_loses_nothing(tmp_path, capsys):
    colours, image = cut_out(255)
    assert np.array_equal(read(tmp_path, saved(image), background=None), colours)
    assert "transparency" not in capsys.readouterr().err


def transparent_palette(*, of_gif: bool) -> bytes:
    image = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % 4, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    return saved(image, "gif" if of_gif else "png", transparency=1 if of_gif else bytes([255, 0, 255, 255]))


@pytest.mark.parametrize("of_gif", [False, True])
def test_palettes_with_a_transparent_colour(of_gif, tmp_path):
    got = read(tmp_path, transparent_palette(of_gif=of_gif), "a.gif" if of_gif else "a.png").reshape(-1, 3)
    assert got[:4].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255], [9, 9, 9]]


def test_grey_with_alpha_and_grey_with_a_transparent_shade(tmp_path):
    grey = noise(SIDE, SIDE).astype(np.uint8)
    both = np.stack([grey, np.where(grey < 128, 0, 255).astype(np.uint8)], -1)
    expected = np.where(grey < 128, 255, grey)
    assert np.array_equal(read(tmp_path, saved(Image.fromarray(both, "LA")), channels=1)[..., 0], expected)
    content = saved(Image.fromarray(grey), transparency=int(grey[0, 0]))
    assert np.array_equal(read(tmp_path, content, channels=1)[..., 0], np.where(grey == grey[0, 0], 255, grey))


def test_without_a_background_transparency_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'a.png' of .* has transparency \(mode RGBA\)"):
        read(tmp_path, saved(cut_out(254)[1]), background=None)


# Colours, frames and formats -----------------------------------------------------------------------------------------------


def test_adobes_inverted_cmyk(tmp_path):
    """Photoshop's CMYK JPEGs hold 255 - ink, which their Adobe marker says; without black, full magenta and yellow are red."""
    content = saved(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "jpeg", quality=100)
    assert b"Adobe" in content
    assert np.abs(read(tmp_path, content, "a.jpg") - np.array([255.0, 0, 0])).max() < 8


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first_is_taken_and_that_is_said(kind, tmp_path, capsys):
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue", "lime")]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "webp" else {}))
    assert (read(tmp_path, content, f"a.{kind}") == (255, 0, 0)).all()
    assert "1 pictures: the first of several frames or pages taken" in capsys.readouterr().err


def test_a_photo_with_more_photos_in_it_is_one(tmp_path, capsys):
    """MPO, a .jpg of phones with two lenses."""
    content = saved(Image.new("RGB", (SIDE, SIDE), "red"), "mpo", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))])
    assert np.abs(read(tmp_path, content, "a.jpg") - np.array([255.0, 0, 0])).max() < 8
    assert "frames" not in capsys.readouterr().err


SUFFIXES = (
    ".png .apng .jpg .jpeg .jpe .jfif .webp .avif .gif .bmp .dib .tif .tiff .tga .ppm .pnm .jp2 .ico .psd .qoi .pcx"
).split()


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".gif", ".jfif", ".JPE", ".bmp", ".webp", ".avif", ".tga", ".ppm", ".jp2"])
def test_every_usual_suffix_is_read(suffix, tmp_path):
    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / f"a{suffix}", format="JPEG" if suffix == ".jfif" else None)
    assert np.abs(load_folder(str(tmp_path), SIDE, 3).pixels.float().mean((0, 2, 3)).numpy() - (255, 0, 0)).max() < 8


def test_suffixes_are_those_of_pictures():
    """Nothing that only another program could read, and nothing whose reader is a stub."""
    from pipelines.data.decode import suffixes

    assert set(SUFFIXES) <= suffixes()
    assert not suffixes() & {".eps", ".ps", ".pdf", ".wmf", ".emf", ".h5", ".hdf", ".grib", ".bufr", ".mpg", ".mpeg", ".txt", ""}


def test_content_counts_not_the_suffix(tmp_path):
    assert (read(tmp_path, saved(Image.new("RGB", (SIDE, SIDE), "red"), "bmp"), "a.jpg") == (255, 0, 0)).all()


def test_16_bits_a_pixel_are_no_16_bits_a_channel(tmp_path):
    """A bitmap of 5, 6 and 5 bits a colour, as old Windows programs write."""
    rows = struct.pack("<8H", *[0xF800] * 8) * SIDE  # red; rows are padded to 4 bytes
    header = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 16, 3, len(rows), 0, 0, 0, 0) + struct.pack(
        "<3I", 0xF800, 0x07E0, 0x1F
    )
    content = b"BM" + struct.pack("<IHHI", 66 + len(rows), 0, 0, 66) + header + rows
    assert (read(tmp_path, content, "a.bmp") == (255, 0, 0)).all()


def test_postscript_under_another_name_runs_no_program(tmp_path, monkeypatch):
    """Pillow would hand it to Ghostscript."""
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: sys.exit("a program was started"))
    with pytest.raises(UserError, match=r"'a.png' of .* cannot be decoded: it holds text"):
        read(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 7\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "it is a pointer of Git LFS, not the picture"),
        (b"\0\0\0\x20ftypheic" + bytes(50), "it is a HEIC photo"),
        (b"<!DOCTYPE html><html>404</html>", "it holds text"),
        (b"no picture", "it begins as no picture"),
    ],
)
def test_what_is_no_picture_is_named_for_what_it_is(content, said, tmp_path):
    with pytest.raises(UserError, match=rf"data.path: 'a.png' of .* cannot be decoded: {said}.*; mend or remove it"):
        read(tmp_path, content)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "tga", "jpeg2000", "ico", "pcx"])
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    """Bytes changed and cut off at random: a picture or one clear error, whatever Pillow meets."""
    rng = np.random.default_rng(0)
    whole = saved(Image.fromarray(noise(SIDE, SIDE, 3).astype(np.uint8)), kind)
    refused = 0
    for _ in range(60):
        content = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(0, 256)
        try:
            assert read(tmp_path, bytes(content)).shape == (SIDE, SIDE, 3)
        except UserError as error:
            assert "'a.png'" in str(error)  # noqa: PT017
            refused += 1
    assert refused
