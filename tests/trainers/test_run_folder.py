"""An output_dir as users have them: in use, full, read-only, shared, a file. One message, and what was there still is."""

import json
import os
import resource
import shutil
import stat
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines.common.errors import UserError
from pipelines.common.lock import FolderLock
from trainers import train_teacher
from trainers.engine import checkpoint
from trainers.engine.log import RunLog
from trainers.engine.loop import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator", "one_thread")


@pytest.fixture
def train(train_teacher_with, tiny_teacher):
    """train(folder, a=b ...) -> (exit status, what the command says, without a traceback)."""
    return train_teacher_with(tiny_teacher | {"checkpoint_every": 2})


@contextmanager
def at_step(step: int, act):
    """act() once, after this step of a run."""
    one_step = Trainer.one_step

    def watched(self):
        one_step(self)
        if self.step == step:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "one_step", watched)
        yield


@pytest.fixture
def full_disk():
    """full_disk(size): from now on no file can grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# In use -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["no", "latest"])
def test_a_second_run_in_the_same_folder_is_refused(resume, train, tmp_path):
    """By name, before anything is loaded, however the folder is spelt; what the first writes is as if there were no second."""
    train(tmp_path / "alone")
    run, link, second = tmp_path / "run", tmp_path / "link", []
    link.symlink_to(run)
    with at_step(1, lambda: second.append(train(link, f"resume={resume}"))):
        assert train(run)[0] == 0
    ((status, said),) = second
    assert status == 2
    assert f"error: output_dir {str(link)!r} is in use by another run (process {os.getpid()} on " in said
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "alone" / "metrics.jsonl").read_bytes()
    assert not (run / ".lock").exists()


def test_two_runs_that_start_at_the_same_moment(train, tmp_path, monkeypatch):
    """Both have found the folder free; only one gets it."""
    run, second = tmp_path / "run", []
    check = train_teacher.command.check_output

    def checked(config, accelerator):
        check(config, accelerator)
        if not second:
            second.append(None)
            second[0] = train(run)  # the whole of another run, between the look at the folder and the first write

    monkeypatch.setattr(train_teacher.command, "check_output", checked)
    status, said = train(run)
    assert second[0][0] == 0
    assert status == 2
    assert "already holds a run" in said
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_the_lock_of_a_killed_run_locks_nobody_out(train, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_text("process 1 on here")
    assert train(run)[0] == 0


# Python 3.12 and later, where threads are there: the child only takes a lock and dies.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_lock_ends_with_its_process(tmp_path):
    child = os.fork()
    if child == 0:
        FolderLock(tmp_path).acquire()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").read_text() == f"process {child} on {os.uname().nodename}"
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    lock.release()
    assert os.listdir(tmp_path) == []


# Full -------------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_at_a_checkpoint(train, full_disk, tmp_path):
    """One message that names the file and the last checkpoint; no half of one; resumed, the run ends as it would have."""
    train(tmp_path / "whole")
    run = tmp_path / "run"
    with at_step(3, lambda: full_disk(10_000)):
        status, said = train(run)
    full_disk(resource.RLIM_INFINITY)
    new, last = run / "checkpoints" / "step_00000004", run / "checkpoints" / "step_00000002"
    assert status == 2
    assert (
        f"error: cannot write {str(new)!r}: File too large. The run stopped at step 4; the last checkpoint is {str(last)!r}."
        in said
    )
    assert os.listdir(run / "checkpoints") == ["step_00000002"]
    checkpoint.load(last)
    assert train(run, "resume=latest")[0] == 0
    for name in ("metrics.jsonl", "teacher/unet/diffusion_pytorch_model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("named", "size", "overrides"),
    [
        ("teacher", 10_000, ["checkpoint_every=null"]),
        ("snapshots/step_00000002", 10_000, ["snapshot_every=2", "checkpoint_every=1"]),
        ("samples/step_00000002.png", 300, ["sample_every=2", "checkpoint_every=null", "log_every=4"]),
        ("metrics.jsonl", 250, ["checkpoint_every=null"]),
    ],
)
def test_a_full_disk_anywhere_else(named, size, overrides, train, full_disk, tmp_path):
    run = tmp_path / "run"
    with at_step(1, lambda: full_disk(size)):
        status, said = train(run, *overrides)
    full_disk(resource.RLIM_INFINITY)
    assert status == 2
    assert f"error: cannot write {str(run / named)!r}: File too large. The run stopped at step " in said
    assert not list(run.rglob(".*"))
    assert (run / named).exists() == (named == "metrics.jsonl")
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []:
        json.loads(line)  # whole


# Not to be written --------------------------------------------------------------------------------------------------------------


def test_an_output_dir_that_cannot_be_is_refused_before_it_is_needed(train, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for part in ("checkpoints", "samples", "snapshots", "teacher"):
        (tmp_path / part).mkdir()
        (tmp_path / part / part).write_text("mine")
    (tmp_path / "log" / "metrics.jsonl").mkdir(parents=True)
    cases = {
        "file": f"{str(tmp_path / 'file')!r} is a file",
        "file/run": f"{str(tmp_path / 'file')!r} is a file",
        "dangling": f"{str(tmp_path / 'dangling')!r} is a link to nothing",
        "log": f"{str(tmp_path / 'log' / 'metrics.jsonl')!r} is no file that may be written",
    }
    cases |= {
        p: f"{str(tmp_path / p / p)!r} is to be a folder, and is none" for p in ("checkpoints", "samples", "snapshots", "teacher")
    }
    before = everything(tmp_path)
    monkeypatch.setattr(train_teacher, "family_for", None)  # nothing is loaded
    for name, reason in cases.items():
        status, said = train(tmp_path / name)
        assert (status, said) == (
            2,
            f"error: output_dir {str(tmp_path / name)!r} cannot be written: {reason}; name another folder\n",
        )
    assert everything(tmp_path) == before


@pytest.fixture
def mine(tmp_path):
    """A folder of a user who is not root: root may write anywhere, so where the tests run as root the process gets another real
    user, which is the one that access rights are checked for."""
    root = os.geteuid() == 0
    folder = Path(tempfile.mkdtemp())
    if root:
        os.chown(folder, 65534, -1)
        os.setreuid(65534, -1)
    yield folder
    if root:
        os.setreuid(0, -1)
    shutil.rmtree(folder)


@pytest.mark.parametrize("part", [".", "checkpoints", "teacher"])
def test_a_read_only_folder_is_refused(part, train, mine):
    assert train(mine, "checkpoint_every=null")[0] == 0
    shutil.rmtree(mine / "teacher")
    (mine / "metrics.jsonl").unlink()
    (mine / part).mkdir(exist_ok=True)
    (mine / part).chmod(0o555)
    status, said = train(mine)
    assert status == 2
    assert f"{str(mine / part)!r} may not be written; name another folder" in said


# Shared -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o007, 0o660)])
def test_all_files_of_a_run_can_be_read_by_whom_the_umask_lets(mask, expected, train, tmp_path):
    before = os.umask(mask)
    try:
        train(tmp_path / "run", "sample_every=2", "snapshot_every=2")
    finally:
        os.umask(before)
    files = [f for f in (tmp_path / "run").rglob("*") if f.is_file()]
    assert {f.suffix for f in files} >= {".safetensors", ".json", ".jsonl", ".yaml", ".png", ".md"}
    assert {str(f): oct(stat.S_IMODE(f.stat().st_mode)) for f in files} == {str(f): oct(expected) for f in files}


def test_what_a_killed_save_left_is_removed(train, tmp_path):
    run = tmp_path / "run"
    train(run)
    for name in ("checkpoints/.partial_step_00000003", ".partial_teacher", "checkpoints/.replaced_step_00000004"):
        (run / name).mkdir()
    (run / "teacher").rename(run / ".replaced_teacher")
    assert train(run, "resume=latest")[0] == 0
    assert not list(run.rglob(".*"))
    assert (run / "teacher" / "teacher.json").is_file()


def test_a_lock_that_was_waited_for_is_of_a_file_that_is_there(tmp_path):
    """Who held it has removed the file: a lock on what was removed would keep nobody out."""
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    waiting = threading.Thread(target=second.acquire)
    waiting.start()
    time.sleep(0.2)
    first.release()
    waiting.join()
    with pytest.raises(UserError, match="is in use by another run"):
        FolderLock(tmp_path).acquire()
    second.release()


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    RunLog(SimpleNamespace(is_main_process=False), tmp_path, 4, ()).rewind(None, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_tensors_of_another_shape_are_named_though_they_are_as_many():
    with pytest.raises(checkpoint.CheckpointError, match=r"teacher/w has shape \(3, 2\), this configuration makes \(2, 3\)"):
        checkpoint.restore_tensors({"teacher/w": torch.zeros(2, 3)}, {"teacher/w": torch.ones(3, 2)}, "networks")
