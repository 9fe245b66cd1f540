"""The page of a run and what it needs: numbers of pictures, the sampler of the teacher, report.html while a real run goes on."""

import json
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

from eval.report.run_page import averaged, best_snapshot, page, read_run, thinned, write_page
from pipelines.denoiser import Denoiser
from pipelines.noise import EDMSchedule, VPSchedule
from trainers import distill
from trainers.engine.pictures import TEACHER_STEPS, picture_numbers, sample_teacher, sampling_times

pytestmark = pytest.mark.usefixtures("fresh_accelerator", "one_thread")

CONFIG = {
    "teacher": {"exact": "samples"},
    "data": {"name": "digits"},
    "student": {"network": {"channels": 8, "num_blocks": 1, "patch_size": 2}, "optimizer": {"lr": 1e-3}},
    "objective": {"name": "varflow", "levels": {"name": "log_uniform", "low": 0.3, "high": 3.0}},
    "steps": 6,
    "batch_size": 6,
    "log_every": 1,
    "num_samples": 9,
    "checkpoint_every": 3,
}


def train(folder: Path, **more) -> Path:
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(CONFIG | {"output_dir": str(folder)} | more))
    distill.main(["--config", str(file)])
    return folder


# Numbers ----------------------------------------------------------------------------------------------------------------------


def test_numbers_of_pictures_in_closed_form():
    pictures = torch.tensor([0.0, 0.001, 0.25, 0.75, 0.999, 1.0]).view(2, 3, 1, 1)  # .001 and .999 are black and full in 8 bits
    alike = torch.tensor([[0.1, 0.1], [0.4, 0.5], [0.1, 0.1]]).view(3, 1, 1, 2)
    numbers = picture_numbers(pictures, alike)
    assert numbers["saturation"] == pytest.approx(4 / 6)
    assert numbers["spread"] == pytest.approx(float(pictures.std()), rel=1e-6)
    one_pair = ((0.3**2 + 0.4**2) / 2) ** 0.5
    assert numbers["diversity"] == pytest.approx(one_pair * 2 / 3, rel=1e-6)  # two pairs of three differ


class Gaussian(torch.nn.Module):
    """E[x0 | x_t] of x0 ~ N(0, s^2), exactly."""

    def __init__(self, schedule, s: float) -> None:
        super().__init__()
        self.schedule, self.s = schedule, s

    def forward(self, x_t, time):
        level = self.schedule.level(time)
        alpha, var = level.alpha, self.s**2
        return alpha * var / (alpha.square() * var + level.sigma.square()) * x_t


@pytest.mark.parametrize(
    ("schedule", "low", "high"),
    [
        (EDMSchedule(), 0.002, 80.0),
        (VPSchedule(torch.linspace(0.9999, 0.004, 1000, dtype=torch.float64)), 0.0, 999.0),
    ],
)
def test_teacher_is_sampled_along_its_own_ode(schedule, low, high, generator):
    """DDIM of an exact Gaussian score is x0 = s z, up to the step size, of every picture; times descend from `high`."""
    s, z = 0.5, torch.randn(3, 2, 5, 7, generator=generator, dtype=torch.float64)
    teacher = Denoiser(Gaussian(schedule, s), schedule, "sample", s)
    times = sampling_times(schedule, low, high, 400).double()
    assert float(times[0]) == pytest.approx(high)
    assert (times.diff() < 0).all()
    assert float(times[-1]) >= low - 1e-9
    assert_close(sample_teacher(teacher, z, None, times), s * z, rtol=0.05, atol=0.02)


# A real run -------------------------------------------------------------------------------------------------------------------


