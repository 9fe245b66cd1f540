"""Image sets: pixels in and out of [-1, 1] exactly, parquet files and folders, crops, and every way they can be broken."""

import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.data import images
from pipelines.data.images import ImageSet, load_digits, load_folder, load_parquet, to_pixels, to_unit

# of pixels and labels that sklearn.datasets.load_digits() gave (1.9.1), scaled to 0..255
SCIKIT_LEARNS = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"
CIFAR10 = Path(__file__).resolve().parents[2] / "../shared/data/cifar10/test.parquet"


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
    assert hashlib.sha256(digits.pixels.numpy().tobytes() + digits.labels.numpy().tobytes()).hexdigest() == SCIKIT_LEARNS
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


@pytest.mark.parametrize("labels", [{"word": ["a", "b"]}, {"label": [0, None]}, {"number": [0, -1]}, {"number": [0, 100_000]}])
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


def test_classes_are_in_the_order_of_text_as_torchvisions_and_pictures_as_a_person_counts(tmp_path):
    from torchvision.datasets.folder import find_classes

    for i, name in enumerate(("9", "10", "2", "b2", "b10", "B")):
        (tmp_path / name).mkdir()
        picture(5, 5, i).save(tmp_path / name / "1.png")
    folder = load_folder(str(tmp_path), 5, 3)
    assert list(folder.class_names) == find_classes(str(tmp_path))[0] == ["10", "2", "9", "B", "b10", "b2"]
    order = sorted(range(6), key=lambda i: folder.labels.tolist()[i])
    assert torch.equal(folder.pixels[order], torch.stack([tensor(picture(5, 5, i)) for i in (1, 2, 0, 5, 4, 3)]))


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
    with pytest.raises(FileNotFoundError, match=r"data.path: no such folder or .zip '.*none'"):
        load_folder(str(tmp_path / "none"), 5, 3)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"data.path: no pictures in '.*'; left out: 1 of another kind .* \(notes.txt\)"):
        load_folder(str(tmp_path), 5, 3)
    with pytest.raises(UserError, match=r"data.path: '.*notes.txt' is neither a folder nor a .zip file"):
        load_folder(str(tmp_path / "notes.txt"), 5, 3)


def test_a_folder_larger_than_memory_is_refused_before_decoding(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"not decoded")
    monkeypatch.setattr(images, "MAX_BYTES", 3 * 3 * 5 * 5 - 1)
    with pytest.raises(UserError, match=r"data.path: 3 images of 3x5x5 take .* choose a smaller"):
        load_folder(str(tmp_path), 5, 3)


def test_files_are_in_the_order_in_which_a_person_counts(tmp_path):
    for i in (10, 2, 1, 11):
        Image.new("L", (5, 5), i).save(tmp_path / f"frame {i}.png")
    assert load_folder(str(tmp_path), 5, 1).pixels[:, 0, 0, 0].tolist() == [1, 2, 10, 11]


# Classes of folders ---------------------------------------------------------------------------------------------------


