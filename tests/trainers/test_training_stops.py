"""Training runs that are stopped: killed, interrupted, resumed, damaged, diverged or refused. Nothing is ever lost.

A run that was stopped and resumed must end, bit for bit, like one that was not.
"""

import copy
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.common.config import load_config
from pipelines.students import load_student, read_info
from trainers import distill, train_teacher
from trainers.config.run import DistillConfig
from trainers.engine import checkpoint, draws
from trainers.engine.loop import NonFiniteError, Trainer

ROOT = Path(__file__).resolve().parents[2]
ADAM = {"lr": 1e-3, "betas": [0.0, 0.99]}
LEVELS = {"name": "log_uniform", "low": 0.3, "high": 3.0}
TINY = {"channels": 8, "num_blocks": 1, "patch_size": 2}
OBJECTIVES = {
    "varflow": {"levels": LEVELS, "cross": "full"},
    "diff_instruct": {"levels": LEVELS, "fake_score": {"levels": LEVELS, "optimizer": ADAM, "updates": 2, "warmup_updates": 7}},
    "vardiu": {
        "levels": LEVELS,
        "num_samples": 2,
        "posterior": {"network": TINY, "optimizer": ADAM, "updates": 2, "warmup_updates": 7},
    },
}
# The state that is no network: running means by which levels are drawn.
ESS_LEVELS = ["objective.estimator=resampled_score", "objective.num_samples=3", "objective.ess_levels=true"]


# Tools ----------------------------------------------------------------------------------------------------------------


