"""Settings that would do nothing are refused by name; what stands on a command line is what the run gets."""

import copy
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pipelines.common.config import load_config
from pipelines.common.errors import UserError
from trainers import cache, command, distill, networks, train_teacher
from trainers.config.run import DistillConfig, TeacherConfig

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")

LEVELS = {"name": "log_uniform", "low": 0.3, "high": 3.0}
ADAM = {"lr": 1e-3}
TEACHER = {
    "data": {"name": "digits"},
    "network": {"channels": 8},
    "levels": {"name": "log_normal"},
    "optimizer": ADAM,
    "steps": 5,
    "batch_size": 7,
    "output_dir": "out",
}
POINTS = {
    "teacher": {"exact": "density"},
    "data": {"name": "mixture"},
    "student": {"network": {"width": 8}, "optimizer": ADAM},
    "objective": {
        "name": "diff_instruct",
        "levels": LEVELS,
        "joint": True,
        "fake_score": {"levels": LEVELS, "optimizer": ADAM},
    },
    "steps": 5,
    "batch_size": 7,
    "output_dir": "out",
}
PROMPTS = {
    "teacher": {"path": "some/teacher", "guidance_scale": 2.0},
    "data": {"name": "prompts", "file": "prompts.txt"},
    "student": {"optimizer": ADAM},
    "objective": {"name": "diff_instruct", "levels": LEVELS, "fake_score": {"levels": LEVELS, "optimizer": ADAM}},
    "steps": 5,
    "batch_size": 7,
    "output_dir": "out",
}
VARFLOW = "objective={name: varflow, levels: {name: uniform, low: 1, high: 2}}"
CAPTIONS = "data={name: captions, source: parquet, paths: [x.parquet]}"


@pytest.fixture
def load(tmp_path):
    """load(config, *overrides): of a dict, as a command reads it."""

    def read(config: dict, *overrides: str):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(copy.deepcopy(config)))
        return load_config(TeacherConfig if "levels" in config else DistillConfig, str(file), list(overrides))

    return read


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "key", "void", "acts"),
    [
        (TEACHER, "final_ratio", ["optimizer.final_ratio=0.1"], ["optimizer.schedule=cosine"]),
        (TEACHER, "label_dropout", ["label_dropout=0.3"], ["data.labels=true"]),
        (POINTS, "final_ratio", ["student.optimizer.final_ratio=0.1"], ["student.optimizer.schedule=linear"]),
        (POINTS, "data.num_samples", ["data.num_samples=99"], ["teacher.exact=samples"]),
        (POINTS, "data.seed", ["data.seed=3"], ["teacher.exact=samples"]),
        (POINTS, "data.seed", ["data.seed=3"], [VARFLOW]),
        (POINTS, "fake_score.levels", ["objective.fake_score.levels.low=0.5"], ["objective.joint=false"]),
        (POINTS, "fake_score.levels", ["objective.fake_score.levels.low=0.5"], ["objective.fake_score.updates=2"]),
        (POINTS, "fake_score.levels", ["objective.fake_score.levels.low=0.5"], ["objective.fake_score.warmup_updates=2"]),
        (PROMPTS, "teacher.guidance_scale", [VARFLOW, CAPTIONS], ["teacher.guidance_scale=1"]),
        (PROMPTS, "column", ["data.column=text"], ["data.file=prompts.csv"]),
        (PROMPTS, "split", [CAPTIONS, "data.split=test"], ["data.source=hub"]),
    ],
)
def test_a_setting_without_effect_is_refused(config, key, void, acts, load):
    """By name; with the setting that it needs it is taken."""
    with pytest.raises(UserError, match=f"{key} ha(s|ve) no effect"):
        load(config, *void)
    load(config, *void, *acts)


def test_the_message_says_what_to_do(load):
    with pytest.raises(
        UserError,
        match=r"final_ratio has no effect without schedule linear or cosine; remove it, or set it to its default, 0\.0",
    ):
        load(POINTS, "student.optimizer.final_ratio=0.5")


