"""Distilling converted EDM teachers by the real command: adapters and whole copies, every objective and every preconditioning."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from torchvision.utils import save_image

from pipelines.common.config import load_config, validate
from pipelines.common.errors import UserError
from pipelines.edm import EDMPipeline
from pipelines.noise import EDMSchedule, add_noise
from pipelines.students import load_student
from trainers import distill
from trainers.config.level_range import sampler
from trainers.config.run import DistillConfig
from trainers.data.augment import augment
from trainers.engine import checkpoint
from trainers.engine.draws import DrawSource
from trainers.engine.ema import Ema, constant_decay
from trainers.families.edm import Family as EDMModels
from trainers.objectives.base import sample_level
from trainers.preview import preview

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerator")

ADAM = {"lr": 1e-3, "betas": [0.0, 0.99]}
LEVELS = {"name": "log_uniform", "low": 0.1, "high": 3.0}
LORA = {"rank": 3, "alpha": 5.0}
POSTERIOR = {"covariance": "learned", "warmup_updates": 0, "optimizer": ADAM}
OBJECTIVES = {
    "varflow": {"name": "varflow", "levels": LEVELS, "features": True},
    "diff_instruct": {
        "name": "diff_instruct",
        "levels": LEVELS,
        "fake_score": {"levels": LEVELS, "optimizer": ADAM, "lora": LORA, "augment": 0.5},
    },
    "sid": {"name": "sid", "levels": LEVELS, "fake_score": {"levels": LEVELS, "optimizer": ADAM, "lora": LORA}},
    "vardiu_shared": {"name": "vardiu", "levels": LEVELS, "posterior": POSTERIOR | {"network": "shared"}},
    "vardiu_adapter": {"name": "vardiu", "levels": LEVELS, "posterior": POSTERIOR | {"network": "adapter", "lora": LORA}},
    "vardiu_bound": {
        "name": "vardiu",
        "estimator": "bound",
        "levels": LEVELS,
        "posterior": POSTERIOR | {"network": {"channels": 8, "num_blocks": 1}},
    },
    "vardiu_copy": {"name": "vardiu", "levels": LEVELS, "posterior": POSTERIOR | {"network": "copy"}},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Seven classes of 16x16 images, two each."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for label in range(7):
        (folder / f"class_{label}").mkdir()
        for i in range(2):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"class_{label}" / f"{i}.png")
    return folder


@pytest.fixture
def configure(tmp_path, converted, pictures):
    """configure(objective, case, lora, **more): the path of a configuration of 20 steps."""

    def make(objective: str, case: str = "edm_ncsnpp", lora: bool = True, **more) -> Path:
        config = {
            "output_dir": str(tmp_path / "run"),
            "teacher": {"path": str(converted(case))},
            "student": {"optimizer": ADAM, "lora": LORA if lora else None},
            "objective": copy.deepcopy(OBJECTIVES[objective]),
            "steps": 20,
            "batch_size": 4,
            "ema_decay": 0.5,
            "num_samples": 8,
            "sample_every": 20,
            "checkpoint_every": 20,
        }
        if objective == "varflow":
            config["data"] = {"name": "folder", "path": str(pictures), "image_size": 16, "labels": case == "edm_ncsnpp"}
        if case not in ("edm_ncsnpp", "edm_ddpmpp", "edm_adm") and objective == "diff_instruct":
            config["objective"]["fake_score"]["augment"] = 0.0
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config | more))
        return file

    return make


def one_step(pipe: EDMPipeline, z: torch.Tensor, labels) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(len(z), labels, latents=z, output_type="pt").images


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.slow
def test_lora_student(objective, configure, converted, tmp_path):
    """20 steps: the file holds the adapter alone; loaded, in this process and a fresh one, it is bit for bit the trainer's."""
    file = configure(objective)
    distill.main(["--config", str(file)])
    student, teacher = tmp_path / "run" / "student", converted("edm_ncsnpp")
    assert sorted(p.name for p in student.iterdir()) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
        "scheduler",
        "student.json",
    ]
    held = load_file(student / "pytorch_lora_weights.safetensors")
    base = EDMPipeline.from_pretrained(teacher)
    assert all(key.startswith("unet.") and ".lora_" in key for key in held)
    assert sum(v.numel() for v in held.values()) < sum(p.numel() for p in base.unet.parameters())
    assert max(v.abs().max() for k, v in held.items() if "lora_B" in k) > 1e-4  # it has learned something

    # the trainer's own student, with the averaged weights of its last checkpoint
    models = EDMModels(load_config(DistillConfig, str(file), []))
    if objective in ("diff_instruct", "sid", "vardiu_adapter"):
        o = models.config.objective
        # a second adapter changes nothing
        _ = models.posterior(o.posterior, True) if objective == "vardiu_adapter" else models.fake_score(o.fake_score)
    models.student.to(memory_format=torch.channels_last)
    ema, (tensors, _) = (
        Ema(models.student, constant_decay(0.5)),
        checkpoint.load(tmp_path / "run" / "checkpoints" / "step_00000020"),
    )
    checkpoint.restore_tensors(ema.average, tensors["ema"], "checkpoint")
    z, labels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(9)), torch.tensor([0, 4, 6])
    with ema.swapped(), torch.no_grad():
        expected = models.student(z, {"class_labels": labels}) / 2 + 0.5
    base.load_lora_weights(student)
    images = one_step(base, z, labels)
    assert torch.equal(images, expected)
    assert base.scheduler.config.sampler == "renoise"
    assert torch.equal(one_step(load_student(student), z, labels), expected)

    if objective == "diff_instruct":
        script = "import sys, torch; from pipelines.edm import EDMPipeline\n"
        script += "torch.set_num_threads(1); p = EDMPipeline.from_pretrained(sys.argv[1]); p.load_lora_weights(sys.argv[2])\n"
        script += "z, labels, expected = torch.load(sys.argv[3], weights_only=True)\n"
        script += "sys.exit(not torch.equal(p(3, labels, latents=z, output_type='pt').images, expected))"
        torch.save((z, labels, expected), tmp_path / "expected.pt")
        done = subprocess.run([sys.executable, "-c", script, teacher, student, tmp_path / "expected.pt"], cwd=ROOT)
        assert done.returncode == 0
    save_image(preview(load_student(student), 8, 0), tmp_path / "again.png", nrow=3)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "run" / "samples" / "step_00000020.png").read_bytes()
    info = json.loads((student / "student.json").read_text())
    assert (info["weights"], info["readout_sigma"], info["base_model"]) == ("lora", 2.5, str(teacher))