class Lab:
    """A teacher of the 8x8 digits, trained once, and configurations that distil it."""

    def __init__(self, root: Path) -> None:
        self.root, self.teacher, self._whole = root, root / "teacher", {}
        overrides = [
            f"output_dir={self.teacher}",
            f"network={TINY}",
            "steps=30",
            "batch_size=7",
            "sample_every=",
            "checkpoint_every=",
        ]
        train_teacher.main(["--config", str(ROOT / "configs" / "digits_teacher.yaml"), *overrides])

    def config(self, objective: str, output: Path, **changes) -> str:
        """The path of a configuration that writes to `output`."""
        config = {
            "output_dir": str(output),
            "teacher": {"path": str(self.teacher)},
            "student": {"optimizer": ADAM},
            "objective": {"name": objective} | copy.deepcopy(OBJECTIVES[objective]),
            "steps": 9,
            "batch_size": 6,
            "ema_decay": 0.9,
            "log_every": 2,
            "checkpoint_every": 4,
        }
        config |= {"data": {"name": "digits"}} if objective == "varflow" else {}
        file = output.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config | changes))
        return str(file)

    def distil(self, objective: str, output: Path, *overrides: str, **changes) -> Path:
        distill.main(["--config", self.config(objective, output, **changes), *overrides])
        return output

    def copy(self, objective: str, output: Path) -> Path:
        """A finished run in a folder of its own."""
        whole = self.whole_run(objective)
        shutil.copytree(whole, output)
        config = output / "config.yaml"
        config.write_text(config.read_text().replace(str(whole), str(output)))
        return output

    def whole_run(self, objective: str, *overrides: str) -> Path:
        """The run that the stopped ones are compared with, never stopped itself."""
        key = " ".join([objective, *overrides])
        if key not in self._whole:
            self._whole[key] = self.distil(objective, self.root / f"whole_{len(self._whole)}", *overrides)
        return self._whole[key]


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, one_thread):
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def watched(monkeypatch):
    """made: the trainers that distill makes, each counting its updates. at: {count: what to do when so many are done}."""

    class Watched(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.count = 0
            made.append(self)

        def _update(self, phase, key):
            values = super()._update(phase, key)
            self.count += 1
            at.get(self.count, lambda: None)()
            return values

    made, at = [], {}
    Watched.made, Watched.at = made, at
    monkeypatch.setattr(distill, "Trainer", Watched)
    return Watched


def saved(output: Path) -> list[str]:
    return [f.name for f in checkpoint.list_checkpoints(output / "checkpoints")]


def end_state(output: Path) -> dict:
    """Everything a run leaves that must not depend on whether it was stopped, bit for bit."""
    last = output / "checkpoints" / saved(output)[-1]
    files = [*sorted(last.glob("*.safetensors")), output / "metrics.jsonl", *(output / "student" / "unet").iterdir()]
    state = json.loads((last / "state.json").read_text())
    info = read_info(output / "student", "student")
    assert state.pop("seconds") > 0
    hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert len(hashes) == 7
    return hashes | {"folder": last.name, "state": state, "calls": info["calls"], "steps": info["steps"]}


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def refusal(arguments: list[str], capsys) -> str:
    """What distill says when it refuses: exit status 2 and one message without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        distill.main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in said
    return said[said.index("error: ") :]


def start(config: str, log: Path, *overrides: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "trainers.distill", "--config", config, *overrides]
    with log.open("w") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stream)


def wait_for(process: subprocess.Popen, happened, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, f"the run ended too early, with status {process.returncode}"
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.002)


# Stopping and resuming ------------------------------------------------------------------------------------------------


# Long enough to be caught in the middle from outside: half a second and more between two checkpoints.
RHYTHM = ["steps=40", "checkpoint_every=15"]
LONG = {"varflow": [*RHYTHM, "batch_size=60"], "vardiu": [*RHYTHM, "objective.posterior.warmup_updates=150"]}


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "when"), [("vardiu", "steps"), ("varflow", "steps"), ("vardiu", "warm-up")])
def test_a_killed_run_ends_as_if_it_had_never_been_killed(objective, when, lab, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    config, long = lab.config(objective, output), LONG[objective]
    process = start(config, log, *long)
    metrics = output / "metrics.jsonl"
    moments = {
        "steps": lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 10,  # step 20; checkpoints at 15 and 30
        "warm-up": lambda: "warm-up posterior" in log.read_text(),
    }
    wait_for(process, moments[when])
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "student").exists()
    if when == "steps":
        assert saved(output)
        with metrics.open("a") as stream:
            stream.write('{"step": 2')  # a line, and below two checkpoints, that the kill cut off
        for name in (".partial_step_00000030", ".partial_step_00000099"):
            (output / "checkpoints" / name).mkdir(exist_ok=True)
            (output / "checkpoints" / name / "networks.safetensors").write_bytes(b"half")
    else:
        assert not saved(output)  # resume=latest then starts afresh
    distill.main(["--config", config, *long, "resume=latest"])
    assert end_state(output) == end_state(lab.whole_run(objective, *long))


@pytest.mark.slow
def test_sigterm_ends_a_run_with_status_0_and_nothing_lost(lab, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    config, long = lab.config("vardiu", output), LONG["vardiu"]
    process = start(config, log, *long)
    metrics = output / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
    process.terminate()
    assert process.wait(timeout=60) == 0
    step = read_info(output / "student", "student")["steps"]
    assert 6 <= step < 40
    assert saved(output)[-1] == f"step_{step:08d}"
    assert f"Stopped by a signal at step {step}; saved. Continue with resume=latest." in log.read_text()
    assert len(load_student(output)(3).images) == 3
    distill.main(["--config", config, *long, "resume=latest"])
    assert end_state(output) == end_state(lab.whole_run("vardiu", *long))


@pytest.mark.parametrize(
    ("objective", "number", "update", "step"),
    [
        ("vardiu", signal.SIGTERM, 3, 0),  # in the warm-up of 7 updates
        ("vardiu", signal.SIGTERM, 6, 0),  # seen when its last update is done
        ("vardiu", signal.SIGTERM, 7, 1),  # seen in the first step
        ("diff_instruct", signal.SIGINT, 7 + 3 * 4 + 2, 5),  # between the phases of a step, which is finished first
        ("diff_instruct", signal.SIGINT, 7 + 3 * 9, 9),  # after the very last update
    ],
)
def test_a_signal_anywhere_loses_nothing(objective, number, update, step, lab, watched, tmp_path, capsys):
    whole = end_state(lab.whole_run(objective))
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    watched.made.clear()
    watched.at[update] = lambda: signal.raise_signal(number)
    output = lab.distil(objective, tmp_path / "run")
    assert f"{number.name}: finishing the step and saving" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert watched.made[0].step == step
    assert saved(output)[-1] == f"step_{step:08d}"
    assert (output / "student").is_dir() == (step > 0)
    watched.at.clear()
    distill.main(["--config", str(output.with_suffix(".yaml")), "resume=latest"])
    assert end_state(output) == whole


def test_a_second_signal_stops_at_once(lab, watched, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    watched.at[2] = twice
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        lab.distil("varflow", tmp_path / "run", steps=11)
    assert watched.made[0].count == 2
    assert signal.getsignal(signal.SIGINT) == before


def test_resuming_a_complete_run_changes_nothing(lab, watched, tmp_path):
    output = lab.distil("diff_instruct", tmp_path / "run")
    before = end_state(output)
    distill.main(["--config", str(output.with_suffix(".yaml")), "resume=latest"])
    assert end_state(output) == before
    assert watched.made[1].count == 0


@pytest.mark.slow
def test_resuming_from_a_checkpoint_by_its_path(lab, tmp_path):
    """An older checkpoint is resumed, newer ones lie beside it: what is saved now is not what is removed."""
    whole = end_state(lab.distil("diff_instruct", tmp_path / "whole", steps=7, keep_checkpoints=9, checkpoint_every=1))
    output = lab.distil("diff_instruct", tmp_path / "run", steps=7, keep_checkpoints=9, checkpoint_every=1)
    second = output / "checkpoints" / "step_00000002"
    config = str(output.with_suffix(".yaml"))
    distill.main(["--config", config, f"resume={second}"])
    assert end_state(output) == whole
    distill.main(["--config", config, f"resume={second}", "keep_checkpoints=1", "steps=4"])
    assert (output / "checkpoints" / "step_00000004").is_dir()


def test_levels_drawn_by_effective_size_go_on_as_they_were(lab, watched, tmp_path):
    """The running means have moved when the run is stopped, and are no longer equal: with fresh ones it would end otherwise."""
    whole = end_state(lab.whole_run("vardiu", *ESS_LEVELS))
    watched.made.clear()
    watched.at[7 + 3 * 6] = lambda: signal.raise_signal(signal.SIGTERM)
    output = lab.distil("vardiu", tmp_path / "run", *ESS_LEVELS)
    means = load_file(output / "checkpoints" / saved(output)[-1] / "objective.safetensors")
    assert means.keys() == {"ess_by_level"}
    assert len(set(means["ess_by_level"].tolist())) > 3
    assert torch.equal(watched.made[0].objective.state["ess_by_level"], means["ess_by_level"])
    watched.at.clear()
    resumed = ["--config", str(output.with_suffix(".yaml")), "resume=latest", *ESS_LEVELS]
    distill.main(resumed)
    assert end_state(output) == whole


@pytest.mark.slow
def test_a_step_count_raised_later_continues_a_finished_run(lab, tmp_path):
    whole = end_state(lab.distil("vardiu", tmp_path / "whole", steps=5, log_every=1))
    output = lab.distil("vardiu", tmp_path / "run", steps=3, log_every=1)
    distill.main(["--config", str(output.with_suffix(".yaml")), "resume=latest", "steps=5"])
    assert end_state(output) == whole


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_kept(lab, tmp_path):
    output = lab.distil("diff_instruct", tmp_path / "run", checkpoint_every=2, keep_checkpoints=3)
    assert saved(output) == ["step_00000006", "step_00000008", "step_00000009"]
    assert saved(lab.distil("varflow", tmp_path / "one", checkpoint_every=4, keep_checkpoints=1)) == ["step_00000009"]
    assert saved(lab.distil("varflow", tmp_path / "none", checkpoint_every=None)) == []


FILES = ["networks.safetensors", "objective.safetensors", "ema.safetensors", "optimizers.safetensors", "state.json"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_remedy_works(name, damage, lab, tmp_path, capsys):
    output = lab.copy("vardiu", tmp_path / "run")
    damaged = output / "checkpoints" / "step_00000009"
    file, data = damaged / name, bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 0x20
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data if damage == "altered" else data[:-5])
    before = everything(output)

    resume = ["--config", lab.config("vardiu", output), "resume=latest"]
    said = refusal(resume, capsys)
    remedy = f"Remove {str(damaged)!r} to resume from the checkpoint before it, or give resume=<another checkpoint>.\n"
    assert said.endswith(remedy)
    if (name, damage) == ("manifest.json", "altered"):  # what it vouches for no longer fits, whichever file that is
        assert str(damaged) in said
    elif (name, damage) == ("manifest.json", "missing"):
        assert f"{str(damaged)!r} is not a checkpoint: it has no manifest.json" in said
    else:
        reason = {"truncated": "bytes, not", "altered": "its sha256 has changed", "missing": "is missing"}[damage]
        assert ("is damaged" if name == "manifest.json" else reason) in said
        assert str(file) in said
    assert everything(output) == before

    shutil.rmtree(damaged)
    distill.main(resume)
    assert end_state(output) == end_state(lab.whole_run("vardiu"))


@pytest.mark.parametrize(
    ("objective", "override", "message"),
    [
        ("vardiu", "objective.posterior.network.channels=16", "\n  objective.posterior.network.channels: 8 -> 16\n"),
        ("vardiu", "objective.posterior.covariance=diag", "\n  objective.posterior.covariance: 'linear' -> 'diag'\n"),
        ("diff_instruct", None, "\n  objective.name: 'vardiu' -> 'diff_instruct'\n"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(objective, override, message, lab, tmp_path, capsys):
    output = lab.copy("vardiu", tmp_path / "run")
    before = everything(output)
    config = lab.config(objective, output)
    said = refusal(["--config", config, "resume=latest", *([override] if override else [])], capsys)
    assert message in said
    assert str(output / "checkpoints" / "step_00000009") in said
    assert "start a new output_dir" in said
    assert everything(output) == before, "config.yaml must stay: the message says to resume with it"


@pytest.mark.parametrize("fails_at", ["second file", "rename"])
@pytest.mark.slow
def test_a_save_that_fails_leaves_the_checkpoint_before_it(fails_at, lab, tmp_path, monkeypatch):
    if fails_at == "rename":
        replace = os.replace

        def failing(source, target):
            if Path(target).name == "step_00000008":
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
    else:
        save, calls = checkpoint.save_file, []

        def failing(tensors, file):
            calls.append(file)
            if len(calls) == 4 * 2 + 2:  # four files at steps 0 and 4; the second one at step 8
                raise OSError(28, "No space left on device")
            save(tensors, file)

        monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises((OSError, SystemExit)):
        lab.distil("vardiu", tmp_path / "run")
    monkeypatch.undo()
    assert saved(tmp_path / "run") == ["step_00000000", "step_00000004"]
    checkpoint.load(tmp_path / "run" / "checkpoints" / "step_00000004")  # whole
    distill.main(["--config", str(tmp_path / "run.yaml"), "resume=latest"])
    assert end_state(tmp_path / "run") == end_state(lab.whole_run("vardiu"))


# Divergence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "phase"), [("varflow", "student"), ("diff_instruct", "fake_score"), ("vardiu", "posterior")]
)
def test_a_nan_in_the_teacher_stops_the_first_update(objective, phase, lab, watched, tmp_path, capsys):
    teacher = shutil.copytree(lab.teacher / "teacher", tmp_path / "teacher")
    file = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"][3, 1, 1, 2] = float("nan")
    save_file(weights, file)
    config = lab.config(objective, tmp_path / "run", teacher={"path": str(teacher)})
    said = refusal(["--config", config], capsys)
    assert f"phase {phase!r} at step 0: " in said
    assert " = nan" in said
    assert "no checkpoint has been written" in said
    assert watched.made[0].count == 0
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_number_stops_before_any_weight_changes(what, lab, watched, tmp_path, monkeypatch):
    whole = end_state(lab.whole_run("diff_instruct"))
    watched.made.clear()
    before, healthy = {}, draws.DrawSource.batch

    def tensors(trainer) -> dict[str, torch.Tensor]:
        groups = trainer._tensors()
        return {f"{g}/{n}": t.detach().clone() for g, group in groups.items() for n, t in group.items()}

    def poison() -> None:  # after the second update of the fake score at step 5: the student's comes next
        (trainer,) = watched.made
        before.update(tensors(trainer))
        if what == "gradient":
            parameter = trainer.parameters["student"][3]
            parameter.register_hook(lambda g: g * float("inf"))
        else:

            def bad(self, key, progress):
                made = healthy(self, key, progress)
                made[0].eps[2, 0, 3, 5] = float("inf")
                return made

            monkeypatch.setattr(draws.DrawSource, "batch", bad)

    watched.at[7 + 3 * 5 + 2] = poison
    config = load_config(DistillConfig, lab.config("diff_instruct", tmp_path / "run"), [])
    number = {"loss": "loss = (nan|inf|-inf)", "gradient": "student_grad_norm = (nan|inf)"}[what]
    last = str(tmp_path / "run" / "checkpoints" / "step_00000004")
    message = rf"phase 'student' at step 5: .*{number}.* No weight was changed; the last checkpoint is '{last}'"
    with pytest.raises(NonFiniteError, match=message):
        distill.run(config)
    after = tensors(watched.made[0])
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)

    monkeypatch.setattr(draws.DrawSource, "batch", healthy)
    watched.at.clear()
    distill.main(["--config", str(tmp_path / "run.yaml"), "resume=latest"])
    assert end_state(tmp_path / "run") == whole


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_learning_rate_that_diverges_ends_with_a_message(objective, lab, tmp_path, capsys):
    config = lab.config(objective, tmp_path / "run", student={"optimizer": ADAM | {"lr": 1e30}}, checkpoint_every=1)
    said = refusal(["--config", config], capsys)
    assert " at step 1: " in said
    assert f"the last checkpoint is {str(tmp_path / 'run' / 'checkpoints' / 'step_00000001')!r}. Lower the learning rate" in said


# Health ---------------------------------------------------------------------------------------------------------------


def test_a_posterior_that_learns_nothing_is_reported(lab, tmp_path, capsys):
    still = ["objective.posterior.warmup_updates=0", "objective.posterior.optimizer.lr=1e-12"]
    lab.distil("vardiu", tmp_path / "run", *still, steps=4)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING: " in line]
    assert any("step 4: " in w and "/information = " in w and "is below 0.05" in w for w in warnings)
    assert all("collapsed" in w for w in warnings)
    for key in re.findall(r"objective\.[\w.]+", warnings[-1]):  # what it says to raise can be raised
        lab.distil("vardiu", tmp_path / key, *still, f"{key}=1", steps=1)
    capsys.readouterr()
    lab.distil("vardiu", tmp_path / "regression", *still, "objective.num_samples=0", steps=4)
    assert "WARNING" not in capsys.readouterr().err  # without proposals the student does not read q
    lab.distil("vardiu", tmp_path / "quiet", *still, "objective.posterior.min_information=-1000", steps=4)
    assert "WARNING" not in capsys.readouterr().err


# Refusals -------------------------------------------------------------------------------------------------------------


def folder_of(path: Path, *pictures: tuple[str, str, int]) -> dict:
    """A data section for images (name, mode, side)."""
    path.mkdir()
    for name, mode, side in pictures:
        Image.new(mode, (side, side)).save(path / name)
    return {"name": "folder", "path": str(path), "image_size": 8, "channels": 1}


def corrupt(path: Path) -> dict:
    data = folder_of(path, ("good.png", "L", 8))
    (path / "bad.png").write_bytes(b"no image")
    return data


def parquet(path: Path) -> dict:
    import datasets

    datasets.Dataset.from_dict({"label": [0, 1]}).to_parquet(path.with_suffix(".parquet"))
    return {"name": "parquet", "files": [str(path.with_suffix(".parquet"))], "image_size": 8, "channels": 1}


GONE = {"name": "parquet", "files": ["gone.parquet"], "image_size": 8, "channels": 1}
DATA = {
    "resolution": (
        lambda p: folder_of(p, ("a.png", "L", 8)) | {"image_size": 5},
        "data: images are (1, 5, 5) (channels, height, width), the teacher",
    ),
    "channels": (lambda p: folder_of(p, ("a.png", "L", 8)) | {"channels": 3}, "makes (1, 8, 8); set data.image_size=8"),
    "classes": (lambda p: {"name": "digits", "labels": True}, "data: 10 classes, the teacher has 0"),
    "no classes": (
        lambda p: folder_of(p, ("a.png", "L", 8)) | {"labels": True},
        "has no classes: 1 images lie outside sub-folders (a.png)",
    ),
    "empty folder": (lambda p: folder_of(p), "data.path: no pictures in"),
    "no folder": (lambda p: folder_of(p) | {"path": "gone"}, "data.path: no such folder or .zip 'gone'"),
    "corrupt image": (corrupt, "cannot be decoded: it begins as no picture"),
    "no parquet file": (lambda p: GONE, "data.files: no such file 'gone.parquet'"),
    "no column": (parquet, "data.image_column: no column 'image'; the data set has label"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_are_refused(case, lab, tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make, message = DATA[case]
    config = lab.config("varflow", tmp_path / "run", data=make(tmp_path / "data"))
    assert message in refusal(["--config", config], capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    lab.distil("varflow", tmp_path / "run", steps=1)  # the folder is still free for a run that is right


def no_folder(teacher: Path) -> None:
    shutil.rmtree(teacher)


def no_index(teacher: Path) -> None:
    (teacher / "model_index.json").unlink()


def no_weights(teacher: Path) -> None:
    (teacher / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def truncated_weights(teacher: Path) -> None:
    file = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def a_tensor_missing(teacher: Path) -> None:
    file = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file)


def other_width(teacher: Path) -> None:
    file = teacher / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"channels": 16}))


def damaged_config(teacher: Path) -> None:
    file = teacher / "unet" / "config.json"
    file.write_text(file.read_text()[:-9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_folder, "teacher.path: no such folder"),
        (no_index, "is not a diffusers pipeline folder: it has no model_index.json"),
        (no_weights, "has no weights: expected diffusion_pytorch_model.safetensors in unet/"),
        (truncated_weights, "is damaged"),
        (a_tensor_missing, "conv_in.weight"),
        (other_width, "teacher.path"),
        (damaged_config, "config.json"),
    ],
)
def test_a_bad_teacher_is_refused(damage, message, lab, tmp_path, capsys):
    teacher = shutil.copytree(lab.teacher / "teacher", tmp_path / "teacher")
    damage(teacher)
    said = refusal(["--config", lab.config("vardiu", tmp_path / "run", teacher={"path": str(teacher)})], capsys)
    assert message in said
    assert str(teacher) in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("micro_batch_size=4", "micro_batch_size=4 does not divide each process's share of the batch, 6"),
        ("teacher.guidance_scale=2", "guidance_scale=2.0 needs a null condition"),
        ("objective.posterior.network.patch_size=3", "sample_size 8 must be a multiple of patch_size 2^(levels-1) = 3"),
        ("trackers=[nonsense]", "nonsense"),
        ("resume=gone", "resume: no such checkpoint folder 'gone'; give 'latest', 'no' or a folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused(override, message, lab, tmp_path, capsys):
    assert message in refusal(["--config", lab.config("vardiu", tmp_path / "run"), override], capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    lab.distil("vardiu", tmp_path / "run", steps=1)


def test_a_batch_that_cannot_be_split_is_refused_before_anything_is_loaded(lab, tmp_path, capsys):
    """The teacher's weights and the data, which here are not there, have not been looked for."""
    teacher = shutil.copytree(lab.teacher / "teacher", tmp_path / "teacher")
    no_weights(teacher)
    configs = ROOT / "configs"
    for command, config, missing in (
        (distill, configs / "digits_vardiu.yaml", f"teacher.path={teacher}"),
        (train_teacher, configs / "digits_teacher.yaml", "data={name: folder, path: gone, image_size: 8, channels: 1}"),
    ):
        with pytest.raises(SystemExit):
            command.main(
                ["--config", str(config), missing, f"output_dir={tmp_path / 'run'}", "batch_size=12", "micro_batch_size=8"]
            )
        assert "micro_batch_size=8 does not divide each process's share of the batch, 12" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fp16_is_refused(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert "fp16" in refusal(["--config", lab.config("varflow", tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_is_refused(lab, tmp_path, capsys):
    (tmp_path / "file").write_text("a regular file")
    config = lab.config("varflow", tmp_path / "run")
    said = refusal(["--config", config, f"output_dir={tmp_path / 'file' / 'run'}"], capsys)
    assert f"output_dir {str(tmp_path / 'file' / 'run')!r} cannot be written" in said
    assert (tmp_path / "file").read_text() == "a regular file"


def test_an_output_folder_that_holds_a_run_is_left_alone(lab, tmp_path, capsys):
    output = lab.distil("varflow", tmp_path / "run", steps=3)
    before = everything(output)
    said = refusal(["--config", lab.config("diff_instruct", output)], capsys)
    assert f"output_dir {str(output)!r} already holds a run; continue it with resume=latest or name another folder" in said
    assert everything(output) == before
