"""Images on disk: the same bytes whatever the batch, the number of processes and the interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.__main__ import main
from eval.images import generation as module
from eval.images.generation import generate, image_file
from eval.images.sampler import Sampler, latency, load_sampler
from eval.images.seeds import image_generator, image_label
from pipelines.common.errors import UserError
from pipelines.edm import EDMPipeline

ROOT = Path(__file__).parents[2]
N = 23
TWO = ("torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")


def options(model: Path, output: Path, *more: str) -> list[str]:
    return ["generate", "--protocol", "custom", "--num-images", str(N), "--model", str(model), "--output", str(output), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def expected(edm, tmp_path_factory) -> dict[str, bytes]:
    """What one process with batches of 7 writes."""
    output = tmp_path_factory.mktemp("one")
    assert main(options(edm, output, "--batch-size", "7")) == 0
    found = contents(output)
    assert len(found) == N + 1
    return found


@pytest.mark.slow
def test_batch_size_does_not_matter(edm, expected, tmp_path):
    assert main(options(edm, tmp_path, "--batch-size", "64")) == 0
    assert contents(tmp_path) == expected


@pytest.mark.slow
def test_processes_do_not_matter(edm, expected, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *TWO, "-m", "eval", *options(edm, tmp_path, "--batch-size", "3")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path) == expected


@pytest.mark.slow
def test_kill_and_resume(edm, expected, tmp_path):
    """kill -9 in the middle: whole files only, and the second run makes just what is missing."""
    command = [sys.executable, "-m", "eval", *options(edm, tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.rglob("*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    partial = {name: data for name, data in contents(tmp_path).items() if name.endswith(".png") and "/." not in name}
    assert 3 <= len(partial)
    assert all(expected[name] == data for name, data in partial.items())
    made = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("0*.png")}
    assert main(options(edm, tmp_path)) == 0
    whole = {name: data for name, data in contents(tmp_path).items() if "/." not in name}
    assert whole == expected
    assert all(f.stat().st_mtime_ns == when for f, when in made.items())


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_picture_that_was_cut_short_is_made_again(length, edm, expected, tmp_path):
    """As a copy from another machine that broke off leaves it: not "finished"."""
    for name, content in expected.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    cut = next(file for file in sorted(tmp_path.rglob("*.png")))
    cut.write_bytes(cut.read_bytes()[:length])
    assert main(options(edm, tmp_path, "--batch-size", "7")) == 0
    assert contents(tmp_path) == expected


def test_images_are_the_pipelines_own(edm, expected, tmp_path):
    """Image i is the pipeline called by hand with the generator and the label of i, rounded to 8 bits."""
    pipe = EDMPipeline.from_pretrained(edm)
    for i in (0, 17):
        label = image_label(0, i, 5)
        made = pipe(class_labels=[label], generator=[image_generator(0, i)], num_inference_steps=3, output_type="np").images[0]
        (tmp_path / "x.png").write_bytes(expected[f"images/draw0/000000/{i:06d}.png"])
        assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), (made * 255).round().astype(np.uint8))


def test_draws_share_no_seed(edm, tmp_path):
    assert main([*options(edm, tmp_path), "--num-images", "2", "--draws", "2"]) == 0
    assert sorted(f.name for f in tmp_path.rglob("*.png")) == ["000000.png", "000001.png", "000002.png", "000003.png"]
    facts = json.loads((tmp_path / "images" / "draw1" / "generation.json").read_text())
    assert (facts["first"], facts["n"], facts["seed"]) == (2, 2, 0)


def test_captions_go_with_their_images_wherever_these_begin(tmp_path):
    """Of a later draw the first caption is that of its first image; also when half of them are there already."""
    told: dict[int, str] = {}

    class Model(Sampler):
        def __call__(self, indices, seed=0, captions=None):
            told.update(zip(indices, captions, strict=True))
            return torch.zeros(len(indices), 3, 2, 2, dtype=torch.uint8)

        def identity(self, captions):
            return {}

        def describe(self):
            return {}

    model, expected = Model(None, "prompt", {}), {7: "a", 8: "b", 9: "c", 10: "d", 11: "e"}
    generate(model, tmp_path, range(7, 12), captions=list("abcde"), batch_size=2, exact=False)
    assert told == expected
    for i in (8, 11):
        image_file(tmp_path, i).unlink()
    told.clear()
    generate(model, tmp_path, range(7, 12), captions=list("abcde"), batch_size=2, exact=False)
    assert told == {8: "b", 11: "e"}


def test_fixed_batches_are_filled_up(edm, tmp_path):
    """Without --exact every call has batch_size images, so that a resumed run computes what the first one would have."""
    sizes = []
    sampler = load_sampler(str(edm))
    pipe = sampler.pipe

    def counted(**kwargs):
        sizes.append(kwargs["batch_size"])
        return pipe(**kwargs)

    counting = Sampler(pipe, "class_labels", sampler.call, sampler.facts)
    counting.pipe = Counted(pipe, counted)
    generate(counting, tmp_path / "x", range(5), batch_size=3, exact=False)
    assert sizes == [3, 3]
    assert len(list((tmp_path / "x").rglob("*.png"))) == 5
    assert json.loads((tmp_path / "x" / "generation.json").read_text())["batch_size"] == 3


class Counted(EDMPipeline):
    """The pipeline, telling the size of every call."""

    def __init__(self, pipe: EDMPipeline, call) -> None:
        super().__init__(pipe.unet, pipe.scheduler)
        self.call = call

    @property
    def components(self) -> dict:
        return {"unet": self.unet, "scheduler": self.scheduler}

    def __call__(self, **kwargs):
        return self.call(**kwargs)


@pytest.mark.parametrize("change", [{"seed": 1}, {"indices": range(5, 8)}, {"batch_size": 4, "exact": False}])
def test_other_images_in_the_folder_are_refused(change, edm, tmp_path):
    sampler = load_sampler(str(edm), steps=1)
    call = {"indices": range(3), "seed": 0, "batch_size": 2, "exact": True}
    generate(sampler, tmp_path / "x", **call)
    with pytest.raises(ValueError, match=r"x holds images made otherwise: (seed is 0|first is 0|batch_size is 1), needed"):
        generate(sampler, tmp_path / "x", **{**call, **change})
    with pytest.raises(ValueError, match=r"otherwise: call.num_inference_steps is 1, needed 2; name another --output"):
        generate(load_sampler(str(edm), steps=2), tmp_path / "x", **call)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"y is not empty and has no generation.json"):
        generate(sampler, tmp_path / "y", **call)


def changed(model: Path, part: str, **settings) -> None:
    """Settings in a JSON file of a model."""
    file = model / part
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def weighed(model: Path) -> None:
    """One number of its network."""
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights[sorted(weights)[0]].view(-1)[0] += 1e-3
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (weighed, "unet.weights differ"),
        (lambda m: changed(m, "scheduler/scheduler_config.json", sigma_max=70.0), "scheduler.sigma_max is not set, needed 70.0"),
        (lambda m: changed(m, "unet/config.json", dropout=0.5), None),
    ],
    ids=["weights", "scheduler", "training"],
)
def test_another_model_in_the_same_place_is_refused(change, said, edm, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(edm, model)
    generate(load_sampler(str(model), steps=1), tmp_path / "x", range(2))
    change(model)
    if said is None:
        return generate(load_sampler(str(model), steps=1), tmp_path / "x", range(2))
    with pytest.raises(UserError, match=f"x holds images made otherwise: {said}; name another --output or remove them"):
        generate(load_sampler(str(model), steps=1), tmp_path / "x", range(2))


def test_the_same_model_elsewhere_goes_on(edm, tmp_path):
    """Neither its place, nor its files' times, nor what lies beside its weights makes other images."""
    generate(load_sampler(str(edm), steps=1), tmp_path / "x", range(2))
    before = contents(tmp_path / "x")
    model = tmp_path / "moved"
    shutil.copytree(edm, model, copy_function=shutil.copyfile)
    (model / ".DS_Store").write_bytes(b"x")
    (model / "README.md").write_text("mine")
    changed(model, "unet/config.json", _diffusers_version="0.0.1", _name_or_path="elsewhere")
    (tmp_path / "x" / "000000" / "000001.png").unlink()
    generate(load_sampler(str(model), steps=1), tmp_path / "x", range(2))
    assert contents(tmp_path / "x") == before


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_damaged_list_of_what_made_them_is_named(text, edm, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "generation.json").write_text(text)
    with pytest.raises(UserError, match=r"generation.json' (is not valid JSON|holds a ).*what made the images beside it is un"):
        generate(load_sampler(str(edm), steps=1), tmp_path / "x", range(2))
    (tmp_path / "x" / "generation.json").write_text('{"model": {"model": "a"}, "seed": 0, "first": 0, "n": 2}')
    with pytest.raises(UserError, match="x holds images of an earlier version"):
        generate(load_sampler(str(edm), steps=1), tmp_path / "x", range(2))


