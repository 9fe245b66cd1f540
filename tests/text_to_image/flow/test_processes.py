"""Two processes with a transformer split over them (FSDP2): what they leave is what two whole copies leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pipelines.students import load_student
from trainers.engine import checkpoint

ROOT = Path(__file__).resolve().parents[3]
# a gradient that is little but rounding must not become a full step of random sign
SMOOTH = {"lr": 1e-3, "betas": [0.0, 0.99], "eps": 1e-2}


@pytest.fixture
def launched(recipe, tmp_path, written):
    """launched(kind, objective, config_file, dtype) -> the output_dir of two steps in two processes on this CPU."""

    def run(kind: str, objective: str, config_file: str, dtype: str) -> Path:
        config = recipe(objective, kind, checkpoint_every=2, sample_every=2, num_samples=2, gradient_checkpointing=True)
        output = tmp_path / Path(config_file).stem
        config["output_dir"] = str(output)
        config["data"]["cache"] = str(tmp_path / "shared")
        config["teacher"] |= {"guidance_scale": 2.0, "dtype": dtype}
        second = "fake_score" if objective == "diff_instruct" else "posterior"
        config["student"]["optimizer"] = SMOOTH
        config["objective"] = config["objective"] | {second: config["objective"][second] | {"optimizer": SMOOTH}}
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2"]
        command += [f"--config_file={ROOT / 'configs' / 'accelerate' / config_file}", "-m", "trainers.distill", *written(config)]
        environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        how = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 400}
        done = subprocess.run(command, env=os.environ | environment, **how)
        assert done.returncode == 0, done.stderr[-4000:]
        about = json.loads((output / "environment.json").read_text())
        assert (about["processes"], about["sharded"]) == (2, config_file == "fsdp2.yaml")
        return output

    return run


@pytest.mark.parametrize(("kind", "objective"), [("sd35", "vardiu"), ("flux dev", "diff_instruct")])
@pytest.mark.slow
def test_sharded_weights_do_not_show(kind, objective, launched):
    """With recomputed blocks and a picture on the way."""
    outputs = [launched(kind, objective, config_file, "float32") for config_file in ("cpu_2.yaml", "fsdp2.yaml")]
    for file in ("networks", "optimizers"):
        one, two = (
            load_file(checkpoint.list_checkpoints(output / "checkpoints")[-1] / f"{file}.safetensors") for output in outputs
        )
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert float((two[key] - value).abs().max()) <= 1e-3 * float(value.abs().max()), key


@pytest.mark.slow
def test_bfloat16_weights_are_sharded_below_float32_adapters(launched):
    """The two dtypes do not meet in one shard; the run ends with finite numbers and a student that loads."""
    output = launched("sd35", "vardiu", "fsdp2.yaml", "bfloat16")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    load_student(output)
