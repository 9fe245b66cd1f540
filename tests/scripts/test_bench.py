"""The benchmarks' arithmetic and the memory that training may take."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from eval.report.figures import benchmark_chart
from pipelines.common.config import load_config
from pipelines.common.identity import weights_sha256
from pipelines.data.images import ImageSet
from pipelines.edm import EDMPipeline, EDMScheduler, PatchUNet
from pipelines.noise import EDMSchedule
from scripts.bench.covariances import log_density_of_data
from scripts.bench.digits import METHODS, SETTINGS, overrides, smoothed, summary
from scripts.bench.memory import PeakMemory, distillation, student_alone
from scripts.bench.parts.judge import Judge
from scripts.jobs import Job, PartError, kept, run_all
from trainers import train_teacher
from trainers.config.run import DistillConfig, TeacherConfig

SMALL = ["network={channels: 8, channel_mult: [1, 2, 4], num_blocks: 1}"]


def test_smoothing_takes_three_neighbours():
    assert smoothed([9.0, 3.0, 6.0, 0.0, 3.0]) == pytest.approx([9.0, 6.0, 6.0, 3.0, 3.0])


def test_summary_compares_with_the_baseline_in_time():
    def curve(seconds, values):
        return [{"seconds": s, "fd": v} for s, v in zip(seconds, values, strict=True)]

    curves = {
        # medians over the three seeds: 9, 6, 3, 3 at 10, 20, 30, 40 s; smoothed 9, 7.5, 6, 4
        "diff_instruct": {
            "0": curve((10, 20, 30, 40), (9, 6, 3, 3)),
            "1": curve((9, 19, 29, 39), (9, 6, 3, 3)),
            "2": curve((11, 21, 31, 41), (90, 60, 30, 0)),
        },
        # smoothed: 9, 6, 4, 2, 1
        "vardiu": {s: curve((10, 14, 18, 30, 60), (9, 3, 0, 3, 0)) for s in "012"},
        "varflow": {s: curve((10, 20, 30, 40), (9, 9, 9, 9)) for s in "012"},
    }
    rows = summary(curves, "fd")
    assert rows["diff_instruct"] == {"seconds": 40, "final": 3, "at_baseline_time": 3, "seconds_to_baseline_best": 40}
    assert rows["vardiu"] == {"seconds": 60, "final": 0, "at_baseline_time": 3, "seconds_to_baseline_best": 18}
    assert rows["varflow"]["seconds_to_baseline_best"] is None
    only = summary({"varflow": curves["varflow"]}, "fd")
    assert only == {"varflow": {"seconds": 40, "final": 9}}


@pytest.mark.parametrize("data", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_run_of_the_benchmark_has_a_valid_configuration(data, method):
    config = METHODS[method].config
    given = overrides(SETTINGS[data], METHODS[method], 5, Path("some/teacher"))
    loaded = load_config(DistillConfig, str(config), given)
    recipe = load_config(DistillConfig, str(config), [])
    scale = SETTINGS[data].scale
    assert (loaded.seed, loaded.teacher.path) == (5, "some/teacher")
    assert loaded.student.sigma_init == pytest.approx(scale * recipe.student.sigma_init)
    for end in ("low", "high"):
        wanted = scale * getattr(recipe.objective.levels, end)
        assert getattr(loaded.objective.levels, end) == pytest.approx(wanted)
    teacher = load_config(TeacherConfig, "configs/digits_teacher.yaml", [f"data={SETTINGS[data].data}", *SETTINGS[data].teacher])
    assert loaded.data is None or loaded.data == teacher.data


def test_a_finished_job_is_not_run_again(tmp_path):
    job = Job("vardiu 0", Path("configs/digits_vardiu.yaml"), tmp_path / "run", ["steps=7"])
    assert job.steps == 7
    assert not job.is_done
    (tmp_path / "run" / "student").mkdir(parents=True)
    settings = load_config(DistillConfig, "configs/digits_vardiu.yaml", ["steps=7", f"output_dir={tmp_path / 'run'}"])
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    for steps, done in ((6, False), (7, True)):
        (tmp_path / "run" / "student" / "student.json").write_text(json.dumps({"steps": steps}))
        assert job.is_done is done
    for override in ("student.optimizer.lr=1.0e-5", "seed=3", "teacher.path=elsewhere", "objective.num_samples=9"):
        assert not Job("vardiu 0", Path("configs/digits_vardiu.yaml"), tmp_path / "run", ["steps=7", override]).is_done
    config = Path("configs/digits_vardiu.yaml")
    assert Job("x", config, tmp_path, []).steps == load_config(DistillConfig, str(config), []).steps


def test_a_job_is_run_again_when_its_teacher_has_changed(tmp_path):
    """The same path, other weights: the student is of a teacher that is gone."""
    shape = {"in_channels": 1, "out_channels": 1, "channels": 8, "channel_mult": (1,), "num_blocks": 1}
    pipeline = EDMPipeline(PatchUNet(sample_size=8, **shape), EDMScheduler())
    pipeline.save_pretrained(tmp_path / "teacher")
    given = ["steps=7", f"teacher.path={tmp_path / 'teacher'}"]
    job = Job("vardiu 0", Path("configs/digits_vardiu.yaml"), tmp_path / "run", given)
    (tmp_path / "run" / "student").mkdir(parents=True)
    settings = load_config(DistillConfig, "configs/digits_vardiu.yaml", [*given, f"output_dir={tmp_path / 'run'}"])
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    facts = {"steps": 7, "base_weights": weights_sha256({"unet": pipeline.unet})}
    (tmp_path / "run" / "student" / "student.json").write_text(json.dumps(facts))
    assert job.is_done
    with torch.no_grad():
        next(pipeline.unet.parameters()).view(-1)[0] += 1e-3
    pipeline.save_pretrained(tmp_path / "teacher")
    assert not job.is_done


def test_what_is_kept_is_made_again_where_it_depends_on_something_else(tmp_path):
    made = []

    def found(identity: dict) -> int:
        return kept(tmp_path / "kept.json", identity, lambda: made.append(identity) or len(made))

    assert [found({"images": 5}), found({"images": 5}), found({"images": 6}), found({"images": 6})] == [1, 1, 2, 2]
    (tmp_path / "kept.json").write_text('{"fd": 3.0}')  # as earlier versions kept them
    assert found({"images": 6}) == 3


@pytest.mark.slow
def test_a_judge_is_trained_again_on_other_images(tmp_path):
    file = tmp_path / "judge.safetensors"
    pixels = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 10
    first = Judge(ImageSet(pixels, labels), file, steps=1).net.state_dict()
    again = Judge(ImageSet(pixels, labels), file, steps=1).net.state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    for other, steps in (
        (ImageSet(pixels.flip(0), labels), 1),
        (ImageSet(pixels, labels.flip(0)), 1),
        (ImageSet(pixels, labels), 2),
    ):
        changed = Judge(other, file, steps).net.state_dict()
        assert not all(torch.equal(first[k], changed[k]) for k in first)


@pytest.mark.slow
def test_a_run_that_fails_ends_all_or_itself(tmp_path):
    """The good run writes its file when the bad one has failed: it is stopped, or comes to its end."""

    def jobs(folder: Path) -> list[Job]:
        made = [Job(name, Path("x.yaml"), folder / name, ["steps=1"]) for name in ("bad", "good")]
        wait = f"import time; time.sleep(2); open({str(folder / 'written')!r}, 'w')"
        made[0].command, made[1].command = [sys.executable, "-c", "raise SystemExit('diverged')"], [sys.executable, "-c", wait]
        return made

    with pytest.raises(PartError, match=r"bad failed with exit status 1(.|\n)*diverged"):
        run_all(jobs(tmp_path / "strict"), 2, threads=1)
    assert not (tmp_path / "strict" / "written").exists()
    failed = run_all(jobs(tmp_path / "tolerant"), 2, threads=1, keep_going=True)
    assert list(failed) == ["bad"]
    assert "diverged" in failed["bad"]
    assert (tmp_path / "tolerant" / "written").exists()


def test_benchmark_chart_draws_every_method_over_both_axes():
    points = [{"seconds": 1.0 + i, "calls": 10.0 * (1 + i), "fd": 3.0 - i, "energy_distance": -0.1} for i in range(3)]
    figure = benchmark_chart(
        {"a": {"0": points, "1": points}, "b": {"0": points}}, {"fd": "FD", "energy_distance": "energy"}, {"fd": 0.5}
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["FD", "FD", "energy", "energy"]
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 2, 2]  # the floor is known of one key
    assert figure.axes[1].lines[0].get_xdata().tolist() == [10.0, 20.0, 30.0]
    assert min(figure.axes[2].lines[0].get_ydata()) > 0  # an unbiased distance may be below zero, a logarithm not


def test_density_of_the_data_is_the_mixture_around_them(randn):
    x_t, data = randn(5, 2, 3, 1), randn(7, 2, 3, 1)
    level = EDMSchedule().level(torch.tensor([0.3, 0.5, 0.7, 1.1, 1.3], dtype=torch.float64))
    mixtures = []
    for x, sigma in zip(x_t, level.t, strict=True):
        normal = torch.distributions.Normal(data.flatten(1), sigma)
        mixtures.append(normal.log_prob(x.flatten()).sum(1).logsumexp(0) - torch.tensor(7.0, dtype=torch.float64).log())
    torch.testing.assert_close(log_density_of_data(x_t, level, data), torch.stack(mixtures), rtol=1e-6, atol=1e-6)


def test_peak_memory_counts_what_is_alive_at_a_time():
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100)  # the same storage
        c = torch.ones(500)
        del a, b
        d = torch.ones(700)
    assert (memory.peak, memory.now) == (4 * 1500, 4 * 1200)
    del c, d
    with PeakMemory() as memory:  # what autograd keeps for the backward pass counts too
        x = torch.ones(1000, requires_grad=True)
        loss = x.exp().exp().sum()
        assert memory.now >= 4 * 3000
        del loss
        assert memory.now == 4 * 1000


@pytest.mark.slow
def test_memory_of_the_recipe_and_of_many_proposals(tmp_path):
    """At most 1.6 times of training the student alone; K costs the K images (and their latents), not K activations."""
    batch = 32
    config = load_config(TeacherConfig, "configs/digits_teacher.yaml", [f"output_dir={tmp_path}/teacher", "steps=1", *SMALL])
    train_teacher.run(config)

    def peak(name: str, *overrides: str) -> int:
        folder = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        return distillation(name, folder, batch, tmp_path / "teacher", list(overrides))

    alone = student_alone(tmp_path / "alone", batch, SMALL)
    recipe = peak("vardiu")
    assert recipe <= 1.6 * alone
    assert peak("vardiu", "objective.noise_draws=5") <= 1.02 * recipe
    image = 4 * batch * 64
    for name in ("vardiu_multi_sample", "vardiu_resampled"):
        few, many = (peak(name, f"objective.num_samples={k}") for k in (2, 14))
        assert many - few <= 12 * 12 * image  # twelve more proposals: noise, z, x0, residuals, and their gradients
        assert many - few < 0.2 * alone  # where twelve more graphs would be many times of it