def test_nan_pixels_stop_the_run(edm, tmp_path):
    sampler = load_sampler(str(edm), steps=1)
    torch.nn.init.constant_(sampler.pipe.unet.dec.conv_out.bias, torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite pixels for images"):
        generate(sampler, tmp_path / "x", range(2))
    assert not list(tmp_path.rglob("*.png"))


def test_half_written_files_are_never_seen(edm, tmp_path, monkeypatch):
    """A crash while an image is written leaves no image of that name."""

    def fail(file: Path, content: bytes) -> None:
        if file.name == "000001.png":
            raise OSError("disk full")
        original(file, content)

    original = module.write_atomically
    monkeypatch.setattr(module, "write_atomically", fail)
    with pytest.raises(OSError, match="disk full"):
        generate(load_sampler(str(edm), steps=1), tmp_path / "x", range(3))
    assert [f.name for f in tmp_path.rglob("*.png")] == ["000000.png"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("absent", "no such folder 'absent', and a hub id"),
        ("empty", "has no model_index.json, student.json, student/ or teacher/"),
    ],
)
def test_models_that_are_none(model, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    path = tmp_path / "empty" if model == "empty" else model
    assert main(options(path, tmp_path / "out")) == 2
    assert message in capsys.readouterr().err


def test_damaged_model(edm, tmp_path, capsys):
    shutil.copytree(edm, tmp_path / "edm")
    weights = tmp_path / "edm" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(options(tmp_path / "edm", tmp_path / "out")) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_image_files_are_in_order():
    names = [str(image_file(Path(), i)) for i in (0, 7, 999, 1000, 49_999, 123_456)]
    assert names == sorted(names)
    assert names[-1] == "123000/123456.png"


def test_latency_is_taken_in_turn_and_counts_images(edm, monkeypatch):
    """Called one after the other, again and again, so that both see the same moments of the machine; the first time warms up."""
    samplers, steps, call = [load_sampler(str(edm), steps=n) for n in (1, 2)], [], Sampler.__call__

    def noted(sampler, indices, seed, texts):
        assert list(indices) == [0, 1, 2]
        steps.append(sampler.call["num_inference_steps"])
        return call(sampler, indices, seed, texts)

    monkeypatch.setattr(Sampler, "__call__", noted)
    found = latency(samplers, batch_size=3, repeats=2)
    assert steps == [1, 2] * 3
    assert [speed["call"]["num_inference_steps"] for speed in found] == [1, 2]
    for speed in found:
        assert speed["images_per_s"] * speed["seconds_per_image"] == pytest.approx(1)


def test_neighbouring_seeds_share_no_image():
    """The largest set, three draws of 50,000 images, ends before that of the next seed begins."""
    first, last = (image_generator(0, i).initial_seed() for i in (0, 149_999))
    assert (first, last) == (0, 149_999)  # EDM's seeds
    assert image_generator(1, 0).initial_seed() > last
