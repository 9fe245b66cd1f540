"""`python -m eval run`, `metrics`, `reference`, `compare` as commands, on networks with random weights, against the libraries."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.__main__ import main
from eval.images.files import ImageFiles
from eval.metrics.measure import over_draws
from eval.metrics.one_pass import one_pass
from eval.networks.extractors import Inception
from eval.networks.weights import Found
from eval.protocols import PROTOCOLS

ROOT = Path(__file__).parents[2]
TWO = ("torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
ALL = ("fid", "kid", "inception_score", "precision_recall")


# All at once ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_metric_in_one_pass(networks, tmp_path, make_pictures, save_pictures, measured, values):
    """Nine metrics, seven networks, every image decoded once; CLIP score and aesthetic score of one model share it."""
    a, b = (save_pictures(make_pictures(n, s, 310), tmp_path / f"set{s}") for n, s in ((13, 1), (17, 2)))
    (tmp_path / "captions.txt").write_text("".join(f"thing {i}\n" for i in range(13)))
    metrics = ["fid", "kid", "inception_score", "precision_recall", "patch_fid", "fd_dinov2", "cmmd", "clip_score", "aesthetic"]
    call = ["metrics", "--protocol", "custom", "--images", str(a), "--reference", str(b), "--metrics", *metrics]
    call += [
        "--captions",
        str(tmp_path / "captions.txt"),
        "--inception",
        str(networks.inception),
        "--clip",
        str(networks.clip_768),
    ]
    call += ["--clip-336", str(networks.clip), "--dinov2", str(networks.dinov2), "--clip-aesthetic", str(networks.clip_768)]
    assert main([*call, "--aesthetic", str(networks.aesthetic), "--output", str(tmp_path / "out")]) == 0
    found = measured(tmp_path / "out")
    names = {"precision", "recall", *metrics} - {"precision_recall"}
    assert found["metrics"].keys() == names
    assert all(np.isfinite(numbers["value"]) for numbers in found["metrics"].values())
    assert sorted(found["extractors"]) == ["clip", "clip_336", "dinov2", "inception", "inception_patch"]
    assert sorted(found["not_published_weights"]) == sorted(found["extractors"])
    assert found["metrics"]["fid"]["images_below_dimension"] == [37]
    assert (tmp_path / "out" / "reference" / "reference.json").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Not the published weights" in page
    assert "the covariance has not full rank" in page


@pytest.mark.slow
def test_patches_are_of_the_images_as_they_are(networks, tmp_path, make_pictures, save_pictures, values):
    """Patch FID under a crop to 64 pixels is the FID of what lies within 299 pixels of the middle, cut out by hand."""
    folders = {}
    for name, n, seed in (("a", 13, 1), ("b", 17, 2)):
        pixels = make_pictures(n, seed, 331)
        folders[name] = save_pictures(pixels, tmp_path / name)
        folders[f"{name}_cut"] = save_pictures(pixels[..., 16:315, 16:315], tmp_path / f"{name}_cut")
    call = ["metrics", "--protocol", "custom", "--inception", str(networks.inception)]
    whole = ["--images", str(folders["a"]), "--reference", str(folders["b"]), "--metrics", "patch_fid", "fid", "--crop-to", "64"]
    assert main([*call, *whole, "--output", str(tmp_path / "whole")]) == 0
    cut = ["--images", str(folders["a_cut"]), "--reference", str(folders["b_cut"]), "--metrics", "fid"]
    assert main([*call, *cut, "--output", str(tmp_path / "cut")]) == 0
    found = values(tmp_path / "whole")
    assert found["patch_fid"] == pytest.approx(values(tmp_path / "cut")["fid"], rel=1e-9)
    assert found["fid"] != pytest.approx(found["patch_fid"], rel=1e-2)


@pytest.mark.slow
def test_statistics_give_what_images_give(command, networks, sets, tmp_path, values):
    call = [
        "reference",
        "--protocol",
        "custom",
        "--reference",
        str(sets.b),
        "--metrics",
        "fid",
        "kid",
        "--output",
        str(tmp_path / "ref"),
    ]
    call += ["--inception", str(networks.inception), "--inception-mode", "legacy_tensorflow"]
    assert main(call) == 0
    assert command("--metrics", "fid", "kid") == 0
    assert command("--metrics", "fid", "kid", "--reference", str(tmp_path / "ref"), output="again") == 0
    assert values(tmp_path / "out") == values(tmp_path / "again")
    assert command("--metrics", "fid", "kid", "--reference", str(tmp_path / "out" / "reference"), output="third") == 0
    assert values(tmp_path / "third") == values(tmp_path / "out")


@pytest.mark.slow
def test_processes_and_workers_do_not_matter(command, networks, sets, tmp_path, measured):
    assert command("--metrics", *ALL, "--feature-batch", "16") == 0
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    call = ["metrics", "--protocol", "custom", "--images", str(sets.a), "--reference", str(sets.b), "--metrics", *ALL]
    call += ["--inception", str(networks.inception), "--inception-mode", "legacy_tensorflow", "--feature-batch", "16"]
    two = [sys.executable, "-m", *TWO, "-m", "eval", *call, "--output", str(tmp_path / "two")]
    done = subprocess.run(two, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert measured(tmp_path / "two")["metrics"] == measured(tmp_path / "out")["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers(method, networks, sets):
    """Every way of starting workers gives the same rows in the same order."""
    extractor = Inception(Found(networks.inception, "", False), "clean")
    images = ImageFiles(str(sets.a), replace(PROTOCOLS["custom"], num_images=61))
    alone, helped = (
        one_pass(images, {"inception": extractor}, ["inception"], batch_size=13, workers=w, start_method=method if w else None)
        for w in (0, 2)
    )
    assert torch.equal(alone.rows["inception"], helped.rows["inception"])


@pytest.mark.slow
def test_model_from_generation_to_report(edm, networks, sets, tmp_path, measured):
    """run: two draws of generated images; killed after generating, it goes on without making one anew."""
    call = [
        "run",
        "--protocol",
        "cifar10-50k",
        "--num-images",
        "11",
        "--draws",
        "2",
        "--force",
        "--model",
        str(edm),
        "--steps",
        "1",
    ]
    call += ["--reference", str(sets.b), "--inception", str(networks.inception), "--output", str(tmp_path / "out")]
    assert main([*call, "--teacher", str(edm), "--teacher-steps", "4", "--latency-batch", "3"]) == 0
    found = measured(tmp_path / "out")
    fid = found["metrics"]["fid"]
    assert fid["value"] == min(fid["draws"])
    assert fid["value_is"] == "the least of the draws"
    assert fid["mean"] == pytest.approx(sum(fid["draws"]) / 2)
    assert found["seeds"] == [[0, 0, 10], [0, 11, 21]]
    expected = ["11 images instead of 50,000", "2 of 3 draws", "a reference of 97 images instead of 50,000"]
    assert found["protocol"]["departures"] == expected
    assert "11 images in each of 2 draws (one seed an image, 0 to 21, set 0)" in found["protocol"]["computed"]
    assert found["latency"]["teacher"]["call"]["num_inference_steps"] == 4
    made = {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "images").rglob("*.png")}
    assert len(made) == 22
    assert main(call) == 0
    assert {f: f.stat().st_mtime_ns for f in made} == made
    assert measured(tmp_path / "out")["metrics"] == found["metrics"]
    for name in ("samples.png", "metrics.png", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_least_and_mean_of_draws():
    draws = [{"fid": {"value": 3.0}, "clip_score": {"value": 0.3}}, {"fid": {"value": 5.0}, "clip_score": {"value": 0.1}}]
    least, mean = over_draws(draws, "min"), over_draws(draws, "mean")
    assert (least["fid"]["value"], mean["fid"]["value"]) == (3.0, 4.0)
    assert least["clip_score"]["value"] == pytest.approx(0.2)  # higher is better: the least is no honest summary
    assert least["fid"]["std"] == pytest.approx(2**0.5)


# What cannot work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--protocol", "coco30k"], "unknown protocol 'coco30k'; did you mean 'coco-30k'"),
        (["--protocol", "digits-10k"], "is for `python -m eval run` with --teacher and --student"),
        (["--metrics", "fids"], "unknown 'fids'; did you mean 'fid'"),
        (["--metrics", "clip_score"], "--captions is needed"),
        (["--protocol", "cifar10-50k", "--inception-mode", "clean"], "--inception-mode is fixed by protocol cifar10-50k"),
        (["--images", "absent"], "no such folder, .zip or .parquet: 'absent'"),
        (["--reference", "absent.npz"], "no such file 'absent.npz'"),
        (["--inception", "absent.pt"], "no such file or folder 'absent.pt'"),
        (["--num-images", "1"], "statistics need at least 2 images"),
        (["--baselines", "absent.yaml"], "--baselines: no such file"),
    ],
)
def test_impossible_options(more, message, command, tmp_path, capsys):
    assert command(*more) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_too_few_images_for_the_protocol(networks, sets, tmp_path, capsys):
    call = [
        "metrics",
        "--protocol",
        "cifar10-50k",
        "--images",
        str(sets.a),
        "--reference",
        str(sets.b),
        "--inception",
        str(networks.inception),
    ]
    call += ["--output", str(tmp_path / "out")]
    assert main(call) == 2
    assert "holds 61 images, 50,000 are needed; add --num-images and --force" in capsys.readouterr().err
    assert main([*call, "--num-images", "61"]) == 2
    assert "add --force to do it anyway" in capsys.readouterr().err
    assert main([*call, "--num-images", "61", "--force"]) == 0
    assert main([*call, "--num-images", "62", "--force"]) == 2
    assert "holds 61 images, 62 are needed" in capsys.readouterr().err


def test_a_reference_needs_no_network_that_looks_at_one_set_alone(networks, sets, tmp_path, monkeypatch):
    """The CLIP score's network is neither looked for nor loaded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    call = ["reference", "--protocol", "coco-30k", "--reference", str(sets.b), "--inception", str(networks.inception), "--force"]
    assert main([*call, "--output", str(tmp_path / "ref")]) == 0
    assert list(json.loads((tmp_path / "ref" / "reference.json").read_text())["extractors"]) == ["inception"]


