"""Students from scratch, by the real command: no teacher, labels, features of another network, what is stored and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from pipelines.common.config import load_config
from pipelines.data.images import load_digits, to_unit
from pipelines.edm import EDMPipeline, EDMScheduler, PatchUNet
from pipelines.students import load_student
from trainers import distill
from trainers.config.run import DistillConfig

RECIPE = str(Path(__file__).resolve().parents[2] / "configs" / "digits_varflow_scratch.yaml")
LEVELS = "{name: log_uniform, low: 0.3, high: 3.0}"
SMALL = ["steps=4", "batch_size=6", "log_every=1", "sample_every=null", "checkpoint_every=null", "snapshot_every=null"]
SMALL += ["student.network={channels: 8, num_blocks: 1}", "student.optimizer.lr=1e-2", "student.optimizer.warmup_steps=0"]
LABELS = "data={name: digits, labels: true}"

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerator")


def made(folder: Path, *more: str):
    """The trainer, not started."""
    return distill.make_trainer(load_config(DistillConfig, RECIPE, [f"output_dir={folder}", *SMALL, *more]))


def saved_network(folder: Path, size: int = 8, num_classes: int = 0) -> str:
    """A network with random weights, which a trained one is for all that is asked of it here."""
    torch.manual_seed(5)
    network = PatchUNet(sample_size=size, channels=8, num_blocks=1, num_classes=num_classes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    EDMPipeline(network, EDMScheduler()).save_pretrained(folder)
    return str(folder)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["student/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("section", [(), ("teacher={}",), ("teacher={path: null}",)])
def test_without_a_teacher_it_is_the_run_that_never_asks_its_own(section, tmp_path):
    """A teacher of the same schedule and spread whose score is not read: the same losses to the last digit."""
    made(tmp_path / "scratch", *section).fit()
    made(tmp_path / "exact", "teacher={exact: samples}").fit()
    assert losses(tmp_path / "scratch") == losses(tmp_path / "exact")
    facts = json.loads((tmp_path / "scratch" / "student" / "student.json").read_text())
    assert (facts["base_model"], facts["teacher"], facts["calls"]) == (None, None, {"student": 24})


def test_a_run_by_drift_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    """With further data, which are drawn anew: the same losses and weights, bit for bit, in one go or from step 2."""
    made(tmp_path / "whole", "checkpoint_every=2").fit()
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for left in ("student", "checkpoints/step_00000004"):
        shutil.rmtree(tmp_path / "stopped" / left)
    made(tmp_path / "stopped", "checkpoint_every=2", "resume=latest").fit()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    whole, stopped = ((tmp_path / name / "student" / "unet").glob("*.safetensors") for name in ("whole", "stopped"))
    assert [f.read_bytes() for f in whole] == [f.read_bytes() for f in stopped]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("more", [(), (LABELS, "objective.condition_scale=0.5")])
def test_what_is_stored_is_the_averaged_student(steps, more, tmp_path):
    trainer = made(tmp_path, *more, f"student.steps={steps}", "ema_decay=0.5")
    trainer.fit()
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(steps, 7, 1, 8, 8, generator=generator)
    labels = torch.arange(7) if more else None
    with trainer.ema.swapped(), torch.no_grad():
        student = trainer.objective.student
        expected = student.sample(z, None if labels is None else {"class_labels": labels})
        if labels is not None:
            assert not torch.equal(expected, student.sample(z, {"class_labels": labels + 1}))
    stored = load_student(tmp_path)
    if steps == 1:
        images = stored(latents=z[0], class_labels=labels, output_type="latent").images
        assert_close(images.clamp(-1, 1), expected, rtol=1e-5, atol=1e-6)  # of another layout of the weights
    assert stored.unet.config.num_classes == (10 if more else 0)
    assert len(trainer.objective.student.levels) == steps


def test_sigma_data_is_the_spread_of_the_data(tmp_path):
    x = to_unit(load_digits().pixels).double()
    student = made(tmp_path).objective.student
    assert student.denoiser.sigma_data == pytest.approx(float(x.std()), rel=1e-12)
    with torch.no_grad():  # EDM's preconditioning, the network 0: what is left of sigma_init z
        z = torch.randn(5, 1, 8, 8)
        left = student.denoiser.sigma_data**2 / (student.denoiser.sigma_data**2 + 4)
        assert_close(student(z), (2 * left * z).clamp(-1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [0, 10])
def test_features_of_a_network_of_ones_choice(known, tmp_path):
    """Its maps at x_t are compared, the class told where it knows one; it stays as it is, and no part of the student."""
    path = saved_network(tmp_path / "network", num_classes=known)
    trainer = made(tmp_path / "run", LABELS, f"objective.features={path}")
    trainer.fit()
    maps, network = trainer.objective.features, EDMPipeline.from_pretrained(path).unet
    for name, value in maps.denoiser.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name
    facts = json.loads((tmp_path / "run" / "student" / "student.json").read_text())
    assert facts["calls"] == {"features": 24 * (1 + 4), "student": 24}  # of each sample, and of its four of the data
    x_t, labels = torch.randn(3, 1, 8, 8), torch.tensor([4, 1, 7])
    level = maps.denoiser.schedule.level(torch.full((3,), 0.4))
    inputs, time = maps.denoiser.preconditioner.inputs(x_t, level)
    wanted = network.encode(inputs, time, labels if known else None).bottom
    assert_close(maps(x_t, level, {"class_labels": labels})[0], wanted, rtol=1e-5, atol=1e-5)
    made(tmp_path / "plain", LABELS).fit()
    assert losses(tmp_path / "run") != losses(tmp_path / "plain")


def test_beside_a_teacher_another_network_can_be_named(tmp_path):
    """A student of an EDM teacher, its own maps or another network's: of the same network they are the same run."""
    teacher, other = saved_network(tmp_path / "teacher"), saved_network(tmp_path / "other", num_classes=0)
    of_teacher = [f"teacher={{path: {teacher}}}", "student.network=null"]
    for name, features in (("own", "true"), ("named", other), ("none", "false")):
        made(tmp_path / name, *of_teacher, f"objective.features={features}").fit()
    assert losses(tmp_path / "own") == losses(tmp_path / "named")
    assert losses(tmp_path / "own") != losses(tmp_path / "none")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"objective={{name: vardiu, levels: {LEVELS}, posterior: {{optimizer: {{lr: 1e-3}}}}}}"],
            "objective 'vardiu' follows the teacher's score: give teacher.path",
        ),
        (
            [f"objective={{name: diff_instruct, levels: {LEVELS}, fake_score: {{levels: {LEVELS}, optimizer: {{lr: 1e-3}}}}}}"],
            "objective 'diff_instruct' follows the teacher's score: give teacher.path",
        ),
        (["data=null"], "data: objective 'varflow' matches samples of data; add a data section"),
        (["data={name: captions, source: parquet, paths: [x]}"], "'captions' is for text-to-image teachers; a student"),
        (["student.network=null"], "student.network: a student from scratch has no network to copy; give one"),
        (["student.lora={rank: 2}"], "student.lora has no effect for a student from scratch; remove it"),
        (["teacher.dtype=bfloat16"], "teacher.dtype has no effect for a student from scratch; remove it"),
        (["teacher.guidance_scale=2.0"], "teacher.guidance_scale has no effect without an objective that follows"),
        (["objective.condition_scale=1.0"], "objective.condition_scale has no effect: the data have no labels"),
        (["objective.features=true"], "objective.features: a student from scratch has no teacher's network"),
        (["objective.features=nowhere"], "objective.features: no such folder 'nowhere'"),
    ],
)
def test_refused(overrides, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distill.main(["--config", RECIPE, f"output_dir={tmp_path / 'run'}", *overrides])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"size": 16}, "is of images of (1, 16, 16) (channels, height, width), the student's are (1, 8, 8)"),
        ({"num_classes": 10}, "knows 10 classes, the student 0"),
    ],
)
def test_features_of_other_images_are_refused(network, message, tmp_path, capsys):
    path = saved_network(tmp_path / "network", **network)
    with pytest.raises(SystemExit):
        distill.main(["--config", RECIPE, f"output_dir={tmp_path / 'run'}", *SMALL, f"objective.features={path}"])
    assert f"objective.features: the network in {path!r} {message}" in capsys.readouterr().err
