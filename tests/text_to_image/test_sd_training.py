"""What must not show in a run of Stable Diffusion: a kill, micro-batches, or blocks computed again. Through the real command."""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from pipelines import adapters
from pipelines.students import read_info
from trainers.data.examples import evenly, shown_classes
from trainers.engine import checkpoint

ROOT = Path(__file__).resolve().parents[2]
# Some layers of each sort: fewer adapters than recipes have, for speed.
LORA = {"rank": 4, "alpha": 4.0, "targets": ["to_q", "to_v", "proj_in", "conv1", "conv_shortcut", "time_emb_proj"]}

pytestmark = pytest.mark.usefixtures("fresh_accelerator", "one_thread")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def last_checkpoint(output: Path) -> Path:
    return checkpoint.list_checkpoints(output / "checkpoints")[-1]


def weights(output: Path) -> dict[str, Tensor]:
    """The trained networks and the average of the student at the end of a run."""
    groups = {name: load_file(last_checkpoint(output) / f"{name}.safetensors") for name in ("networks", "ema")}
    return {f"{name}/{key}": value for name, group in groups.items() for key, value in group.items()}


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_a_run_shows_pictures_of_prompts_from_the_whole_file():
    """Neighbours are often one caption in other words."""
    assert evenly(3, 11).tolist() == [0, 3, 7]
    assert evenly(7, 7).tolist() == evenly(11, 7).tolist() == list(range(7))
    rows = evenly(64, 3_524).tolist()
    assert (rows[0], len(set(rows))) == (0, 64)
    assert {b - a for a, b in pairwise(rows)} == {55, 56}
    assert shown_classes(4, 1000).tolist() == [0, 250, 500, 750]  # so do classes
    assert shown_classes(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


# a gradient that is little but rounding must not become a full step of random sign: updates in proportion where it is small
ADAM = {"lr": 1e-3, "betas": [0.0, 0.99], "eps": 1e-2}
SMALL = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_levels": [1]}
VARIANTS = {
    "varflow": ("sd15", "varflow", {}),
    "varflow of images and text": ("sdxl", "varflow", {"cross": "full", "condition_scale": 1.0}),
    "varflow of features": ("sd15", "varflow", {"cross": "full", "features": True, "grids": [1, 2, 4]}),
    "diff_instruct": ("sd21", "diff_instruct", {}),
    "sid": ("sd15", "sid", {}),
    "vardiu": ("sdxl", "vardiu", {"pool": "batch"}),
    "vardiu with networks of its own": ("sd21", "vardiu", {"posterior": {"network": SMALL}}),
}


def variant(name: str, recipe, warmup: int = 0, **more) -> dict:
    kind, objective, options = VARIANTS[name]
    config = recipe(objective, kind, **more)
    config["objective"] = copy.deepcopy(config["objective"]) | copy.deepcopy(options)
    own = name.endswith("of its own")
    config["student"] = {"lora": None if own else LORA, "optimizer": ADAM}
    for key in ("fake_score", "posterior"):
        if key in config["objective"]:
            config["objective"][key] |= {"optimizer": ADAM, "warmup_updates": warmup} | ({} if own else {"lora": LORA})
    return config


def end_state(output: Path) -> dict:
    """Everything a run leaves that must not depend on whether it was stopped, bit for bit."""
    last, student = last_checkpoint(output), output / "student" / "pytorch_lora_weights.safetensors"
    files = [*sorted(last.glob("*.safetensors")), output / "metrics.jsonl"]
    state: dict = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert len(state) == 5
    moments = load_file(last / "optimizers.safetensors")
    assert {name.split("/")[0] for name in moments} == {"student", "posterior"}
    with safe_open(student, "pt") as file:  # its header lists the metadata in no fixed order
        state |= {"metadata": file.metadata(), "student": {k: file.get_tensor(k).numpy().tobytes() for k in file.keys()}}
    return state | {"folder": last.name, "calls": read_info(output / "student", "student")["calls"]}


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_never_been_killed(recipe, tmp_path, distil, written):
    """Two adapters on one network with an optimiser each; killed between two checkpoints, when half of the steps are done."""
    config = variant("vardiu", recipe, warmup=1, steps=6, checkpoint_every=2)
    whole = end_state(distil(config, output_dir=str(tmp_path / "whole")))
    output = Path(config["output_dir"])
    command = [sys.executable, "-m", "trainers.distill", *written(config)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):  # a checkpoint at 2, the next at 4
        assert process.poll() is None, f"the run ended too early, with status {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "student").exists()
    assert last_checkpoint(output).name == "step_00000002"
    distil(config, "resume=latest")
    assert end_state(output) == whole


@pytest.fixture
def recomputed(monkeypatch) -> list:
    """What diffusers and the shared network hand to torch's checkpoint: one entry for each block that is recomputed."""
    calls = []
    for module in (adapters, torch.utils.checkpoint):
        original = module.checkpoint
        monkeypatch.setattr(module, "checkpoint", lambda *a, original=original, **k: (calls.append(a[0]), original(*a, **k))[1])
    return calls


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.slow
def test_neither_micro_batches_nor_recomputed_blocks_show(name, recipe, tmp_path, recomputed, distil):
    """2 of 4 at a time, or each block computed again in backward: logged numbers and weights up to rounding."""
    config = variant(name, recipe, steps=2, checkpoint_every=2)
    config["data"]["cache"] = str(tmp_path / "shared")
    whole = distil(config)
    assert recomputed == []
    split = distil(config, output_dir=str(tmp_path / "split"), micro_batch_size=2)
    saving = distil(config, output_dir=str(tmp_path / "saving"), gradient_checkpointing=True)
    assert len(recomputed) > 0
    ended, first = weights(whole), lines(whole / "metrics.jsonl")[0]
    # lora_B starts at zero, as does the last layer of a small posterior: what they are is how far they went
    moved = max(v.abs().max().item() for k, v in ended.items() if "lora_B" in k or "posterior/network.network.conv_out" in k)
    assert moved > 1e-3
    for other, tolerance in ((split, 2e-3), (saving, 1e-5)):
        assert gap(weights(other), ended) < tolerance * moved
        values = lines(other / "metrics.jsonl")[0]
        assert values.keys() == first.keys()
        for key in first:
            if other == saving or not key.endswith(("x0_std", "x0_gap")):  # not the standard deviation over fewer samples
                assert values[key] == pytest.approx(first[key], rel=1e-3, abs=1e-5), key


@pytest.mark.slow
def test_compiled_blocks_do_not_show(recipe, tmp_path, distil):
    """One compilation serves the teacher and both adapters, recomputed in backward: it must tell them apart."""
    config = variant("vardiu", recipe, steps=2, checkpoint_every=2, gradient_checkpointing=True)
    config["data"]["cache"] = str(tmp_path / "shared")
    plain = distil(config)
    torch._dynamo.reset()
    counters.clear()
    compiled = distil(config, output_dir=str(tmp_path / "compiled"), compile="aot_eager")
    assert counters["stats"]["unique_graphs"] >= 3
    assert not counters["recompile_limit"]
    ended = weights(plain)
    assert gap(weights(compiled), ended) < 1e-5 * max(v.abs().max().item() for k, v in ended.items() if "lora_B" in k)