@pytest.mark.parametrize("level", [1, -1, 7])
def test_attention_at_a_level_that_is_none(level, load):
    with pytest.raises(UserError, match=rf"attention_levels: there is no level {level}; channel_mult \[1\] has 0 to 0"):
        load(TEACHER, f"network.attention_levels=[{level}]")
    load(TEACHER, "network.attention_levels=[0]")


def test_attention_at_a_resolution_that_is_none(load):
    network = "network={architecture: ddpmpp, model_channels: 4, channel_mult: [1, 1], attention_resolutions: [%d]}"
    with pytest.raises(ValueError, match=r"no level has 16x16 positions; those of images of 8x8 are 8, 4"):
        networks.build_unet(load(TEACHER, network % 16).network, 0, "teacher", 8, in_channels=1, out_channels=1)
    networks.build_unet(load(TEACHER, network % 4).network, 0, "teacher", 8, in_channels=1, out_channels=1)


def refusal(main, argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def teacher_file(tmp_path) -> Path:
    file = tmp_path / "teacher.yaml"
    file.write_text(yaml.safe_dump(TEACHER | {"output_dir": str(tmp_path / "out")}))
    return file


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        pytest.param("[tensorboard, wandb]", "trackers: 'wandb' is not installed", marks=needs_tensorboard),
        ("[wandb]", "trackers: 'wandb' is not installed"),
        ("[all, wandb]", "trackers: 'wandb' is not installed"),
        ("[nonsense]", "trackers: accelerate knows no 'nonsense'; expected some of"),
    ],
)
def test_a_tracker_that_is_not_there(trackers, message, teacher_file, tmp_path, capsys, fresh_accelerator):
    """Before anything is written; accelerate would leave it out without a word."""
    assert message in refusal(train_teacher.main, ["--config", str(teacher_file), f"trackers={trackers}"], capsys)
    assert not (tmp_path / "out").exists()


def test_the_extra_of_a_tracker_is_named(monkeypatch):
    monkeypatch.setattr(command, "get_available_trackers", list)
    with pytest.raises(UserError, match=r"'tensorboard' is not installed; pip install -e \"\.\[tensorboard\]\", or leave it out"):
        command.check_trackers(["tensorboard"])


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run #2", "run #2"),
        ("#2", "#2"),
        ("a b # c", "a b # c"),
        ("'run' # mine", "'run' # mine"),
        ("run#2", "run#2"),
        ("'run #2'", "run #2"),
        ('"run #2"', "run #2"),
    ],
)
def test_a_value_is_all_of_the_text(text, expected, load):
    assert load(TEACHER, f"output_dir={text}").output_dir == expected


@pytest.mark.parametrize("override", ["steps=5 # for now", "optimizer={lr: 1, eps: 1} # mine", "data.name=digits # x"])
def test_text_after_a_number_is_no_comment(override, load):
    with pytest.raises(UserError, match="#"):
        load(TEACHER, override)


def test_augmented_samples_are_not_those_of_a_joint_update(load):
    """There the student's own samples are what the fake score sees."""
    alone = {"objective": POINTS["objective"] | {"joint": False}}
    load(POINTS | alone, "objective.fake_score.augment=0.1")
    with pytest.raises(UserError, match=r"fake_score\.augment and joint exclude each other"):
        load(POINTS, "objective.fake_score.augment=0.1")


def test_an_override_changes_the_one_value_that_it_names(load, tmp_path):
    """Two sections that are one in the file (*anchor) are two in the run."""
    loaded = load(POINTS | {"objective": POINTS["objective"] | {"joint": False}}, "objective.fake_score.levels.low=0.5")
    assert "&id" in (tmp_path / "config.yaml").read_text()
    assert (loaded.objective.levels.low, loaded.objective.fake_score.levels.low) == (0.3, 0.5)


def test_two_files_are_refused(teacher_file, capsys):
    said = refusal(train_teacher.main, ["--config", str(teacher_file), "--config=other.yaml"], capsys)
    assert "--config takes one file; 2 were given" in said


