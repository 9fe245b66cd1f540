"""Configurations: every recipe loads; every fault is one clear message and exit status 2, and leaves nothing behind."""

import copy
from pathlib import Path

import pytest
import yaml

from pipelines.common.config import load_config
from pipelines.common.errors import UserError
from trainers import distill, train_teacher
from trainers.config.run import DistillConfig, TeacherConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

LEVELS = {"name": "log_uniform", "low": 0.3, "high": 3.0}
VARDIU = {
    "teacher": {"path": "no/teacher"},
    "student": {"optimizer": {"lr": 1e-3}},
    "objective": {
        "name": "vardiu",
        "levels": LEVELS,
        "posterior": {"network": {"channels": 8}, "optimizer": {"lr": 1e-3}},
    },
    "steps": 5,
    "batch_size": 7,
}
TEACHER = {
    "data": {"name": "digits"},
    "network": {"channels": 8},
    "levels": {"name": "log_normal"},
    "optimizer": {"lr": 1e-3},
    "steps": 5,
    "batch_size": 7,
}
PARQUET = "data={name: parquet, files: [], image_size: 0, channels: 2}"
GUIDANCE = ("guidance_scale", "guidance_normalization", "negative_prompt")
RUN_KEYS = "output_dir, seed, steps, batch_size, micro_batch_size"


def write(folder: Path, config: dict | str) -> Path:
    """A configuration file; a dict gets an output_dir inside the folder."""
    file = folder / "config.yaml"
    if isinstance(config, dict):
        config = yaml.safe_dump({"output_dir": str(folder / "out")} | config)
    file.write_text(config)
    return file


def refusal(main, arguments: list[str], folder: Path, capsys) -> str:
    """What main says on stderr when it refuses: exit status 2, no traceback, nothing written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in error
    assert sorted(folder.rglob("*")) == before
    return error.removeprefix("error: ").removesuffix("\n")


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_every_recipe_loads_with_its_model(file):
    raw = yaml.safe_load(file.read_text())
    models = [
        m for key, m in (("objective", DistillConfig), ("network", TeacherConfig), ("pipeline", TeacherConfig)) if key in raw
    ]
    assert len(models) == 1, f"{file.name} is neither a distillation nor a teacher; if it is a new kind, name its model here"
    config = load_config(models[0], str(file), [])
    for key, value in raw.items():  # what the file says is what the run gets
        if not isinstance(value, dict):
            assert getattr(config, key) == value
    assert models[0].model_validate(config.model_dump(mode="json")) == config


def test_there_are_recipes():
    assert {f.stem for f in RECIPES} >= {"digits_teacher", "digits_vardiu", "digits_varflow", "digits_diff_instruct"}


def test_overrides_replace_single_values(tmp_path):
    file = write(tmp_path, VARDIU)
    overrides = ["student.optimizer.lr=1e-4", "objective.noise_draws=3", "data.name=digits", "micro_batch_size=", "steps=11"]
    config = load_config(DistillConfig, str(file), overrides)
    assert (config.student.optimizer.lr, config.objective.noise_draws, config.data.name) == (1e-4, 3, "digits")
    assert (config.micro_batch_size, config.steps, config.batch_size) == (None, 11, 7)


@pytest.mark.parametrize(
    ("estimator", "samples"), [("bound", 0), ("multi_sample", 16), ("resampled_score", 16), ("amortized_score", 0)]
)
def test_number_of_samples(estimator, samples, tmp_path):
    """By default what the estimator needs; else what is given."""
    file = str(write(tmp_path, VARDIU))
    assert load_config(DistillConfig, file, [f"objective.estimator={estimator}"]).objective.samples == samples
    if estimator != "bound":
        given = [f"objective.estimator={estimator}", "objective.num_samples=3"]
        assert load_config(DistillConfig, file, given).objective.samples == 3


def test_options_that_fit_are_taken(tmp_path):
    file = str(write(tmp_path, VARDIU))
    resampled = ["objective.estimator=resampled_score", "objective.num_samples=4", "objective.target_ess=4"]
    assert load_config(DistillConfig, file, [*resampled, "objective.ess_levels=true"]).objective.target_ess == 4
    for network in ("shared", "copy"):
        config = load_config(DistillConfig, file, [f"objective.posterior.network={network}"])
        assert config.objective.posterior.network == network
    options = {"lowrank": ("rank=3", {"rank": 3}), "learned": ("block=2", {"block": 2}), "diag": ("updates=1", {})}
    for covariance, (option, expected) in options.items():
        given = [f"objective.posterior.covariance={covariance}", f"objective.posterior.{option}"]
        assert load_config(DistillConfig, file, given).objective.posterior.covariance_options() == expected


def test_a_configuration_cannot_be_changed(tmp_path):
    config = load_config(DistillConfig, str(write(tmp_path, VARDIU)), [])
    with pytest.raises(ValueError, match="frozen"):
        config.student.optimizer.lr = 1.0


MERGED = """
output_dir: out
teacher: {path: no/teacher}
student: {optimizer: &adam {lr: 0.5, eps: 0.25}}
objective:
  name: vardiu
  levels: {name: uniform, low: 1, high: 2}
  posterior: {network: {channels: 8}, optimizer: {<<: *adam, eps: 0.125}}
