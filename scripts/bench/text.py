"""Do one-step LoRA students of a text-to-image latent diffusion teacher draw well, and what they are asked for? CIFAR-10 by name.

    python -m scripts.bench.text --cifar DIR [--output outputs/bench] [--teacher-steps N] [--objectives vardiu ...]

DIR holds train.parquet with columns img and label. Everything is made here, through the commands that users run: a small VAE, a
Stable Diffusion pipeline around it with an untrained network and a random frozen text encoder, the teacher
(trainers.train_teacher), the students (trainers.distill), a classifier. Then Frechet distance on the classifier's features, and
how often it sees the class that the prompt named. Writes <output>/text.json and text.png. Run again, it continues where it was
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from eval.networks.weights import sha256
from pipelines.common.options import path, whole
from pipelines.common.provenance import git_commit, versions
from pipelines.data.images import ImageSet, load_parquet, to_pixels, to_unit
from pipelines.students import load_student
from pipelines.text_to_image import decode_latents, encode_images, load_pipeline
from pipelines.variance_preserving import one_step_scheduler

from ..jobs import LAUNCH, Job, cores, exit_cleanly, kept, run, run_all
from .parts import random_networks
from .parts.judge import Judge, train

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGES = 2000
LEVELS = {"name": "uniform", "low": 20.0, "high": 980.0}
LORA = {"rank": 32}
BATCH = {"vardiu": 32, "diff_instruct": 32, "varflow": 128}
RATE = {"vardiu": 5e-4, "diff_instruct": 5e-4, "varflow": 2e-3}


def rate(lr: float, **more: Any) -> dict[str, Any]:
    return {"lr": lr, "betas": [0.0, 0.99], "schedule": "cosine", "final_ratio": 0.1, "warmup_steps": 20} | more


OBJECTIVES: dict[str, dict[str, Any]] = {
    "vardiu": {
        "objective": {
            "name": "vardiu",
            "levels": LEVELS,
            "weighting": "dmd",
            "noise_draws": 2,
            "posterior": {
                "network": "adapter",
                "lora": LORA,
                "covariance": "learned",
                "warmup_updates": 50,
                "optimizer": rate(1e-3),
            },
        },
    },
    "diff_instruct": {
        "objective": {
            "name": "diff_instruct",
            "levels": LEVELS,
            "weighting": "dmd",
            "fake_score": {"lora": LORA, "optimizer": rate(1e-3), "levels": LEVELS, "weighting": "edm", "warmup_updates": 50},
        },
    },
    "varflow": {
        "objective": {
            "name": "varflow",
            "levels": {"name": "uniform", "low": 1.0, "high": 200.0},
            "weighting": "uniform",
            "cross": "full",
            "condition_scale": 3.0,
            "grids": [1, 2, 4],
            "features": True,
        },
    },
}


def make_vae(pixels: Tensor, steps: int) -> AutoencoderKL:
    """8x8 latents of 4 channels, scaled to variance 1; trained for squared error with a little Kullback-Leibler divergence."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=4,
        sample_size=32,
        mid_block_add_attention=False,
    )

    def loss(rows: Tensor) -> Tensor:
        x = to_unit(pixels[rows])
        gaussian = vae.encode(x).latent_dist
        return F.mse_loss(vae.decode(gaussian.sample()).sample, x) + 1e-5 * gaussian.kl().mean()

    train(vae, loss, len(pixels), steps, 64, 2e-3, "VAE")
    vae.eval()
    latents = encode_images(vae, to_unit(pixels[:2000]), torch.randn(2000, 4, 8, 8))
    vae.register_to_config(scaling_factor=float(vae.config.scaling_factor / latents.std()))
    return vae


def make_pipeline(folder: Path, pixels: Tensor, vae_steps: int) -> None:
    """An untrained Stable Diffusion pipeline with v-prediction: characters are tokens, the text encoder is random and frozen."""
    vae = make_vae(pixels, vae_steps)
    tokenizer = random_networks.tokenizer(folder.with_name("vocabulary"), length=16)
    torch.manual_seed(1)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=8,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**noise, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True)
    pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder)


