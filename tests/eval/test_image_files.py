"""Image sets on disk: every kind of source gives the same images, and every kind of bad image is refused by name."""

import io
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow

from eval.images.files import ImageFiles, same_sizes
from eval.protocols import PROTOCOLS

CUSTOM = PROTOCOLS["custom"]
CIFAR = PROTOCOLS["cifar10-50k"]


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(array, mode).save(buffer, format="PNG")
    return buffer.getvalue()


def parquet(folder: Path, file: Path, **more: list) -> Path:
    files = sorted(folder.glob("*.png"))
    columns = {"image": [{"bytes": f.read_bytes(), "path": None} for f in files], **more}
    features = Features({"image": Image(), **{key: Value("string") for key in more}})
    Dataset.from_dict(columns, features=features).to_parquet(str(file))
    return file


def test_every_source_gives_the_same_images(sets, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(sets.a.glob("*.png"), reverse=True):  # the order in the file does not matter
            archive.write(file, f"inside/{file.name}")
        archive.writestr("README.txt", "not an image")
        archive.writestr("__MACOSX/._0001.png", "nor this")
    sources = [sets.a, tmp_path / "a.zip", parquet(sets.a, tmp_path / "a.parquet")]
    for source in sources:
        images = ImageFiles(str(source), CIFAR)
        assert len(images) == len(sets.a_pixels)
        assert torch.equal(torch.stack([images[i]["image"] for i in range(len(images))]), sets.a_pixels)


def test_captions_belong_to_images_as_a_person_counts(tmp_path, make_pictures):
    """The i-th line of a caption file is of image i, also where numbers have no leading zeros."""
    for i, pixels in enumerate(make_pictures(12, 0)):
        Pillow.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    assert ImageFiles(str(tmp_path), CUSTOM).names == [f"{i}.png" for i in range(12)]


def test_every_suffix_of_pictures_is_measured(tmp_path, make_pictures, capsys):
    """And what is left out is said."""
    for name, pixels in zip("a.png b.tif c.gif d.jfif e.JPE f.bmp".split(), make_pictures(6, 0), strict=True):
        image = Pillow.fromarray(pixels.permute(1, 2, 0).numpy())
        image.save(tmp_path / name, format="JPEG" if name[2] in "jJ" else None)
    (tmp_path / "raw.heic").write_bytes(b"")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / ".ipynb_checkpoints/a-checkpoint.png")
    images = ImageFiles(str(tmp_path), CUSTOM)
    assert images.names == ["a.png", "b.tif", "c.gif", "d.jfif", "e.JPE", "f.bmp"]
    assert all(images[i]["image"].shape == (3, 32, 32) for i in range(6))
    said = capsys.readouterr().err
    assert "6 images; left out: 1 of another kind than the pictures that are read here (raw.heic); 1 hidden or a tool's" in said


def test_folders_behind_links_are_measured(sets, tmp_path):
    (tmp_path / "linked").symlink_to(sets.a)
    images = ImageFiles(str(tmp_path), CUSTOM)
    assert len(images) == len(sets.a_pixels)
    assert torch.equal(images[3]["image"], sets.a_pixels[3])


def test_parquet_beside_pictures_is_refused(sets, tmp_path):
    parquet(sets.a, tmp_path / "a.parquet")
    shutil.copy(sets.a / "0000.png", tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"holds parquet files and pictures \(x.png\); name a folder of one kind"):
        ImageFiles(str(tmp_path), CUSTOM)


def test_order_is_that_of_names(tmp_path, make_pictures, save_pictures):
    pixels = make_pictures(5, 0)
    save_pictures(pixels, tmp_path / "x")
    (tmp_path / "x" / "deeper").mkdir()
    shutil.move(tmp_path / "x" / "0001.png", tmp_path / "x" / "deeper" / "0000.png")
    assert ImageFiles(str(tmp_path / "x"), CUSTOM).names == ["0000.png", "0002.png", "0003.png", "0004.png", "deeper/0000.png"]


