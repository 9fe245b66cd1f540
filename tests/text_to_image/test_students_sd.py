"""Students of Stable Diffusion as users meet them: trained by the command, loaded by diffusers alone, in another process.

The reference is the trainer's own one-step readout of the averaged weights, rebuilt from the last checkpoint.
"""

import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines import text_to_image as t2i
from pipelines.adapters import Whole
from pipelines.common.config import load_config
from pipelines.denoiser import FewStepGenerator
from pipelines.students import load_student
from trainers import distill
from trainers.config.run import DistillConfig
from trainers.engine import checkpoint
from trainers.engine.ema import Ema, constant_decay
from trainers.families import load_family

StableDiffusionModels = load_family("stable_diffusion")
pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerator")

PROMPTS = ["a cat", "a dog on a mat", "a red house"]  # conftest's prompt_file
RANK, ALPHA = 4, 2.0  # conftest's LORA
LORA, WEIGHTS = "pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors"
# name: (objective, teacher, settings of the student); enough of a learning rate to be far from the teacher after 3 steps
FAST = {"optimizer": {"lr": 1e-2}}
RUNS = {
    "varflow": ("varflow", "sd15", FAST),
    "diff_instruct": ("diff_instruct", "sd15", FAST),
    "vardiu": ("vardiu", "sd15", FAST),
    "sd21": ("diff_instruct", "sd21", FAST),
    "sdxl": ("diff_instruct", "sdxl", FAST),
    "whole": ("diff_instruct", "sd15", {"optimizer": {"lr": 1e-3}, "lora": None}),
    "t=625": ("diff_instruct", "sd15", FAST | {"readout_t": 625}),
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b).abs().max() / b.abs().max())


# Runs and what the trainer's student makes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[str, SimpleNamespace]:
    return {}