steps: 5
batch_size: 7
"""


def test_yaml_anchors_and_merge_keys_work(tmp_path):
    config = load_config(DistillConfig, str(write(tmp_path, MERGED)), [])
    optimizer = config.objective.posterior.optimizer
    assert (optimizer.lr, optimizer.eps, config.student.optimizer.eps) == (0.5, 0.125, 0.25)


# Faults ---------------------------------------------------------------------------------------------------------------

FAULTS = [
    # unknown keys, at every depth
    (["stepz=3"], ["unknown key 'stepz'; did you mean 'steps'?"]),
    (["objective.num_sample=3"], ["unknown key 'objective.num_sample'; did you mean 'num_samples'?"]),
    (
        ["objective.posterior.network.chanels=8"],
        ["unknown key 'objective.posterior.network.chanels'; did you mean 'channels'?"],
    ),
    (
        ["objective.posterior.network=shard"],
        ["objective.posterior.network: Input should be 'shared', 'copy' or 'adapter', got 'shard'"],
    ),
    (
        ["objective.posterior.network=3"],
        ["objective.posterior.network: Input should be a valid dictionary or instance of Network, got 3"],
    ),
    (
        ["objective.posterior.network.channels=3"],
        ["objective.posterior.network.channels: Input should be a multiple of 2, got 3"],
    ),
    (["objective.levels.lo=1"], ["unknown key 'objective.levels.lo'; did you mean 'low'?"]),
    (
        ["teacher.zzz=1"],
        [f"unknown key 'teacher.zzz'; known here: path, exact, {', '.join(GUIDANCE)}, dtype, variant"],
    ),
    # wrong types
    (["steps=many"], ["steps: Input should be a valid integer, unable to parse string as an integer, got 'many'"]),
    (["steps=2.5"], ["steps: Input should be a valid integer, got a number with a fractional part, got 2.5"]),
    (["student=3"], ["student: Input should be a valid dictionary or instance of Student, got 3"]),
    (
        ["objective.antithetic=perhaps"],
        ["objective.antithetic: Input should be a valid boolean, unable to interpret input, got 'perhaps'"],
    ),
    # impossible values
    (["batch_size=0"], ["batch_size: Input should be greater than 0, got 0"]),
    (["ema_decay=1"], ["ema_decay: Input should be less than 1, got 1"]),
    (["student.optimizer.lr=-1"], ["student.optimizer.lr: Input should be greater than 0, got -1"]),
    (["student.optimizer.betas=[0, 1]"], ["student.optimizer.betas.1: Input should be less than 1, got 1"]),
    (
        ["objective.estimator=best"],
        ["objective.estimator: Input should be 'bound', 'multi_sample', 'resampled_score' or 'amortized_score', got 'best'"],
    ),
    (
        ["objective.name=vardi"],
        [
            "objective: Input tag 'vardi' found using 'name' does not match any of the expected tags: "
            "'diff_instruct', 'sid', 'varflow', 'vardiu'"
        ],
    ),
    (["steps="], ["steps: Input should be a valid integer, got None"]),
    *(
        (
            [f"data={{name: folder, path: x, image_size: 8, background: {given}}}"],
            [f"data.background: Input should be a colour, by name or as #rrggbb, got {shown}"],
        )
        for given, shown in (("whit", "'whit'"), ('"#ff"', "'#ff'"), ('"#ffffff80"', "'#ffffff80'"))
    ),
    # a fault of two values together; the path is that of the file, without the name of the variant
    (["objective.levels.low=5"], ["objective.levels: low (5.0) must be below high (3.0)"]),
    (
        ["objective={name: varflow, levels: {name: uniform, low: 1, high: 2}}"],
        ["data: objective 'varflow' matches samples of data; add a data section, e.g. data.name=digits"],
    ),
    (
        ["objective={name: varflow, levels: {name: uniform, low: 1, high: 2}}", "data={name: digits}", "batch_size=1"],
        ["batch_size: 1, expected at least 2; the energy distance needs pairs of samples"],
    ),
    # an option of another estimator, or of another covariance, would be ignored without a word
    *(
        (
            [f"objective.estimator={estimator}", f"objective.{option}"],
            [f"objective: {option.split('=')[0]} has no effect with estimator={estimator!r}; remove it (it is for {others})"],
        )
        for estimator, option, others in (
            ("bound", "num_samples=3", "multi_sample resampled_score amortized_score"),
            ("bound", "target_ess=2", "resampled_score"),
            ("multi_sample", "moves=1", "resampled_score"),
            ("amortized_score", "ess_levels=true", "resampled_score"),
            ("resampled_score", "control_variate=false", "bound multi_sample"),
            ("amortized_score", "antithetic=false", "bound multi_sample resampled_score"),
            ("resampled_score", "noise_draws=1", "amortized_score"),
            ("bound", "regression_weight=1", "amortized_score"),
        )
    ),
    *(
        (
            [f"objective.posterior.covariance={covariance}", f"objective.posterior.{option}"],
            [f"objective.posterior: {key} has no effect with covariance={covariance!r}; remove it (it is for {other})"],
        )
        for covariance, option, key, other in (
            ("diag", "rank=3", "rank", "lowrank"),
            ("lowrank", "block=2", "block", "learned"),
            ("learned", "flow={blocks: 2}", "flow", "flow"),
        )
    ),
    # values that no estimator could work with
    *(
        (
            ["objective.estimator=resampled_score", *(f"objective.{option}" for option in options)],
            [f"objective: {message}"],
        )
        for options, message in (
            (["num_samples=0"], "num_samples must be at least 1 for estimator='resampled_score'; got 0"),
            (["num_samples=3", "target_ess=4"], "target_ess (4) must not be above num_samples (3)"),
            (["target_ess=17"], "target_ess (17) must not be above num_samples (16)"),
            (
                ["target_ess=2", "moves=1"],
                "target_ess and moves exclude each other: moves are exact for untempered weights only",
            ),
            (
                ["num_samples=1", "ess_levels=true"],
                "ess_levels needs num_samples of at least 2: a single proposal always counts as one",
            ),
        )
    ),
    (
        ["objective.estimator=multi_sample", "objective.num_samples=0"],
        ["objective: num_samples must be at least 1 for estimator='multi_sample'; got 0"],
    ),
    (["objective.noise_draws=0"], ["objective.noise_draws: Input should be greater than 0, got 0"]),
    (["objective.regression_weight=0"], ["objective.regression_weight: Input should be greater than 0, got 0"]),
    # several at once, each on a line of its own
    (
        [PARQUET, "seed=-1", "studnt={}"],
        [
            "seed: Input should be greater than or equal to 0, got -1",
            "data.image_size: Input should be greater than 0, got 0",
            "data.channels: Input should be 1 or 3, got 2",
            "data.files: List should have at least 1 item after validation, not 0, got []",
            "unknown key 'studnt'; did you mean 'student'?",
        ],
    ),
]


@pytest.mark.parametrize(("overrides", "lines"), FAULTS, ids=[" ".join(o)[:60] for o, _ in FAULTS])
def test_fault_in_a_value(overrides, lines, tmp_path, capsys):
    file = write(tmp_path, VARDIU)
    said = refusal(distill.main, ["--config", str(file), *overrides], tmp_path, capsys)
    assert said.splitlines() == [f"{file}: {len(lines)} fault(s)", *(f"  {line}" for line in lines)]


@pytest.mark.parametrize("key", ["student.optimizer.lr", "teacher.guidance_scale", "student.sigma_init", "objective.levels.high"])
@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_no_number_may_be_nan_or_infinite(key, value, tmp_path, capsys):
    file = write(tmp_path, VARDIU)
    assert f"  {key}" in refusal(distill.main, ["--config", str(file), f"{key}={value}"], tmp_path, capsys)


def test_an_unknown_key_without_a_near_one_lists_what_is_known(tmp_path, capsys):
    said = refusal(distill.main, ["--config", str(write(tmp_path, VARDIU)), "qqq=1"], tmp_path, capsys)
    assert f"unknown key 'qqq'; known here: {RUN_KEYS}" in said


def test_missing_keys_are_all_named(tmp_path, capsys):
    config = copy.deepcopy(TEACHER)
    del config["steps"], config["optimizer"]["lr"], config["levels"]["name"]
    file = write(tmp_path, config)
    said = refusal(train_teacher.main, ["--config", str(file)], tmp_path, capsys)
    expected = [
        "steps: Field required",
        "levels: Unable to extract tag using discriminator 'name'",
        "optimizer.lr: Field required",
    ]
    assert said.splitlines() == [f"{file}: 3 fault(s)", *(f"  {line}" for line in expected)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nteacher:\n  path: a\n  path: b\n", "key 'path' stands twice in one section"),
        ("a: {b: 1, b: 2}\n", "key 'b' stands twice in one section"),
        ("- 1\n", "must hold `key: value` lines, not list"),
        ("", "must hold `key: value` lines, not NoneType"),
        ("a: [1\n", "is not valid YAML: while parsing a flow sequence"),
        ("? [a, b]\n: 1\n", "is not valid YAML: while constructing a mapping"),
        ("a: !!python/object/apply:os.getpid []\n", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_fault_in_the_file(text, message, tmp_path, capsys):
    file = write(tmp_path, text)
    said = refusal(distill.main, ["--config", str(file)], tmp_path, capsys)
    assert said.startswith(str(file))
    assert message in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("=3", "override '=3' must look like a.b=value"),
        ("steps", "override 'steps' must look like a.b=value"),
        ("student..optimizer=3", "override 'student..optimizer=3' must look like a.b=value"),
        ("steps.x=3", "override 'steps.x=3': 'steps' is a value, not a section"),
        ("steps=[3", "override 'steps=[3'"),
        ("student.optimizer={lr: 1, lr: 2}", "key 'lr' stands twice"),
    ],
)
def test_fault_in_an_override(override, message, tmp_path, capsys):
    assert message in refusal(distill.main, ["--config", str(write(tmp_path, VARDIU)), override], tmp_path, capsys)


@pytest.mark.parametrize("main", [distill.main, train_teacher.main])
def test_fault_in_the_command_line(main, tmp_path, capsys):
    missing = str(tmp_path / "none.yaml")
    assert refusal(main, ["--config", missing], tmp_path, capsys) == f"--config: no such file {missing!r}"
    assert refusal(main, ["--config", str(tmp_path)], tmp_path, capsys) == f"--config: no such file {str(tmp_path)!r}"
    assert "--config" in refusal(main, [], tmp_path, capsys)


def test_a_recipe_of_the_other_command_is_refused(tmp_path, capsys):
    said = refusal(train_teacher.main, ["--config", str(write(tmp_path, VARDIU))], tmp_path, capsys)
    assert "unknown key 'objective'" in said
    assert "data: Field required" in said


def test_load_config_raises_what_main_prints(tmp_path):
    with pytest.raises(UserError, match="did you mean 'steps'"):
        load_config(DistillConfig, str(write(tmp_path, VARDIU)), ["step=1"])


# Values as they look ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "steps"), [("010", 10), ("0", None), ("1_0", 10), ("'7'", 7), ("1:30", None), ("0x10", 16)])
def test_a_number_is_the_one_that_stands_there(text, steps, tmp_path):
    """YAML 1.1 has 010 for 8 and 1:30 for 90."""
    for form in (lambda: (write(tmp_path, VARDIU), [f"steps={text}"]), lambda: (write(tmp_path, VARDIU | {"steps": 1}), [])):
        file, given = form()
        if not given:
            file.write_text(file.read_text().replace("steps: 1\n", f"steps: {text}\n"))
        if steps is None:
            with pytest.raises(ValueError, match="steps: Input should be"):
                load_config(DistillConfig, str(file), given)
        else:
            assert load_config(DistillConfig, str(file), given).steps == steps


@pytest.mark.parametrize("name", ["2026-01-31", "010", "1:30", "2026-01-31 12:00:00"])
def test_a_folder_named_by_a_date_or_number(name, tmp_path):
    assert load_config(DistillConfig, str(write(tmp_path, VARDIU)), [f"output_dir={name}"]).output_dir == name


@pytest.mark.parametrize("override", ["steps=true", "steps=yes", "seed=off", "student.optimizer.lr=on", "micro_batch_size=true"])
def test_truth_is_no_number(override, tmp_path):
    """pydantic takes it for 1: one step, a rate of 1.0."""
    with pytest.raises(ValueError, match=f"{override.partition('=')[0].split('.')[-1]} is (true|false), expected a number"):
        load_config(DistillConfig, str(write(tmp_path, VARDIU)), [override])


def test_truth_in_a_list_of_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"betas is .*true.*, expected a number"):
        load_config(DistillConfig, str(write(tmp_path, VARDIU)), ["student.optimizer.betas=[true, 0.9]"])


def test_a_number_that_no_tensor_can_have(tmp_path):
    with pytest.raises(ValueError, match="batch_size: Input should be less than"):
        load_config(DistillConfig, str(write(tmp_path, VARDIU)), [f"batch_size={10**20}"])
