"""Folders of images with captions: every row of their metadata is used or refused by name, whatever words are in names."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.data.images import load_hub
from trainers.config.data import Captions
from trainers.data.sources import CaptionRows, load_rows


def captioned(folder: Path, table: str | None, *names: str, file: str = "metadata.csv") -> Captions:
    """A folder with pictures of those names, the i-th in shade i, and one file of metadata."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(folder / name)
    if table is not None:
        (folder / file).write_text(table)
    return Captions(name="captions", source="imagefolder", paths=[str(folder)])


def shades(rows: CaptionRows) -> list[int]:
    return [round((float(rows.image(i, 8).pixels[0, 0, 0]) + 1) * 127.5) for i in range(len(rows))]


@pytest.mark.parametrize(
    "names",
    [
        ("COCO_val2014_1.jpg", "COCO_val2014_2.jpg", "COCO_train2014_1.jpg"),
        ("pika.png", "wheel.png", "train.png"),
        ("bus/1.png", "train/2.png", "test/3.png"),
        ("val/1.png", "validation/2.png", "eval/3.png"),
    ],
)
def test_words_for_splits_in_names_are_only_words(names, tmp_path):
    """`datasets` would take them for splits and leave out rows: huggingface/datasets#5021, #7201."""
    names = tuple(n.replace(".jpg", ".png") for n in names)
    table = "file_name,caption\n" + "".join(f"{n},said {i}\n" for i, n in enumerate(names))
    rows = load_rows(captioned(tmp_path, table, *names))
    assert rows.prompts == ["said 0", "said 1", "said 2"]
    assert shades(rows) == [0, 1, 2]


def test_each_folder_may_have_its_metadata(tmp_path):
    """Names are relative to it; rows in the order of folders as a person counts, then as they stand there."""
    captioned(
        tmp_path,
        "file_name,caption\n1.png,two\n0.png,one\n",
        "2/0.png",
        "2/1.png",
        "train/0.png",
        "10/0.png",
        file="2/metadata.csv",
    )
    (tmp_path / "10/metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "caption": ["three", 7]}))
    pq.write_table(pa.table({"file_name": ["0.png"], "caption": [1984]}), tmp_path / "train/metadata.parquet")
    rows = load_rows(Captions(name="captions", source="imagefolder", paths=[str(tmp_path)]))
    assert rows.prompts == ["two", "one", "three", "7", "1984"]
    assert shades(rows) == [1, 0, 3, 3, 2]


def test_captions_that_are_numbers(tmp_path):
    rows = load_rows(captioned(tmp_path, "file_name,caption\n0.png,7\n1.png,007\n2.png,nan\n", "0.png", "1.png", "2.png"))
    assert rows.prompts == ["7", "007", "nan"]


def test_a_zip_is_a_folder(tmp_path):
    captioned(tmp_path / "x", "file_name,caption\nb.png,b\na.png,a\n", "a.png", "b.png")
    shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path / "x")
    folder, packed = (Captions(name="captions", source="imagefolder", paths=[str(tmp_path / n)]) for n in ("x", "x.zip"))
    assert shades(load_rows(packed)) == [1, 0]
    assert load_rows(packed).identity == load_rows(folder).identity


def test_other_image_columns_have_their_own_names(tmp_path):
    """As `datasets` documents: image is file_name or image_file_name, depth is depth_file_name."""
    data = captioned(tmp_path, "image_file_name,depth_file_name,caption\n0.png,1.png,a\n", "0.png", "1.png")
    assert shades(load_rows(data)) == [0]
    assert shades(load_rows(data.model_copy(update={"image_column": "depth"}))) == [1]


def test_names_as_other_systems_write_them(tmp_path):
    """Windows' backslashes; macOS's accents, which are letters of their own there."""
    names = ["a/0.png", "e\u0301te\u0301.png"]
    rows = load_rows(captioned(tmp_path, "file_name,caption\na\\0.png,x\n\u00e9t\u00e9.png,y\n", *names))
    assert shades(rows) == [0, 1]


def test_pictures_without_a_row_and_other_files_are_said(tmp_path, capsys):
    names = ("0.png", "1.png", "2.png", ".3.png")
    rows = load_rows(captioned(tmp_path, "file_name,caption\n1.png,b\n", *names))
    (tmp_path / "notes.txt").write_text("")
    assert rows.prompts == ["b"]
    said = "data.paths: 1 rows; 2 pictures have no row in the metadata and are not used (0.png, 2.png); left out: 1 hidden"
    assert said in capsys.readouterr().err


def test_what_is_not_used_is_no_part_of_the_identity(tmp_path):
    """A .DS_Store, a note, a picture without a row: a finished cache stays valid."""
    data = captioned(tmp_path, "file_name,caption\n0.png,a\n", "0.png")
    identity = load_rows(data).identity
    for name in (".DS_Store", "notes.txt", "1.png"):
        Image.new("L", (8, 8)).save(tmp_path / name, "png")
    assert load_rows(data).identity == identity


METADATA_FAULTS = {
    "gone": (
        "file_name,caption\n0.png,a\n1.png,b\n",
        r"data.paths: 1 rows of the metadata of .* not among its pictures \(1.png\)",
    ),
    "outside": ("file_name,caption\n../0.png,a\n", r"data.paths: 1 rows of the metadata"),
    "unnamed": ("file_name,caption\n,a\n", r"data.paths: 1 rows of the metadata"),
    "no names": (
        "file,caption\n0.png,a\n",
        r"data.image_column: no column 'file_name' in row 1 of 'metadata.csv' in .*; it has file, ",
    ),
    "no captions": ("file_name,text\n0.png,a\n", r"data.caption_column: no column 'caption' in row 1 .* it has file_name, text"),
    "comma": (
        "file_name,caption\n0.png,a cat, on a mat\n",
        r"data.paths: cannot read 'metadata.csv' in .*: line 2 has more cells",
    ),
    "empty caption": ("file_name,caption\n0.png, \n", r"data.caption_column: image '0.png' of .* has no caption; give it one"),
    "no rows": ("file_name,caption\n", r"data.paths: no rows in 'metadata.csv'"),
}


@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_faults_of_metadata_are_named(fault, tmp_path):
    table, said = METADATA_FAULTS[fault]
    with pytest.raises(UserError, match=said):
        load_rows(captioned(tmp_path, table, "0.png"))


def test_a_folder_of_pictures_is_no_data_set_by_name(tmp_path):
    """`datasets` would read a part of it: the "train" split, by the words in names."""
    data = captioned(tmp_path, "file_name,caption\n0.png,a\nval.png,b\n", "0.png", "val.png")
    with pytest.raises(UserError, match=r"data.paths: '.*' is a folder of pictures, no data set; use data.source=imagefolder"):
        load_rows(data.model_copy(update={"source": "hub"}))
    with pytest.raises(UserError, match=r"data.id: '.*' is a folder of pictures, no data set; use data=\{name: folder, path: "):
        load_hub(str(tmp_path), "train", "image", None, 8, 3)


def test_two_files_of_metadata_in_a_folder_are_refused(tmp_path):
    data = captioned(tmp_path, "file_name,caption\n0.png,a\n", "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "caption": "b"}))
    with pytest.raises(UserError, match=r"several files of metadata in a folder \(metadata.csv, metadata.jsonl\); keep one"):
        load_rows(data)
