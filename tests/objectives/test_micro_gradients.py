"""Accumulated over micro-batches, every objective with every option has the gradient of the whole batch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.data.images import ImageSet
from pipelines.edm import EDMPipeline, EDMScheduler
from trainers import networks, train_teacher
from trainers.config.networks import Network
from trainers.config.run import DistillConfig, TeacherConfig
from trainers.data import examples as data_sets
from trainers.data.examples import Images
from trainers.distill import make_trainer
from trainers.objectives import CONFIGS

pytestmark = pytest.mark.usefixtures("fresh_accelerator", "one_thread")

B = 6
LEVELS = {"name": "log_uniform", "low": 0.3, "high": 3.0}
ADAM = {"lr": 1e-3, "betas": [0.0, 0.99], "eps": 1e-4, "clip": None}
SECOND = {"optimizer": ADAM, "updates": 1, "warmup_updates": 1}


def vardiu(estimator: str, **options) -> dict:
    posterior = SECOND | {"network": options.pop("network", "shared"), "covariance": "learned"}
    return {"name": "vardiu", "estimator": estimator, "levels": LEVELS, "posterior": posterior} | options


def diff_instruct(**options) -> dict:
    return {"name": "diff_instruct", "levels": LEVELS, "fake_score": SECOND | {"levels": LEVELS}} | options


def varflow(**options) -> dict:
    return {"name": "varflow", "levels": LEVELS} | options


CASES = {
    "varflow paired": varflow(),
    "varflow joint grids": varflow(cross="full", condition_scale=0.7, grids=[1, 2], weighting="dmd"),
    "varflow features": varflow(features=True),
    "varflow drift": varflow(kernel="drift", temperatures=[0.1, 0.5], grids=[1, 2], features=True, weighting="dmd"),
    "varflow drift joint more data": varflow(kernel="drift", condition_scale=0.7, data_per_sample=2),
    "varflow more data": varflow(cross="full", condition_scale=0.7, features=True, data_per_sample=3),
    "varflow several samples": varflow(samples_per_condition=2),
    "diff_instruct": diff_instruct(weighting="dmd"),
    "diff_instruct joint": diff_instruct(joint=True, fake_score=SECOND | {"levels": LEVELS, "updates": 2}),
    "sid": diff_instruct(name="sid", alpha=0.7, fake_score=SECOND | {"levels": LEVELS}),
    "bound": vardiu("bound"),
    "bound alone": vardiu("bound", antithetic=False, control_variate=False, network="copy"),
    "multi_sample pairs": vardiu("multi_sample", num_samples=2),
    "multi_sample batch": {"name": "vardiu", "estimator": "multi_sample", "proposals": "batch", "levels": LEVELS},
    "resampled": vardiu("resampled_score", num_samples=4, target_ess=2.0),
    "resampled moves": vardiu("resampled_score", num_samples=2, moves=1, antithetic=False, ess_levels=True),
    "amortized": vardiu("amortized_score", noise_draws=3),
    "amortized dmd": vardiu("amortized_score", weighting="dmd", regression_weighting="snr"),
    "amortized proposals": vardiu("amortized_score", num_samples=2),
    "amortized own": vardiu("amortized_score", pool="own"),
}
PER_MICRO_BATCH = ("x0_std", "x0_gap")  # spreads of the samples that are at hand: no loss depends on them


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A class-conditional network of 2x6x6 images whose weights are all random: none of its zeros hides anything."""
    shape = {"in_channels": 2, "out_channels": 2, "num_classes": 3}
    unet = networks.build_unet(Network(channels=8, num_blocks=1), 0, "teacher", 6, **shape)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("teacher")
    EDMPipeline(unet, EDMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def images(monkeypatch) -> None:
    """What a `data` section names: eleven images of three classes."""
    pixels = torch.randint(0, 256, (11, 2, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Images(ImageSet(pixels, torch.arange(11) % 3, ("a", "b", "c")))
    monkeypatch.setattr(data_sets, "load_data", lambda section: data)


def updates(objective: dict, teacher: Path, folder: Path, micro: int | None) -> tuple[list, list]:
    """(gradients at each optimiser's step, values of each update) of the warm-up and one step."""
    config = {
        "output_dir": str(folder / str(micro)),
        "teacher": {"path": str(teacher)},
        "student": {"sigma_init": 2.0, "optimizer": ADAM},
        "objective": objective,
        "steps": 2,
        "batch_size": B,
        "micro_batch_size": micro,
    }
    if CONFIGS[objective["name"]].built.needs_data:
        config["data"] = {"name": "digits"}
    trainer, gradients = make_trainer(DistillConfig(**config)), []
    for role, optimizer in trainer.optimizers.items():
        mine = trainer.parameters[role]
        optimizer.register_step_pre_hook(lambda *_, mine=mine: gradients.append(torch.cat([p.grad.flatten() for p in mine])))
    phases = (*trainer.objective.warmup, *trainer.objective.phases)
    values = [trainer._update(phase, ("step", i, phase.name, 0)) for i, phase in enumerate(phases)]
    return gradients, values


def test_every_objective_has_a_case():
    """One that is not tried here may compute another loss on micro-batches, in silence."""
    assert {case["name"] for case in CASES.values()} == CONFIGS.keys()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_the_gradient_is_that_of_the_whole_batch(case, teacher, images, tmp_path):
    expected, whole = updates(CASES[case], teacher, tmp_path, None)
    assert all(float(g.abs().max()) > 1e-3 for g in expected)
    for micro in (3, 2, 1):
        gradients, values = updates(CASES[case], teacher, tmp_path, micro)
        for mine, theirs in zip(gradients, expected, strict=True):
            assert float((mine - theirs).norm()) < 1e-4 * float(theirs.norm())
        for mine, theirs in zip(values, whole, strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                if not name.endswith(PER_MICRO_BATCH):
                    assert value == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_a_teacher_too_but_for_its_dropout(images, tmp_path, fresh_accelerator):
    """Augmented data, dropped labels and all; each micro-batch has dropout masks of its own."""

    def weights(name: str, micro: int | None, dropout: float) -> torch.Tensor:
        network = {"architecture": "ddpmpp", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "dropout": dropout}
        config = {
            "output_dir": str(tmp_path / name),
            "data": {"name": "digits", "labels": True},
            "network": network | {"attention_resolutions": []},
            "levels": {"name": "log_normal"},
            "augment": 0.5,
            "label_dropout": 0.5,
            "optimizer": ADAM,
            "steps": 3,
            "batch_size": B,
            "micro_batch_size": micro,
            "ema_decay": 0.0,
            "num_samples": 2,
        }
        train_teacher.run(TeacherConfig(**config))
        saved = load_file(tmp_path / name / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
        return torch.cat([value.flatten() for value in saved.values()])

    whole = weights("whole", None, 0.0)
    for micro in (3, 1):
        assert float((weights(f"micro_{micro}", micro, 0.0) - whole).abs().max()) < 1e-5
    masked = weights("masked", None, 0.3)
    assert float((weights("masked_3", 3, 0.3) - masked).abs().max()) > 1e-4
    assert torch.equal(weights("again", None, 0.3), masked)
