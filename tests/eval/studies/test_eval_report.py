"""From run folders to report.json, samples.png and report.html, through the command line and below it."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from eval.__main__ import main
from eval.metrics.samples import class_balance
from eval.report.figures import grid, panels
from eval.report.html import Picture
from eval.report.training_log import curves, ess_by_level, read_metrics
from eval.studies.digits.evaluate import check_fits, evaluate
from eval.studies.digits.page import page
from eval.studies.digits.report import FILES, write_report
from eval.studies.protocols import PROTOCOLS
from eval.studies.runs import Run, find_run
from pipelines.common.atomic import write_atomically
from pipelines.common.errors import UserError
from pipelines.data.images import load_digits
from pipelines.edm import EDMPipeline, EDMScheduler, PatchUNet
from pipelines.students import save_model

ROOT = Path(__file__).resolve().parents[3]
TOLD = {"objective": "vardiu", "steps": 300, "train_seconds": 22.5, "calls": {"student": 76_800, "posterior": 230_400}}
INFO = TOLD | {"readout_sigma": 3.0}


def save_run(folder: Path, kind: str, sampler: str, steps: int, seed: int, num_classes: int = 0) -> Path:
    """A run folder with a tiny random network, a log that ends in the middle of a line, and nothing trained."""
    unet = PatchUNet(channels=16, num_blocks=1, patch_size=2, num_classes=num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    scheduler = EDMScheduler(sigma_data=0.75, sigma_max=3.0, sampler=sampler, num_inference_steps=steps)
    save_model(folder / kind, EDMPipeline(unet, scheduler), kind, INFO)
    if kind == "student":
        for step in (100, 300):  # the later one is the model itself
            facts = INFO | {"steps": step, "train_seconds": step / 8}
            save_model(folder / "snapshots" / f"step_{step:08d}", EDMPipeline(unet, scheduler), kind, facts)
            with torch.no_grad():
                unet.conv_out.weight.mul_(1 if step == 300 else 0.5)
        save_model(folder / kind, EDMPipeline(unet, scheduler), kind, INFO)
    rows = [{"step": s, f"{kind}/loss": 1 / s, "posterior/loss": -s, "eval/fd": 50 / s} for s in range(1, 200)]
    if sampler == "renoise" and steps == 1:
        rows[0] |= {"joint/ess_share@2.5": 0.5, "joint/ess_sum@2.5": 1.5, "joint/ess_share@0.3": 0.0, "joint/ess_sum@0.3": 0.0}
        rows[1] |= {"joint/ess_share@2.5": 0.25, "joint/ess_sum@2.5": 1.0, "joint/ess_share@0.3": 0.5, "joint/ess_sum@0.3": 0.6}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 200, "stu')
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "teacher", "teacher", "heun", 3, seed=1, num_classes=10)
    save_run(folder / "a", "student", "renoise", 1, seed=2, num_classes=10)
    save_run(folder / "b", "student", "renoise", 2, seed=3)
    return folder


@pytest.fixture(scope="module")
def reported(runs) -> Path:
    """The folder that `python -m eval run` left."""
    output = runs / "out" / "deeper"
    students = ["--student", f"<b>VarDiU={runs}/a", "--student", f"b={runs}/b/student"]
    force = ["--num-images", "67", "--force", "--seed", "3", "--output", str(output)]
    assert main(["run", "--protocol", "digits-10k", "--teacher", f"{runs}/teacher", *students, *force]) == 0
    return output


@pytest.mark.slow
def test_writes_three_whole_files(reported):
    assert sorted(os.listdir(reported)) == sorted(FILES)
    assert (reported / "report.json").stat().st_mode & 0o444 == 0o444


def test_report_json(reported):
    report = json.loads((reported / "report.json").read_text())
    assert report["protocol"]["name"] == "digits-10k"
    assert (report["protocol"]["n"], report["protocol"]["standard"], report["protocol"]["seed"]) == (67, False, 3)
    assert "67 generated images (not the 10,000 of the protocol)" in report["protocol"]["computed"]
    assert report["protocol"]["reference"]["n"] == 1797
    assert list(report["students"]) == ["<b>VarDiU", "b"]
    assert report["base_fd"] == max(report["teacher"]["fd"], report["floor_fd"])
    assert 0 < report["floor_fd"] < 1
    assert report["extractor"]["accuracy"] >= 0.975
    assert len(report["extractor"]["sha256"]) == 64
    assert set(report["versions"]) >= {"python", "torch", "diffusers"}
    assert report["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", report["git_commit"])
    for model, calls in ((report["teacher"], 5), (report["students"]["<b>VarDiU"], 1), (report["students"]["b"], 2)):
        assert model["fd"] > report["floor_fd"]
        assert model["fd_over_base"] == pytest.approx(model["fd"] / report["base_fd"])
        assert model["calls_per_image"] == calls
        assert model["seconds_per_image"] > 0
        assert model["energy_distance"] > 0
        assert model["nearest_neighbour"]["exact_duplicates"] == 0
        assert sum(model["class_balance"]) == pytest.approx(1)
        assert {key: model[key] for key in TOLD} == TOLD
    assert "label_accuracy" in report["students"]["<b>VarDiU"]
    assert "label_accuracy" not in report["students"]["b"]


def test_curve_is_the_fd_of_the_snapshots(reported):
    """Fewer images than a curve's 2,000 were asked for, so its last point, the model itself, has the table's figure."""
    report = json.loads((reported / "report.json").read_text())
    assert report["teacher"]["curve"] == []
    for student in report["students"].values():
        first, last = student["curve"]
        assert (first["step"], first["seconds"], first["n"]) == (100, 12.5, 67)
        assert (last["step"], last["seconds"], last["n"]) == (300, 37.5, 67)
        assert last["fd"] == student["fd"]
        assert abs(first["fd"] - last["fd"]) > 1e-3


def test_report_html_is_self_contained(reported):
    html = (reported / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 9  # samples, FD, losses, sample sizes, balance, distances; nearest pairs of three models
    assert all(source.startswith("data:image/") for source in sources)
    assert "&lt;b&gt;VarDiU" in html
    assert "<b>V" not in html
    assert "http" not in re.sub(r'src="[^"]*"', "", html)
    assert "Not the protocol" in html
    headings = ("Samples", "FD while training", "Losses", "Effective sample size by noise level", "Class balance")
    for heading in (*headings, "Nearest real images"):
        assert f"<h2>{heading}</h2>" in html
    assert "22.5 s" in html
    assert "307.2 k" in html  # the training calls of all roles together


def test_no_text_of_a_report_becomes_a_tag(reported, hostile):
    report = json.loads((reported / "report.json").read_text())
    pictures = {key: [Picture(b"", caption="x")] for key in ("samples", "fd", "loss", "ess", "balance", "neighbours")}
    bad = {key: [Picture(b"", caption=hostile.text)] for key in pictures}
    hostile.check(page(report, pictures), page(hostile.plant(report), bad))


def test_effective_sample_size_is_a_ratio_of_sums(runs):
    assert ess_by_level(find_run("a", runs / "a", "student").metrics) == {0.3: ([2], [1.2]), 2.5: ([1, 2], [3.0, 4.0])}
    assert ess_by_level(find_run("b", runs / "b", "student").metrics) == {}


def test_samples_png(reported):
    image = Image.open(io.BytesIO((reported / "samples.png").read_bytes()))
    image.load()
    assert image.mode == "RGB"
    assert image.width > 4 * 8 * 32  # four panels of eight enlarged digits
    assert image.width > image.height


class Copier:
    """A "model" that has learned the digits by heart: image i is real image i."""

    def __init__(self, flip: bool = False) -> None:
        self.unet = nn.Identity()
        self.unet.config = SimpleNamespace(num_classes=0)
        self.pixels = load_digits().pixels.flip(3) if flip else load_digits().pixels

    def __call__(self, batch_size, generator, class_labels=None, num_inference_steps=None, output_type="pil"):
        indices = [g.initial_seed() % len(self.pixels) for g in generator]
        return SimpleNamespace(images=self.unet(self.pixels[indices] / 255))


@pytest.mark.slow
def test_a_model_that_copies_is_found_out(tmp_path):
    protocol = PROTOCOLS["digits-10k"].adjusted(1797, force=True)
    run = Run("copier", tmp_path)
    lines = []
    pipes = iter([Copier(), Copier(), Copier(flip=True)])
    evaluation = evaluate(
        protocol,
        Run("teacher", tmp_path),
        [run, replace(run, name="mirrored")],
        load=lambda folder, role: next(pipes),
        say=lines.append,
    )
    report = evaluation.report()
    copier, mirrored = report["students"]["copier"], report["students"]["mirrored"]
    assert copier["fd"] < 1e-9
    assert copier["fd_over_base"] < 1e-6
    assert report["base_fd"] == report["floor_fd"]
    assert copier["nearest_neighbour"]["exact_duplicates"] == 1797
    assert copier["nearest_neighbour"]["close_share"] == 1
    assert copier["class_balance"] == pytest.approx(class_balance(load_digits().labels, 10).tolist(), abs=0.005)
    assert copier["pixel_std"] == pytest.approx(report["protocol"]["reference"]["pixel_std"], rel=1e-12)
    assert copier["calls_per_image"] == 1
    assert copier["train_seconds"] is None
    assert mirrored["fd"] > 10 * report["floor_fd"]
    assert mirrored["energy_distance"] > 10 * report["floor"]["energy_distance_std"]
    assert mirrored["nearest_neighbour"]["exact_duplicates"] < 20
    assert len(lines) == 4
    write_report(evaluation, tmp_path)  # without any log or training facts
    assert "FD while training" not in (tmp_path / "report.html").read_text()


def test_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "report.json"
    write_atomically(file, b"old")
    with pytest.raises(TypeError):
        write_atomically(file, "text is not bytes")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_grid_is_crisp():
    pixels = torch.randint(0, 256, (3, 1, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = grid(pixels, columns=2, gap=3)
    assert image.size == (2 * 35 + 3, 2 * 25 + 3)  # 7 pixels become 35, the first multiple of at least 32
    for i, (x, y) in enumerate([(0, 0), (38, 0), (0, 28)]):
        tile = image.crop((x, y, x + 35, y + 25)).resize((7, 5), Image.Resampling.NEAREST)
        assert list(tile.convert("L").tobytes()) == pixels[i].flatten().tolist()
        assert tile.resize((35, 25), Image.Resampling.NEAREST).tobytes() == image.crop((x, y, x + 35, y + 25)).tobytes()
    assert image.getpixel((36, 10)) == image.getpixel((60, 40)) == (255, 255, 255)
    with pytest.raises(ValueError, match="uint8"):
        grid(pixels.float())


def test_panels_wrap_and_cut_long_titles():
    pixels = torch.zeros(4, 3, 5, 7, dtype=torch.uint8)
    one, six = (panels([("A long title " * 9, "sub", pixels)] * n, columns=5) for n in (1, 6))
    assert six.width == 20 + 5 * (one.width - 20)
    assert six.height == 20 + 2 * (one.height - 20)


def test_curves_and_unfinished_logs(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 5, "student/loss": 2, "note": "x", "eval/fd": 9.5}\n{"step": 7, "student/loss": 1}\n{"ste')
    rows = read_metrics(file)
    assert curves(rows, "loss") == {"student/loss": ([5, 7], [2.0, 1.0])}
    assert curves(rows, "fd") == {"eval/fd": ([5], [9.5])}
    file.write_text('{"step": 5}\n{"ste\n{"step": 7}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not valid JSON"):
        read_metrics(file)
    file.write_text('{"loss": 5}\n')
    with pytest.raises(ValueError, match="line 1 is not an object with a 'step'"):
        read_metrics(file)


def test_find_run(runs):
    from_run, from_model = (find_run("a", path, "student") for path in (runs / "a", runs / "a" / "student"))
    assert from_run == from_model
    assert from_run.info == INFO
    assert len(from_run.metrics) == 199


def test_protocols():
    protocol = PROTOCOLS["digits-10k"]
    assert protocol.is_standard
    assert protocol.adjusted(10_000, seed=5).seed == 5
    assert not protocol.adjusted(100, force=True).is_standard
    with pytest.raises(ValueError, match="statistics need at least 2 images"):
        protocol.adjusted(1, force=True)


ERRORS = {
    "protocol": ({"--protocol": "digits-10"}, ["unknown protocol 'digits-10'", "did you mean 'digits-10k'?"]),
    "teacher": ({"--teacher": "{runs}/none"}, ["teacher 'teacher': no such folder: {runs}/none"]),
    "not a run": ({"--teacher": "{runs}/a"}, ["neither teacher/ nor model_index.json", "trainers.train_teacher"]),
    "student": ({"--student": "x={runs}/none"}, ["student 'x': no such folder: {runs}/none"]),
    "no student": ({"--student": "x={runs}/teacher"}, ["neither student/ nor student.json", "trainers.distill"]),
    "no name": ({"--student": "{runs}/a"}, ["expected NAME=RUN"]),
    "twice": ({"--student": "x={runs}/a --student x={runs}/b"}, ["'x' is given twice", "two different names"]),
    "output": ({"--output": "{runs}/a/metrics.jsonl"}, ["cannot write there", "metrics.jsonl"]),
    "too few": ({"--num-images": "100"}, ["num-images is 100", "has 10,000", "--force"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_before_work(case, runs, capsys):
    changes, expected = ERRORS[case]
    options = {
        "--protocol": "digits-10k",
        "--teacher": "{runs}/teacher",
        "--student": "x={runs}/a",
        "--output": "{runs}/unused",
    }
    argv = " ".join(f"{key} {value}" for key, value in (options | changes).items()).format(runs=runs).split()
    assert main(["run", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval: error: ")
    assert error.count("\n") == 1
    for part in expected:
        assert part.format(runs=runs) in error


@pytest.mark.parametrize(("channels", "side"), [(3, 8), (1, 16)])
def test_a_model_of_other_images_is_refused_before_work(channels, side, tmp_path):
    network = PatchUNet(
        sample_size=side, in_channels=channels, out_channels=channels, channels=8, channel_mult=(1,), num_blocks=1
    )
    pipe = EDMPipeline(network, EDMScheduler())
    run = Run("teacher", tmp_path)
    check_fits(pipe, run, "teacher", (channels, side, side))
    with pytest.raises(UserError, match=rf"^teacher 'teacher': .* makes images of \({channels}, {side}, {side}\), the study"):
        check_fits(pipe, run, "teacher", (1, 8, 8))


@pytest.mark.slow
def test_module_entry_point(tmp_path):
    argv = "run --protocol digits-10k --teacher nowhere --student x=nowhere --output out".split()
    done = subprocess.run(
        [sys.executable, "-m", "eval", *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    *warned, error = done.stderr.splitlines()  # libraries may warn while they are imported, of a CPU or of a missing extra
    assert error == "eval: error: teacher 'teacher': no such folder: nowhere"
    assert not any("Traceback" in line for line in warned)
    assert not (tmp_path / "out").exists()