def test_limit_takes_the_first(sets):
    assert ImageFiles(str(sets.a), CUSTOM, limit=7).names == [f"{i:04d}.png" for i in range(7)]


def test_identity_is_of_contents(sets, tmp_path):
    shutil.copytree(sets.a, tmp_path / "copy")
    here, there = (ImageFiles(str(f), CUSTOM).identity() for f in (sets.a, tmp_path / "copy"))
    assert here["sha256"] == there["sha256"]
    Pillow.open(tmp_path / "copy" / "0003.png").transpose(Pillow.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "copy" / "0003.png")
    assert ImageFiles(str(tmp_path / "copy"), CUSTOM).identity()["sha256"] != here["sha256"]
    assert ImageFiles(str(sets.a), CUSTOM, limit=60).identity()["sha256"] != here["sha256"]


def test_crop_is_dmd2s(tmp_path, make_pictures):
    """The largest centred square first, then Lanczos; a patch is cut from the image as it is; a smaller one stays whole."""
    image = Pillow.fromarray(make_pictures(1, 3, 401)[0].permute(1, 2, 0).numpy()[:, :331])
    image.save(tmp_path / "tall.png")
    protocol = replace(CUSTOM, crop_to=64, clip_crop=48)
    item = ImageFiles(str(tmp_path), protocol, ("image", "patch", "clip"))[0]
    square = image.crop((0, 35, 331, 366))
    for view, side in (("image", 64), ("clip", 48)):
        expected = square.resize((side, side), Pillow.Resampling.LANCZOS)
        assert np.array_equal(item[view].permute(1, 2, 0).numpy(), np.asarray(expected))
    assert np.array_equal(item["patch"].permute(1, 2, 0).numpy(), np.asarray(image.crop((16, 51, 315, 350))))
    image.resize((200, 400)).save(tmp_path / "tall.png")
    assert ImageFiles(str(tmp_path), protocol, ("patch",))[0]["patch"].shape == (3, 400, 200)


def test_neighbours_of_one_size_are_stacked():
    batch = [{"image": torch.zeros(3, *size, dtype=torch.uint8)} for size in ((5, 7), (5, 7), (7, 5), (5, 7))]
    assert [tuple(s["image"].shape) for s in same_sizes(batch)] == [(2, 3, 5, 7), (1, 3, 7, 5), (1, 3, 5, 7)]


grey = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)
COLOURS = {
    "grey": (png(grey), "no colour channels (mode L)"),
    "RGBA": (png(np.zeros((32, 32, 4), np.uint8)), "transparency (mode RGBA)"),
    "grey with alpha": (png(np.zeros((32, 32, 2), np.uint8), "LA"), "transparency (mode LA)"),
    "16 bit grey": (png(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60), "more than 8 bits a channel"),
}


