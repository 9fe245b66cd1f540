"""What `resume` means: from where a run goes on, what may change on the way, and what is the user's and stays untouched."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("fresh_accelerator", "one_thread")


@pytest.fixture
def train(train_teacher_with, tiny_teacher):
    """train(folder, a=b ...) -> what the command says, without a traceback."""
    run = train_teacher_with(tiny_teacher | {"optimizer": {"lr": 1e-3, "warmup_steps": 1}})
    return lambda *given: run(*given)[1]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loss(folder: Path, step: int) -> float:
    rows = {json.loads(line)["step"]: json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()}
    return next(v for k, v in rows[step].items() if k.endswith("/loss"))


# Where a run starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["latest", "no"])
def test_a_finished_run_without_checkpoints_is_not_overwritten(resume, train, tmp_path):
    run = tmp_path / "run"
    train(run, "snapshot_every=2")
    before = everything(run)
    said = train(run, f"resume={resume}", "seed=1", "steps=9")
    assert f"output_dir {str(run)!r} already holds a run, with its teacher in {str(run / 'teacher')!r} and without" in said
    assert "name another folder" in said
    assert everything(run) == before


def test_latest_in_a_new_folder_starts_afresh_and_says_so(train, tmp_path):
    said = train(tmp_path / "run", "resume=latest")
    assert f"No checkpoint in {str(tmp_path / 'run')!r} (nothing to resume): starting at step 0." in said
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(train, tmp_path):
    train(tmp_path / "whole")
    run = tmp_path / "run"
    train(run)
    shutil.rmtree(run / "teacher")  # as if it had been killed at step 4 of more
    assert "resume=latest starts it again" in train(run)
    assert "  levels.low: 0.3 -> 0.4" in train(run, "resume=latest", "levels.low=0.4")
    said = train(run, "resume=latest")
    assert "the run in it ended before its first" in said
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_configuration_of_the_user_is_not_overwritten(train, tmp_path):
    """`--config config.yaml output_dir=.` must not replace config.yaml by ours."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "config.yaml").write_text("# mine\n")
    train(tmp_path / "other", "checkpoint_every=2")
    for resume in ("no", "latest", tmp_path / "other" / "checkpoints" / "step_00000002"):
        said = train(folder, f"resume={resume}")
        assert f"{str(folder / 'config.yaml')!r} is of no run, and this run would overwrite it" in said
    assert everything(folder) == {"config.yaml": b"# mine\n"}


@pytest.mark.parametrize("word", ["no", "off", "false", "False", "'no'"])
def test_no_as_yaml_reads_it(word, train, tmp_path):
    train(tmp_path / "run", f"resume={word}", f"compile={'null' if 'n' in word else word}")
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["resume"] == "no"


@pytest.mark.parametrize("word", ["yes", "true", "null", ""])
def test_yes_does_not_say_from_where(word, train, tmp_path):
    assert "resume: give latest, no or the folder of a checkpoint" in train(tmp_path / "run", f"resume={word}")
    assert not (tmp_path / "run").exists()


# What a path may be -----------------------------------------------------------------------------------------------------------


def test_a_path_that_is_no_checkpoint_is_explained(train, tmp_path):
    run = tmp_path / "run"
    train(run, "checkpoint_every=2", "snapshot_every=2")
    before, newest = everything(run), f"give resume={run / 'checkpoints' / 'step_00000004'}, the newest there"
    cases = {
        run: f"{str(run)!r} is a run's folder, not a checkpoint; {newest}",
        run / "checkpoints": f"is a folder of checkpoints, not a checkpoint; {newest}",
        run / "checkpoints" / "step_00000004" / "state.json": "is a file; give the checkpoint's folder",
        run / "teacher": "is a finished model, not a checkpoint",
        run / "snapshots" / "step_00000002": "is a finished model, not a checkpoint",
        run / "snapshots": "is not a checkpoint: it has no manifest.json. Give resume=<another checkpoint>",
    }
    for path, message in cases.items():
        said = train(run, f"resume={path}")
        assert message in said
        assert "Remove" not in said  # never what the user has named
    assert everything(run) == before


def test_a_damaged_checkpoint_that_is_the_only_one_is_not_to_be_removed(train, tmp_path):
    run = tmp_path / "run"
    train(run, "checkpoint_every=9")
    file = run / "checkpoints" / "step_00000004" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    said = train(run, "resume=latest", "steps=5")
    assert f"{str(file)!r} has " in said
    assert said.endswith("There is no checkpoint before it: put back a copy of this one, or start again in a new output_dir.\n")


