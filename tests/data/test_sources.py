"""Rows of text-to-image data: prompts from every kind of file, images with their captions, and what is said of bad ones."""

import io
import itertools
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines.data.images import to_unit
from trainers.config.data import Captions, Prompts, TeacherSamples
from trainers.data.sources import CaptionRows, image_batch, load_rows

PROMPTS = ["a cat", 'a "dog", on a mat', "ein rotes Haus mit Tür", "a cat"]


def prompts_of(file: Path, **options) -> list[str]:
    return load_rows(Prompts(name="prompts", file=str(file), **options)).prompts


def written(file: Path, text: str | bytes) -> Path:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# Prompts -----------------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_prompts(tmp_path):
    """In their order, with repetitions; the column by its name, among others."""
    rows = [{"id": i, "said": p} for i, p in enumerate(PROMPTS)]
    txt = written(tmp_path / "a.txt", "\n".join(PROMPTS))
    quoted = "".join('{},"{}"\n'.format(i, p.replace('"', '""')) for i, p in enumerate(PROMPTS))
    csv = written(tmp_path / "a.csv", "id,said\n" + quoted)
    lines = written(tmp_path / "a.jsonl", jsonl(*rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert prompts_of(txt) == PROMPTS
    identities = [load_rows(Prompts(name="prompts", file=str(txt))).identity]
    for file in (csv, lines, tmp_path / "a.parquet"):
        found = load_rows(Prompts(name="prompts", file=str(file), column="said"))
        assert found.prompts == PROMPTS
        assert len(found) == 4
        identities.append(found.identity)
    assert all(identity == identities[0] for identity in identities)  # an encoded copy is of the prompts, not of their file
    assert identities[0]["rows"] == 4


def test_a_list_of_captions_is_a_prompt_for_each(tmp_path):
    rows = [{"caption": ["a", "b"]}, {"caption": ["c"]}, {"caption": ["d", "e", "f"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert prompts_of(written(tmp_path / "a.jsonl", jsonl(*rows))) == list("abcdef")
    assert prompts_of(tmp_path / "a.parquet") == list("abcdef")
    assert prompts_of(written(tmp_path / "mixed.jsonl", jsonl({"caption": "x"}, *rows))) == list("xabcdef")


def test_numbers_are_prompts(tmp_path):
    """As they are written: a caption of a digit, a year, a time."""
    written_so = ["7", "1984", "007", "1e3", "-0.50", "12345678901234567890123"]
    assert prompts_of(written(tmp_path / "a.txt", "\n".join(written_so))) == written_so
    assert prompts_of(written(tmp_path / "a.csv", "caption\n" + "\n".join(written_so))) == written_so
    numbers = [n for n in written_so if n != "007"]  # which is no JSON
    lines = "".join(f'{{"caption": {n}}}\n' for n in numbers)
    assert prompts_of(written(tmp_path / "a.jsonl", lines + '{"caption": ["x", 7]}\n')) == [*numbers, "x", "7"]
    pq.write_table(pa.table({"caption": [7, 1984]}), tmp_path / "a.parquet")
    assert prompts_of(tmp_path / "a.parquet") == ["7", "1984"]


def test_only_line_feeds_part_prompts(tmp_path):
    """Windows' line ends and the byte order mark of spreadsheets are no part of a prompt; rarer separators are."""
    odd = "a\u2028b\x0cc\x85d"
    assert prompts_of(written(tmp_path / "a.txt", f"{odd}\nz\n")) == [odd, "z"]
    assert prompts_of(written(tmp_path / "a.jsonl", jsonl({"caption": odd}, {"caption": "two\nlines"}))) == [odd, "two\nlines"]
    assert prompts_of(written(tmp_path / "b.txt", "\ufeffa\r\nb\r\n")) == ["a", "b"]
    assert prompts_of(written(tmp_path / "b.csv", '\ufeffcaption,x\r\na,1\r\n"b\nc",2\r\n')) == ["a", "b\nc"]


def test_identity_changes_with_any_prompt_and_their_order(tmp_path):
    def identity(*prompts: str) -> dict:
        return load_rows(Prompts(name="prompts", file=str(written(tmp_path / "a.txt", "\n".join(prompts))))).identity

    same = identity("a", "b", "c")
    assert identity("a", "b", "c") == same
    for other in (["a", "b"], ["a", "c", "b"], ["a", "b", "C"], ["a", "b", "c", "c"]):
        assert identity(*other) != same
    assert identity("a b", "c") != identity("a", "b c")  # where one prompt ends and the next begins


def test_teacher_samples_repeat_each_prompt(tmp_path):
    file = str(written(tmp_path / "a.txt", "a\nb\n"))
    rows = load_rows(TeacherSamples(name="teacher_samples", file=file, images_per_prompt=3))
    assert rows.prompts == ["a", "a", "a", "b", "b", "b"]
    assert rows.identity["rows"] == 6
    assert load_rows(TeacherSamples(name="teacher_samples", file=file)).prompts == ["a", "b"]


FAULTS = {
    "empty.txt": ("", "no prompts in it; put one on each line or row"),
    "blank.txt": ("a\n\nb\n", "prompt 2 of 3 is empty; remove it"),
    "spaces.txt": ("a\nb\n  \t\n", "prompt 3 of 3 is empty; remove it"),
    "latin.txt": (b"T\xfcr\n", "cannot read"),
    "prompts.json": ('["a"]', "is none of .txt, .csv, .jsonl, .parquet"),
    "nothing": ("a", "is none of .txt, .csv, .jsonl, .parquet"),
    "header.csv": ("caption,x\n", "no prompts in it"),
    "column.csv": ("id,text\n1,a\n", "no column 'caption' in row 1 of '{file}'; it has id, text"),
    "cell.csv": ("id,caption\n1,a\n2,\n", "prompt 2 of 2 is empty"),
    "short.csv": ("id,caption\n1,a\n2\n", "prompt 2 of 2 is empty"),
    "column.jsonl": (jsonl({"caption": "a"}, {"text": "b"}), "no column 'caption' in row 2 of '{file}'; it has text"),
    "broken.jsonl": (jsonl({"caption": "a"}) + '{"caption": \n', "line 2 is not valid JSON"),
    "blank.jsonl": (jsonl({"caption": "a"}) + "\n" + jsonl({"caption": "b"}), "line 2 is not valid JSON"),
    "string.jsonl": (jsonl("a"), "line 1 is no JSON object"),
    "truth.jsonl": (jsonl({"caption": "a"}, {"caption": True}), "prompt 2 of 2 is True, no text"),
    "nested.jsonl": (jsonl({"caption": [["a"]]}), "prompt 1 of 1 is ['a'], no text"),
    "nothing.jsonl": (jsonl({"caption": ["a"]}, {"caption": []}), "row 2 has an empty list of prompts"),
    "comma.csv": ("id,caption\n1,a\n2,a cat, on a mat\n", "line 3 has more cells than the header"),
    "quote.csv": ('id,caption\n1,"a cat\n2,a dog\n', "cannot read"),  # it would take all that follows for one caption
    "twice.csv": ("caption,id,caption\na,1,b\n", "has a column twice (caption, id, caption)"),
    "none.jsonl": (jsonl({"caption": "a"}, {"caption": None}), "prompt 2 of 2 is empty"),
    "listed.jsonl": (jsonl({"caption": ["a", ""]}), "prompt 2 of 2 is empty"),
    "damaged.parquet": (b"no parquet", "cannot read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_file_of_prompts_is_named(name, tmp_path):
    """One ValueError that names the file, and the row, line or column at fault."""
    text, message = FAULTS[name]
    file = written(tmp_path / name, text)
    with pytest.raises(ValueError, match=r"^data") as raised:
        prompts_of(file)
    assert message.format(file=file) in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_missing_file_and_a_missing_column_of_parquet(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.file: no such file '.*gone.txt'; give a .txt, .csv, .jsonl or .parquet"):
        prompts_of(tmp_path / "gone.txt")
    for rows in (2, 0):  # from the schema: an empty table says it too
        pq.write_table(pa.table({"text": ["a", "b"][:rows], "id": [1, 2][:rows]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"data.column: no column 'caption' in row 1 of '.*a.parquet'; it has text, id$"):
            prompts_of(tmp_path / "a.parquet")


# Images with captions ------------------------------------------------------------------------------------------------------


SIZES = ((8, 8), (24, 10), (7, 30))  # (width, height)


def picture(i: int) -> Image.Image:
    width, height = SIZES[i]
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def tar_of(file: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def parquet_of(file: Path, images: list, captions: list) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    if captions and isinstance(captions[0], list):
        features["caption"] = datasets.List(datasets.Value("string"))
    datasets.Dataset.from_dict({"image": images, "caption": captions}, features).to_parquet(file)
    return file


def folder_of(folder: Path, metadata: str | None) -> Path:
    folder.mkdir()
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    if metadata is not None:
        (folder / "metadata.csv").write_text(metadata)
    return folder


def make(source: str, folder: Path) -> Captions:
    """The three pictures, captioned "picture 0" to "picture 2"."""
    said = [f"picture {i}" for i in range(3)]
    if source == "parquet":
        parts = {"a": [0, 1], "b": [2]}
        files = [parquet_of(folder / f"{n}.parquet", [picture(i) for i in p], [said[i] for i in p]) for n, p in parts.items()]
        return Captions(name="captions", source="parquet", paths=[str(f) for f in files])
    if source == "webdataset":
        parts = [[(f"{i}.png", encoded(picture(i))), (f"{i}.txt", said[i].encode())] for i in range(3)]
        files = [tar_of(folder / "a.tar", *parts[0], *parts[1]), tar_of(folder / "b.tar", *parts[2])]
        columns = {"image_column": "png", "caption_column": "txt"}
        return Captions(name="captions", source="webdataset", paths=[str(f) for f in files], **columns)
    metadata = "file_name,caption\n" + "".join(f"{i}.png,{said[i]}\n" for i in range(3))
    return Captions(name="captions", source="imagefolder", paths=[str(folder_of(folder / "images", metadata))])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.mark.parametrize("source", ["parquet", "webdataset", "imagefolder"])
def test_every_source_gives_the_same_images_and_captions(source, tmp_path):
    data = make(source, tmp_path)
    rows = load_rows(data)
    assert isinstance(rows, CaptionRows)
    assert rows.prompts == ["picture 0", "picture 1", "picture 2"]
    for i, (width, height) in enumerate(SIZES):
        side = min(width, height)  # nothing is resized
        row = rows.image(i, side)
        left, top = (width - side) // 2, (height - side) // 2
        pixels = torch.from_numpy(np.array(picture(i))).permute(2, 0, 1)[:, top : top + side, left : left + side]
        assert torch.equal(row.pixels, to_unit(pixels))
        assert row.original_and_crop == (height, width, top, left)
    identity = rows.identity
    assert load_rows(data).identity == identity  # the same after a second reading
    assert set(identity) == {"prompts", "rows", "images"}


def test_images_are_part_of_the_identity(tmp_path):
    """Same captions, one pixel other: another data set."""
    identities = []
    for value in (0, 1):
        (tmp_path / str(value)).mkdir()
        file = parquet_of(tmp_path / str(value) / "a.parquet", [Image.new("RGB", (8, 8), (value, 0, 0))], ["a"])
        identities.append(load_rows(Captions(name="captions", source="parquet", paths=[str(file)])).identity)
    assert identities[0]["prompts"] == identities[1]["prompts"]
    assert identities[0]["images"] != identities[1]["images"]


def test_which_caption_is_whose_is_part_of_the_identity(tmp_path):
    """The same images and the same captions in the same order, but the second is of another image."""
    identities = []
    for i, cells in enumerate(([["a", "b"], ["c"]], [["a"], ["b", "c"]])):
        file = parquet_of(tmp_path / f"{i}.parquet", [picture(0), picture(1)], cells)
        identities.append(load_rows(Captions(name="captions", source="parquet", paths=[str(file)])).identity)
    assert identities[0]["prompts"] == identities[1]["prompts"]
    assert identities[0]["images"] != identities[1]["images"]


def test_what_transparent_images_are_put_on_is_part_of_the_identity(tmp_path):
    """Other pixels; white, as it has always been, needs no word."""
    file = str(parquet_of(tmp_path / "a.parquet", [picture(0)], ["a"]))
    grounds = ("white", "black", None)
    made = [load_rows(Captions(name="captions", source="parquet", paths=[file], background=b)).identity for b in grounds]
    assert all(one != other for one, other in itertools.combinations(made, 2))
    assert made[0] == load_rows(Captions(name="captions", source="parquet", paths=[file])).identity


def test_the_column_is_part_of_the_identity(tmp_path):
    """One file, columns of other images: other data sets; the same images under another name are the same."""
    import datasets

    picture, other = Image.new("RGB", (8, 8), (3, 0, 0)), Image.new("RGB", (8, 8), (4, 0, 0))
    rows = datasets.Dataset.from_dict({"image": [picture], "depth": [other], "copy": [picture], "caption": ["a"]})
    rows.to_parquet(tmp_path / "a.parquet")
    data = {"name": "captions", "source": "parquet", "paths": [str(tmp_path / "a.parquet")]}
    one, other, copy = (load_rows(Captions(**data, image_column=column)).identity for column in ("image", "depth", "copy"))
    assert one["prompts"] == other["prompts"]
    assert one["images"] != other["images"]
    assert one == copy


def test_copied_images_are_the_same(tmp_path):
    """Names and contents count, not where they lie or when they were written."""
    data = make("imagefolder", tmp_path)
    identity, other = load_rows(data).identity, tmp_path / "elsewhere"
    shutil.copytree(data.paths[0], other)
    for file in other.iterdir():
        os.utime(file, (0, 0))
    copied = data.model_copy(update={"paths": [str(other)]})
    assert load_rows(copied).identity == identity
    pixels = np.array(Image.open(other / "1.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(other / "1.png")
    assert load_rows(copied).identity["images"] != identity["images"]


def test_an_image_with_a_list_of_captions_is_a_row_for_each(tmp_path):
    file = parquet_of(tmp_path / "a.parquet", [picture(0), picture(1)], [["a", "b", "c"], ["d"]])
    rows = load_rows(Captions(name="captions", source="parquet", paths=[str(file)]))
    assert rows.prompts == ["a", "b", "c", "d"]
    assert rows.index == [0, 0, 0, 1]
    pixels, places = image_batch(rows, range(1, 4), 8)
    assert pixels.shape == (3, 3, 8, 8)
    assert torch.equal(pixels[0], rows.image(0, 8).pixels)
    assert torch.equal(pixels[2], rows.image(3, 8).pixels)
    assert places == [(8, 8, 0, 0), (8, 8, 0, 0), (10, 24, 0, 5)]


@pytest.mark.parametrize(("width", "height"), [(40, 16), (16, 40), (80, 32), (33, 77), (5, 3)])
def test_the_middle_is_cut_out_at_its_size(width, height, tmp_path):
    """Resized until the shorter side is 16, then cut: a ramp along the longer side says which part is left.

    (height, width) are those before, (top, left) those in the resized image: SDXL's micro-conditioning.
    """
    ramp = np.linspace(0, 255, max(width, height))
    ramp = np.repeat(ramp[None] if width > height else ramp[:, None], min(width, height), 0 if width > height else 1)
    image = Image.fromarray(np.stack([ramp] * 3, 2).round().astype(np.uint8))
    file = parquet_of(tmp_path / "a.parquet", [image], ["a"])
    row = load_rows(Captions(name="captions", source="parquet", paths=[str(file)])).image(0, 16)
    longer = round(max(width, height) * 16 / min(width, height))
    cut = (longer - 16) // 2
    assert row.original_and_crop == (height, width, *((0, cut) if width > height else (cut, 0)))
    assert row.pixels.shape == (3, 16, 16)
    assert row.pixels.dtype == torch.float32
    line = row.pixels[0, 7] if width > height else row.pixels[0, :, 7]
    # pixel centres of the cut, on a ramp from -1 to 1 over the centres of the original's pixels
    position = (cut + torch.arange(16) + 0.5) / longer * max(width, height) - 0.5
    expected = (2 * position / (max(width, height) - 1) - 1).clamp(-1, 1)
    step = float(position[1] - position[0]) * 2 / (max(width, height) - 1)
    assert float((line - expected).abs().max()) < 0.8 * step  # one pixel aside would show
    across = row.pixels[0, :, 7] if width > height else row.pixels[0, 7]
    assert float(across.std()) < 0.01
    assert float(line.mean()) == pytest.approx(0, abs=step / 2 + 0.004)  # half a pixel, where the rest is odd, and rounding


@pytest.mark.parametrize(("background", "ground"), [("white", 255), ("#000000", 0)])
def test_grey_and_transparent_images_become_rgb(background, ground, tmp_path):
    images = [Image.new("L", (8, 8), 51), Image.new("RGBA", (8, 8), (255, 0, 51, 0)), Image.new("1", (8, 8), 1)]
    file = parquet_of(tmp_path / "a.parquet", images, ["a", "b", "c"])
    rows = load_rows(Captions(name="captions", source="parquet", paths=[str(file)], background=background))
    for i, colour in enumerate(((51, 51, 51), (ground, ground, ground), (255, 255, 255))):
        expected = to_unit(torch.tensor(colour, dtype=torch.uint8))[:, None, None].expand(3, 8, 8)
        assert torch.equal(rows.image(i, 8).pixels, expected)
    assert rows.notes == {f"transparency put on {background}": 1}
    white = load_rows(Captions(name="captions", source="parquet", paths=[str(file)])).identity
    assert (rows.identity == white) == (background == "white")


@pytest.mark.parametrize("source", ["parquet", "webdataset", "imagefolder"])
def test_photos_are_turned_upright(source, tmp_path):
    """(height, width) are those of the upright photo, which SDXL is told."""
    exif = Image.Exif()
    exif[274] = 6  # the 0th row lies on the right: a phone held upright
    seen = np.array(picture(1))
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(seen[:, ::-1].swapaxes(0, 1))).save(stream, "PNG", exif=exif)
    data = make(source, tmp_path)
    if source == "parquet":
        images = [{"bytes": encoded(picture(0)), "path": None}, {"bytes": stream.getvalue(), "path": None}]
        parquet_of(Path(data.paths[0]), images, ["a", "b"])
    elif source == "webdataset":
        tar_of(
            Path(data.paths[0]), ("0.png", encoded(picture(0))), ("0.txt", b"a"), ("1.png", stream.getvalue()), ("1.txt", b"b")
        )
    else:
        (Path(data.paths[0]) / "1.png").write_bytes(stream.getvalue())
    row = load_rows(data).image(1, 10)
    assert row.original_and_crop == (10, 24, 0, 7)
    assert torch.equal(row.pixels, to_unit(torch.from_numpy(seen[:, 7:17].copy()).permute(2, 0, 1)))


def test_names_with_brackets_are_no_patterns(tmp_path):
    """And "train" in the name of a parquet file no split."""
    files = [tmp_path / name for name in ("a[1].parquet", "test*.parquet", "train?.parquet")]
    for i, file in enumerate(files):
        parquet_of(file, [picture(i)], [f"said {i}"])
    rows = load_rows(Captions(name="captions", source="parquet", paths=[str(f) for f in files]))
    assert rows.prompts == ["said 0", "said 1", "said 2"]


# Faults of captioned data ----------------------------------------------------------------------------------------------------


def refusal(kind: type[Exception] = ValueError, **data) -> str:
    with pytest.raises(kind, match=r"^data") as raised:
        load_rows(Captions(name="captions", **data))
    return str(raised.value)


def test_images_without_captions_are_refused(tmp_path):
    folder = folder_of(tmp_path / "images", None)
    said = refusal(source="imagefolder", paths=[str(folder)])
    assert said.startswith(
        f"data.caption_column: no metadata.csv, .jsonl or .parquet in {folder}, so its images have no captions; "
    )
    tar = make("webdataset", tmp_path).paths[0]
    said = refusal(source="webdataset", paths=[tar], image_column="png")
    assert "no column 'caption'" in said
    assert "its columns are png, txt" in said  # what to set caption_column to
    said = refusal(source="webdataset", paths=[tar])
    assert said.startswith(f"data.image_column: no column 'image' in {tar}, so it has no images; its columns are png, txt")


@pytest.mark.parametrize("captions", [["a", None], ["a", " "], [["a"], []], [["a"], ["b", ""]]], ids=str)
def test_an_image_whose_caption_is_missing_is_named(captions, tmp_path):
    file = parquet_of(tmp_path / "a.parquet", [picture(0), picture(1)], captions)
    said = refusal(source="parquet", paths=[str(file)])
    assert said == f"data.caption_column: image 1 of {file} has no caption; give it one or remove it"


def test_an_undecodable_or_missing_image_is_named(tmp_path):
    whole = encoded(picture(1))
    damaged = [{"bytes": b, "path": None} for b in (b"no image", whole[: len(whole) // 2])]
    file = parquet_of(tmp_path / "a.parquet", [picture(0), *damaged], list("abc"))
    rows = load_rows(Captions(name="captions", source="parquet", paths=[str(file)]))
    rows.image(0, 8)
    for row in (1, 2):
        with pytest.raises(ValueError, match=f"^data: image {row} cannot be decoded: .*; mend or remove it"):
            rows.image(row, 8)
    file = parquet_of(tmp_path / "b.parquet", [picture(0), None], list("ab"))
    assert refusal(source="parquet", paths=[str(file)]) == f"data: image 1 of {file} has no image; remove the row"


def test_a_strip_that_would_fill_the_memory_is_refused(tmp_path):
    """Resized by its shorter side it would have 2 million pixels along the other."""
    file = parquet_of(tmp_path / "a.parquet", [Image.new("RGB", (1, 4000))], ["a"])
    rows = load_rows(Captions(name="captions", source="parquet", paths=[str(file)]))
    with pytest.raises(ValueError, match=r"data: image 0 is 1x4000, and 512x2048000 with the shorter side at 512: .*; crop it"):
        rows.image(0, 512)


def test_a_column_that_holds_no_images_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [encoded(picture(0))], "caption": ["a"]}), tmp_path / "a.parquet")
    assert "holds Value('binary'), not images" in refusal(source="parquet", paths=[str(tmp_path / "a.parquet")])


@pytest.mark.parametrize(
    ("source", "name", "data", "message"),
    [
        ("parquet", "a.parquet", b"no parquet", "cannot read"),
        ("webdataset", "a.tar", b"no archive" * 100, "cannot read"),
        ("webdataset", "cut.tar", None, "cannot read"),
        ("imagefolder", "images.zip", b"no archive", ""),
    ],
)
def test_a_damaged_source_is_named(source, name, data, message, tmp_path):
    path = tmp_path / name
    if name == "cut.tar":
        data = tar_of(tmp_path / "whole.tar", ("0.png", encoded(picture(0))), ("0.txt", b"a")).read_bytes()[:700]
    path.write_bytes(data)
    said = refusal(source=source, paths=[str(path)])
    assert said.startswith(f"data.paths: {message} {path}: " if message else f"data.paths: {path} is not a whole zip file (")


def test_a_folder_without_pictures_is_refused(tmp_path):
    assert refusal(source="imagefolder", paths=[str(tmp_path)]).startswith(f"data.paths: no pictures in '{tmp_path}'")


def test_paths_that_are_not_there_or_too_many_are_refused(tmp_path):
    gone = str(tmp_path / "gone.parquet")
    assert refusal(FileNotFoundError, source="parquet", paths=[gone]) == f"data.paths: no such file or folder {gone!r}"
    folders = [str(folder_of(tmp_path / name, None)) for name in ("one", "two")]
    assert refusal(source="imagefolder", paths=folders) == "data.paths: one folder, got 2"
    assert refusal(source="hub", paths=["a/b", "c/d"]) == "data.paths: one hub id, got 2"