@pytest.mark.parametrize("case", ["edm_ddpmpp", "vp_ddpmpp", "ve_ncsnpp", "edm_adm", "iddpm_adm"], scope="session")
@pytest.mark.parametrize("objective", ["diff_instruct", "vardiu_shared"])
@pytest.mark.slow
def test_every_preconditioning(case, objective, configure, converted, tmp_path):
    """Adapters on every family of networks learn and load; a frozen posterior or score starts as the teacher."""
    file = configure(objective, case, steps=2, batch_size=2, sample_every=None, checkpoint_every=None)
    distill.main(["--config", str(file)])
    pipe = load_student(tmp_path / "run")
    unet = pipe.unet.config
    z = torch.randn(2, unet.in_channels, unet.sample_size, unet.sample_size)
    labels = [0, 1] if unet.num_classes else None
    images = one_step(pipe, z, labels)
    teacher = EDMPipeline.from_pretrained(converted(case))
    level = pipe.scheduler.config.sigma_max
    assert not torch.equal(images, teacher(2, labels, latents=z, sigmas=[level], output_type="pt").images)
    assert abs(level - 2.5) < 0.01


@pytest.mark.parametrize("case", ["edm_ddpmpp", "vp_ddpmpp", "ve_ncsnpp", "edm_adm", "iddpm_adm"], scope="session")
@pytest.mark.slow
def test_roles_start_as_the_teacher(case, configure):
    """Student at its readout, fake score, the posterior's mean by every network made of the teacher's: all the same function."""
    for objective in ("diff_instruct", "vardiu_shared", "vardiu_adapter", "vardiu_copy"):
        models = EDMModels(load_config(DistillConfig, str(configure(objective, case)), []))
        shape = models.latent_shape
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        level = EDMSchedule().level(torch.tensor([0.3, 2.5]))
        condition = {"class_labels": torch.tensor([0, 1])} if models.num_classes else None
        with torch.no_grad():
            x0, features = models.teacher(x, level, condition, return_features=True)
            # at the one level of a student, whose pipeline knows no other
            student = models.student(x, condition) / 2 + 0.5
            assert torch.equal(one_step(models.pipeline, x, None if condition is None else condition["class_labels"]), student)
            if objective == "diff_instruct":
                other = models.fake_score(models.config.objective.fake_score).eval()(x, level, condition)
            else:
                posterior = models.posterior(models.config.objective.posterior, True)
                assert any("lora_" in n for n, _ in posterior.named_parameters()) == (objective == "vardiu_adapter")
                other = posterior(x, level, condition, features).x0_mean
        assert_close(other, x0, rtol=1e-5, atol=1e-5)


