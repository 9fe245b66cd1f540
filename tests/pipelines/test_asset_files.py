"""Damaged and missing files of assets/ are named, with the command that makes them again."""

import json
from pathlib import Path

import pytest

from pipelines.assets import check_assets, sum_of
from pipelines.common.errors import UserError


@pytest.fixture
def assets(tmp_path, monkeypatch) -> Path:
    """assets/ with a/one, a/b/two and c/three, in the current folder."""
    monkeypatch.chdir(tmp_path)
    files = {"a/one": b"1", "a/b/two": b"22", "c/three": b"333"}
    for name, content in files.items():
        file = tmp_path / "assets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    listed = {name: sum_of(tmp_path / "assets" / name) for name in files}
    (tmp_path / "assets" / "manifest.json").write_text(json.dumps(listed))
    return tmp_path / "assets"


def said(assets: Path, *folders: str) -> str:
    with pytest.raises(UserError) as raised:
        check_assets(*(assets / folder for folder in folders), assets=assets)
    return str(raised.value)


def test_the_files_of_this_repository_are_those_of_its_manifest():
    check_assets()


def test_whole_files_pass(assets):
    check_assets(assets=assets)
    check_assets(assets / "a", assets / "c", assets=assets)


def test_a_damaged_file_is_named_with_its_command(assets):
    (assets / "a" / "b" / "two").write_bytes(b"2x")
    message = said(assets)
    assert "damaged assets/a/b/two" in message
    assert "git checkout -- assets/a/b/two (" in message
    assert "make assets" in message


def test_a_shorter_file_is_damaged(assets):
    (assets / "c" / "three").write_bytes(b"33")
    assert "damaged assets/c/three" in said(assets, "c")


def test_missing_and_damaged_files_are_all_named(assets):
    (assets / "a" / "one").unlink()
    (assets / "c" / "three").write_bytes(b"")
    message = said(assets)
    assert "missing assets/a/one; damaged assets/c/three" in message
    assert "git checkout -- assets/a/one assets/c/three (" in message


def test_other_folders_are_not_looked_at(assets):
    (assets / "c" / "three").unlink()
    check_assets(assets / "a", assets=assets)


def test_a_manifest_that_is_missing_damaged_or_of_something_else(assets):
    assert "assets/manifest.json lists no file of d" in said(assets, "d")
    (assets / "manifest.json").write_text("{")
    assert "is not valid JSON" in said(assets)
    (assets / "manifest.json").unlink()
    assert "assets/manifest.json is missing; get them again: git checkout -- assets/manifest.json" in said(assets)
