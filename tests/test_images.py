"""Image sets: pixels in and out of [-1, 1] exactly, parquet files and folders, crops, and every way they can be broken."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import images
from pipelines.images import ImageSet, load_digits, load_folder, load_parquet, to_pixels, to_unit

CIFAR10 = Path(__file__).resolve().parents[1] / "../shared/data/cifar10/test.parquet"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_all_256_values_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_unit(pixels)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1.0, 1.0)
    assert torch.equal(to_pixels(x), pixels)
    assert (x - (pixels.double() / 255 * 2 - 1)).abs().max() < 1e-7


def test_pixels_are_rounded_and_clamped():
    step = 2 / 255
    x = torch.tensor([-1.7, -1 + 0.49 * step, -1 + 0.51 * step, 1 - 0.51 * step, 1 - 0.49 * step, 1.3])
    assert to_pixels(x).tolist() == [0, 0, 1, 254, 255, 255]
    assert to_pixels(x.bfloat16()).dtype == torch.uint8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_colour_raises(bad):
    x = torch.zeros(2, 3, 5, 5)
    x[1, 2, 4, 3] = bad
    with pytest.raises(ValueError, match="images hold NaN or infinite values"):
        to_pixels(x)


def test_digits():
    digits = load_digits()
    assert digits.pixels.shape == (1797, 1, 8, 8)
    assert (digits.pixels.dtype, digits.labels.dtype, len(digits)) == (torch.uint8, torch.int64, 1797)
    assert digits.class_names == tuple("0123456789")
    assert to_unit(digits.pixels).std().item() == pytest.approx(0.7521, abs=1e-3)  # configs/digits_teacher.yaml: sigma_data
    # 0..16 -> 0..255; the 17 grey values and nothing else
    assert digits.pixels.unique().tolist() == [round(v / 16 * 255) for v in range(17)]


# Parquet --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """write(name, **columns) -> path of a parquet file with those columns; nothing is cached outside tmp_path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    kinds = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"]), "word": datasets.Value("string")}
    kinds |= {"number": datasets.Value("int64")}

    def write(name: str, **columns: list) -> str:
        file = tmp_path / f"{name}.parquet"
        features = datasets.Features({c: kinds[c] for c in columns})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
        return str(file)

    return write


def test_parquet_is_read_as_written(parquet):
    drawn = [picture(5, 5, seed) for seed in range(7)]
    first = parquet("first", img=drawn[:4], label=[0, 1, 1, 0], number=[1, 2, 3, 5])
    second = parquet("second", img=drawn[4:], label=[1, 0, 1], number=[7, 11, 13])
    both = load_parquet([first, second], "img", "label", 5, 3)
    assert torch.equal(both.pixels, torch.stack([tensor(p) for p in drawn]))
    assert both.labels.tolist() == [0, 1, 1, 0, 1, 0, 1]
    assert both.class_names == ("ant", "bee")
    grey = load_parquet([first], "img", None, 5, 1)
    assert torch.equal(grey.pixels[2, 0], torch.from_numpy(np.array(drawn[2].convert("L"))))
    assert (grey.labels, grey.class_names) == (None, ())
    assert load_parquet([first], "img", "number", 5, 3).class_names == tuple("012345")  # no names: every number up to the largest


def test_parquet_faults_in_the_request(parquet):
    file = parquet("ok", img=[picture(5, 5)], label=[0], word=["a"])
    with pytest.raises(FileNotFoundError, match=r"data.files: no such file '.*none.parquet'"):
        load_parquet([file, "none.parquet"], "img", None, 5, 3)
    with pytest.raises(ValueError, match=r"data.image_column: no column 'image'; the data set has img, label, word"):
        load_parquet([file], "image", None, 5, 3)
    with pytest.raises(ValueError, match=r"data.label_column: no column 'class'; the data set has img, label, word"):
        load_parquet([file], "img", "class", 5, 3)


def test_parquet_larger_than_memory_is_refused_before_decoding(parquet, monkeypatch):
    file = parquet("ok", img=[picture(5, 5, s) for s in range(3)])
    monkeypatch.setattr(images, "MAX_BYTES", 3 * 3 * 5 * 5)
    assert len(load_parquet([file], "img", None, 5, 3)) == 3  # exactly what is allowed
    with pytest.raises(ValueError, match=r"3 images of 3x7x7 take .* choose a smaller split"):
        load_parquet([file], "img", None, 7, 3)


def test_parquet_faults_in_the_columns(parquet):
    good = picture(5, 5)
    cases = [
        (parquet("bad", img=[good, {"bytes": b"no image", "path": None}]), "img", None),
        (parquet("null", img=[good, None]), "img", None),
        (parquet("word", img=[good], word=["a"]), "word", None),
    ]
    for file, image_column, label_column in cases:
        with pytest.raises(ValueError, match=r"data.image_column|row"):
            load_parquet([file], image_column, label_column, 5, 3)