def test_full_student_is_a_pipeline_of_its_own(configure, converted, tmp_path):
    distill.main(["--config", str(configure("diff_instruct", "edm_ddpmpp", lora=False, steps=2, sample_every=None))])
    student = tmp_path / "run" / "student"
    assert (student / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    pipe = EDMPipeline.from_pretrained(student)
    z = torch.randn(2, 3, 16, 16)
    assert torch.equal(one_step(pipe, z, None), one_step(load_student(tmp_path / "run"), z, None))
    teacher = load_file(converted("edm_ddpmpp") / "unet" / "diffusion_pytorch_model.safetensors")
    with safe_open(student / "unet" / "diffusion_pytorch_model.safetensors", "pt") as held:
        assert set(held.keys()) == set(teacher)
        moved = [n for n in teacher if not torch.equal(held.get_tensor(n), teacher[n])]
    assert len(moved) > 0.9 * len(teacher)


@pytest.mark.parametrize("name", ["diff_instruct", "sid"])
def test_adapters_have_the_gradients_of_separate_copies(name, configure):
    """One frozen network under two adapters and none, against three deep copies, with checkpointing: student and score. SiD's
    gradient passes through teacher and fake score to the student.
    """
    file = configure(name)
    results = []
    for checkpointing in (False, True):
        config = load_config(DistillConfig, str(file), ["objective.fake_score.augment=0"])
        models = EDMModels(config)
        objective = config.objective.build(models, config.steps)
        generator = torch.Generator().manual_seed(3)
        for parameter in (p for net in objective.networks.values() for p in net.parameters()):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        if checkpointing:
            objective.student.denoiser.network.enable_gradient_checkpointing()
        else:  # the same roles on three networks of their own
            roles = [copy.deepcopy(role) for role in (objective.student, objective.teacher, objective.fake_score)]
            settings = (objective.levels, objective.fake_levels, objective.weighting, objective.fake_weighting)
            results.append(gradients(type(objective)(*roles, *settings), models))
        results.append(gradients(objective, models))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert max(float(g.abs().max()) for g in results[0]) > 1e-3


def gradients(objective, models) -> list[torch.Tensor]:
    draw = DrawSource(0, 3, models.latent_shape, torch.device("cpu"), models.examples).batch(("step", 1), 0.0)[0]
    found = []
    for phase in objective.phases:
        parameters = [p for role in phase.updates for p in objective.networks[role].parameters()]
        found += torch.autograd.grad(phase.loss(draw, None).loss.mean(), parameters)
    return found


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*_edm_*.yaml")), ids=lambda f: f.stem)
@pytest.mark.slow
def test_recipes_run_when_shrunk(recipe, converted, pictures, tmp_path):
    """The files as they are, on a small teacher of the same kind."""
    teacher = converted("edm_ncsnpp" if "imagenet" in recipe.stem else "edm_ddpmpp")
    small = [f"output_dir={tmp_path / 'run'}", f"teacher.path={teacher}", "steps=1", "batch_size=4", "num_samples=3"]
    small += ["micro_batch_size=2", "sample_every=1", "snapshot_every=null", "checkpoint_every=null", "student.lora.rank=2"]
    objective = yaml.safe_load(recipe.read_text())["objective"]["name"]
    if objective == "varflow":
        labels = "imagenet" in recipe.stem
        small.append(f"data={{name: folder, path: {pictures}, image_size: 16, labels: {labels}}}")
    if objective == "vardiu":
        small.append("objective.posterior.warmup_updates=1")
    distill.main(["--config", str(recipe), *small])
    pipe = load_student(tmp_path / "run")
    assert pipe.scheduler.config.sigma_max == yaml.safe_load(recipe.read_text())["student"]["sigma_init"]
    assert pipe(2, output_type="np").images.shape == (2, 16, 16, 3)


# Settings -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "case", "override", "match"),
    [
        ("varflow", "edm_ncsnpp", {"student": {"optimizer": ADAM, "sigma_init": 200.0}}, None),
        ("diff_instruct", "ve_ncsnpp", {"student": {"optimizer": ADAM, "sigma_init": 200.0}}, "sigma_init: 200 is outside"),
        ("diff_instruct", "edm_ddpmpp", {"student": {"optimizer": ADAM, "lora": {"targets": ["to_q"]}}}, "'to_q' fits no layer"),
        ("diff_instruct", "edm_ddpmpp", {"teacher": {"path": None, "dtype": "bfloat16"}}, "teacher.dtype has no effect"),
    ],
)
def test_settings(objective, case, override, match, configure, converted):
    raw = yaml.safe_load(configure(objective, case).read_text()) | override
    raw["teacher"]["path"] = str(converted(case))
    config = validate(DistillConfig, raw, "test")
    if match is None:
        assert EDMModels(config).facts["readout_sigma"] == 200.0
        return
    with pytest.raises(ValueError, match=match):
        EDMModels(config)