def numbered(root: Path) -> list[str]:
    """Pictures of one shade each, in EDM's layout: folders number them, by their thousands."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in (0, 1, 1000, 1001)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (5, 5), i).save(root / name)
    return names


def zipped(folder: Path, file: Path) -> str:
    with zipfile.ZipFile(file, "w") as archive:
        for each in sorted(folder.rglob("*"), reverse=True):
            if each.is_file():
                archive.write(each, each.relative_to(folder).as_posix())
    return str(file)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_edms_labels_are_the_classes(packed, tmp_path, capsys):
    """NVlabs' dataset_tool.py: dataset.json names a class for each picture; 00000, 00001, ... only number them."""
    names = numbered(tmp_path / "a")
    labels = [
        [name.replace("/", "\\") if i == 3 else name, label]
        for i, (name, label) in enumerate(zip(names, (6, 0, 2, 6), strict=True))
    ]
    (tmp_path / "a/dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    source = zipped(tmp_path / "a", tmp_path / "a.zip") if packed else str(tmp_path / "a")
    for wanted in (None, True):
        found = load_folder(source, 5, 1, wanted)
        assert found.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
        assert found.labels.tolist() == [6, 0, 2, 6]
        assert found.class_names == tuple("0123456")
    assert load_folder(source, 5, 1, False).labels is None
    assert "data.path: 4 pictures, 7 classes by dataset.json\n" in capsys.readouterr().err


def test_a_zip_of_one_folder_is_that_folder(tmp_path):
    """As file managers pack it: the classes are those within."""
    names = numbered(tmp_path / "a/my set")
    (tmp_path / "a/my set/dataset.json").write_text(json.dumps({"labels": [[n, i] for i, n in enumerate(names)]}))
    assert load_folder(zipped(tmp_path / "a", tmp_path / "a.zip"), 5, 1).labels.tolist() == [0, 1, 2, 3]
    for name in ("b/set/ant/0.png", "b/set/bee/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("L", (5, 5)).save(tmp_path / name)
    assert load_folder(zipped(tmp_path / "b", tmp_path / "b.zip"), 5, 1).class_names == ("ant", "bee")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"labels": null}', r"has no classes: its dataset.json says that there are none"),
        (None, r"has no classes: its sub-folders \(00000, 00001\) only number the images, and there is no dataset.json"),
        ('{"labels": [["00000/img00000000.png", 1]]}', r"no label for 3 of 4 images \(00000/img00000001.png, "),
        (
            '{"labels": [["00000/img00000000.png", [0.5, 1]]]}',
            r"gives 00000/img00000000.png the label \[0.5, 1\]; expected a class",
        ),
        ('{"labels": [["00000/img00000000.png", -1]]}', r"the label -1; expected a class number"),
        ('{"labels": [["00000/img00000000.png", 1e9]]}', r"the label 1000000000.0; expected a class number"),
        ('{"labels": [["00000/img00000000.png", 99999999999]]}', r"below 100,000"),
        ('{"labels": [["a.png", 1], ["a.png", 0]]}', r"has 1 names twice"),
        ('{"labels": 3}', r"must hold \{"),
        ('{"labels": ', r"dataset.json of .* is not valid JSON"),
        ("[" * 100_000, r"dataset.json of .* is not valid JSON"),
    ],
)
def test_classes_that_cannot_be_known_are_refused_before_decoding(content, said, tmp_path):
    for name in numbered(tmp_path):
        (tmp_path / name).write_bytes(b"not decoded")
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=rf"^data.labels: .*{said}"):
        load_folder(str(tmp_path), 5, 1, True)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("00000/img00000007.png", "00000/img00000999.png", "00001/img00001000.png"), None),  # EDM
        (("00000/000000007.jpg", "00000/000000008.jpg", "00001/000010000.jpg"), None),  # img2dataset
        (("000000/000000.png", "000000/000999.png", "001000/001000.png"), None),  # eval/images/generation.py
        (("0/0.png", "0/1.png", "1/2.png"), ("0", "1")),  # classes of digits
        (("00/0000.png", "00/0001.png", "01/0002.png"), ("00", "01")),
        (("00000/photo 1.png", "00000/photo 2.png", "00001/photo 1.png"), ("00000", "00001")),
        (("100001/000001.png", "100001/000002.png", "100002/000001.png"), ("100001", "100002")),
        (("n00000/n00000_1.png", "n00000/n00000_2.png", "n00001/n00001_1.png"), ("n00000", "n00001")),  # ImageNet
    ],
)
def test_folders_that_number_pictures_are_no_classes(names, classes, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (5, 5)).save(tmp_path / name)
    found = load_folder(str(tmp_path), 5, 1)
    assert (found.class_names or None) == classes
    assert (None if found.labels is None else found.labels.tolist()) == (classes and [0, 0, 1])


def test_what_was_taken_and_left_out_is_said_in_a_line(tmp_path, capsys):
    for name in ("ant/0.png", "bee/1.png", "bee/.2.png", "__MACOSX/bee/._1.png", "bee/.ipynb_checkpoints/1-checkpoint.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (5, 5)).save(tmp_path / name)
    (tmp_path / "bee/raw.heic").write_bytes(b"")
    (tmp_path / "bee/Thumbs.db").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert len(load_folder(str(tmp_path), 5, 1)) == 2
    said = [line for line in capsys.readouterr().err.split("\n") if line.startswith("data.path")]
    assert said == [
        "data.path: 2 pictures, 2 classes by folder (ant, bee); left out: 1 of another kind than the pictures that are read here "
        "(bee/raw.heic); 5 hidden or a tool's (.DS_Store, __MACOSX, bee/.2.png, ...)"
    ]


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
    with pytest.raises(ValueError, match=r"data.path: 'broken.png' of .* cannot be decoded: .*; mend or remove it"):
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


def test_pictures_that_are_enlarged_are_counted(tmp_path, capsys):
    """Small ones among large ones, which a training would otherwise blur unseen."""
    for i, size in enumerate([(8, 8), (40, 9), (64, 16), (64, 64)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    load_folder(str(tmp_path), 16, 3)
    assert "2 pictures: smaller than image_size, enlarged" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", None])
def test_digits_that_are_damaged_or_missing(content, tmp_path, monkeypatch):
    file = tmp_path / "digits.safetensors"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(images, "DIGITS", file)
    with pytest.raises((UserError, FileNotFoundError), match=r"digits\.safetensors"):
        load_digits()


def test_digits_too_large_for_memory_are_refused():
    with pytest.raises(UserError, match="more than 8; choose"):
        load_digits(10**9)