@pytest.mark.parametrize("labels", [{"word": ["a", "b"]}, {"label": [0, None]}, {"number": [0, -1]}])
def test_parquet_labels_must_be_class_numbers(parquet, labels):
    (column,) = labels
    file = parquet("labels", img=[picture(5, 5, 0), picture(5, 5, 1)], **labels)
    with pytest.raises(ValueError, match=rf"data.label_column.*{column}"):
        load_parquet([file], "img", column, 5, 3)


def test_a_truncated_parquet_file_is_named(parquet):
    file = Path(parquet("short", img=[picture(5, 5, s) for s in range(5)]))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"short.parquet"):
        load_parquet([str(file)], "img", None, 5, 3)


@pytest.mark.skipif(not CIFAR10.is_file(), reason=f"{CIFAR10} is not here; it is data of the project's own machines")
def test_cifar10(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cifar = load_parquet([str(CIFAR10)], "img", "label", 32, 3)
    assert cifar.pixels.shape == (10_000, 3, 32, 32)
    assert cifar.labels.bincount().tolist() == [1000] * 10
    assert (len(cifar.class_names), cifar.class_names[3]) == (10, "cat")
    assert to_unit(cifar.pixels).std().item() == pytest.approx(0.5008, abs=0.01)


# Folders --------------------------------------------------------------------------------------------------------------


def test_folder_with_classes(tmp_path):
    drawn = {("bee", "2.png"): 3, ("ant", "0.PNG"): 1, ("ant", "deeper/1.png"): 2}
    for (name, file), seed in drawn.items():
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        picture(5, 5, seed).save(tmp_path / name / file)
    (tmp_path / "bee" / "notes.txt").write_text("no image")
    folder = load_folder(str(tmp_path), 5, 3)
    assert torch.equal(folder.pixels, torch.stack([tensor(picture(5, 5, seed)) for seed in (1, 2, 3)]))
    assert folder.labels.tolist() == [0, 0, 1]
    assert folder.class_names == ("ant", "bee")


def test_folder_without_classes(tmp_path):
    (tmp_path / "sub").mkdir()
    picture(5, 5, 1).save(tmp_path / "sub" / "a.png")
    picture(5, 5, 2).save(tmp_path / "b.bmp")  # one image outside a sub-folder: there are no classes
    folder = load_folder(str(tmp_path), 5, 3)
    assert (len(folder), folder.labels, folder.class_names) == (2, None, ())


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    source = picture(5, 5)
    for i, mode in enumerate(("RGB", "L", "P", "RGBA")):
        source.convert(mode).save(tmp_path / f"{i}.png")
    folder = load_folder(str(tmp_path), 5, 3)
    assert folder.pixels.shape == (4, 3, 5, 5)
    assert torch.equal(folder.pixels[3], folder.pixels[0])
    assert torch.equal(folder.pixels[1, 0], folder.pixels[1, 2])


def test_folder_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.path: no such folder '.*none'"):
        load_folder(str(tmp_path / "none"), 5, 3)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"data.path: no images \(.png, .jpg, .jpeg, .webp, .bmp\) below"):
        load_folder(str(tmp_path), 5, 3)


def png(seed: int) -> bytearray:
    buffer = io.BytesIO()
    picture(7, 5, seed).save(buffer, "png")
    return bytearray(buffer.getvalue())


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "chunk", "bomb"])
def test_a_corrupt_image_is_named(damage, tmp_path):
    (tmp_path / "good.png").write_bytes(png(0))
    data = png(1)
    if damage == "chunk":
        data[36] = 0  # inside the length of the IDAT chunk: PIL answers with a SyntaxError
    if damage == "bomb":
        data[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the header
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    broken = {"empty": b"", "text": b"no image", "truncated": data[:-40]}.get(damage, data)
    (tmp_path / "broken.png").write_bytes(broken)
    with pytest.raises(ValueError, match=r"data.path: cannot decode '.*broken.png'.*; mend or remove it"):
        load_folder(str(tmp_path), 5, 3)


# Crops ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height", "left", "top"), [(5, 5, 0, 0), (11, 5, 3, 0), (5, 13, 0, 4), (8, 5, 1, 0)])
def test_the_centre_is_cut_out_where_no_resizing_is_needed(width, height, left, top, tmp_path):
    source = picture(width, height)
    source.save(tmp_path / "a.png")
    expected = tensor(source)[:, top : top + 5, left : left + 5]
    assert torch.equal(load_folder(str(tmp_path), 5, 3).pixels[0], expected)


@pytest.mark.parametrize(("width", "height"), [(29, 13), (13, 29), (23, 23), (3, 2)])
def test_what_is_cut_away_leaves_no_trace(width, height, tmp_path):
    """Centre crop, then Lanczos (facts: the COCO protocol): what lies outside the crop has no influence."""
    source = picture(width, height)
    source.save(tmp_path / "a.png")
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    expected = source.crop((left, top, left + side, top + side)).resize((5, 5), Image.Resampling.LANCZOS)
    assert torch.equal(load_folder(str(tmp_path), 5, 3).pixels[0], tensor(expected))


def test_an_image_set_has_as_many_as_pixels():
    assert len(ImageSet(torch.zeros(7, 3, 5, 5, dtype=torch.uint8))) == 7
