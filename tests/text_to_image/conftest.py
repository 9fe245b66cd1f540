"""Tiny Stable Diffusion pipelines, made from configurations and saved: the real classes, with random weights; and a process that
knows diffusers alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.adapters import Role
from scripts.bench.parts import random_networks
from trainers import distill
from trainers.engine import checkpoint

ROOT = Path(__file__).resolve().parents[2]
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KINDS = ("sd15", "sd21", "sdxl")
PROMPTS = ["a cat", "a dog on a mat", "a red house"]


def tiny_text_encoder(tokenizer: CLIPTokenizer, kind: type = CLIPTextModel) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def tiny_pipeline(kind: str, folder: Path) -> Path:
    """SD1.5 (epsilon), SD2.1 (v_prediction) or SDXL (two text encoders, micro-conditioning): 8x8 latents of 16x16 images."""
    torch.manual_seed(KINDS.index(kind))
    tokenizer = random_networks.tokenizer(folder / "vocabulary")
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        sample_size=16,
    )
    shape = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
    if kind == "sdxl":
        unet = UNet2DConditionModel(
            **shape,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + 32,
            use_linear_projection=True,
        )
        encoders = (tiny_text_encoder(tokenizer), tiny_text_encoder(tokenizer, CLIPTextModelWithProjection))
        scheduler = EulerDiscreteScheduler(**NOISE)
        pipe = StableDiffusionXLPipeline(vae, *encoders, tokenizer, tokenizer, unet, scheduler, add_watermarker=False)
    else:
        unet = UNet2DConditionModel(
            **shape,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
        )
        prediction_type = "v_prediction" if kind == "sd21" else "epsilon"
        scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, prediction_type=prediction_type)
        encoder = tiny_text_encoder(tokenizer)
        pipe = StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder / kind)
    return folder / kind


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """kind -> folder of a saved pipeline; tests must not write into it."""
    return {kind: tiny_pipeline(kind, tmp_path_factory.mktemp(f"tiny_{kind}")) for kind in KINDS}


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return file


# Sections of a configuration by objective; a test adds teacher, data and output_dir.
LORA = {"rank": 4, "alpha": 2.0}
ADAM = {"lr": 1e-3}
LEVELS = {"name": "uniform", "low": 20.0, "high": 980.0}


@pytest.fixture
def sections():
    """sections(levels): the section of each objective, of adapters alone."""

    def make(levels: dict) -> dict[str, dict]:
        fake = {"optimizer": ADAM, "lora": LORA, "levels": levels, "weighting": "snr"}
        posterior = {"network": "adapter", "lora": LORA, "covariance": "learned", "warmup_updates": 1, "optimizer": ADAM}
        return {
            "varflow": {"name": "varflow", "levels": levels, "weighting": "sigma2"},
            "diff_instruct": {"name": "diff_instruct", "levels": levels, "weighting": "dmd", "joint": True, "fake_score": fake},
            "sid": {"name": "sid", "levels": levels, "fake_score": fake},
            "vardiu": {"name": "vardiu", "levels": levels, "weighting": "dmd", "pool": "own", "posterior": posterior},
        }

    return make


@pytest.fixture
def recipe(tiny, tmp_path, prompt_file, sections):
    """recipe(objective, kind, **more): a distillation of a tiny pipeline as a plain dict, ready to be written as YAML."""

    def make(objective: str, kind: str = "sd15", **more) -> dict:
        data = {"name": "prompts", "file": str(prompt_file)}
        if objective == "varflow":
            data = {"name": "teacher_samples", "file": str(prompt_file), "num_inference_steps": 2, "images_per_prompt": 2}
        return {
            "output_dir": str(tmp_path / f"{objective}_{kind}"),
            "teacher": {"path": str(tiny[kind]), "guidance_scale": 1.0 if objective == "varflow" else 2.0},
            "student": {"lora": LORA, "optimizer": ADAM},
            "objective": sections(LEVELS)[objective],
            "data": data,
            "steps": 3,
            "batch_size": 4,
            "log_every": 1,
        } | more

    return make


@pytest.fixture
def written():
    """written(config): the arguments of a command, the configuration in a file beside its output_dir."""

    def write(config: dict) -> list[str]:
        file = Path(config["output_dir"]).with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config))
        return ["--config", str(file)]

    return write


@pytest.fixture
def distil(written):
    """distil(config, *overrides, **changes): trainers.distill in this process -> its output_dir."""

    def run(config: dict, *overrides: str, **changes) -> Path:
        config = config | changes
        distill.main([*written(config), *overrides])
        return Path(config["output_dir"])

    return run


@pytest.fixture
def launched(written, tmp_path):
    """launched(config, config_file): trainers.distill in two processes on this CPU, as a configuration of ours says -> its
    output_dir."""

    def run(config: dict, config_file: str = "cpu_2.yaml") -> Path:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2"]
        command += [f"--config_file={ROOT / 'configs' / 'accelerate' / config_file}", "-m", "trainers.distill", *written(config)]
        environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        environment["HF_DATASETS_CACHE"] = str(tmp_path / "datasets")
        how = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 400}
        done = subprocess.run(command, env=os.environ | environment, **how)
        assert done.returncode == 0, done.stderr[-4000:]
        output = Path(config["output_dir"])
        about = json.loads((output / "environment.json").read_text())
        assert (about["processes"], about["sharded"]) == (2, config_file == "fsdp2.yaml")
        return output

    return run


@pytest.fixture
def whole_and_sharded(launched, tmp_path):
    """whole_and_sharded(config): two processes with a copy of the weights each, and with a share; what they leave, and that it is
    the same."""

    def run(config: dict) -> list[Path]:
        outputs = [
            launched(config | {"output_dir": str(tmp_path / Path(file).stem)}, file) for file in ("cpu_2.yaml", "fsdp2.yaml")
        ]
        for file in ("networks", "optimizers"):
            one, two = (
                load_file(checkpoint.list_checkpoints(output / "checkpoints")[-1] / f"{file}.safetensors") for output in outputs
            )
            assert one.keys() == two.keys()
            for key, value in one.items():
                assert float((two[key] - value).abs().max()) <= 1e-3 * float(value.abs().max()), key
        return outputs

    return run


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread):
    """Every test here is faster on one thread."""


@pytest.fixture
def fill(generator):
    """fill(role): N(0, 0.2^2) in every adapter weight, so that lora_B is not zero."""

    def normal(role: Role) -> Role:
        with torch.no_grad():
            for p in role.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        return role

    return normal


# Another process ---------------------------------------------------------------------------------------------------------------

WORKER = """
import json, logging, os, sys, traceback, warnings
import diffusers, peft, torch, transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
for library in ("diffusers", "transformers", "peft", "huggingface_hub"):
    logging.getLogger(library).addHandler(handler)