def test_augmentation_needs_labels_for_it(configure, converted):
    raw = yaml.safe_load(configure("diff_instruct", "vp_ddpmpp").read_text())
    raw["objective"]["fake_score"]["augment"] = 0.1
    models = EDMModels(validate(DistillConfig, raw, "test"))
    with pytest.raises(ValueError, match=r"fake_score.augment: the teacher has augment_dim=0, 9 are needed; set it to 0"):
        models.fake_score(models.config.objective.fake_score)


def test_only_the_fake_score_sees_augmented_samples(configure):
    """Its loss is that of changed samples and their labels; the student's does not know of them."""
    config = load_config(DistillConfig, str(configure("diff_instruct")), [])
    models = EDMModels(config)
    objective = config.objective.build(models, config.steps)
    draw = DrawSource(0, 4, models.latent_shape, torch.device("cpu"), models.examples).batch(("step", 1), 0.0)[0]
    with torch.no_grad():
        x0, labels = augment(models.student(draw.z, draw.condition), draw.normal("augment", 14), 0.5)
        t = objective.fake_levels(draw.u, 0.0)
        level = EDMSchedule().level(t)
        condition = draw.condition | {"augment_labels": labels}
        assert labels.abs().sum() > 0
        x0_hat = objective.fake_score(add_noise(x0, draw.eps, level), level, condition)
        assert_close(objective.fake_score_loss(draw).loss, objective.fake_loss(x0_hat, x0, level))
        plain = copy.copy(objective)
        plain.fake_augment = 0.0
        assert_close(plain.student_loss(draw).loss, objective.student_loss(draw).loss, rtol=0, atol=0)


# teacher, levels: what is said of them before anything is trained
LEVELS_REFUSED = {
    "ve above": ("ve_ncsnpp", {"name": "log_uniform", "low": 0.1, "high": 200.0}, "levels.high: 200 is outside the teacher's"),
    "vp below": ("vp_ddpmpp", {"name": "log_uniform", "low": 1e-4, "high": 10.0}, "levels.low: 0.0001 is outside the teacher's"),
    "timesteps": ("edm_ncsnpp", {"name": "uniform", "low": 20.0, "high": 980.0}, "levels: 94% of what uniform draws is outside"),
}


@pytest.mark.parametrize("name", LEVELS_REFUSED)
def test_levels_that_the_teacher_does_not_know(name, configure):
    case, levels, message = LEVELS_REFUSED[name]
    for section in ("levels", "fake_score"):
        raw = yaml.safe_load(configure("diff_instruct", case).read_text())
        (raw["objective"] if section == "levels" else raw["objective"]["fake_score"])["levels"] = levels
        with pytest.raises(UserError) as caught:
            EDMModels(DistillConfig.model_validate(raw))
        assert str(caught.value).startswith(f"objective.{'' if section == 'levels' else 'fake_score.'}{message}")


def test_an_iddpm_student_trains_at_levels_that_its_network_knows(configure):
    """Levels between two of iDDPM's are moved for x_t as they are for what the network is told."""
    config = load_config(DistillConfig, str(configure("vardiu_bound", "iddpm_adm")), [])
    teacher, u = EDMModels(config).teacher, (torch.arange(200) + 0.5) / 200
    level = sample_level(u, sampler(config.objective.levels, 20, teacher.schedule.t_range), 0.0, teacher.schedule)
    known = teacher.preconditioner.levels
    assert set(level.sigma.flatten().tolist()) <= set(known.tolist())
    told = teacher.preconditioner.inputs(torch.zeros(200, 1, 1, 1), level)[1]
    assert torch.equal(known[(999 - told).long()], level.sigma.flatten())


def test_a_readout_below_the_lowest_level_of_the_teachers_grid(configure):
    """Within what the network knows: the student's own grid is that one level."""
    raw = yaml.safe_load(configure("diff_instruct").read_text())
    raw["student"]["sigma_init"] = 0.001
    models = EDMModels(DistillConfig.model_validate(raw))
    assert models.pipeline.scheduler.sigmas(1).tolist() == [pytest.approx(0.001)]
