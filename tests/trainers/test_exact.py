"""Exact and learned teachers of points, by the real commands: mixtures, data sets, what is stored and loaded, what is refused."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.testing import assert_close

from eval.studies.points import numbers as points
from pipelines.analytic import EmpiricalPosterior, forty_modes, make_mixture
from pipelines.common.config import load_config
from pipelines.data.images import load_digits, to_unit
from pipelines.edm import EDMPipeline
from pipelines.noise import add_noise
from pipelines.students import load_student
from trainers import distill, train_teacher
from trainers.config.run import DistillConfig
from trainers.objectives.importance import log_standard_normal
from trainers.preview import scatter

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(f for f in (ROOT / "configs").glob("mog40_*.yaml") if f.stem != "mog40_teacher")
THREE = "data={name: mixture, means: [[0, 0], [9, 1], [-3, 8]], std: 0.7, weights: [1, 2, 5]}"
SMALL = ["steps=3", "batch_size=6", "sample_every=2", "log_every=1", "checkpoint_every=null"]
TINY = "{width: 13, layers: 3}"

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerator")


def recipe(stem: str) -> str:
    return str(ROOT / "configs" / f"{stem}.yaml")


def made(stem: str, folder: Path, *more: str):
    """The trainer of a recipe with overrides, not started."""
    return distill.make_trainer(load_config(DistillConfig, recipe(stem), [f"output_dir={folder}", *more]))


def run(stem: str, folder: Path, *more: str) -> EDMPipeline:
    distill.main(["--config", recipe(stem), f"output_dir={folder}", *more])
    pipeline = load_student(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: EDMPipeline, n: int = 5, seed: int = 0) -> Tensor:
    return pipeline(n, generator=torch.Generator().manual_seed(seed), output_type="latent").images


# What a run is made of -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
@pytest.mark.slow
def test_recipes_run(file, tmp_path):
    """Whole, but for their length: a student of points, and a picture of them."""
    more = ["objective.posterior.warmup_updates=1"] if "vardiu" in file.stem else []
    student = run(file.stem, tmp_path / "run", *SMALL, *more)
    assert drawn(student).shape == (5, 2, 1, 1)
    assert (tmp_path / "run" / "samples" / "step_00000002.png").is_file()
    facts = json.loads((tmp_path / "run" / "student" / "student.json").read_text())
    assert facts["base_model"] == "exact density"


def test_the_card_loads_it(tmp_path, monkeypatch):
    run("mog40_vardiu", tmp_path / "run", *SMALL)
    monkeypatch.chdir(tmp_path / "run")
    names: dict = {}
    exec(re.search("```python\n(.*?)```", Path("student/README.md").read_text(), re.DOTALL)[1], names)
    assert names["points"].shape == (10_000, 2)


def test_the_teacher_is_the_mixture(tmp_path):
    """Any dimension; its standard deviation is the networks' sigma_data."""
    assert torch.equal(made("mog40_vardiu", tmp_path).objective.teacher.network.means, forty_modes().double())
    trainer = made("mog40_vardiu", tmp_path, "data={name: mixture, means: [[0, 0, 3], [9, 1, 1]], std: [0.5, 2.0]}")
    law = trainer.objective.teacher.network
    x = law.sample(200_000, torch.Generator().manual_seed(0))
    assert x.shape == (200_000, 3, 1, 1)
    centred = x - x.mean(0)
    assert trainer.objective.teacher.sigma_data == pytest.approx(centred.square().mean().sqrt().item(), rel=5e-3)
    assert law.variances.tolist() == pytest.approx([0.25, 4.0])
    assert law.log_weights.exp().tolist() == pytest.approx([0.5, 0.5])


def test_a_student_starts_as_half_the_data(tmp_path):
    """EDM's preconditioning at sigma_data, the network 0: x0 = sigma_data z / 2. With `sample` it is the network alone."""
    trainer = made("mog40_vardiu", tmp_path)
    z = torch.randn(7, 2, 1, 1)
    assert_close(trainer.objective.student(z), trainer.objective.teacher.sigma_data * z / 2, rtol=1e-5, atol=1e-5)
    plain = made("mog40_vardiu_paper", tmp_path).objective.student
    network = plain.denoiser.network
    torch.nn.init.normal_(network.conv_out.weight)
    assert_close(plain(z), network(z, torch.ones(7)).sample, rtol=0, atol=0)


