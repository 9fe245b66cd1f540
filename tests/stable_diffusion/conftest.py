"""Tiny Stable Diffusion pipelines, made from configurations and saved: the real classes, with random weights."""

from __future__ import annotations

from pathlib import Path

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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from scripts.bench.parts import random_networks
from trainers import distill

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KINDS = ("sd15", "sd21", "sdxl")


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
    file.write_text("a cat\na dog on a mat\na red house\n")
    return file


# Sections of a configuration by objective; a test adds teacher, data and output_dir.
LORA = {"rank": 4, "alpha": 2.0}
ADAM = {"lr": 1e-3}
LEVELS = {"name": "uniform", "low": 20.0, "high": 980.0}
OBJECTIVES = {
    "varflow": {"name": "varflow", "levels": LEVELS, "weighting": "sigma2"},
    "diff_instruct": {
        "name": "diff_instruct",
        "levels": LEVELS,
        "weighting": "dmd",
        "joint": True,
        "fake_score": {"optimizer": ADAM, "lora": LORA, "levels": LEVELS, "weighting": "snr"},
    },
    "vardiu": {
        "name": "vardiu",
        "levels": LEVELS,
        "weighting": "dmd",
        "pool": "own",
        "posterior": {"network": "adapter", "lora": LORA, "covariance": "learned", "warmup_updates": 1, "optimizer": ADAM},
    },
}


@pytest.fixture
def recipe(tiny, tmp_path, prompt_file):
    """recipe(objective, kind, **more): a distillation of a tiny pipeline as a plain dict, ready to be written as YAML."""

    def make(objective: str, kind: str = "sd15", **more) -> dict:
        data = {"name": "prompts", "file": str(prompt_file)}
        if objective == "varflow":
            data = {"name": "teacher_samples", "file": str(prompt_file), "num_inference_steps": 2, "images_per_prompt": 2}
        return {
            "output_dir": str(tmp_path / f"{objective}_{kind}"),
            "teacher": {"path": str(tiny[kind]), "guidance_scale": 1.0 if objective == "varflow" else 2.0},
            "student": {"lora": LORA, "optimizer": ADAM},
            "objective": OBJECTIVES[objective],
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


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread):
    """Every test here is faster on one thread."""
