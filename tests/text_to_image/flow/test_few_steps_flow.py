"""Students of several steps of flow-matching teachers: stock diffusers draws what the trainer does, given the same noise."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from eval.images.sampler import load_sampler
from eval.images.seeds import image_generator
from pipelines.common.config import load_config
from pipelines.common.errors import UserError
from pipelines.students import load_student
from trainers.config.run import DistillConfig
from trainers.families import family_for
from trainers.families.base import unit_noise

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

PROMPTS = ["a cat", "a dog on a mat", "a red house"]  # conftest's prompt_file
GUIDANCE = {"z-image": 1.0, "sd35": 1.0, "sd3 without t5": 1.0, "flux dev": 3.5, "flux schnell": 1.0}
CASES = [("sd35", 2), ("sd35", [1.0, 0.8, 0.3]), ("flux dev", 4), ("flux schnell", 8), ("sd35", [0.9]), ("z-image", 4)]


@pytest.fixture
def student(recipe, tmp_path):
    """student(kind, steps, **more): one with random adapters, and its folder."""

    def make(kind: str, steps, **more) -> SimpleNamespace:
        config = recipe("diff_instruct", kind, **more)
        config["student"] = config["student"] | {"steps": steps}
        config["teacher"]["guidance_scale"] = GUIDANCE[kind]
        file = Path(config["output_dir"]).with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config))
        parsed = load_config(DistillConfig, str(file), [])
        made = family_for(parsed)(parsed, Accelerator())
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in made.student.parameters():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        made.export(tmp_path / "student", made.facts | {"base_model": parsed.teacher.path})
        return SimpleNamespace(made=made, folder=tmp_path / "student", teacher=parsed.teacher.path)

    return make


def packed(kind: str, z: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(z, *z.shape) if kind.startswith("flux") else z


def unpacked(kind: str, latents: Tensor) -> Tensor:
    return FluxPipeline._unpack_latents(latents, 16, 16, 2) if kind.startswith("flux") else latents


@pytest.mark.parametrize(("kind", "steps"), CASES, ids=str)
def test_stock_diffusers_draws_the_trainers_x0(kind, steps, student):
    """To 1e-5 of the largest: by stock classes alone, as the card has it, and by load_student. Noise between steps comes from
    torch's own generator, since these pipelines do not hand on theirs."""
    run = student(kind, steps)
    n, levels = run.made.student.steps, list(run.made.student.levels)
    first = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    again = torch.Generator().manual_seed(11)
    shape = packed(kind, first).shape
    drawn = [unpacked(kind, torch.randn(shape, generator=again)) for _ in range(n - 1)]
    with torch.no_grad():
        expected = run.made.student.sample(torch.stack([first, *drawn]), run.made.condition(torch.arange(3)))
    call = {"sigmas": levels, "guidance_scale": 0.0 if kind == "z-image" else GUIDANCE[kind]}
    assert ", ".join(f"{k}={v}" for k, v in call.items()) in (run.folder / "README.md").read_text()
    info = json.loads((run.folder / "student.json").read_text())
    assert (info["readout_t"], info.get("levels", levels)) == (levels[0], levels)
    stock = DiffusionPipeline.from_pretrained(run.teacher)
    stock.load_lora_weights(str(run.folder))
    stock.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(run.folder, subfolder="scheduler")
    for pipe in (stock, load_student(run.folder)):
        torch.manual_seed(11)
        options = {"height": 16, "width": 16, "output_type": "latent"} | call
        got = unpacked(kind, pipe(list(PROMPTS), latents=packed(kind, first), **options).images)
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["sd35", "flux dev", "z-image"])
def test_evaluation_draws_each_image_from_its_own_seed(kind, student):
    """Noise between steps too, whatever else is in its batch and whatever state torch's own generator has."""
    sampler = load_sampler(str(student(kind, 4).folder))
    assert len(sampler.call["sigmas"]) == 4
    torch.manual_seed(1)
    together = sampler(range(3), 0, PROMPTS)
    torch.manual_seed(2)
    assert torch.equal(sampler([2], 0, PROMPTS[2:])[0], together[2])
    assert not torch.equal(together[1], together[2])
    alone = sampler.pipe(PROMPTS[:1], generator=[image_generator(0, 0)], **sampler.call, output_type="np").images
    assert (torch.from_numpy(alone[0]).permute(2, 0, 1) * 255 - together[0]).abs().max() > 1  # the stock pipeline alone does not


@pytest.mark.parametrize(("kind", "steps"), [("sd3 without t5", 1), ("flux dev", 1), ("sd35", 2)])
def test_pictures_of_a_run_are_the_stock_pipelines(kind, steps, student):
    """Those that evaluations in a run measure, and its own, decoded; each from noise of its own, whatever the batch."""
    run = student(kind, steps, sample_every=1)
    whole = run.made.images(range(3))
    assert (whole.shape, run.made.preview().shape) == ((3, 3, 16, 16), (3, 3, 16, 16))
    assert torch.allclose(run.made.images(range(1, 3)), whole[1:], atol=1e-5)
    if steps == 1:
        z, pipe = unit_noise(run.made.config, range(3), (3, 8, 8))[0], load_student(run.folder)
        options = {"num_inference_steps": 1, "guidance_scale": GUIDANCE[kind], "height": 16, "width": 16, "output_type": "pt"}
        drawn = pipe(list(PROMPTS), latents=packed(kind, z), **options).images
        assert torch.allclose(drawn, whole, atol=1e-5)


def test_what_is_refused(student, tmp_path):
    """Other numbers of steps, other schedulers, levels that are none: by name."""
    run = student("sd35", 4)
    with pytest.raises(UserError, match=r"this student makes 4 steps \(at 1, 0\.9, 0\.75, 0\.5\), not 2"):
        load_sampler(str(run.folder), steps=2)
    with pytest.warns(UserWarning, match="4 steps of FlowMatchEulerDiscreteScheduler are not the x0"):
        load_student(run.folder, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    file = run.folder / "student.json"
    info = json.loads(file.read_text())
    for levels in ([1.0, 1.0], [0.9, 0.5], [1.0, "x"]):
        file.write_text(json.dumps(info | {"levels": levels}))
        with pytest.raises(UserError, match=r"levels are .*, expected descending timesteps from readout_t=1\.0"):
            load_student(run.folder)


@pytest.mark.parametrize(
    ("kind", "objective", "steps", "levels"),
    [
        ("sd35", "vardiu", 3, [1.0, 0.857143, 0.6]),  # 1, 2/3, 1/3 under a shift of 3
        ("flux dev", "diff_instruct", [1.0, 0.6], [1.0, 0.6]),
        ("sd3", "varflow", 4, [1.0, 0.9, 0.75, 0.5]),
    ],
)
@pytest.mark.slow
def test_runs_of_several_steps(kind, objective, steps, levels, recipe, distil):
    config = recipe(objective, kind, sample_every=2, num_samples=2)
    output = distil(config | {"student": config["student"] | {"steps": steps}})
    assert json.loads((output / "student" / "student.json").read_text())["levels"] == levels
    load_student(output)