def test_copies_of_checkpoints_are_the_users(train, tmp_path):
    """Under other names they are neither resumed as latest nor removed; one that a run would take for its own is refused."""
    run = tmp_path / "run"
    train(run, "checkpoint_every=2")
    folder = run / "checkpoints"
    for name in ("step_00000002_good", "step_best", "step_2", "step_000000002", "best"):
        shutil.copytree(folder / "step_00000002", folder / name)
    (folder / "step_99999999").write_text("a file")
    (folder / "step_00000077").symlink_to("step_best")
    kept = set(names(folder)) - {"step_00000002", "step_00000004"}
    copies = {n: everything(folder / n) for n in kept if (folder / n).is_dir()}
    said = train(run, "checkpoint_every=1", "keep_checkpoints=1", "resume=latest", "steps=6")
    assert f"Resumed from {folder / 'step_00000004'} at step 4." in said
    assert set(names(folder)) == kept | {"step_00000006"}
    assert {n: everything(folder / n) for n in copies} == copies
    assert f"Resumed from {folder / 'step_best'} at step 2." in train(run, "steps=6", f"resume={folder / 'step_best'}")

    shutil.copytree(folder / "step_best", folder / "step_00000050")
    said = train(run, "resume=latest", "steps=60")
    assert f"{str(folder / 'step_00000050')!r} is at step 2, so it is a copy" in said
    assert (folder / "step_00000050").is_dir()


def test_a_folder_with_a_checkpoints_name_and_other_content_is_not_removed(train, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_00000001").mkdir(parents=True)
    (folder / "step_00000001" / "notes.txt").write_text("mine")
    train(tmp_path / "run", "resume=latest")  # the newest, it is taken for a damaged one
    assert "already holds a run" in train(tmp_path / "run")
    shutil.move(folder / "step_00000001", tmp_path / "kept")
    train(tmp_path / "run", "checkpoint_every=2")
    shutil.move(tmp_path / "kept", folder / "step_00000001")
    train(tmp_path / "run", "checkpoint_every=1", "keep_checkpoints=1", "resume=latest", "steps=6")
    assert names(folder) == ["step_00000001", "step_00000006"]
    assert (folder / "step_00000001" / "notes.txt").read_text() == "mine"


# What may change --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("weighting=snr", "weighting: 'edm' -> 'snr'"),
        ("levels.low=0.4", "levels.low: 0.3 -> 0.4"),
        ("levels={name: uniform, low: 0.3, high: 3.0}", "levels.name: 'log_uniform' -> 'uniform'"),
        ("sigma_data=0.6", "sigma_data: 0.5 -> 0.6"),
        ("data.labels=true", "data.labels: False -> True"),
        ("network.dropout=0.1", "network.dropout: 0.0 -> 0.1"),
        ("sigma_min=0.003", "sigma_min: 0.002 -> 0.003"),
    ],
)
def test_what_makes_another_experiment_is_refused(override, line, train, tmp_path):
    run = tmp_path / "run"
    train(run, "checkpoint_every=2")
    before, last = everything(run), str(run / "checkpoints" / "step_00000004")
    for resume in ("latest", last):
        said = train(run, "checkpoint_every=2", "steps=6", f"resume={resume}", override)
        assert f"error: {last!r} was written by another configuration" in said
        assert f"\n  {line}\n" in said
        assert "steps" not in said  # which may change
        assert said.endswith("Resume with the values of that run, or start a new output_dir.\n")
    assert everything(run) == before


