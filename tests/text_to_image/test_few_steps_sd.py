"""Students of 2, 4 and 8 steps of Stable Diffusion: stock diffusers draws what the trainer does; what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler
from torch.testing import assert_close

from eval.images.sampler import load_sampler
from pipelines.common.config import load_config
from pipelines.common.errors import UserError
from pipelines.students import load_student
from trainers.config.run import DistillConfig
from trainers.engine import checkpoint
from trainers.families import load_family

Family = load_family("stable_diffusion")
pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerator")

PROMPTS = ["a cat", "a dog on a mat", "a red house"]  # conftest's prompt_file
CASES = [("sd15", 2), ("sd15", 8), ("sd15", [999, 700, 333]), ("sd21", 4), ("sdxl", 4), ("sdxl", [900, 100])]


def family(config: dict) -> Family:
    file = Path(config["output_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return Family(load_config(DistillConfig, str(file), []), Accelerator())


def exported(made: Family, folder: Path) -> Path:
    made.export(folder, made.facts | {"base_model": made.config.teacher.path})
    return folder


def randomised(made: Family) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.student.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def noise(steps: int, seed: int = 11) -> torch.Tensor:
    """What a stock pipeline draws from a generator of this seed, after the latents it is given."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return torch.stack([first, *(torch.randn(3, 4, 8, 8, generator=generator) for _ in range(steps - 1))])


@pytest.mark.parametrize(("kind", "steps"), CASES, ids=str)
def test_stock_diffusers_draws_the_trainers_x0(kind, steps, recipe, tmp_path):
    """To 1e-5 of the largest value with the same noise: by stock classes alone, as the card has it, by load_student, fused."""
    config = recipe("diff_instruct", kind)
    made = family(config | {"student": config["student"] | {"steps": steps}})
    randomised(made)
    levels, n = list(made.student.levels), made.student.steps
    z = noise(n)
    with torch.no_grad():
        expected = made.student.sample(z, made.condition(torch.arange(3)))
        one = made.student(z[0], made.condition(torch.arange(3)))
    assert float((expected - one).abs().max()) > 0.1
    folder = exported(made, tmp_path / "student")
    info = json.loads((folder / "student.json").read_text())
    assert (info["levels"], info["readout_t"]) == (levels, levels[0])
    call = {"timesteps": levels} if isinstance(steps, list) else {"num_inference_steps": steps}
    assert ", ".join(f"{k}={v}" for k, v in call.items()) in (folder / "README.md").read_text()
    assert f"Student of {n} steps" in (folder / "README.md").read_text()

    stock = DiffusionPipeline.from_pretrained(config["teacher"]["path"])
    stock.load_lora_weights(str(folder))
    stock.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    loaded = load_student(folder)
    for pipe in (stock, loaded):
        for fused in (False, True):
            if fused:
                pipe.fuse_lora()
            drawn = pipe(
                PROMPTS,
                guidance_scale=1.0,
                latents=z[0],
                generator=torch.Generator().manual_seed(11),
                output_type="latent",
                **call,
            ).images
            assert float((drawn - expected).abs().max() / expected.abs().max()) < 1e-5
    sampler = load_sampler(config["teacher"]["path"], str(folder))
    assert {k: sampler.call[k] for k in call} == call
    assert sampler.call["guidance_scale"] == 1.0


def test_another_number_of_steps_is_refused(recipe, tmp_path):
    config = recipe("diff_instruct")
    made = family(config | {"student": config["student"] | {"steps": 4}})
    folder = exported(made, tmp_path / "student")
    for steps in (1, 2, 8):
        with pytest.raises(UserError, match=rf"4 steps \(at 999, 749, 499, 249\), not {steps}"):
            load_sampler(config["teacher"]["path"], str(folder), steps=steps)
    assert load_sampler(config["teacher"]["path"], str(folder), steps=4).call["num_inference_steps"] == 4


def test_a_scheduler_that_makes_other_steps_is_told(recipe, tmp_path):
    config = recipe("diff_instruct")
    made = family(config | {"student": config["student"] | {"steps": 4}})
    folder = exported(made, tmp_path / "student")
    with pytest.warns(UserWarning, match="4 steps of EulerDiscreteScheduler are not the x0"):
        load_student(folder, scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"))


@pytest.mark.parametrize("levels", [[999, 999], [749, 499], "999", [999, 499.5], [999, True]])
def test_levels_that_cannot_be_are_refused(levels, recipe, tmp_path):
    config = recipe("diff_instruct")
    folder = exported(family(config | {"student": config["student"] | {"steps": 2}}), tmp_path / "student")
    info = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps(info | {"levels": levels}))
    with pytest.raises(UserError, match=r"levels are .*, expected descending timesteps from readout_t=999"):
        load_student(folder)


