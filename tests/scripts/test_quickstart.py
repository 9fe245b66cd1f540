"""The quickstart as a newcomer runs it, short: the printed commands, resuming, a stock pipeline with the LoRA, damaged assets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
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


SLEEPER = """
import sys
import time
from pathlib import Path
from scripts import jobs

class Sleeper(jobs.Job):
    is_done = False

    def __post_init__(self):
        super().__post_init__()
        part = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(300)", str(self.folder)]
        # as a launcher does, whose part has not come to watch it yet
        self.command = [sys.executable, "-c", f"import subprocess; subprocess.run({part})", str(self.folder)]

folder = Path(sys.argv[1])
made = [Sleeper(f"job {i}", Path("none.yaml"), folder / f"job_{i}", ["steps=1"]) for i in range(2)]
if sys.argv[2] == "run_all":
    jobs.exit_cleanly(lambda: jobs.run_all(made, 2, threads=1))
sys.stdout = sys.stderr
made[1].log.write_text("up")
with made[0].log.open("w") as log:
    jobs.subprocess.Popen = lambda *a, popen=jobs.subprocess.Popen, **k: popen(*a, stdout=log, **k)
    jobs.exit_cleanly(lambda: jobs.run(made[0].command, 1))
"""


@pytest.mark.parametrize("how", ["run_all", "run"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_the_script_stops_its_parts(number, how, tmp_path):
    """Sent to the script alone, as a batch system does; its parts would train on for hours."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path), how], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    logs = [tmp_path / f"job_{i}.log" for i in range(2)]
    deadline = time.monotonic() + 60
    while not all(log.is_file() and "up" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Stopped. The same command goes on from the last checkpoints." in said
    assert "Traceback" not in said
    time.sleep(0.5)
    left = [f for f in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(f)]
    assert not left


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # ended meanwhile
        return b""
