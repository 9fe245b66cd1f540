"""Commands under a launcher, in one process or several: they end with it, whole, and leave their group however they end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from torch import distributed

from eval.__main__ import main
from pipelines.common import launch
from pipelines.common.errors import UserError
from trainers.engine import checkpoint

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCHERS = {
    "accelerate, 1 process": [*LAUNCH, "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--cpu"],
    "accelerate, 2 processes": [*LAUNCH, "--config_file", str(ROOT / "configs" / "accelerate" / "cpu_2.yaml")],
    "torchrun, 1 process": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"],
}


def wait_until(happened, process: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.1)


def end(process: subprocess.Popen) -> None:
    """Whatever is left of what a test started, in a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    process.wait()


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
    """The others wait, so that the launcher does not end the first for their sake, and speak if nobody has ended them by then."""
    waited = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    for rank, local in (("0", "0"), ("1", "1"), ("2", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        launch.say(UserError("no such file"))
        assert len(waited) == (rank != "0")
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: no such file", "error (process 1): no such file", "error (process 2): no such file"]
    assert waited == [launch.FIRST_SPEAKS]


def test_processes_that_do_not_know_of_each_other(monkeypatch):
    """Each would train the whole run into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, but accelerate takes each for the only one"):
        launch.check_processes(SimpleNamespace(num_processes=1))
    launch.check_processes(SimpleNamespace(num_processes=2))
    monkeypatch.delenv("WORLD_SIZE")
    launch.check_processes(SimpleNamespace(num_processes=1))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["steps=-3", "output_dir={used}"])
def test_two_processes_print_an_error_once(fault, tmp_path):
    """A configuration's, met before the processes know of each other, and one met afterwards."""
    used = tmp_path / "used"
    used.mkdir()
    (used / "metrics.jsonl").write_text('{"step": 50}\n')
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    two = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [sys.executable, "-m", *two, "-m", "trainers.train_teacher", "--config", "configs/digits_teacher.yaml"]
    command += [f"output_dir={tmp_path / 'new'}", fault.format(used=used)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "whom"),
    [
        ("accelerate, 1 process", signal.SIGTERM, "the launcher"),
        ("accelerate, 1 process", signal.SIGKILL, "the launcher"),
        ("accelerate, 1 process", signal.SIGINT, "everybody"),
        ("accelerate, 2 processes", signal.SIGINT, "the launcher"),
        ("accelerate, 2 processes", signal.SIGTERM, "everybody"),
        ("torchrun, 1 process", signal.SIGTERM, "everybody"),
    ],
)
def test_a_run_ends_with_its_launcher_and_is_saved(launcher, number, whom, tmp_path, tiny_teacher):
    """`kill` of the launcher; Ctrl-C and a scheduler's SIGTERM, which go to all processes. The reader of stderr is gone, too."""
    (tmp_path / "config.yml").write_text(yaml.safe_dump(tiny_teacher | {"output_dir": str(tmp_path / "run"), "steps": 1_000_000}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*LAUNCHERS[launcher], "-m", "trainers.train_teacher", "--config", str(tmp_path / "config.yml")]
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    started = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=reader.stdin, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 1000, started)
        processes = psutil.Process(started.pid).children(recursive=True)
        reader.kill()
        reader.communicate()
        for process in [psutil.Process(started.pid), *(processes if whom == "everybody" else [])]:
            process.send_signal(number)
        started.wait(100)
        assert not psutil.wait_procs(processes, timeout=100)[1]
    finally:
        end(started)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert steps == list(range(1, checkpoint.number_of(saved.name) + 1))
    checkpoint.load(saved)
    assert json.loads((tmp_path / "run" / "teacher" / "teacher.json").read_text())["steps"] == steps[-1]


@pytest.mark.slow
def test_a_run_does_not_end_with_its_shell(tmp_path, tiny_teacher):
    """`nohup python -m trainers... &` and the window closed: the parent is gone, and it was no launcher."""
    (tmp_path / "config.yml").write_text(yaml.safe_dump(tiny_teacher | {"output_dir": str(tmp_path / "run"), "steps": 30}))
    run = f"nohup {sys.executable} -m trainers.train_teacher --config {tmp_path / 'config.yml'} 2> {tmp_path / 'log'} >&2 &"
    shell = subprocess.Popen(["bash", "-c", f"{run} sleep 100"], cwd=ROOT, start_new_session=True)
    try:
        wait_until(lambda: (tmp_path / "run" / "config.yaml").is_file(), shell)
        children = [p for p in psutil.Process(shell.pid).children() if "trainers.train_teacher" in p.cmdline()]
        shell.kill()
        children[0].send_signal(signal.SIGHUP)
        shell.wait()
        assert not psutil.wait_procs(children, timeout=100)[1]
    finally:
        end(shell)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 30
