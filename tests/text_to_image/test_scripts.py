"""scripts/export_kohya.py, sample.py, bench/step.py and bench/text.py on tiny networks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from pipelines.noise import VPSchedule
from pipelines.students import load_student
from scripts import export_kohya, sample
from scripts.bench import step as bench_step
from scripts.bench import text as bench_text
from trainers import distill
from trainers.config import level_range as levels
from trainers.config.networks import Lora

SHAPE = {
    "family": "sd",
    "network": {"cross_attention_dim": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    "text": {"encoder_hidden_states": (7, 16)},
    "dtype": torch.float32,
    "side": 8,
    "rank": 3,
}
TRANSFORMER = SHAPE | {
    "family": "sd3",
    "network": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 5, "out_channels": 5}
    | {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 11, "pos_embed_max_size": 8},
    "text": {"encoder_hidden_states": (7, 16), "pooled_projections": (11,)},
}
CPU = torch.device("cpu")


@pytest.fixture
def student(recipe, tmp_path, fresh_accelerator):
    """student(kind): the folder of a student trained for three steps with alpha != rank, far enough from its teacher to tell."""

    def train(kind: str) -> Path:
        config = recipe("vardiu", kind)
        config["student"]["optimizer"] = {"lr": 0.03}
        file = tmp_path / f"{kind}.yaml"
        file.write_text(yaml.safe_dump(config | {"ema_decay": 0.0}))
        distill.main(["--config", str(file)])
        return Path(config["output_dir"]) / "student"

    return train


def one_step(pipe: DiffusionPipeline) -> torch.Tensor:
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": z, "output_type": "latent", "height": 16, "width": 16}
    return pipe("a cat", **call).images


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.slow
def test_a_kohya_file_acts_as_the_student(kind, student, tiny, tmp_path):
    """alpha / rank = 1/2 is folded in, since diffusers' converter writes alpha = rank; every layer is there."""
    folder, file = student(kind), tmp_path / "out" / "kohya.safetensors"
    export_kohya.main([str(folder), str(file)])
    weights = load_file(file)
    assert all(key.startswith("lora_unet_") for key in weights)
    layers = {key.split(".")[0] for key in weights}
    assert len(weights) == 3 * len(layers)
    assert len(layers) == sum(".lora_A." in k for k in load_file(folder / export_kohya.LORA_FILE))

    ours = load_student(folder)
    pipe = DiffusionPipeline.from_pretrained(tiny[kind], use_safetensors=True)
    pipe.scheduler = ours.scheduler
    teacher = one_step(pipe)
    pipe.load_lora_weights(file)
    expected, got = one_step(ours), one_step(pipe)
    assert (expected - teacher).abs().max() > 1e-2 * expected.abs().max()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_what_cannot_be_exported(student, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export_kohya.main([str(tmp_path), str(tmp_path / "x.safetensors")])
    assert "no LoRA weights" in capsys.readouterr().err
    folder = student("sd15")
    file = folder / export_kohya.LORA_FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SystemExit):
        export_kohya.main([str(folder), str(tmp_path / "x.safetensors")])
    assert "damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_a_grid_of_teacher_and_student(student, tmp_path, capsys):
    folder, file = student("sd15"), tmp_path / "grid.png"
    prompts = ["--prompt", "a cat", "--prompt", "a dog on a mat", "--prompt", "a red house"]
    sample.main([str(folder.parent), *prompts, "--output", str(file), "--teacher-steps", "2"])
    said = capsys.readouterr().out
    assert "teacher, 2 steps:" in said
    assert "student, 1 step:" in said
    width, height = Image.open(file).size  # images of 16 pixels, twelve times as large
    assert height == 24 + 3 * 192
    assert width == 160 + 2 * 192


def test_a_grid_without_a_student(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sample.main([str(tmp_path), "--prompt", "a cat"])
    assert "holds no student" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [SHAPE, TRANSFORMER], ids=["unet", "transformer"])
@pytest.mark.parametrize("layout", ["ours", "shared", "three_copies"])
@pytest.mark.parametrize("objective", ["vardiu", "diff_instruct", "sid", "varflow_k2"])
@pytest.mark.slow
def test_a_measured_step_is_a_training_step(objective, layout, shape, fresh_accelerator, one_thread):
    """It moves the adapters of every network of the objective, and nothing else."""
    if layout == "shared" and objective == "varflow_k2":
        pytest.skip("it has no second network")
    step = bench_step.our_step(shape, objective, layout, CPU)
    trainer = step.__self__
    before = {role: [p.detach().clone() for p in group] for role, group in trainer.parameters.items()}
    frozen = {n: p.detach().clone() for n, p in base_of(trainer).named_parameters() if ".lora_" not in n}
    step()
    for role, group in trainer.parameters.items():
        assert any(not torch.equal(a, b) for a, b in zip(before[role], group, strict=True)), role
    assert all(torch.equal(v, dict(base_of(trainer).named_parameters())[n]) for n, v in frozen.items())


def test_layouts_differ_in_networks_alone(one_thread):
    """One network against three, with as many trained weights."""
    for copies, expected in ((False, 1), (True, 3)):
        models = bench_step.RandomModels(SHAPE, copies, Lora(rank=3), CPU)
        fake = models.fake_score(SimpleNamespace(network=None))
        bases = {id(d.network.shared.network) for d in (models.teacher, models.student.denoiser, fake)}
        assert len(bases) == expected
        trained = [p for d in (models.student, fake) for p in d.parameters()]
        assert all(p.requires_grad for p in trained)


def base_of(trainer):
    return trainer.networks["student"].denoiser.network.shared.network


def test_the_lcm_update_trains(one_thread):
    step = bench_step.lcm_step(SHAPE, CPU)
    role = next(c.cell_contents for c in step.__closure__ if type(c.cell_contents).__name__ == "Role")
    before = [p.detach().clone() for p in role.parameters()]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, role.parameters(), strict=True))


def test_base_bytes_are_those_of_stable_diffusion():
    """859.5 million weights of two bytes (the size that Stable Diffusion 1.5 is published with); 2.24 billion of SD3.5-M."""
    assert bench_step.base_bytes("sd15") == pytest.approx(2 * 859.52e6, rel=1e-4)
    assert bench_step.base_bytes("sd35") == pytest.approx(2 * 2.24e9, rel=5e-3)


def test_configurations_of_the_text_benchmark_are_valid(tmp_path):
    from pipelines.common.config import validate
    from trainers.config.run import DistillConfig, TeacherConfig

    schedule = VPSchedule.from_scheduler(DDIMScheduler())  # timesteps 0 to 999, as Stable Diffusion's
    teacher = bench_text.teacher_config(tmp_path, tmp_path / "captions.parquet", 7)
    config = validate(TeacherConfig, json.loads(json.dumps(teacher)), "teacher")
    assert config.steps == 7
    levels.check_levels(config, schedule)
    for name in bench_text.OBJECTIVES:
        raw = bench_text.student_config(tmp_path, name, tmp_path / "captions.parquet", tmp_path / "prompts.txt", 9)
        config = validate(DistillConfig, json.loads(json.dumps(raw)), name)
        assert config.objective.name == name
        levels.check_levels(config, schedule)