def test_a_run_draws_its_page_and_its_numbers_stay(tmp_path, capsys):
    """Pictures take part in no random draw; a run that is stopped and resumed ends with the same numbers of them; a page that
    cannot be written ends no run.
    """
    plain = train(tmp_path / "plain")
    assert not (plain / "report.html").exists()
    seen = train(tmp_path / "seen", sample_every=2)
    log = (seen / "metrics.jsonl").read_bytes()
    assert log == (plain / "metrics.jsonl").read_bytes()
    counted = [json.loads((run / "student" / "student.json").read_text())["calls"] for run in (plain, seen)]
    assert counted[0] == counted[1]

    rows = [json.loads(line) for line in (seen / "pictures.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    teacher = json.loads((seen / "samples" / "teacher.json").read_text())
    assert teacher.keys() - {"steps"} == rows[0].keys() - {"step"} == {"spread", "saturation", "diversity"}
    assert teacher["steps"] == TEACHER_STEPS
    assert 0.2 < teacher["saturation"] < 0.8  # digits have a black background
    timing = json.loads((seen / "timings.jsonl").read_text().splitlines()[-1])
    assert 50 < timing["peak_memory_mib"] < 50_000

    html = (seen / "report.html").read_text()
    assert "seen: step 6 of 6" in html
    assert "varflow, complete" in html
    assert "refresh" not in html  # nothing comes after it
    linked = set(re.findall(r'(?:src|href)="(?!data:)([^"]+)"', html))
    assert linked == {f"samples/{name}.png" for name in ("teacher", "step_00000002", "step_00000004", "step_00000006")}
    assert all((seen / name).is_file() for name in linked)
    assert "<script" not in html

    halves = train(tmp_path / "halves", steps=3, sample_every=2)
    capsys.readouterr()
    (halves / "report.html").unlink()
    (halves / "report.html").mkdir()  # where no file can be put
    train(halves, resume="latest", sample_every=2)
    said = capsys.readouterr().err
    assert said.count("report.html could not be drawn, the training goes on: WriteError: cannot write") == 1
    assert (halves / "pictures.jsonl").read_bytes() == (seen / "pictures.jsonl").read_bytes()
    assert (halves / "metrics.jsonl").read_bytes() == log


# The page of a folder -----------------------------------------------------------------------------------------------------------

HEALTH = [("information", 0.05, "raise <updates>", True)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A VarDiU run of 10 log lines that collapses after the sixth, measured, with hostile names."""
    run = tmp_path / "a <b> run"
    (run / "samples").mkdir(parents=True)
    config = {"objective": {"name": "vardiu", "estimator": "bound"}, "steps": 200, "batch_size": 4, "note": "<img src=x>"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"device": "cpu"}))
    (run / "history.jsonl").write_text(json.dumps({"time": "now", "step": 0, "changed": {"steps": [1, "<b>"]}}) + "\n")
    steps = range(10, 110, 10)
    fid = [90, 50, 30, 25, 20, 30, 40, 60, 80, 90]
    rows = [
        {
            "step": s,
            "joint/information": 1.0 if s <= 60 else 0.0,
            "posterior/information": 0.0,
            "evaluation/fid": f,
            "joint/loss": s,
        }
        for s, f in zip(steps, fid, strict=True)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11')  # a write that goes on
    (run / "timings.jsonl").write_text("".join(f'{{"step": {s}, "seconds": {s / 2}}}\n' for s in steps))
    for name in ("step_00000020", "step_00000100", "step_00000140", "abandoned_step_00000120", "step_x"):
        (run / "samples" / f"{name}.png").write_bytes(b"")
    for step in (40, 80):
        (run / "snapshots" / f"step_{step:08d}").mkdir(parents=True)
    return run


def test_page_says_what_went_wrong_and_which_snapshot_was_best(folder):
    write_page(folder, "training", 100, HEALTH)
    html = re.sub(r">\s+<", "><", (folder / "report.html").read_text())
    assert html.index("collapsed since step 70") < html.index("FID worse since step 50")  # the worst is the headline
    assert "Raise &lt;updates&gt;." in html
    assert 'href="snapshots/step_00000040">' in html
    assert "measured best: FID 25 (best FID: 20 at step 50, of which no snapshot is kept)" in html
    assert "Steps a second, of late</td><td>2<" in html
    assert "Images a second, of late</td><td>8<" in html
    assert "Still to come, at this speed</td><td>50 s<" in html
    assert 'http-equiv="refresh"' in html


def test_page_escapes_and_holds_nothing_from_outside(folder):
    write_page(folder, "stopped", 100, HEALTH)
    html = (folder / "report.html").read_text()
    assert "<b> run" not in html
    assert "<img src=x" not in html
    assert "steps: 1 -&gt; &lt;b&gt;" in html
    assert re.search(r'(src|href)="(https?:)?//', html) is None
    assert "@import" not in html
    assert "url(" not in re.sub(r'src="data:[^"]+"', "", html)


def test_page_shows_nothing_of_later_steps_or_of_a_branch_that_was_left(folder):
    html = page(read_run(folder, 100), "training", HEALTH, datetime(2026, 1, 1))
    assert "step_00000100.png" in html
    assert "step_00000140" not in html
    assert "abandoned" not in html
    early = read_run(folder, 50)
    assert early.logged["joint/loss"][0] == [10, 20, 30, 40, 50]
    assert early.snapshots == [40]
    found = best_snapshot(early)
    assert (found.metric, found.best, found.kept) == ("FID", (50, 20.0), (40, 25.0))


def test_no_text_of_a_run_becomes_a_tag(folder, hostile):
    """Names of the run, of numbers and of settings, old and new values, advice: the page has the same tags whatever they are."""
    (folder / "samples" / "teacher.json").write_text('{"steps": 35}')
    plain = page(read_run(folder, 100), "training", HEALTH, datetime(2026, 1, 1))
    bad = folder.rename(folder.with_name(f"a{hostile.text}"))
    run, plant = read_run(bad, 100), hostile.plant
    (bad / "config.yaml").write_text(json.dumps(plant(run.config)))
    starts = [start | {"changed": {hostile.text: plant(start["changed"]["steps"])}} for start in run.starts]
    logged = {key if key.startswith("evaluation/") else plant(key): curve for key, curve in run.logged.items()}
    run = replace(run, config=plant(run.config), environment=plant(run.environment), starts=plant(starts), logged=logged)
    run.teacher["steps"] = hostile.text
    run.grids[0] = (20, f"step{hostile.text}")
    hostile.check(plain, page(run, "training", plant([list(HEALTH[0])]), datetime(2026, 1, 1)))


def test_curves_are_thinned_and_averaged_over_phases():
    steps, values = thinned((list(range(1, 1001)), [float(i) for i in range(1, 1001)]))
    assert len(steps) == len(values) == 333
    assert (steps[0], values[0]) == (3, 2.0)
    assert averaged([([10, 20], [1.0, 2.0]), ([20, 30], [4.0, 5.0])]) == ([10, 20, 30], [1.0, 3.0, 5.0])
