"""What one family of teachers has and the other has not is refused with one message, before anything is written."""

from pathlib import Path

import pytest
import yaml

from pipelines.edm import EDMPipeline, EDMScheduler, PatchUNet
from trainers import distill, train_teacher

pytestmark = pytest.mark.usefixtures("fresh_accelerator", "one_thread")


def run(config: dict, *overrides: str) -> None:
    file = Path(config["output_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    distill.main(["--config", str(file), *overrides])


def refusal(config: dict, capsys, *overrides: str) -> str:
    """What distill says when it refuses: exit status 2 and one message without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(config, *overrides)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    return said[said.index("error: ") :].strip()


@pytest.fixture(scope="module")
def edm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edm")
    unet = PatchUNet(sample_size=4, in_channels=1, out_channels=1, channels=8, num_blocks=1)
    EDMPipeline(unet, EDMScheduler()).save_pretrained(folder)
    return folder


SHARED = {"network": "shared", "warmup_updates": 0, "optimizer": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("objective", "override", "message"),
    [
        ("vardiu", "student.sigma_init=2.5", "student.sigma_init has no effect for a Stable Diffusion teacher; remove it"),
        ("vardiu", "student.image_range=true", "student.image_range has no effect for a Stable Diffusion teacher; remove it"),
        (
            "vardiu",
            f"objective.posterior={SHARED | {'network': 'copy'}}",
            "objective.posterior.network: 'copy' is for EDM teachers",
        ),
        (
            "vardiu",
            "data={name: digits}",
            "data: a Stable Diffusion teacher needs data.name prompts, captions or teacher_samples",
        ),
        ("vardiu", "data=", "data: a Stable Diffusion teacher needs data.name prompts, captions or teacher_samples"),
        ("diff_instruct", "student.readout_t=1000", "the readout level t=1000 is outside the schedule's range [0.0, 999.0]"),
        ("vardiu", "objective.levels.high=1500", "objective.levels.high: 1500 is outside the teacher's levels, 0 to 999"),
        (
            "diff_instruct",
            ["objective.joint=false", "objective.fake_score.levels={name: log_normal}"],
            "objective.fake_score.levels.name: 'log_normal' draws noise levels sigma, for EDM teachers; this teacher's levels",
        ),
        ("vardiu", "objective.levels={name: log_uniform, low: 0.2, high: 3}", "objective.levels.low: 0.2 is no timestep"),
        (
            "varflow",
            "objective.levels={name: karras, low: 0.002, high: 80}",
            "objective.levels.name: 'karras' draws noise levels",
        ),
        ("diff_instruct", "objective.fake_score.lora.targets=[to_q, nonsense]", "lora.targets: 'nonsense' fits no layer"),
        ("varflow", "objective.grids=[1, 3]", "objective.grids: [1, 3] must all divide the sides of the latents, (8, 8)"),
        ("vardiu", "compile=nonsense", "compile: no backend 'nonsense'; torch has "),
        ("varflow", "data={name: prompts, file: x.txt}", "data: objective 'varflow' needs images; 'prompts' has none"),
    ],
)
def test_what_is_not_for_stable_diffusion_is_refused(objective, override, message, recipe, capsys):
    config = recipe(objective)
    overrides = override if isinstance(override, list) else [override]
    assert message in refusal(config, capsys, *overrides)
    assert not (Path(config["output_dir"]) / "metrics.jsonl").exists()
    if "levels" in overrides[-1] or "readout_t" in overrides[-1]:  # said before a prompt is encoded
        assert not Path(config["output_dir"]).exists()


def test_levels_of_a_teacher_trained_further(tiny, tmp_path, capsys):
    """train_teacher on a Stable Diffusion pipeline takes timesteps too; a new EDM network sigmas."""
    config = {"output_dir": str(tmp_path / "further"), "pipeline": str(tiny["sd15"]), "steps": 1, "batch_size": 2}
    config |= {"data": {"name": "captions", "source": "parquet", "paths": ["x.parquet"]}, "optimizer": {"lr": 1e-3}}
    config["levels"] = {"name": "log_normal"}
    file = tmp_path / "further.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        train_teacher.main(["--config", str(file)])
    assert "error: levels.name: 'log_normal' draws noise levels sigma, for EDM teachers" in capsys.readouterr().err
    new = {
        "output_dir": str(tmp_path / "new"),
        "network": {"channels": 8},
        "data": {"name": "digits"},
        "steps": 1,
        "batch_size": 2,
    }
    new |= {"optimizer": {"lr": 1e-3}, "levels": {"name": "uniform", "low": 20, "high": 980}}
    file.write_text(yaml.safe_dump(new))
    with pytest.raises(SystemExit):
        train_teacher.main(["--config", str(file)])
    assert "error: levels: 94% of what uniform draws is outside 0.002 to 80" in capsys.readouterr().err
    file.write_text(yaml.safe_dump(new | {"levels": {"name": "log_normal"}, "sigma_min": 90.0}))  # said when it was sampled, once
    with pytest.raises(SystemExit):
        train_teacher.main(["--config", str(file)])
    assert "error: sigma_min=90, sigma_max=80 must be in order" in capsys.readouterr().err
    file.write_text(yaml.safe_dump(new | {"levels": {"name": "log_normal"}, "guidance_scale": 2.0}))
    with pytest.raises(SystemExit):
        train_teacher.main(["--config", str(file)])
    assert "guidance_scale has no effect without pipeline; remove it" in capsys.readouterr().err
    for scale in (0.0, -2.0):  # the stock pipeline would draw what it draws for 1
        file.write_text(yaml.safe_dump(config | {"guidance_scale": scale}))
        with pytest.raises(SystemExit):
            train_teacher.main(["--config", str(file)])
        assert f"guidance_scale: Input should be greater than or equal to 1, got {scale}" in capsys.readouterr().err


def test_a_negative_prompt_without_guidance_is_refused(recipe, capsys):
    said = refusal(recipe("vardiu"), capsys, "teacher.negative_prompt=ugly", "teacher.guidance_scale=1")
    assert said == "error: teacher.negative_prompt has no effect for a teacher without guidance (guidance_scale 1); remove it"


@pytest.fixture
def edm_recipe(edm, recipe):
    def make(objective: str) -> dict:
        levels = {"name": "log_uniform", "low": 0.3, "high": 3.0}
        more = {"posterior": SHARED} if objective == "vardiu" else {"fake_score": {"optimizer": {"lr": 1e-3}, "levels": levels}}
        config = recipe(objective, teacher={"path": str(edm)}, student={"optimizer": {"lr": 1e-3}}, data=None)
        return config | {"objective": {"name": objective, "levels": levels} | more}

    return make


@pytest.mark.parametrize(
    ("objective", "override", "key"),
    [
        ("vardiu", "teacher.negative_prompt=ugly", "teacher.negative_prompt"),
        ("vardiu", "teacher.variant=fp16", "teacher.variant"),
        ("vardiu", "teacher.dtype=bfloat16", "teacher.dtype"),
        ("vardiu", "student.readout_t=999", "student.readout_t"),
    ],
)
def test_what_is_not_for_edm_is_refused(objective, override, key, edm_recipe, capsys):
    config = edm_recipe(objective)
    said = refusal(config, capsys, override)
    assert said == f"error: {key} has no effect for an EDM teacher; remove it"
    assert not Path(config["output_dir"]).exists()
    run(config, "steps=1")


@pytest.mark.parametrize("objective", ["vardiu", "diff_instruct"])
def test_data_that_nothing_looks_at_are_refused(objective, edm_recipe, capsys):
    config = edm_recipe(objective)
    said = refusal(config, capsys, "data={name: digits}")
    assert said == f"error: data has no effect for an EDM teacher and objective {objective!r}, which need no data; remove it"
    assert not Path(config["output_dir"]).exists()


@pytest.mark.parametrize("name", ["prompts", "captions", "teacher_samples"])
def test_text_data_are_not_for_edm(name, edm_recipe, capsys):
    section = {"captions": "source: parquet, paths: [x.parquet]"}.get(name, "file: x.txt")
    assert refusal(edm_recipe("vardiu"), capsys, f"data={{name: {name}, {section}}}").startswith("error: data: ")


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("family", "environment", "override", "message"),
    [
        ("sd", {"FSDP_VERSION": "1"}, "steps=1", "FSDP: only version 2 is supported; set fsdp_config.fsdp_version: 2"),
        ("sd", {}, "compile=aot_eager", "compile: FSDP and compiled blocks do not go together; set compile: null"),
        (
            "edm",
            {},
            "steps=1",
            "FSDP has no effect for an EDM teacher, whose networks are small; use",
        ),
    ],
)
def test_where_fsdp_has_nothing_to_shard(family, environment, override, message, recipe, edm_recipe, monkeypatch, capsys):
    for key, value in (FSDP | environment).items():
        monkeypatch.setenv(key, value)
    config = recipe("vardiu") if family == "sd" else edm_recipe("vardiu")
    overrides = override if isinstance(override, list) else [override]
    assert message in refusal(config, capsys, *overrides)
    assert not (Path(config["output_dir"]) / "metrics.jsonl").exists()
