"""Tiny pipelines of flow matching, made from configurations and saved: diffusers' own classes, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from scripts.bench.parts import random_networks

CHANNELS, T5_WIDTH, CLIP_WIDTH, QWEN_WIDTH = 3, 40, 16, 24  # of latents; of T5; of each CLIP; of Qwen


def clip(tokenizer, kind: type) -> CLIPTextModel:
    shape = {"hidden_size": CLIP_WIDTH, "intermediate_size": 23, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return kind(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, projection_dim=11, **shape, **ends))


def t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """Every printable character is a token."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *((chr(c), -3.0) for c in range(33, 127))]
    tokenizer = T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=512)
    shape = {"d_model": T5_WIDTH, "d_kv": 5, "d_ff": 29, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape)), tokenizer


def vae() -> AutoencoderKL:
    """2 pixels a latent; scale and shift are SD3's."""
    return AutoencoderKL(
        block_out_channels=(16, 16),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=CHANNELS,
        sample_size=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_sd3(kind: str, folder: Path) -> StableDiffusion3Pipeline:
    """8x8 latents of 16x16 images. sd35: a second attention in its first block, normalised queries and keys."""
    tokenizer = random_networks.tokenizer(folder / "vocabulary")
    more = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if kind == "sd35" else {}
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * 11,
        pos_embed_max_size=7,
        **more,
    )
    encoders = [clip(tokenizer, CLIPTextModelWithProjection) for _ in range(2)]
    words = (None, None) if kind == "sd3 without t5" else t5()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, vae(), encoders[0], tokenizer, encoders[1], tokenizer, *words)


def tiny_flux(kind: str, folder: Path) -> FluxPipeline:
    """dev is told its guidance, schnell is not; both shift by the number of tokens, as dev does."""
    tokenizer = random_networks.tokenizer(folder / "vocabulary")
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=kind == "flux dev",
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(scheduler, vae(), clip(tokenizer, CLIPTextModel), tokenizer, *t5(), transformer)


def qwen3() -> tuple[Qwen3Model, Qwen2Tokenizer]:
    """Every byte is a token; the template of a chat as Qwen's, without what is for tools and thoughts."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *names])}
    special = {"eos_token": names[2], "pad_token": names[0], "additional_special_tokens": names[1:2]}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=names[0], **special)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    shape = {"hidden_size": QWEN_WIDTH, "intermediate_size": 29, "num_hidden_layers": 3, "head_dim": 6, "pad_token_id": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    return Qwen3Model(Qwen3Config(vocab_size=len(vocab), **shape, **heads)), tokenizer


def tiny_z_image(kind: str, folder: Path) -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=QWEN_WIDTH,
        axes_dims=(4, 2, 2),
        axes_lens=(1024, 64, 64),
    )
    for parameter in (transformer.x_pad_token, transformer.cap_pad_token):  # zeros would hide what is padded
        torch.nn.init.normal_(parameter)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae(), *qwen3(), transformer)


MAKERS = {"sd3": tiny_sd3, "sd35": tiny_sd3, "sd3 without t5": tiny_sd3, "flux dev": tiny_flux, "flux schnell": tiny_flux}
MAKERS |= {"z-image": tiny_z_image}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(kind): the folder of a saved pipeline, made when it is first asked for; tests must not write into it."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("tiny")
            torch.manual_seed(sorted(MAKERS).index(kind))
            MAKERS[kind](kind, folder).save_pretrained(folder / "pipeline")
            made[kind] = folder / "pipeline"
        return made[kind]

    return get


# Sections of a configuration by objective; a test adds teacher, data and output_dir.
LORA = {"rank": 4, "alpha": 2.0}
ADAM = {"lr": 1e-3}
LEVELS = {"name": "logit_normal", "shift": 3.0}


@pytest.fixture
def recipe(tiny, tmp_path, prompt_file, sections):
    """recipe(objective, kind, **more): a distillation of a tiny pipeline as a plain dict, ready to be written as YAML."""

    def make(objective: str, kind: str, **more) -> dict:
        data = {"name": "prompts", "file": str(prompt_file), "image_size": 16}
        if objective == "varflow":
            samples = {"name": "teacher_samples", "num_inference_steps": 2, "images_per_prompt": 2, "guidance_scale": 2.0}
            data = data | samples
        return {
            "output_dir": str(tmp_path / f"{objective}_{kind.replace(' ', '_')}"),
            "teacher": {"path": str(tiny(kind))},
            "student": {"lora": LORA, "optimizer": ADAM},
            "objective": sections(LEVELS)[objective],
            "data": data,
            "steps": 2,
            "batch_size": 4,
            "log_every": 1,
        } | more

    return make