@pytest.mark.parametrize(
    ("objective", "student", "more", "said"),
    [
        ("diff_instruct", {"steps": 4, "readout_t": 999}, {}, "readout_t has no effect without steps=1"),
        ("diff_instruct", {"inputs": "simulated"}, {}, "inputs has no effect without a second step"),
        ("diff_instruct", {"steps": 4, "inputs": "data"}, {}, "inputs: data needs images"),
        ("diff_instruct", {"steps": [499, 999]}, {}, "must descend"),
        ("diff_instruct", {"steps": [999, 499.5]}, {}, "499.5 is no timestep"),
        ("diff_instruct", {"steps": [1200, 499]}, {}, r"level t=1200 is outside"),
        ("diff_instruct", {"steps": 1001}, {}, "1001 steps are more than the 1000"),
        ("diff_instruct", {"steps": 0}, {}, "steps"),
        ("diff_instruct", {"steps": True}, {}, "steps is true, expected a number"),
        ("diff_instruct", {"steps": 2, "sigma_init": 2.5}, {}, "student.sigma_init"),
        (
            "vardiu",
            {"steps": 2},
            {"estimator": "bound", "pool": "batch"},
            "estimator='bound' knows the density of a step's noise",
        ),
        ("vardiu", {"steps": 2}, {"num_samples": 2, "pool": "batch"}, "estimator='amortized_score' with num_samples=2 knows"),
        ("varflow", {"steps": 2}, {"samples_per_condition": 2}, "samples of a condition must be independent"),
    ],
)
def test_what_is_refused(objective, student, more, said, recipe, distil, capsys):
    config = recipe(objective)
    config |= {"student": config["student"] | student, "objective": config["objective"] | more}
    with pytest.raises(SystemExit) as stopped:
        distil(config)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert re.search(said, err), err
    assert not (Path(config["output_dir"]) / "metrics.jsonl").exists()


RUNS = [
    ("vardiu", {"steps": 3}, {}),
    ("vardiu", {"steps": 3}, {"pool": "batch"}),
    ("diff_instruct", {"steps": [999, 400]}, {}),
    ("varflow", {"steps": 4}, {}),
    ("varflow", {"steps": 4, "inputs": "simulated"}, {}),
]


@pytest.mark.parametrize(("objective", "student"), [("vardiu", {"steps": 3}), ("varflow", {"steps": [999, 400]})])
def test_a_run_of_two_steps(objective, student, recipe, distil):
    config = recipe(objective, steps=2)
    folder = distil(config | {"student": config["student"] | student})
    info = json.loads((folder / "student" / "student.json").read_text())
    assert info["levels"] == ([999, 666, 333] if objective == "vardiu" else [999, 400])
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "student", "more"), RUNS)
def test_training_by_the_command(objective, student, more, recipe, distil, tmp_path):
    """Micro-batches and a stop in between change no digit of what is logged, nor of the student."""
    config = recipe(objective, checkpoint_every=2, steps=4, sample_every=2, num_samples=2)
    config |= {"student": config["student"] | student, "objective": config["objective"] | more}
    config |= {"gradient_checkpointing": objective == "diff_instruct"}
    whole = distil(config)
    again = Path(f"{config['output_dir']}_stopped")
    distil(config | {"output_dir": str(again), "steps": 2})
    distil(config | {"output_dir": str(again), "resume": "latest"})
    assert (again / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    a, b = (checkpoint.load(f / "checkpoints" / "step_00000004")[0]["networks"] for f in (whole, again))
    for name, tensor in a.items():
        assert_close(b[name], tensor, rtol=0, atol=0)
    micro = distil(config | {"output_dir": f"{config['output_dir']}_micro", "micro_batch_size": 2})
    first, second = ([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, micro))
    key = next(k for k in first[0] if k.endswith("/loss") and "warm" not in k)
    assert second[-1][key] == pytest.approx(first[-1][key], rel=1e-3)
    assert (whole / "samples" / "step_00000004.png").is_file()
    assert len(json.loads((whole / "student" / "student.json").read_text())["levels"]) == len(
        student["steps"] if isinstance(student["steps"], list) else range(student["steps"])
    )
