"""`python -m eval points`: a model of points against its law; what it refuses."""

import json

import pytest
import torch
import yaml

from eval.__main__ import main
from eval.studies.points import numbers as points
from eval.studies.points import report as points_report
from pipelines.analytic import make_mixture
from pipelines.edm import EDMPipeline, EDMScheduler, PointNet

MEANS = [[0.0, 0.0], [6.0, 0.0]]


@pytest.fixture
def run(tmp_path):
    """A run's folder whose student makes z + (3, 0), and whose configuration says what it should make."""
    net = PointNet(width=5)
    net.conv_out.bias.data[0] = 3 / (2**-0.5 * 2)  # c_out at sigma = sigma_data = 2
    scheduler = EDMScheduler(sigma_data=2.0, sigma_max=2.0, sampler="renoise", num_inference_steps=1)
    EDMPipeline(net, scheduler).save_pretrained(tmp_path / "run" / "student")
    facts = {"objective": "vardiu", "steps": 5, "train_seconds": 1.0}
    (tmp_path / "run" / "student" / "student.json").write_text(json.dumps(facts))
    data = {"name": "mixture", "means": MEANS, "std": 1.5}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return tmp_path / "run"


def command(run, output, *more: str) -> int:
    return main(["points", "--model", str(run), "--output", str(output), *more])


def test_numbers_are_those_of_its_points(run, tmp_path, capsys):
    """Known points, in blocks as in one; true samples beside; a picture; the same numbers again."""
    assert command(run, tmp_path / "out", "--num-points", "301") == 0
    found = json.loads((tmp_path / "out" / "points.json").read_text())
    z = torch.randn(301, 2, generator=torch.Generator().manual_seed(0))
    expected = points.evaluate(z + torch.tensor([3.0, 0.0]), make_mixture(MEANS, 1.5), seed=2)
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    assert found["true_samples"]["in_mode"] > 0.98
    assert (tmp_path / "out" / "points.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert all(key in printed for key in found["metrics"])
    assert command(run, tmp_path / "again", "--num-points", "301") == 0
    assert json.loads((tmp_path / "again" / "points.json").read_text())["metrics"] == found["metrics"]


def test_blocks_change_nothing(run, monkeypatch):
    pipe = points_report.load_sampler(str(run)).pipe
    whole = points_report.draw(pipe, 31, seed=4)
    monkeypatch.setattr(points_report, "BLOCK", 13)
    torch.testing.assert_close(points_report.draw(pipe, 31, seed=4), whole, rtol=1e-6, atol=1e-6)
    assert not torch.equal(points_report.draw(pipe, 31, seed=5), whole)


def test_the_law(run, tmp_path):
    """A run's own, another file's, and the forty modes where nothing is said."""
    assert points_report.read_law(None, run).means.tolist() == MEANS
    assert points_report.read_law(None, run / "student").means.tolist() == MEANS
    other = tmp_path / "other.yaml"
    other.write_text("data: {name: mixture}")
    assert len(points_report.read_law(str(other), run).means) == 40
    (run / "config.yaml").write_text("data: null")
    assert len(points_report.read_law(None, run).means) == 40


def test_refused(run, tmp_path, capsys, edm):
    three, digits = tmp_path / "three.yaml", tmp_path / "digits.yaml"
    three.write_text("data: {name: mixture, means: [[1, 2, 3]], std: 1}")
    digits.write_text("data: {name: digits}")
    for model, more, message in (
        (run, ["--num-points", "1"], "--num-points: Input should be greater than or equal to 2, got '1'"),
        (run, ["--law", str(three)], "--law: a mixture in 3 dimensions"),
        (run, ["--law", str(digits)], "has no `data: {name: mixture}`"),
        (run, ["--law", "nowhere.yaml"], "--law: no such file 'nowhere.yaml'"),
        (edm, [], "makes images; `python -m eval run` measures them"),
    ):
        assert command(model, tmp_path / "out", *more) == 2
        assert message in capsys.readouterr().err


def test_points_are_no_images(run, tmp_path, capsys):
    call = [
        "generate",
        "--protocol",
        "custom",
        "--num-images",
        "3",
        "--force",
        "--model",
        str(run),
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(call) == 2
    assert "makes points, not images; use `python -m eval points`" in capsys.readouterr().err
