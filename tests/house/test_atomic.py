"""Files and folders are there whole or not at all, and everybody may read them whom the umask lets."""

import os
import re
import resource
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.common import atomic

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def largest_file(size: int):
    """No file can grow beyond `size` bytes: a write that fails as on a full disk, and needs no disk for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def weights(path: Path, size: int = 10) -> None:
    save_file({"w": torch.ones(size)}, path)


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, "0o644", "0o755"), (0o002, "0o664", "0o775"), (0o077, "0o600", "0o700")]
)
def test_files_have_the_mode_of_the_umask(mask, file, folder, tmp_path):
    """safetensors alone leaves 0600, which shuts all others out of a shared folder."""
    with umask(mask):
        with atomic.new_file(tmp_path / "new" / "one.safetensors") as partial:
            weights(partial)
        atomic.write_text(tmp_path / "text", "x")
        atomic.append_line(tmp_path / "lines", "x")
        with atomic.new_folder(tmp_path / "model") as partial:
            (partial / "unet").mkdir()
            weights(partial / "unet" / "two.safetensors")
    for path in ("new/one.safetensors", "text", "lines", "model/unet/two.safetensors"):
        assert mode(tmp_path / path) == file, path
    for path in ("new", "model", "model/unet"):
        assert mode(tmp_path / path) == folder, path


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file, big = tmp_path / "w.safetensors", 100_000
    with atomic.new_file(file) as partial:
        weights(partial)
    with largest_file(10_000):
        with pytest.raises(atomic.WriteError, match=f"^cannot write '{file}': File too large"), atomic.new_file(file) as partial:
            weights(partial, big)
        with pytest.raises(atomic.WriteError, match=f"^cannot write '{file}': File too large"):
            atomic.write_atomically(file, b"x" * big)
    assert load_file(file)["w"].shape == (10,)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_full_disk_is_named_with_what_helps(tmp_path):
    """/dev/full is a disk on which nothing fits."""
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(atomic.WriteError) as failed:
        atomic.append_line(tmp_path / "log", "a line")
    assert str(failed.value) == (
        f"cannot write '{tmp_path / 'log'}': No space left on device; free space there, or name another folder"
    )


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    file = tmp_path / "metrics.jsonl"
    atomic.append_line(file, "1" * 90)
    with largest_file(150), pytest.raises(atomic.WriteError, match="File too large"):
        atomic.append_line(file, "2" * 90)
    assert file.read_text() == "1" * 90 + "\n"


def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path):
    folder = tmp_path / "model"
    with atomic.new_folder(folder) as partial:
        weights(partial / "w.safetensors")

    def write():
        with atomic.new_folder(folder) as partial:
            (partial / "first").write_text("x")
            weights(partial / "w.safetensors", 100_000)

    with largest_file(10_000), pytest.raises(atomic.WriteError, match=f"^cannot write '{folder}': File too large"):
        write()
    assert [f.name for f in tmp_path.rglob("*")] == ["model", "w.safetensors"]
    assert load_file(folder / "w.safetensors")["w"].shape == (10,)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_fails_leaves_nothing(error, tmp_path):
    def write(new):
        with new(tmp_path / "x") as partial:
            assert partial.exists()
            raise error

    for new in (atomic.new_file, atomic.new_folder):
        with pytest.raises(error):
            write(new)
    assert os.listdir(tmp_path) == []


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(atomic.WriteError, match="Not a directory"), atomic.new_folder(tmp_path / "model") as partial:
        weights(partial / "w.safetensors")
    assert (tmp_path / "model").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


def test_what_a_killed_process_left_is_undone(tmp_path):
    """Killed between the two renames, the old folder comes back; killed before them, the half of a new one goes."""
    for name in (".replaced_a", ".partial_a", ".replaced_b", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    assert atomic.unfinished(tmp_path) == {tmp_path / "a", tmp_path / "b"}
    for path in atomic.unfinished(tmp_path):
        atomic.recover(path)
    assert {str(f.relative_to(tmp_path)): f.read_text() for f in tmp_path.rglob("from")} == {
        "a/from": ".replaced_a",
        "b/from": "b",
    }
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_there_is_no_second_way():
    """What renames or makes temporary files is here alone; a download (eval/networks/weights.py) fails in ways of its own."""
    files = [f for room in ("pipelines", "trainers", "eval") for f in (ROOT / room).rglob("*.py")]
    own = re.compile(r"os\.(replace|rename)\(|mkstemp|NamedTemporaryFile")
    assert {str(f.relative_to(ROOT)) for f in files if own.search(f.read_text())} == {
        "pipelines/common/atomic.py",
        "eval/networks/weights.py",
    }
