"""Local data sets as they are now, whatever the `datasets` library has kept of them; its faults as one kind of error."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from eval.images.files import ImageFiles
from eval.protocols import PROTOCOLS
from pipelines.common.errors import UserError
from pipelines.data.images import load_hub, load_parquet
from trainers.config.data import Captions
from trainers.data.sources import load_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def grey(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(stream, "BMP")  # equally long whatever the colour
    return stream.getvalue()


def parquet(file: Path, value: int, caption: str) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": grey(value), "path": None}] * 2, "caption": [caption, caption]}
    datasets.Dataset.from_dict(rows, features).to_parquet(file)


def tar(file: Path, value: int, caption: str) -> None:
    with tarfile.open(file, "w") as archive:
        for name, data in (("0.bmp", grey(value)), ("0.txt", caption.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def images(folder: Path, value: int, caption: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "0.bmp").write_bytes(grey(value))
    (folder / "metadata.csv").write_text(f"file_name,caption\n0.bmp,{caption}\n")


def stamped(path: Path) -> Path:
    """With the one time that every file here has, as an archive or a copy leaves it."""
    for file in (path, *path.rglob("*")):
        os.utime(file, (1_700_000_000, 1_700_000_000))
    return path


def captions(source: str, path: Path, **columns) -> tuple[int, str]:
    rows = load_rows(Captions(name="captions", source=source, paths=[str(path)], **columns))
    return round((float(rows.image(0, 8).pixels.mean()) + 1) * 127.5), rows.prompts[0]


def test_a_parquet_file_replaced_by_one_of_the_same_time_and_size_is_read_anew(tmp_path):
    file, seen = tmp_path / "a.parquet", []
    for value in (10, 200):
        parquet(file, value, "a cat")
        stamped(file)
        read = load_parquet([str(file)], "image", None, 8, 3).pixels
        measured = ImageFiles(str(file), PROTOCOLS["custom"], column="image")[0]["image"]
        folder = ImageFiles(str(tmp_path), PROTOCOLS["custom"], column="image")[0]["image"]
        seen.append([int(read.float().mean()), int(measured.float().mean()), int(folder.float().mean())])
        assert captions("parquet", file) == (value, "a cat")
    assert seen == [[10, 10, 10], [200, 200, 200]]


def test_a_folder_with_a_data_set_is_read_anew(tmp_path):
    folder, seen = tmp_path / "set", []
    folder.mkdir()
    for value in (10, 200):
        parquet(folder / "train.parquet", value, "a cat")
        stamped(folder)
        seen.append(int(load_hub(str(folder), "train", "image", None, 8, 3).pixels.float().mean()))
    assert seen == [10, 200]


@pytest.mark.parametrize("source", ["parquet", "webdataset", "imagefolder"])
def test_captions_replaced_under_the_same_time_and_size_are_read_anew(source, tmp_path):
    path = tmp_path / {"parquet": "a.parquet", "webdataset": "a.tar", "imagefolder": "images"}[source]
    columns = {"image_column": "bmp", "caption_column": "txt"} if source == "webdataset" else {}
    for value, caption in ((10, "a cat"), (200, "a dog")):
        {"parquet": parquet, "webdataset": tar, "imagefolder": images}[source](path, value, caption)
        assert captions(source, stamped(path), **columns) == (value, caption)


def test_a_file_with_another_time_is_not_read_into_the_cache_again_elsewhere(tmp_path):
    """The cache is kept under what is in the file: one place for one content."""
    file = tmp_path / "a.parquet"
    parquet(file, 10, "a cat")
    captions("parquet", file)
    os.utime(file, (1, 1))
    captions("parquet", file)
    assert len(list((tmp_path / "datasets" / "by_content").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "split", "reason"),
    [("{tmp}/set", "tests", "split"), ("{tmp}/empty", "train", "")],
)
def test_what_the_library_says_of_a_folder_is_the_users_to_mend(name, split, reason, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "empty").mkdir()
    parquet(tmp_path / "set" / "train.parquet", 10, "a cat")
    name = name.format(tmp=tmp_path)
    with pytest.raises(UserError, match=rf"^data.id: cannot read {name!r}.*{reason}"):
        load_hub(name, split, "image", None, 8, 3)
    with pytest.raises(UserError, match=rf"^data.paths: cannot read {name}.*{reason}"):
        load_rows(Captions(name="captions", source="hub", paths=[name], split=split))


def test_a_hub_that_cannot_be_asked_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^data.id: cannot read 'nobody/nothing': "):
        load_hub("nobody/nothing", "train", "image", None, 8, 3)


def test_a_truncated_parquet_file_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    parquet(file, 10, "a cat")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"^data.files: cannot read {file}: "):
        load_parquet([str(file)], "image", None, 8, 3)
    with pytest.raises(UserError, match=f"^{file} cannot be read: "):
        ImageFiles(str(file), PROTOCOLS["custom"])


def test_rows_in_another_order_are_another_data_set(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    pictures, found = [{"bytes": grey(i), "path": None} for i in range(3)], []
    for name, order in (("a", pictures), ("b", pictures[::-1])):
        datasets.Dataset.from_dict({"image": order, "caption": list("abc")}, features).to_parquet(tmp_path / f"{name}.parquet")
        found.append(load_rows(Captions(name="captions", source="parquet", paths=[str(tmp_path / f"{name}.parquet")])).identity)
    assert found[0]["prompts"] == found[1]["prompts"]
    assert found[0]["images"] != found[1]["images"]
