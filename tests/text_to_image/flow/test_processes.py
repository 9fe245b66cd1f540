"""Two processes with a transformer split over them (FSDP2): what they leave is what two whole copies leave."""

import json

import numpy as np
import pytest

from pipelines.students import load_student

# a gradient that is little but rounding must not become a full step of random sign
SMOOTH = {"lr": 1e-3, "betas": [0.0, 0.99], "eps": 1e-2}


@pytest.fixture
def two_steps(recipe, tmp_path):
    """two_steps(kind, objective, dtype): with recomputed blocks and a picture on the way."""

    def make(kind: str, objective: str, dtype: str) -> dict:
        config = recipe(objective, kind, checkpoint_every=2, sample_every=2, num_samples=2, gradient_checkpointing=True)
        config["data"]["cache"] = str(tmp_path / "shared")
        config["teacher"] |= {"guidance_scale": 2.0, "dtype": dtype}
        second = "fake_score" if objective == "diff_instruct" else "posterior"
        config["student"]["optimizer"] = SMOOTH
        config["objective"] = config["objective"] | {second: config["objective"][second] | {"optimizer": SMOOTH}}
        return config

    return make


@pytest.mark.parametrize(("kind", "objective"), [("sd35", "vardiu"), ("flux dev", "diff_instruct"), ("z-image", "vardiu")])
@pytest.mark.slow
def test_sharded_weights_do_not_show(kind, objective, two_steps, whole_and_sharded):
    whole_and_sharded(two_steps(kind, objective, "float32"))


@pytest.mark.slow
def test_sharded_weights_do_not_show_on_the_last_third(two_steps, whole_and_sharded):
    """A posterior that runs some of the blocks, of which each is gathered by itself."""
    config = two_steps("sd35", "vardiu", "float32")
    config["objective"]["posterior"] |= {"network": "shared"}
    whole_and_sharded(config)


@pytest.mark.slow
def test_bfloat16_weights_are_sharded_below_float32_adapters(two_steps, launched):
    """The two dtypes do not meet in one shard; the run ends with finite numbers and a student that loads."""
    output = launched(two_steps("sd35", "vardiu", "bfloat16"), "fsdp2.yaml")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    load_student(output)