warnings.simplefilter("always")
warnings.showwarning = lambda message, category, *rest, **more: said.append(f"{category.__name__}: {message}")

for line in sys.stdin:
    job, failure = json.loads(line), None
    said.clear()
    os.chdir(job["cwd"])
    names = {"torch": torch, "diffusers": diffusers, "out": {}, "z": load_file(job["tensors"])["z"]} | job["values"]
    try:
        exec(job["code"], names)
        save_file({k: v.contiguous() for k, v in names["out"].items()}, job["tensors"])
    except BaseException:
        failure = traceback.format_exc()
    ours = sorted({"pipelines", "trainers", "eval"} & {name.split(".")[0] for name in sys.modules})
    print("reply", json.dumps({"failure": failure, "said": said, "ours": ours}), flush=True)
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """A process that knows diffusers and nothing of this project."""
    folder = tmp_path_factory.mktemp("worker")
    with (folder / "stderr").open("w") as stderr:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
        process = subprocess.Popen([sys.executable, "-c", WORKER], **pipes, text=True, cwd=folder)
    yield SimpleNamespace(process=process, folder=folder)
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture
def elsewhere(worker):
    """elsewhere(run, code, cwd): what `code` puts into `out` in the other process, where `teacher`, `student`, `prompts` and `z`
    are known. Any log or warning there is an error, but for what allow matches."""

    def execute(run: SimpleNamespace, code: str, cwd: Path | None = None, allow: str = "$^", **values) -> dict[str, Tensor]:
        tensors = worker.folder / "tensors.safetensors"
        save_file({"z": run.z.contiguous()}, tensors)
        values |= {"teacher": run.teacher, "student": str(run.folder / "student"), "prompts": PROMPTS}
        job = {"code": code, "values": values, "cwd": str(cwd or worker.folder), "tensors": str(tensors)}
        print(json.dumps(job), file=worker.process.stdin, flush=True)
        lines = iter(worker.process.stdout.readline, "")
        reply = next((json.loads(line[6:]) for line in lines if line.startswith("reply ")), None)
        assert reply, (worker.folder / "stderr").read_text()
        assert reply["failure"] is None, reply["failure"]
        assert not reply["ours"]
        # said of every LoRA without text encoder
        expected = re.compile(rf"No LoRA keys associated to CLIPTextModel|{allow}")
        assert not [m for m in reply["said"] if not expected.search(m)]
        return load_file(tensors)

    return execute