def test_another_reference_needs_force(networks, sets, tmp_path, capsys):
    """Found before its images are measured."""
    call = ["reference", "--protocol", "cifar10-50k", "--reference", str(sets.b), "--inception", str(networks.inception)]
    assert main([*call, "--output", str(tmp_path / "ref")]) == 2
    assert "--reference has 97 images, protocol cifar10-50k compares with 50,000; add --force" in capsys.readouterr().err
    assert not list((tmp_path / "ref").glob("*"))
    assert main([*call, "--output", str(tmp_path / "ref"), "--force"]) == 0
    assert json.loads((tmp_path / "ref" / "reference.json").read_text())["images"]["n"] == 97


def test_captions_and_images_must_match(command, networks, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a\n" * 60)
    more = ["--metrics", "clip_score", "--clip", str(networks.clip), "--captions", str(tmp_path / "captions.txt")]
    assert command(*more) == 2
    assert "61 images and 60 captions: one an image is needed" in capsys.readouterr().err


def test_nan_features_stop_the_run(networks, sets, tmp_path, capsys):
    broken = torch.jit.load(str(networks.inception))
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if n.endswith("8.bias"))[3] = torch.nan
    broken.save(str(tmp_path / "broken.pt"))
    call = [
        "metrics",
        "--protocol",
        "custom",
        "--images",
        str(sets.a),
        "--reference",
        str(sets.b),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*call, "--inception", str(tmp_path / "broken.pt")]) == 2
    assert "features of inception are NaN or infinite for" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_a_bad_image_leaves_nothing_behind(command, sets, tmp_path, capsys):
    shutil.copytree(sets.a, tmp_path / "a")
    (tmp_path / "a" / "0050.png").write_bytes(b"\x89PNG half")
    assert command("--images", str(tmp_path / "a")) == 2
    assert "0050.png" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_config_file(networks, sets, tmp_path, capsys, values):
    file = tmp_path / "eval.yaml"
    file.write_text(
        f"protocol: custom\nimages: {sets.a}\nreference: {sets.b}\ninception: {networks.inception}\noutput: {tmp_path / 'x'}\n"
        "metrics: [fid, kid]\ninception_mode: clean\n"
    )
    assert main(["metrics", "--config", str(file), "--output", str(tmp_path / "out"), "--metrics", "fid"]) == 0
    assert list(values(tmp_path / "out")) == ["fid"]
    assert not (tmp_path / "x").exists()
    call = ["reference", "--config", str(file), "--metrics", "fid", "--output", str(tmp_path / "ref")]
    assert main(call) == 0  # of the same file: images and baselines are no option of this command
    file.write_text("protocl: custom\n")
    assert main(["metrics", "--config", str(file)]) == 2
    assert "unknown key 'protocl'; did you mean 'protocol'" in capsys.readouterr().err
    assert main(["metrics", "--config", str(tmp_path / "absent.yaml")]) == 2


@pytest.mark.slow
def test_memory_of_statistics_of_many_images():
    """50,000 images of 2,048 features, as one pass takes them in: below 1 GB above what was there."""
    code = """
import torch
from eval.metrics.one_pass import Gathered
class Extractor: outputs = {"features": 2048}
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
rows = torch.randn(500, 2048)
before = peak()
gathered = Gathered(50_000, {"inception": Extractor()})
for _ in range(100): gathered.update({"inception": {"features": rows}})
gathered.stats["inception"].cov
assert gathered.seen == 50_000
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1000


def test_no_square_root_of_scipys_is_needed(command, monkeypatch, tmp_path):
    """scipy 1.18 dropped an argument that clean-fid passes; evaluating calls none of it."""

    def gone(*args, **kwargs):
        raise TypeError("sqrtm() got an unexpected keyword argument 'disp'")

    monkeypatch.setattr("scipy.linalg.sqrtm", gone)
    assert command("--metrics", *ALL) == 0