def make_captions(cifar: Path, file: Path) -> None:
    """train.parquet with the name of its class as each image's caption."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(cifar / "train.parquet")
    names = [CLASSES[label] for label in table["label"].to_pylist()]
    table = pa.table({"image": table["img"], "caption": names})
    info = {"info": {"features": {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), file)


def teacher_config(folder: Path, captions: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "teacher"),
        "pipeline": str(folder / "untrained"),
        "data": {"name": "captions", "source": "parquet", "paths": [str(captions)], "cache": str(folder / "latents")},
        "levels": {"name": "uniform", "low": 1.0, "high": 999.0},
        "weighting": "edm",
        "label_dropout": 0.1,
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "final_ratio": 0.05, "warmup_steps": 50},
        "steps": steps,
        "batch_size": 128,
        "ema_decay": 0.998,
        "checkpoint_every": 200,
    }


def student_config(folder: Path, objective: str, captions: Path, prompts: Path, steps: int) -> dict[str, Any]:
    data = {"name": "prompts", "file": str(prompts), "cache": str(folder / "prompts")}
    if objective == "varflow":
        data = {"name": "captions", "source": "parquet", "paths": [str(captions)], "cache": str(folder / "teacher_latents")}
    return OBJECTIVES[objective] | {
        "output_dir": str(folder / objective),
        "teacher": {"path": str(folder / "teacher" / "teacher"), "guidance_scale": 1.0},
        "student": {"lora": LORA, "optimizer": rate(RATE[objective])},
        "data": data,
        "steps": steps,
        "batch_size": BATCH[objective],
        "ema_decay": 0.98,
        "log_every": 10,
        "checkpoint_every": 100,
        "snapshot_every": max(1, steps // 4),
    }


def as_the_vae_draws(vae: AutoencoderKL, data: ImageSet) -> tuple[ImageSet, Tensor]:
    """(20,000 real images through the VAE: what it cannot draw is no student's fault; two examples of each class)."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:20_000]
    noise = torch.zeros(500, 4, 8, 8)
    parts = [decode_latents(vae, encode_images(vae, to_unit(data.pixels[i]), noise)) for i in order.split(500)]
    pixels, labels = to_pixels(torch.cat(parts)), data.labels[order]
    return ImageSet(pixels, labels), torch.stack([pixels[(labels == i % 10).nonzero()[i // 10, 0]] for i in range(20)])


def draw(pipe: StableDiffusionPipeline, **call: Any) -> Tensor:
    """uint8 images (IMAGES, 3, 32, 32), the classes in turn, from the same noise for every pipeline."""
    z = torch.randn(IMAGES, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = [CLASSES[i % 10] for i in range(IMAGES)]
    parts = []
    for start in tqdm(range(0, IMAGES, 250), desc="drawing", unit="batch"):
        rows = slice(start, start + 250)
        latents = pipe(prompts[rows], latents=z[rows].clone(), output_type="latent", **call).images
        parts.append(to_pixels(decode_latents(pipe.vae, latents)))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=path, required=True)
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    parser.add_argument("--vae-steps", type=whole(1), default=1500)
    parser.add_argument("--teacher-steps", type=whole(1), default=1500)
    parser.add_argument("--steps", type=whole(1), default=300)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    args = parser.parse_args()
    folder, start = args.output / "text", time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    data = load_parquet([str(args.cifar / "train.parquet")], "img", "label", 32, 3)
    captions, prompts = folder / "captions.parquet", folder / "prompts.txt"
    kept(folder / "captions.json", {"file": sha256(args.cifar / "train.parquet")}, lambda: make_captions(args.cifar, captions))
    prompts.write_text("\n".join(CLASSES) + "\n")
    untrained = {"file": sha256(args.cifar / "train.parquet"), "vae_steps": args.vae_steps}
    kept(folder / "untrained.json", untrained, lambda: make_pipeline(folder / "untrained", data.pixels, args.vae_steps))

    def write(name: str, config: dict[str, Any]) -> Path:
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        return file

    teacher = write("teacher", teacher_config(folder, captions, args.teacher_steps))
    run([*LAUNCH, "trainers.train_teacher", "--config", str(teacher), "resume=latest"], cores())
    jobs = []
    for name in args.objectives:
        file = write(name, student_config(folder, name, captions, prompts, args.steps))
        jobs.append(Job(name, file, folder / name, []))
    # no more at once than there are cores: the seconds of a run are a column of the table
    run_all(jobs, min(len(jobs), cores()), threads=max(1, cores() // len(jobs)))

    base = load_pipeline(str(folder / "teacher" / "teacher"))
    real, examples = as_the_vae_draws(base.vae, data)
    judge = Judge(real, folder / "judge.safetensors")
    pictures = [examples]
    numbers = {"real, held out": judge.held_out}

    def measure(name: str, pixels: Tensor, more: dict[str, float]) -> None:
        numbers[name] = judge.measure(pixels, torch.arange(len(pixels)) % 10) | more
        print(f"{name:20} FD {numbers[name]['fd']:8.3f}  prompted class {numbers[name]['accuracy']:.3f}", flush=True)
        pictures.append(pixels[:20])

    measure("teacher, 50 steps", draw(base, num_inference_steps=50, guidance_scale=1.0), {})
    base.scheduler = one_step_scheduler(base.scheduler)
    measure("teacher, 1 step", draw(base, num_inference_steps=1, guidance_scale=1.0), {})
    for name in args.objectives:
        info = json.loads((folder / name / "student" / "student.json").read_text())
        pixels = draw(load_student(folder / name), num_inference_steps=1, guidance_scale=1.0)
        measure(name, pixels, {"seconds": info["train_seconds"], "steps": info["steps"]})
    save_image(torch.cat(pictures).float() / 255, args.output / "text.png", nrow=20)
    facts = {"git_commit": git_commit(), "versions": versions(("torch", "diffusers", "peft")), "images": IMAGES}
    facts |= {"teacher_steps": args.teacher_steps, "seconds_in_all": round(time.perf_counter() - start), "cpus": os.cpu_count()}
    (args.output / "text.json").write_text(json.dumps({"methods": numbers} | facts, indent=1))


if __name__ == "__main__":
    exit_cleanly(main)
