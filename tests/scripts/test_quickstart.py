"""The quickstart as a newcomer runs it, short: the printed commands, resuming, a stock pipeline with the LoRA, damaged assets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--steps", "2", "--num-images", "16", "--objectives", "vardiu", "varflow"]


def quickstart(output: Path, *options: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "scripts.quickstart", "--output", str(output), *options]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_distils_measures_and_goes_on(tmp_path):
    output = tmp_path / "quick start"
    done = quickstart(output, *SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    for part in (
        "accelerate launch",
        "-m trainers.distill --config configs/emoji_vardiu.yaml",
        "-m eval run --protocol emoji-2k",
    ):
        assert part in done.stdout
    assert "with your own Stable Diffusion" in done.stdout
    report = json.loads((output / "report.json").read_text())
    assert set(report["students"]) == {"vardiu", "varflow"}
    for row in (report["teacher"], report["teacher_one_step"], *report["students"].values()):
        assert row["fd"] > 0
        assert row["seconds_per_image"] > 0
        assert -1 <= row["clip_score"] <= 1
    assert all(row["train_seconds"] > 0 for row in report["students"].values())
    assert report["seconds_total"] > max(row["train_seconds"] for row in report["students"].values())
    assert (output / "samples.png").stat().st_size > 1000
    assert "emoji" in (output / "report.html").read_text()

    # what the printed lines say, with stock diffusers alone: the LoRA changes what the teacher draws in one step
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "assets" / "emoji_sd")
    student = output / "runs" / "vardiu" / "student"
    pipe.scheduler = LCMScheduler.from_pretrained(student, subfolder="scheduler")
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}

    def draw() -> torch.Tensor:
        return pipe(["red apple, noto style, on light blue"], generator=torch.Generator().manual_seed(0), **call).images

    before = draw()
    pipe.load_lora_weights(student)
    after = draw()
    assert after.shape == (1, 3, 32, 32)
    assert not torch.equal(before, after)

    kept = {f: f.stat().st_mtime_ns for f in (output / "runs").glob("*/student/*.safetensors")}
    again = quickstart(output, *SHORT)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "trainers.distill --config configs/emoji" not in again.stdout
    assert {f: f.stat().st_mtime_ns for f in (output / "runs").glob("*/student/*.safetensors")} == kept


def test_a_damaged_asset_is_said_before_anything_starts(tmp_path):
    for folder in ("assets", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for folder in ("scripts", "pipelines", "trainers", "eval"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    weights = tmp_path / "assets" / "emoji_sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said = quickstart(tmp_path / "out", root=tmp_path)
    assert said.returncode == 2
    assert "damaged assets/emoji_sd/unet/diffusion_pytorch_model.safetensors" in said.stderr
    assert "git checkout -- assets/emoji_sd/unet/diffusion_pytorch_model.safetensors" in said.stderr
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "out").exists()
