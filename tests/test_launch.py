"""Commands that may run in several processes leave their group however they end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from eval.__main__ import main
from pipelines import launch
from pipelines.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def group(tmp_path):
    """This process as a group of one, left again where a test's command fails to."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_evaluation_leaves_its_group(group, tmp_path, capsys):
    assert main(["compare", str(tmp_path / "nothing"), "--output", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not distributed.is_initialized()


def test_a_run_that_fails_leaves_its_group(group, capsys):
    with pytest.raises(SystemExit, match="2"):
        launch.fail(UserError("steps: -3"))
    assert "error: steps: -3" in capsys.readouterr().err
    assert not distributed.is_initialized()


def test_processes_that_know_of_each_other_say_one_thing_once(group, capsys, monkeypatch):
    """Whichever is first: the other one is this process again, with another number, on the same store."""
    launch.say(UserError("the disk is full"))
    monkeypatch.setenv("RANK", "1")
    launch.say(UserError("the disk is full"))
    launch.say(UserError("only here"))
    assert capsys.readouterr().err.splitlines() == ["error: the disk is full", "error (process 1): only here"]


def test_before_they_do_the_first_of_each_machine_speaks(capsys, monkeypatch):
    for rank, local in (("0", "0"), ("1", "1"), ("2", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        launch.say(UserError("no such file"))
    assert capsys.readouterr().err.splitlines() == ["error: no such file", "error (process 2): no such file"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["steps=-3", "output_dir={used}"])
def test_two_processes_print_an_error_once(fault, tmp_path):
    """A configuration's, met before the processes know of each other, and one met afterwards."""
    used = tmp_path / "used"
    used.mkdir()
    (used / "metrics.jsonl").write_text("")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    two = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [sys.executable, "-m", *two, "-m", "trainers.train_teacher", "--config", "configs/digits_teacher.yaml"]
    command += [f"output_dir={tmp_path / 'new'}", fault.format(used=used)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1, done.stderr[-3000:]