@pytest.mark.parametrize("preconditioning", ["edm", "sample"])
def test_what_is_stored_is_the_averaged_student(preconditioning, tmp_path):
    """A stock pipeline of the folder gives the trainer's EMA student, bit for bit, and so does a run that was interrupted."""
    more = ["steps=6", "batch_size=6", "log_every=2", "checkpoint_every=3", "sample_every=null", f"student.network={TINY}"]
    more += [f"student.preconditioning={preconditioning}", "student.sigma_init=3.0", "ema_decay=0.5"]
    trainer = made("mog40_vardiu", tmp_path / "whole", *more)
    trainer.fit()
    z = torch.randn(7, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    with trainer.ema.swapped(), torch.no_grad():
        expected = trainer.objective.student(z)
    stored = load_student(tmp_path / "whole")
    assert torch.equal(stored(latents=z, output_type="latent").images, expected)
    halfway = tmp_path / "whole" / "checkpoints" / "step_00000003"
    again = run("mog40_vardiu", tmp_path / "again", *more, f"resume={halfway}")
    assert torch.equal(again(latents=z, output_type="latent").images, expected)


def test_images_as_their_own_teacher(tmp_path):
    """exact: samples, of digits: the teacher is their empirical posterior, the student an image pipeline."""
    net = "{channels: 8, num_blocks: 1}"
    more = ["teacher.exact=samples", "data={name: digits}", f"student.network={net}", f"objective.posterior.network={net}"]
    trainer = made("mog40_vardiu", tmp_path, *more)
    x = to_unit(load_digits().pixels)
    assert trainer.objective.teacher.sigma_data == pytest.approx(float(x.std()))
    level = points.NO_NOISE.level(torch.full((3,), 0.5))
    x_t = add_noise(x[:3], torch.randn(3, 1, 8, 8), level)
    assert_close(trainer.objective.teacher(x_t, level), EmpiricalPosterior(x, points.NO_NOISE)(x_t, level.t), rtol=0, atol=0)
    student = run("mog40_vardiu", tmp_path / "run", *SMALL, *more)
    images = student(2, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert 0 <= images.min() <= images.max() <= 1


# A learned teacher -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    small = ["steps=4", "batch_size=6", "log_every=1", "sample_every=2", "network={width: 13}", "checkpoint_every=null"]
    train_teacher.main(["--config", recipe("mog40_teacher"), f"output_dir={folder}", *small, "data.num_samples=50"])
    return folder


def test_a_learned_teacher_is_a_pipeline_of_points(learned):
    pipeline = EDMPipeline.from_pretrained(learned / "teacher")
    assert drawn(pipeline, 3).shape == (3, 2, 1, 1)
    assert pipeline.scheduler.config.sigma_data == pytest.approx(23.08)
    assert (learned / "samples" / "step_00000002.png").is_file()


@pytest.mark.parametrize("posterior", ["shared", "copy", TINY])
@pytest.mark.parametrize("lora", [None, "{rank: 2}"])
def test_distilling_it(posterior, lora, learned, tmp_path):
    """Whole copies and LoRA students, posteriors on its features, copied, and new."""
    more = ["data=null", "student.network=null", "student.sigma_init=40", f"objective.posterior.network={posterior}"]
    more += [f"teacher={{path: {learned}}}"] + ([f"student.lora={lora}"] if lora else [])
    student = run("mog40_vardiu", tmp_path / "run", *SMALL, *more)
    x = drawn(student)
    assert x.abs().max() > 1  # no image, not clamped
    teacher = EDMPipeline.from_pretrained(learned / "teacher")
    denoiser, z = teacher.denoiser(), torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    start = denoiser(40 * z, denoiser.schedule.level(torch.full((5,), 40.0)))
    assert_close(x, start, rtol=0.1, atol=0.5)  # after three steps it is near where it started: the teacher


def test_diff_instruct_from_it(learned, tmp_path):
    more = ["data=null", "student.network=null", "student.sigma_init=40", "objective.fake_score.network=null"]
    run("mog40_diff_instruct", tmp_path / "run", *SMALL, *more, f"teacher={{path: {learned}}}")


# Learning --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stem", "share"), [("mog40_vardiu", 0.15), ("mog40_vardiu_gaussian", 0.4)])
@pytest.mark.slow
def test_learns_three_modes(stem, share, tmp_path):
    """A few hundred updates of small networks: from one Gaussian to three islands, by every measure that is not blind.

    What is left of the distance after so few: the bound's posterior is a Gaussian, and so is slower.
    """
    nets = ["student.network={width: 48, frequencies: 3}", "objective.posterior.network={width: 48, frequencies: 3}"]
    more = ["steps=400", "batch_size=128", "log_every=100", "sample_every=null", "objective.levels.high=5.0", *nets]
    student = run(stem, tmp_path, THREE, *more)
    law = make_mixture([[0, 0], [9, 1], [-3, 8]], 0.7, [1, 2, 5])
    before = points.evaluate(law.std / 2 * torch.randn(3000, 2, generator=torch.Generator().manual_seed(0)), law)
    after = points.evaluate(drawn(student, 3000).flatten(1), law)
    assert after["mmd_unbiased"] < share * before["mmd_unbiased"]
    assert after["energy"] < share * before["energy"]
    assert after["in_mode"] > 1.5 * before["in_mode"]
    assert after["modes"] == 3


def test_the_bound_is_one(tmp_path):
    """Never below the diffusive KL, whatever q is: as the prior, and with weights that mean nothing."""
    objective = made("mog40_vardiu_gaussian", tmp_path, THREE, "objective.posterior.covariance=nsf").objective
    law, target = points.Pushforward(objective.student, 2, per_axis=150), objective.teacher.network
    n, generator = 500, torch.Generator().manual_seed(0)
    for spoiled in (False, True):
        if spoiled:
            for parameter in objective.posterior.parameters():
                parameter.data.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        for sigma in (1.0, 4.0):
            z, eps = (torch.randn(n, 2, 1, 1, generator=generator) for _ in range(2))
            level = points.NO_NOISE.level(torch.full((n,), sigma))
            with torch.no_grad():
                x_t = add_noise(objective.student(z), eps, level)
                log_q = objective.posterior(x_t, level, z=z[:, None]).log_q[:, 0]
            log_joint = log_standard_normal(z.flatten(1)) + log_standard_normal(eps.flatten(1)) - 2 * math.log(sigma)
            gap = log_joint - log_q - target.log_density(x_t, level) - law.diffusive_kl(x_t, target, sigma)
            assert gap.mean() > -4 * gap.std() / math.sqrt(n)
            assert gap.mean() > 0.1  # neither is the posterior, and it shows


def test_scatter_shows_where_points_are():
    """Upwards is up; outside three spreads nothing is shown; the fullest pixel is black."""
    picture = scatter(torch.tensor([[29.0, 29.0], [29.0, 29.0], [-29.0, 0.0], [31.0, 0.0]]), spread=10.0, side=6)
    assert picture.shape == (1, 1, 6, 6)
    dark = {(i, j): 1 - picture[0, 0, i, j].item() for i in range(6) for j in range(6) if picture[0, 0, i, j] < 1}
    assert dark == pytest.approx({(0, 5): 1.0, (2, 0): math.log(2) / math.log(3)})
    assert (scatter(torch.full((3, 1), 99.0), 1.0) == 1).all()


# Refusals --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher={path: x, exact: density}"], "teacher: path, exact: give one of them"),
        (["teacher={}"], "objective 'vardiu' follows the teacher's score: give teacher.path"),
        (["data=null"], "data: an exact teacher is that of a mixture or of an image set; add one"),
        (["data={name: digits}"], "teacher.exact: the density of 'digits' is unknown; use exact=samples"),
        (["teacher.exact=samples", "data={name: digits, labels: true}"], "an exact teacher is unconditional; remove the labels"),
        (["student.network=null"], "student.network: an exact teacher has no network to copy; give one"),
        (["student.network={channels: 8}"], "network: Network does not fit data of 1x1 pixels"),
        (["objective.posterior.network=shared"], "objective.posterior.network: 'shared' builds on a teacher's network"),
        (["student.lora={rank: 2}"], "student.lora has no effect for an exact teacher; remove it"),
        (["teacher.guidance_scale=2.0"], "teacher.guidance_scale has no effect for an exact teacher; remove it"),
        (["student.image_range=true"], "student.image_range has no effect for an exact teacher; remove it"),
        (["student.network.layers=1"], "student.network.layers: Input should be greater than or equal to 2"),
        (["data.means=[[1, 2]]"], "data: means, std: give both or, for the forty modes, neither"),
        (["data.weights=[1]"], "data: weights: the forty modes are equally likely; remove it"),
        (["data={name: mixture, means: [[1, 2], [3]], std: 1}"], "means must be points of equally many dimensions"),
        (["data={name: mixture, means: [[1], [3]], std: [1]}"], "std has 1 numbers for 2 means; give one for each"),
        (["data={name: mixture, means: [[1], [3]], std: -1}"], "data.std"),
    ],
)
def test_refused(overrides, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distill.main(["--config", recipe("mog40_vardiu"), f"output_dir={tmp_path / 'run'}", *overrides])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_learned_teachers_refuse_what_they_would_ignore(learned, tmp_path, capsys):
    base = ["--config", recipe("mog40_vardiu"), f"output_dir={tmp_path / 'run'}", f"teacher={{path: {learned}}}", "data=null"]
    for given, message in (
        ([], "student.network has no effect for an EDM teacher; remove it"),
        (["student.network=null", "student.preconditioning=edm"], "student.preconditioning has no effect for an EDM teacher"),
        (["student.network=null", "student.image_range=true"], "student.image_range has no effect for a teacher of points"),
    ):
        with pytest.raises(SystemExit):
            distill.main([*base, *given])
        assert message in capsys.readouterr().err


def test_every_recipe_is_here():
    names = {yaml.safe_load(f.read_text())["objective"]["name"] for f in RECIPES}
    assert names >= {"vardiu", "diff_instruct"}