@pytest.fixture
def trained(runs, recipe, tmp_path_factory):
    """trained(name): one of RUNS, trained when it is first asked for: folder, teacher, z, x0 of the trainer's student there, and
    x0 of the teacher."""

    def train(objective: str, kind: str, student: dict) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("run")
        config = recipe(objective, kind, output_dir=str(folder / "run"), checkpoint_every=3)
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(config | {"student": config["student"] | student}))
        distill.main(["--config", str(file)])
        models = StableDiffusionModels(load_config(DistillConfig, str(file), []), Accelerator())
        ema = Ema(models.student, constant_decay(0.5))
        tensors, _ = checkpoint.load(folder / "run" / "checkpoints" / "step_00000003")
        z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        _, condition = models.examples.rows(torch.arange(3) * len(models.examples) // 3)  # perhaps several rows a prompt
        with torch.no_grad():
            teacher = FewStepGenerator(t2i.denoiser(models.pipe, models.base.teacher()), [999])(z, condition)
            checkpoint.restore_tensors(ema.average, {n: tensors["networks"][f"student/{n}"] for n in ema.average}, "")
            with ema.swapped():
                not_averaged = models.student(z, condition)
            checkpoint.restore_tensors(ema.average, tensors["ema"], "")
            with ema.swapped():
                x0 = models.student(z, condition)
        assert relative(teacher, x0) > 1e-2
        assert relative(not_averaged, x0) > 1e-3
        return SimpleNamespace(folder=folder / "run", teacher=config["teacher"]["path"], z=z, x0=x0, condition=condition)

    def get(name: str) -> SimpleNamespace:
        if name not in runs:
            runs[name] = train(*RUNS[name])
        return runs[name]

    return get


# Another process ----------------------------------------------------------------------------------------------------------------

LOAD = """
pipe = diffusers.DiffusionPipeline.from_pretrained(teacher)
pipe.load_lora_weights(student)
pipe.scheduler = diffusers.LCMScheduler.from_pretrained(student, subfolder="scheduler")
step = lambda: pipe(prompts, num_inference_steps=1, guidance_scale=1.0, latents=z, output_type="latent").images
"""
STEP = LOAD.splitlines()[-1]


@pytest.mark.parametrize("name", ["varflow", "diff_instruct", "vardiu", "sd21", "sdxl"])
@pytest.mark.slow
def test_lora_in_the_stock_pipeline(name, trained, elsewhere):
    """One step of diffusers alone is the trainer's x0, to 1e-5 of the largest, loaded without a complaint; rank and alpha
    survive, and so does the image when the LoRA is fused and unloaded."""
    run = trained(name)
    code = f"""{LOAD}
out["x0"] = step()
config, = pipe.unet.peft_config.values()
out["rank_alpha"] = torch.tensor([config.r, config.lora_alpha])
pipe.fuse_lora()
out["fused"] = step()
pipe.unload_lora_weights()
out["unloaded"] = step()
out["timesteps"] = pipe.scheduler.timesteps
"""
    out = elsewhere(run, code)
    assert out["rank_alpha"].tolist() == [RANK, ALPHA]
    assert out["timesteps"].tolist() == [999]
    for key in ("x0", "fused", "unloaded"):
        assert relative(out[key], run.x0) < 1e-5, key
    stored = json.loads((run.folder / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert stored["_class_name"] == "LCMScheduler"
    tensors = load_file(run.folder / "student" / LORA)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert any("conv1" in key for key in tensors)
    assert any("attn2.to_q" in key for key in tensors)


@pytest.fixture
def style(tiny, tmp_path):
    """A LoRA as others publish them: attention only, alpha = rank, no metadata, in diffusers' own key names."""
    unet = UNet2DConditionModel.from_pretrained(tiny["sd15"], subfolder="unet")
    unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "style", unet_lora_layers=layers)
    return tmp_path / "style"


def merged(teacher: str, loras: list[tuple[Path, float, float]]) -> UNet2DConditionModel:
    """The teacher's network with W + weight alpha / rank B A for the tensors in each (file, alpha / rank, weight)."""
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    parameters = dict(unet.named_parameters())
    for file, scale, weight in loras:
        tensors = load_file(file)
        downs = {k: v for k, v in tensors.items() if re.search(r"lora_A|lora\.down", k)}
        assert 2 * len(downs) == len(tensors)
        for key, down in downs.items():
            up = tensors[key.replace("lora_A", "lora_B").replace("lora.down", "lora.up")]
            target = parameters[re.sub(r"^unet\.|\.lora_A|\.lora\.down", "", key)]
            target.data += scale * weight * torch.einsum("or,r...->o...", up.flatten(1), down)
    return unet


@pytest.mark.slow
def test_style_on_top(trained, style, elsewhere):
    """With another LoRA, set_adapters adds the two in the weights asked for: equal to the sum of the files' own products."""
    run = trained("diff_instruct")
    code = """
pipe = diffusers.DiffusionPipeline.from_pretrained(teacher)
pipe.load_lora_weights(student, adapter_name="student")
pipe.load_lora_weights(style, adapter_name="style")
pipe.set_adapters(["student", "style"], [1.0, 0.5])
pipe.scheduler = diffusers.LCMScheduler.from_pretrained(student, subfolder="scheduler")
"""
    code += STEP + "\nout['both'] = step()\npipe.set_adapters(['student'])\nout['student'] = step()"
    out = elsewhere(run, code, style=str(style), allow="Already found a `peft_config`")
    assert relative(out["student"], run.x0) < 1e-5
    pipe = t2i.load_pipeline(run.teacher, without=["unet", "vae"])
    ours = (run.folder / "student" / LORA, ALPHA / RANK, 1.0)
    for loras, key in (([ours], "student"), ([ours, (style / LORA, 1.0, 0.5)], "both")):
        network = merged(run.teacher, loras)
        with torch.no_grad():
            x0 = FewStepGenerator(t2i.denoiser(pipe, Whole(network)), [999])(run.z, run.condition)
        assert relative(out[key], x0) < 1e-5
    assert relative(out["both"], out["student"]) > 1e-2


@pytest.mark.parametrize("name", ["vardiu", "sdxl", "whole", "t=625"])
def test_card_can_be_run(name, trained, elsewhere):
    """The python block of README.md, run where the student lies, makes an image; its pipeline's latents are the trainer's x0."""
    run = trained(name)
    (block,) = re.findall(r"```python\n(.*?)```", (run.folder / "student" / "README.md").read_text(), re.DOTALL)
    (how,) = re.findall(r'pipe\("a prompt", (.*)\)\.images\[0\]', block)
    assert how.startswith("timesteps=[625]" if name == "t=625" else "num_inference_steps=1")
    code = f"{block}\nout['size'] = torch.tensor(image.size)\n"
    code += f"out['x0'] = pipe(prompts, {how}, latents=z, output_type='latent').images"
    out = elsewhere(run, code, cwd=run.folder, allow=r"first timestep on the custom timestep schedule is 625")
    assert out["size"].tolist() == [16, 16]
    assert relative(out["x0"], run.x0) < 1e-5


# load_student ------------------------------------------------------------------------------------------------------------------


def one_step(pipe: DiffusionPipeline, run: SimpleNamespace, **options) -> Tensor:
    options = options or {"num_inference_steps": 1}
    return pipe(PROMPTS, guidance_scale=1.0, latents=run.z, output_type="latent", **options).images


@pytest.mark.parametrize("name", ["vardiu", "sd21", "sdxl", "whole", "t=625"])
def test_load_student(name, trained):
    """From its folder and from the run's: the trainer's x0 in one step, and not a single warning."""
    run = trained(name)
    for source in (run.folder, str(run.folder / "student")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe = load_student(source)
            out = one_step(pipe, run, **({"timesteps": [625]} if name == "t=625" else {}))
        assert relative(out, run.x0) < 1e-5
        assert name == "whole" or pipe.get_active_adapters() == ["student"]
        assert not pipe.unet.training


def test_whole_student_is_saved_whole(trained, tmp_path):
    """A pipeline of load_student can be saved and is then a stock folder of its own."""
    run = trained("whole")
    load_student(run.folder).save_pretrained(tmp_path / "pipeline")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert relative(one_step(pipe, run), run.x0) < 1e-5


def test_scheduler_that_does_not_fit(trained):
    """Another scheduler is used as given; UserWarning if one step of it is not x0, silence if it is."""
    run = trained("diff_instruct")
    config = t2i.load_pipeline(run.teacher, without=["unet", "vae", "text_encoder"]).scheduler.config
    trailing = {"timestep_spacing": "trailing", "clip_sample": False}
    wrong = [
        EulerDiscreteScheduler.from_config(config),
        DDIMScheduler.from_config(config, **trailing, set_alpha_to_one=False),
        DDIMScheduler.from_config(config, **trailing, set_alpha_to_one=True, prediction_type="v_prediction"),
    ]
    for scheduler in wrong:
        with pytest.warns(UserWarning, match=rf"one step of {type(scheduler).__name__} is not the x0 .*student/scheduler"):
            pipe = load_student(run.folder, scheduler=scheduler)
        assert pipe.scheduler is scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = load_student(run.folder, scheduler=DDIMScheduler.from_config(config, **trailing, set_alpha_to_one=True))
    assert relative(one_step(pipe, run), run.x0) < 1e-5


def test_load_student_in_half_precision(trained):
    for name in ("diff_instruct", "whole"):
        pipe, run = load_student(trained(name).folder, dtype=torch.bfloat16), trained(name)
        assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
        run = SimpleNamespace(**vars(run) | {"z": run.z.bfloat16()})
        assert relative(one_step(pipe, run), run.x0) < 0.03


def test_a_lora_on_another_base_model_is_said(trained, tiny, tmp_path):
    """One number of the base has changed since; the same weights in another place are not complained of."""
    run = trained("diff_instruct")
    base = Path(shutil.copytree(tiny["sd15"], tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_student(run.folder, base_model=str(base))
    file = base / "unet" / WEIGHTS
    weights = load_file(file)
    weights[sorted(weights)[0]].view(-1)[0] += 1e-3
    save_file(weights, file, {"format": "pt"})
    with pytest.warns(
        UserWarning, match=r"student' was trained on other weights than those now at its base model \('.*sd15' then\)"
    ):
        load_student(run.folder, base_model=str(base))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def edit(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def widened(folder: Path) -> None:
    """The LoRA of a network whose layers are twice as wide."""
    layers = {k: v.repeat(1, 2) if ".lora_A." in k and v.ndim == 2 else v for k, v in load_file(folder / LORA).items()}
    with safe_open(folder / LORA, "pt") as stored:
        metadata = stored.metadata()
    save_file(layers, folder / LORA, metadata)


# (which student, what is done to its folder, what the message says)
MISSING = {
    "facts": ("vardiu", lambda f: (f / "student.json").unlink(), r"holds no student: expected student\.json"),
    "scheduler": ("vardiu", lambda f: shutil.rmtree(f / "scheduler"), r"has no scheduler/scheduler_config\.json"),
    "lora": ("vardiu", lambda f: (f / LORA).unlink(), rf"is not complete or does not fit.*: .*{LORA}.* copy the student again"),
    "unet": (
        "whole",
        lambda f: shutil.rmtree(f / "unet"),
        r"is not complete .*: .*config\.json.* copy the student again",
    ),
}
DAMAGED = {
    "facts cut": ("vardiu", lambda f: (f / "student.json").write_text("{"), r"student\.json' is not valid JSON"),
    "facts of others": ("vardiu", lambda f: (f / "student.json").write_text('{"family": "sd"}'), r"does not say 'base_model'"),
    "lora of another width": ("vardiu", widened, r"does not fit a StableDiffusionPipeline: .*; it was made for another model"),
    "unet of another width": (
        "whole",
        lambda f: edit(f / "unet" / "config.json", block_out_channels=[16, 64]),
        r"does not fit its base model: .*; save or copy the student again",
    ),
    "scheduler cut": (
        "vardiu",
        lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"),
        r"scheduler_config\.json.*; save or copy the student again",
    ),
    "lora cut": ("vardiu", lambda f: cut(f / LORA), rf"{LORA}' is damaged .*copy or download it again"),
    "unet cut": ("whole", lambda f: cut(f / "unet" / WEIGHTS), rf"unet/{WEIGHTS}' is damaged .*copy or download it again"),
}


@pytest.mark.parametrize("name", [*MISSING, *DAMAGED])
def test_damaged_students_are_named(name, trained, tmp_path):
    run_name, damage, message = (MISSING | DAMAGED)[name]
    folder = Path(shutil.copytree(trained(run_name).folder / "student", tmp_path / "broken"))
    damage(folder)
    with pytest.raises(FileNotFoundError if name in MISSING else ValueError, match=message) as raised:
        load_student(folder)
    assert "broken" in str(raised.value)


@pytest.mark.slow
def test_base_model_that_has_moved(trained, tmp_path):
    """base_model= says where it lies now, and without it the message says so; nothing there is no student."""
    run = trained("vardiu")
    folder = Path(shutil.copytree(run.folder / "student", tmp_path / "student"))
    info = json.loads((folder / "student.json").read_text())
    assert info["base_model"] == run.teacher
    assert (info["family"], info["weights"], info["readout_t"], info["steps"]) == ("sd", "lora", 999, 3)
    (folder / "student.json").write_text(json.dumps(info | {"base_model": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match=r"base model of .*no such folder '.*gone'.*give base_model="):
        load_student(folder)
    assert relative(one_step(load_student(folder, base_model=run.teacher), run), run.x0) < 1e-5
    with pytest.raises(FileNotFoundError, match=r"holds no student: expected student\.json in it or in its student/"):
        load_student(tmp_path / "elsewhere")
