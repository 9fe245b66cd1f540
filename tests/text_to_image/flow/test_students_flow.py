"""Students of flow-matching teachers as users meet them: trained by the command, loaded by diffusers alone, in another process.

The reference is the trainer's own one-step readout of the averaged weights, rebuilt from the last checkpoint.
"""

import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from eval.__main__ import main
from eval.images.seeds import image_generator
from pipelines.common.config import load_config
from pipelines.students import load_student
from scripts import export_kohya, sample
from trainers import distill
from trainers.config.run import DistillConfig
from trainers.engine import checkpoint
from trainers.engine.ema import Ema, constant_decay
from trainers.families import family_for

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

PROMPTS = ["a cat", "a dog on a mat", "a red house"]  # conftest's prompt_file
RANK, ALPHA = 4, 2.0  # conftest's LORA
LORA = "pytorch_lora_weights.safetensors"
PIPELINES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "zimage": ZImagePipeline}
NETWORKS = {"sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel, "zimage": ZImageTransformer2DModel}
# enough of a learning rate to be far from the teacher after a few steps
FAST = {"optimizer": {"lr": 1e-2}}
# name: (objective, teacher, guidance, settings of the student)
RUNS = {
    "sd3": ("diff_instruct", "sd3", 2.0, FAST),
    "sd35": ("vardiu", "sd35", 2.0, FAST),
    "sd3 without t5": ("varflow", "sd3 without t5", 1.0, FAST),
    "flux dev": ("vardiu", "flux dev", 3.5, FAST),
    "flux schnell": ("varflow", "flux schnell", 1.0, FAST),
    "z-image": ("vardiu", "z-image", 2.0, FAST),
    "whole sd35": ("diff_instruct", "sd35", 2.0, {"optimizer": {"lr": 1e-3}, "lora": None}),
    "whole flux": ("diff_instruct", "flux dev", 3.5, {"optimizer": {"lr": 1e-3}, "lora": None}),
}
LORAS = [name for name in RUNS if not name.startswith("whole")]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b).abs().max() / b.abs().max())


# Runs and what the trainer's student makes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[str, SimpleNamespace]:
    return {}