@pytest.mark.parametrize("form", [lambda f: ["--config", f], lambda f: [f"--config={f}"]])
@pytest.mark.parametrize(
    ("content", "overrides", "kind"),
    [
        ("pipeline: x\n", [], TeacherConfig),
        ('"pipeline": x\n', [], TeacherConfig),
        ("{pipeline: x, steps: 1}\n", [], TeacherConfig),
        ("steps: 1\n", ["pipeline=x"], TeacherConfig),
        ("steps: 1\n", [], DistillConfig),
        ("teacher:\n  pipeline: x\n", [], DistillConfig),
    ],
)
def test_which_kind_of_configuration_is_encoded(form, content, overrides, kind, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(content)
    assert cache.kind_of([*form(str(file)), *overrides]) is kind


# Paths ----------------------------------------------------------------------------------------------------------------

PATHS = {
    "output_dir": (POINTS, "output_dir"),
    "resume": (POINTS, "resume"),
    "teacher.path": (PROMPTS, "teacher.path"),
    "data.file": (PROMPTS, "data.file"),
    "data.cache": (PROMPTS, "data.cache"),
    "data.paths": (PROMPTS | {"data": {"name": "captions", "source": "parquet", "paths": ["x"]}}, "data.paths"),
    "data.files": (TEACHER | {"data": {"name": "parquet", "files": ["x"], "image_size": 8}}, "data.files"),
    "data.path": (TEACHER | {"data": {"name": "folder", "path": "x", "image_size": 8}}, "data.path"),
    "data.id": (TEACHER | {"data": {"name": "hub", "id": "x", "image_size": 8}}, "data.id"),
    "pipeline": (
        {k: v for k, v in TEACHER.items() if k != "network"}
        | {"pipeline": "x", "data": {"name": "captions", "source": "parquet", "paths": ["x"]}},
        "pipeline",
    ),
    **{
        f"evaluation.{key}": (PROMPTS | {"evaluation": {"every": 50}}, f"evaluation.{key}")
        for key in ("reference", "weights_dir", "inception", "clip", "clip_336", "dinov2")
    },
}


@pytest.mark.parametrize("name", PATHS)
def test_home_is_meant_by_a_tilde(name, load, monkeypatch, tmp_path):
    """In a file and in an override."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config, key = PATHS[name]
    many = key in ("data.paths", "data.files")

    def held(loaded) -> str:
        for part in key.split("."):
            loaded = getattr(loaded, part)
        return loaded[0] if many else loaded

    assert held(load(config, f"{key}={'[~/x]' if many else '~/x'}")) == str(tmp_path / "x")
    section, _, last = key.rpartition(".")
    changed = copy.deepcopy(config)
    (changed[section] if section else changed)[last] = ["~/x"] if many else "~/x"
    assert held(load(changed)) == str(tmp_path / "x")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nobody_here/x", "this machine has no such home folder"),
        ("$SCRATCH/x", r"\$SCRATCH is not replaced here"),
        ("x/${USER}/y", r"\$\{USER\} is not replaced here"),
    ],
)
def test_a_path_that_only_a_shell_would_know(path, message, load):
    with pytest.raises(UserError, match=f"output_dir: .*{message}"):
        load(TEACHER, f"output_dir={path}")


def test_a_folder_that_has_such_a_name(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("$x/~")
    assert load(TEACHER, "output_dir=$x").output_dir == "$x"
    assert load(TEACHER, "output_dir=$x/~").output_dir == "$x/~"


def test_the_file_itself(teacher_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.parse(TeacherConfig, "", ["--config=~/teacher.yaml"]).steps == 5


def test_a_file_in_no_home(capsys):
    assert "this machine has no such home folder" in refusal(train_teacher.main, ["--config=~nobody_here/x.yaml"], capsys)


def test_distill_knows_its_file_too(tmp_path, capsys):
    assert "no such file" in refusal(distill.main, [f"--config={tmp_path / 'none.yaml'}"], capsys)