def deep_rgb() -> bytes:
    """A 16-bit RGB PNG, which Pillow reads (as 8 bits) but does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\x12\x34" * 3 * 32 for _ in range(32))
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


COLOURS["16 bit RGB"] = (deep_rgb(), "more than 8 bits a channel")


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Pillow.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "png", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


COLOURS["animation"] = (animation(), "several frames or pages")


def test_what_loses_nothing_is_taken(tmp_path, make_pictures):
    """An alpha of 255 everywhere and a palette are RGB in other words."""
    array = make_pictures(1, 0)[0].permute(1, 2, 0).numpy()
    opaque = Pillow.fromarray(np.concatenate([array, np.full((32, 32, 1), 255, np.uint8)], -1))
    opaque.save(tmp_path / "0.png")
    palette = Pillow.fromarray(array).quantize(16)
    palette.save(tmp_path / "1.png")
    images = ImageFiles(str(tmp_path), CIFAR)
    assert np.array_equal(images[0]["image"].permute(1, 2, 0).numpy(), array)
    assert np.array_equal(images[1]["image"].permute(1, 2, 0).numpy(), np.asarray(palette.convert("RGB")))


def test_photos_are_not_turned_as_by_clean_fid_and_that_is_said(tmp_path, make_pictures, capsys):
    """clean-fid opens a file and converts it to RGB; turned photos would be other images than its numbers are of."""
    array, exif = make_pictures(1, 0)[0].permute(1, 2, 0).numpy(), Pillow.Exif()
    exif[274] = 6
    Pillow.fromarray(array).save(tmp_path / "0.png", exif=exif)
    Pillow.fromarray(array).save(tmp_path / "1.png")
    images = ImageFiles(str(tmp_path), CUSTOM)
    assert np.array_equal(images[0]["image"].permute(1, 2, 0).numpy(), array)
    assert images.identity()["turned"] == 1
    assert "EXIF would turn 1 of 2 images; measured as they lie, as by clean-fid" in capsys.readouterr().err
    (tmp_path / "0.png").unlink()
    assert "turned" not in ImageFiles(str(tmp_path), CUSTOM).identity()


@pytest.mark.parametrize("kind", COLOURS)
def test_other_colours_are_refused(kind, tmp_path):
    content, message = COLOURS[kind]
    (tmp_path / "x.png").write_bytes(content)
    for protocol in (CIFAR, PROTOCOLS["coco-30k"]):
        if kind == "grey" and protocol.grayscale:
            continue
        with pytest.raises(ValueError) as error:  # noqa: PT011
            ImageFiles(str(tmp_path), protocol)[0]
        assert "x.png" in str(error.value)
        assert message in str(error.value)


def test_grey_photographs_become_grey_rgb_where_the_protocol_says_so(tmp_path):
    (tmp_path / "x.png").write_bytes(COLOURS["grey"][0])
    image = ImageFiles(str(tmp_path), replace(CUSTOM, grayscale=True))[0]["image"]
    assert torch.equal(image, torch.from_numpy(grey).expand(3, -1, -1))


def test_wrong_size(tmp_path, make_pictures, save_pictures):
    save_pictures(make_pictures(1, 0, 33), tmp_path)
    with pytest.raises(ValueError, match=r"0000.png of .* is 33x33, protocol cifar10-50k compares images of 32x32"):
        ImageFiles(str(tmp_path), CIFAR)[0]


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_images(damage, sets, tmp_path):
    content = (sets.a / "0000.png").read_bytes()
    (tmp_path / "x.png").write_bytes({"truncated": content[: len(content) // 2], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"x.png of .* cannot be decoded: .*; mend or remove it"):
        ImageFiles(str(tmp_path), CIFAR)[0]


def test_sources_that_are_none(sets, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"--images: no pictures in '.*nothing'"):
        ImageFiles(str(tmp_path / "nothing"), CUSTOM)
    with pytest.raises(FileNotFoundError, match=r"no such folder, .zip or .parquet"):
        ImageFiles(str(tmp_path / "absent"), CUSTOM)
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(ValueError, match="is not a whole zip file"):
        ImageFiles(str(tmp_path / "x.zip"), CUSTOM)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ValueError, match=r"x.parquet cannot be read"):
        ImageFiles(str(tmp_path / "x.parquet"), CUSTOM)


def test_columns(sets, tmp_path):
    file = parquet(sets.a, tmp_path / "a.parquet", caption=["x"] * 61)
    with pytest.raises(ValueError, match="has no image column 'caption' \\(image columns: image\\)"):
        ImageFiles(str(file), CUSTOM, column="caption")
    Dataset.from_dict({"n": [1, 2]}).to_parquet(str(tmp_path / "n.parquet"))
    with pytest.raises(ValueError, match="has 0 image columns"):
        ImageFiles(str(tmp_path / "n.parquet"), CUSTOM)
    rows = {"image": [{"bytes": (sets.a / "0000.png").read_bytes(), "path": None}, None]}
    Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(str(tmp_path / "gap.parquet"))
    with pytest.raises(ValueError, match=r"row 1 of .* has no image; remove the row"):
        ImageFiles(str(tmp_path / "gap.parquet"), CUSTOM)[1]