@pytest.fixture
def trained(runs, recipe, tmp_path_factory):
    """trained(name): one of RUNS, trained when it is first asked for: its folder, teacher, z and the trainer's x0 there."""

    def train(objective: str, kind: str, guidance: float, student: dict) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("run")
        config = recipe(objective, kind, output_dir=str(folder / "run"), checkpoint_every=3, steps=3)
        config["teacher"]["guidance_scale"] = guidance
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(config | {"student": config["student"] | student}))
        distill.main(["--config", str(file)])
        parsed = load_config(DistillConfig, str(file), [])
        models = family_for(parsed)(parsed, Accelerator())
        ema = Ema(models.student, constant_decay(0.5))
        tensors, _ = checkpoint.load(folder / "run" / "checkpoints" / "step_00000003")
        z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        _, condition = models.examples.rows(torch.arange(3) * len(models.examples) // 3)  # perhaps several rows a prompt
        with torch.no_grad():
            before = models.student(z, condition)
            checkpoint.restore_tensors(ema.average, tensors["ema"], "")
            with ema.swapped():
                x0 = models.student(z, condition)
        assert relative(before, x0) > 1e-3
        family = models.facts["family"]
        latents = FluxPipeline._pack_latents(z, *z.shape) if family == "flux" else z
        return SimpleNamespace(folder=folder / "run", teacher=config["teacher"]["path"], z=latents, x0=x0, family=family)

    def get(name: str) -> SimpleNamespace:
        if name not in runs:
            runs[name] = train(*RUNS[name])
        return runs[name]

    return get


def maps(latents: Tensor) -> Tensor:
    """(b, c, h, w) of what a stock pipeline gives for output_type latent."""
    return latents if latents.ndim == 4 else FluxPipeline._unpack_latents(latents, 16, 16, 2)


# Another process ----------------------------------------------------------------------------------------------------------------

LOAD = """
none = {"text_encoder_3": None, "tokenizer_3": None} if without_t5 else {}
pipe = diffusers.DiffusionPipeline.from_pretrained(teacher, **none)
pipe.load_lora_weights(student, adapter_name="student")
pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(student, subfolder="scheduler")
call = dict(num_inference_steps=1, guidance_scale=guidance, height=16, width=16, output_type="latent")
step = lambda: pipe(list(prompts), latents=z, **call).images
"""


def told(name: str) -> dict:
    """What the code in LOAD is told of a run: Flux dev's guidance is an input, all others run without."""
    guidance = {"flux dev": 3.5, "whole flux": 3.5, "z-image": 0.0}.get(name, 1.0)  # Z-Image counts from 0
    return {"guidance": guidance, "without_t5": name.endswith("without t5")}


@pytest.mark.parametrize("name", LORAS)
@pytest.mark.slow
def test_lora_in_the_stock_pipeline(name, trained, elsewhere):
    """One step of diffusers alone is the trainer's x0, to 1e-5 of the largest; rank and alpha survive, and so does the image when
    the LoRA is fused and unloaded, and beside a style LoRA that is switched off again."""
    run = trained(name)
    style = run.folder / "style"
    make_style(run, style)
    code = f"""{LOAD}
out["x0"] = step()
config = pipe.transformer.peft_config["student"]
out["rank_alpha"] = torch.tensor([config.r, config.lora_alpha])
pipe.load_lora_weights(style, adapter_name="style")
pipe.set_adapters(["student", "style"], [1.0, 0.5])
out["both"] = step()
pipe.set_adapters(["student"])
out["alone"] = step()
pipe.delete_adapters("style")
pipe.fuse_lora()
out["fused"] = step()
pipe.unload_lora_weights()
out["unloaded"] = step()
out["sigmas"] = pipe.scheduler.sigmas
"""
    out = elsewhere(run, code, style=str(style), allow="Already found a `peft_config`", **told(name))
    assert out["rank_alpha"].tolist() == [RANK, ALPHA]
    assert out["sigmas"].tolist() == [1.0, 0.0]
    for key in ("x0", "alone", "fused", "unloaded"):
        assert relative(maps(out[key]), run.x0) < 1e-5, key
    assert relative(maps(out["both"]), run.x0) > 1e-4
    assert relative(maps(out["both"]), with_style(run, style, name)) < 1e-5
    stored = json.loads((run.folder / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert (stored["_class_name"], stored["shift_terminal"]) == ("FlowMatchEulerDiscreteScheduler", None)
    tensors = load_file(run.folder / "student" / LORA)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(key.startswith("transformer.") for key in tensors)


def make_style(run: SimpleNamespace, folder: Path) -> None:
    """A LoRA as others publish them: attention only, alpha = rank, no metadata."""
    network = NETWORKS[run.family].from_pretrained(run.teacher, subfolder="transformer")
    network.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    PIPELINES[run.family].save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(network))


def with_style(run: SimpleNamespace, style: Path, name: str) -> Tensor:
    """x0 of the teacher's network with W + weight alpha / rank B A for the tensors of both files."""
    network = NETWORKS[run.family].from_pretrained(run.teacher, subfolder="transformer")
    parameters = dict(network.named_parameters())
    for file, scale in ((run.folder / "student" / LORA, ALPHA / RANK), (style / LORA, 0.5)):
        tensors = load_file(file)
        downs = {k: v for k, v in tensors.items() if "lora_A" in k}
        assert 2 * len(downs) == len(tensors)
        for key, down in downs.items():
            target = parameters[key.removeprefix("transformer.").replace(".lora_A", "")]
            target.data += scale * tensors[key.replace("lora_A", "lora_B")] @ down
    none = {"text_encoder_3": None, "tokenizer_3": None} if told(name)["without_t5"] else {}
    pipe = DiffusionPipeline.from_pretrained(run.teacher, transformer=network, **none)
    options = {"num_inference_steps": 1, "guidance_scale": told(name)["guidance"], "height": 16, "width": 16}
    return maps(pipe(list(PROMPTS), latents=run.z, output_type="latent", **options).images)


@pytest.mark.parametrize("name", ["sd35", "sd3 without t5", "flux dev", "z-image", "whole sd35", "whole flux"])
@pytest.mark.slow
def test_card_can_be_run(name, trained, elsewhere):
    """The python block of README.md, run where the student lies, makes an image; its pipeline's latents are the trainer's x0."""
    run = trained(name)
    (block,) = re.findall(r"```python\n(.*?)```", (run.folder / "student" / "README.md").read_text(), re.DOTALL)
    (how,) = re.findall(r'pipe\("a prompt", (.*)\)\.images\[0\]', block)
    assert how == f"num_inference_steps=1, guidance_scale={told(name)['guidance']}"
    block = block.replace(how, f"{how}, height=16, width=16")  # Flux draws 128 latents a side by default
    code = f"{block}\nout['size'] = torch.tensor(image.size)\n"
    code += f"out['x0'] = pipe(list(prompts), {how}, height=16, width=16, latents=z, output_type='latent').images"
    out = elsewhere(run, code, cwd=run.folder)
    assert out["size"].tolist() == [16, 16]
    assert relative(maps(out["x0"]), run.x0) < 1e-5


# load_student ------------------------------------------------------------------------------------------------------------------


def one_step(pipe: DiffusionPipeline, run: SimpleNamespace, name: str) -> Tensor:
    options = {"num_inference_steps": 1, "guidance_scale": told(name)["guidance"], "height": 16, "width": 16}
    return maps(pipe(list(PROMPTS), latents=run.z, output_type="latent", **options).images)


@pytest.mark.parametrize("name", ["sd35", "sd3 without t5", "flux dev", "z-image", "whole flux"])
def test_load_student(name, trained):
    """The trainer's x0 in one step, without a warning, also in bfloat16 within its rounding."""
    run = trained(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = load_student(run.folder)
    assert relative(one_step(pipe, run, name), run.x0) < 1e-5
    info = json.loads((run.folder / "student" / "student.json").read_text())
    weights = "transformer" if name.startswith("whole") else "lora"
    assert (info["family"], info["weights"], info["readout_t"]) == (run.family, weights, 1.0)
    half = load_student(run.folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}
    assert relative(one_step(half, SimpleNamespace(**vars(run) | {"z": run.z.bfloat16()}), name), run.x0) < 0.05


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_scheduler_that_does_not_fit(trained, tmp_path):
    """Named, with what spoils it; also the stored one, if somebody has edited it."""
    run = trained("sd35")
    with pytest.warns(UserWarning, match=r"one step of LCMScheduler is not the x0 .*student/scheduler"):
        load_student(run.folder, scheduler=LCMScheduler())
    terminal = FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)
    with pytest.warns(UserWarning, match=r"not the x0 .*its shift_terminal=0\.02 leaves none; set it to null.*student/scheduler"):
        load_student(run.folder, scheduler=terminal)
    folder = Path(shutil.copytree(run.folder / "student", tmp_path / "student"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift_terminal": 0.02}))
    with pytest.warns(UserWarning, match=r"its shift_terminal=0\.02 leaves none; set it to null"):
        load_student(folder)
    (folder / "student.json").write_text(json.dumps(json.loads((folder / "student.json").read_text()) | {"readout_t": 999}))
    with pytest.raises(ValueError, match=r"reads out at timestep 999, its base model has none after 1"):
        load_student(folder)


def weights_differ():
    return pytest.warns(UserWarning, match="was trained on other weights than those now at its base model")


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_a_student_of_another_model(trained, tiny):
    """Its layers are not there, or its base is of another kind: said by name."""
    with pytest.raises(ValueError, match=r"does not fit a FluxPipeline: .*it was made for another model"), weights_differ():
        load_student(trained("sd35").folder, base_model=str(tiny("flux dev")))
    fits_not = r"does not fit a StableDiffusion3Pipeline: .*it was made for another model"
    with pytest.raises(ValueError, match=fits_not), weights_differ():
        load_student(trained("sd35").folder, base_model=str(tiny("sd3")))  # without the second attention


# The other commands ------------------------------------------------------------------------------------------------------------


def generated(output: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f)) for f in sorted(output.rglob("*.png")) if f.parent.name == "000000"])


@pytest.mark.parametrize("name", ["sd35", "sd3 without t5", "flux dev", "z-image"])
def test_eval_draws_with_a_student(name, trained, tmp_path):
    """By its run and as a LoRA of its base model: one step, no guidance or what the network is told, the same pictures."""
    run, captions = trained(name), tmp_path / "captions.txt"
    captions.write_text("\n".join(PROMPTS) + "\n")
    pictures = []
    for i, model in enumerate((["--model", str(run.folder)], ["--model", run.teacher, "--lora", str(run.folder / "student")])):
        call = ["generate", "--protocol", "custom", "--num-images", "3", *model, "--captions", str(captions)]
        assert main([*call, "--output", str(tmp_path / str(i))]) == 0
        made = json.loads((tmp_path / str(i) / "images" / "draw0" / "generation.json").read_text())
        expected = {"num_inference_steps": 1, "guidance_scale": told(name)["guidance"], "height": 16, "width": 16}
        assert made["model"]["call"] == expected
        pictures.append(generated(tmp_path / str(i)))
    pipe, options = load_student(run.folder), expected | {"output_type": "np"}
    drawn = [pipe([p], generator=[image_generator(0, i)], **options).images[0] for i, p in enumerate(PROMPTS)]
    assert np.array_equal(pictures[0], (np.stack(drawn) * 255).round().astype(np.uint8))
    assert np.array_equal(pictures[0], pictures[1])


def test_eval_draws_with_a_teacher(tiny, tmp_path):
    """SD3 without T5 too, of which diffusers wants to be told."""
    (tmp_path / "captions.txt").write_text("a cat\na dog\n")
    call = ["generate", "--protocol", "custom", "--num-images", "2", "--model", str(tiny("sd3 without t5")), "--steps", "2"]
    assert main([*call, "--captions", str(tmp_path / "captions.txt"), "--output", str(tmp_path / "out")]) == 0
    assert generated(tmp_path / "out").shape == (2, 16, 16, 3)


@pytest.mark.parametrize("name", ["sd35", "flux dev"])
@pytest.mark.slow
def test_an_export_acts_as_the_student(name, trained, tmp_path):
    """alpha / rank = 1/2 is folded in, since ComfyUI reads no alpha but one beside each layer; every layer, diffusers' names."""
    run, file = trained(name), tmp_path / "comfyui.safetensors"
    export_kohya.main([str(run.folder / "student"), str(file)])
    exported, own = load_file(file), load_file(run.folder / "student" / LORA)
    assert exported.keys() == own.keys()
    assert all(re.fullmatch(r"transformer\.[a-z0-9_.]+\.lora_[AB]\.weight", key) for key in exported)
    pipe = DiffusionPipeline.from_pretrained(run.teacher)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(run.folder / "student", subfolder="scheduler")
    options = {"num_inference_steps": 1, "guidance_scale": told(name)["guidance"], "height": 16, "width": 16}
    drawn = pipe(list(PROMPTS), latents=run.z, output_type="latent", **options).images
    assert relative(maps(drawn), run.x0) < 1e-5
    for key, value in exported.items():  # what is not diffusers' takes: the product of the two matrices
        if ".lora_A." in key:
            up = key.replace(".lora_A.", ".lora_B.")
            torch.testing.assert_close(exported[up] @ value, own[up] @ own[key] * (ALPHA / RANK))


def test_samples_beside_the_teacher(trained, tmp_path):
    for name in ("sd35", "flux dev"):
        output = tmp_path / f"{name}.png"
        sample.main([str(trained(name).folder), "--prompt", "a cat", "--teacher-steps", "2", "--output", str(output)])
        assert output.is_file()