def test_what_may_change_is_said_done_and_kept(train, tmp_path):
    run = tmp_path / "run"
    train(run, "checkpoint_every=2")
    lower = ["optimizer.lr=1.0e-4", "steps=6", "log_every=2", "micro_batch_size=3", "optimizer.clip=1"]
    said = train(run, "checkpoint_every=2", "resume=latest", *lower)
    assert "changed: optimizer.lr: 0.001 -> 0.0001\n" in said
    for line in ("steps: 4 -> 6", "log_every: 1 -> 2", "micro_batch_size: None -> 3", "optimizer.clip: 10.0 -> 1.0"):
        assert f"changed: {line}\n" in said
    assert steps(run) == [1, 2, 3, 4, 6]
    rates = [json.loads(line)["teacher/lr"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rates[-2:] == [1e-3, 1e-4]
    first, second = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert (first["step"], first["checkpoint"], first["changed"]) == (0, None, {})
    assert (second["step"], second["checkpoint"]) == (4, str(run / "checkpoints" / "step_00000004"))
    assert second["changed"]["optimizer.lr"] == [1e-3, 1e-4]
    assert second["environment"]["processes"] == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == 1e-4


def test_a_resumed_run_with_nothing_new_says_only_from_where(train, tmp_path, monkeypatch):
    """Another spelling of output_dir is no change; a run that was moved says so."""
    train(tmp_path / "run", "checkpoint_every=2")
    said = train("run", "checkpoint_every=2", "resume=latest")
    assert "Resumed from run/checkpoints/step_00000004 at step 4." in said
    assert "changed" not in said
    (tmp_path / "run").rename(tmp_path / "moved")
    said = train(tmp_path / "moved", "checkpoint_every=2", "resume=latest")
    assert f"changed: output_dir: 'run' -> {str(tmp_path / 'moved')!r}\n" in said


def test_what_is_new_in_the_environment_is_said(train, tmp_path):
    run = tmp_path / "run"
    train(run, "checkpoint_every=2")
    file = run / "environment.json"
    about = json.loads(file.read_text())
    about["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(about | {"processes": 8, "mixed_precision": "bf16"}))
    said = train(run, "checkpoint_every=2", "resume=latest")
    assert "changed: environment.processes: 8 -> 1\n" in said
    assert "changed: environment.mixed_precision: 'bf16' -> 'no'\n" in said
    assert "changed: environment.versions.torch: '1.0' -> " in said
    assert said.count("changed: ") == 3


def test_fewer_steps_than_are_done_are_refused(train, tmp_path):
    run = tmp_path / "run"
    train(run, "checkpoint_every=2")
    before = everything(run)
    said = train(run, "steps=3", "resume=latest")
    assert f"steps: 3, but {str(run / 'checkpoints' / 'step_00000004')!r} is at step 4; give more" in said
    assert everything(run) == before


def test_a_checkpoint_of_an_older_version_is_compared_with_its_runs_configuration(train, tmp_path):
    run = tmp_path / "run"
    train(run, "checkpoint_every=2")
    for folder in (run / "checkpoints").iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in ("config.json", "metrics.jsonl", "timings.jsonl"):
            (folder / name).unlink()
            del manifest[name]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "\n  seed: 0 -> 1\n" in train(run, "checkpoint_every=2", "resume=latest", "seed=1")
    shutil.copytree(run / "checkpoints" / "step_00000004", tmp_path / "alone")
    assert "changed: steps: 4 -> 5\n" in train(run, "checkpoint_every=2", "resume=latest", "steps=5")
    assert steps(run) == [1, 2, 3, 4, 5]
    said = train(tmp_path / "new", f"resume={tmp_path / 'alone'}", "seed=1", "steps=5")
    assert f"WARNING: {tmp_path / 'alone'} does not hold the configuration that wrote it: nothing could be compared." in said


# Branches ---------------------------------------------------------------------------------------------------------------------


def test_the_branch_that_was_left_is_not_latest(train, tmp_path):
    """Back to step 2 with another rate, and on: latest, the log, snapshots and samples are those of the new branch."""
    run = tmp_path / "run"
    often = ["checkpoint_every=2", "keep_checkpoints=9", "snapshot_every=2", "sample_every=2"]
    train(run, *often, "steps=8")
    old = {step: loss(run, step) for step in range(1, 9)}
    abandoned = everything(run / "checkpoints" / "step_00000008")
    lower = [*often, "optimizer.lr=1.0e-4"]
    said = train(run, *lower, "steps=4", f"resume={run / 'checkpoints' / 'step_00000002'}")
    assert "later steps are set aside: checkpoints/abandoned_step_00000004" in said
    assert names(run / "checkpoints") == [
        *(f"abandoned_step_0000000{i}" for i in (4, 6, 8)),
        *(f"step_0000000{i}" for i in (2, 4)),
    ]
    assert everything(run / "checkpoints" / "abandoned_step_00000008") == abandoned
    assert [n for n in names(run / "snapshots") if n.startswith("step_")] == ["step_00000002", "step_00000004"]
    assert [n for n in names(run / "samples") if n.startswith("step_")] == ["step_00000002.png", "step_00000004.png"]
    assert steps(run) == [1, 2, 3, 4]
    assert loss(run, 2) == old[2]
    assert loss(run, 4) != old[4]
    assert f"Resumed from {run / 'checkpoints' / 'step_00000004'} at step 4." in train(run, *lower, "steps=6", "resume=latest")
    new = {step: loss(run, step) for step in range(1, 7)}

    # and back again: the branch that was left can be gone on with, with its own numbers
    said = train(run, *often, "steps=8", f"resume={run / 'checkpoints' / 'abandoned_step_00000006'}")
    assert {step: loss(run, step) for step in range(1, 9)} == old
    assert "changed: optimizer.lr" not in said
    assert new[6] != old[6]
    assert f"Resumed from {run / 'checkpoints' / 'step_00000008'} at" in train(run, *often, "steps=8", "resume=latest")


def test_a_branch_in_a_new_folder_takes_its_log_along(train, tmp_path):
    run, branch = tmp_path / "run", tmp_path / "branch"
    train(run, "checkpoint_every=2", "keep_checkpoints=9")
    before = everything(run)
    train(branch, "checkpoint_every=2", f"resume={run / 'checkpoints' / 'step_00000002'}", "optimizer.lr=1.0e-4")
    assert everything(run) == before
    assert steps(branch) == [1, 2, 3, 4]
    assert loss(branch, 2) == loss(run, 2)


@pytest.mark.parametrize("differs", [["seed=1"], ["seed=1", "optimizer.lr=0.002", "steps=6"]])  # also beside what may change
def test_a_checkpoint_of_one_run_does_not_overwrite_another(differs, train, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    train(run, "checkpoint_every=2")
    train(other, "checkpoint_every=2", *differs)
    before = everything(other)
    said = train(other, "checkpoint_every=2", f"resume={run / 'checkpoints' / 'step_00000002'}")
    assert f"output_dir {str(other)!r} holds another run than the one of" in said
    assert everything(other) == before
