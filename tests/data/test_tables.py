"""Tables of prompts and captions as users' programs write them: read whole, or refused with what is wrong with them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from eval.images.captions import read_captions
from pipelines.common.errors import UserError
from trainers.config.data import Captions, Prompts
from trainers.data.sources import load_rows


def prompts(file: Path, content: str | bytes) -> list[str]:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_rows(Prompts(name="prompts", file=str(file))).prompts


def captioned(folder: Path, content: bytes, name: str = "metadata.csv") -> list[str]:
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    (folder / name).write_bytes(content)
    return load_rows(Captions(name="captions", source="imagefolder", paths=[str(folder)])).prompts


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_than_commas_are_named(separator, tmp_path):
    """As spreadsheets write "CSV" in half of Europe. A comma in a caption must not make it a matter of quotes."""
    table = f"file_name{separator}caption\n0.png{separator}a cat, brown\n"
    with pytest.raises(UserError, match=r"are separated by .*expected commas"):
        prompts(tmp_path / "p.csv", table)
    with pytest.raises(UserError, match=r"are separated by .*expected commas"):
        captioned(tmp_path, table.encode())


def test_one_column_needs_no_separator(tmp_path):
    assert prompts(tmp_path / "p.csv", 'caption\na; b\n"c, d"\n') == ["a; b", "c, d"]


def test_a_space_in_a_columns_name_shows(tmp_path):
    with pytest.raises(UserError, match=r"it has file_name, ' caption'"):
        captioned(tmp_path, b"file_name, caption\n0.png, a\n")
    with pytest.raises(UserError, match=r"it has id, ' caption'"):
        prompts(tmp_path / "p.csv", "id, caption\n1, a\n")


def test_metadata_that_is_no_utf8_names_its_line(tmp_path):
    with pytest.raises(UserError, match=r"line 2 has the byte 0xe9; save it as UTF-8"):
        captioned(tmp_path, "file_name,caption\n0.png,café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"UTF-16"):
        captioned(tmp_path, "file_name,caption\n0.png,a\n".encode("utf-16"))


def test_jsonl_of_windows_with_an_empty_last_line(tmp_path):
    lines = b'{"file_name": "0.png", "caption": "a"}\r\n\r\n'
    assert captioned(tmp_path, lines, "metadata.jsonl") == ["a"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_missing_caption_as_python_writes_it_is_no_caption(value, tmp_path):
    """json.dumps writes NaN where pandas has nothing: not a picture of "NaN"."""
    assert json.dumps(float("nan")) == "NaN"
    with pytest.raises(UserError, match=r"no text"):
        prompts(tmp_path / "p.jsonl", f'{{"caption": "a"}}\n{{"caption": {value}}}\n')
    with pytest.raises(UserError, match=r"image 1 of .* has no caption"):
        read_captions(str(tmp_path / "p.jsonl"))


def test_a_key_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"line 1.*'caption' stands twice"):
        prompts(tmp_path / "p.jsonl", '{"caption": "a", "caption": "b"}\n')


def test_half_a_character_is_no_text(tmp_path):
    """A text that was cut in the middle of an emoji: tokenizers end in a TypeError."""
    with pytest.raises(UserError, match=r"prompt 1 of 1 is .*no text"):
        prompts(tmp_path / "p.jsonl", '{"caption": "a \\ud83d"}\n')
    with pytest.raises(UserError, match=r"image 0 of .* has no caption"):
        read_captions(str(tmp_path / "p.jsonl"))
    assert prompts(tmp_path / "p.jsonl", '{"caption": "a \\ud83d\\ude00"}\n') == ["a \U0001f600"]


@pytest.mark.parametrize(("name", "content"), [("P.TXT", "a\nb\n"), ("P.Csv", "caption\na\nb\n"), ("P.JSONL", '"x"')])
def test_suffixes_in_capitals(name, content, tmp_path):
    content = content if content != '"x"' else '{"caption": "a"}\n{"caption": "b"}\n'
    assert prompts(tmp_path / name, content) == ["a", "b"]
