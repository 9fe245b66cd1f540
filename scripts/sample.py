"""A grid of a student beside its teacher, on the same noise, with the time each takes.

    python -m scripts.sample outputs/sd15_vardiu --prompt "a red bicycle" --prompt "a bowl of soup" --output grid.png

One row a prompt: the teacher with its own scheduler and guidance, then the student in its own steps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from pipelines.common.atomic import new_file
from pipelines.common.errors import UserError
from pipelines.common.launch import user_errors
from pipelines.common.options import path, path_option, typed, whole
from pipelines.common.strict import StockGuidance
from pipelines.kinds import KINDS, kind_named, kind_of, network_of
from pipelines.students import find_student, load_student, read_info
from pipelines.text_to_image import DTYPES, levels_of, load_pipeline, student_call


def timed(pipe: DiffusionPipeline, prompts: list[str], z: Tensor, **call) -> tuple[list[Image.Image], float]:
    """(an image for each prompt from its own noise, seconds an image)."""
    images, start = [], time.perf_counter()
    for prompt, noise in zip(prompts, z.split(1), strict=True):
        images += pipe(prompt, latents=noise.clone(), **call).images
    return images, (time.perf_counter() - start) / len(prompts)


def grid(columns: dict[str, list[Image.Image]], prompts: list[str]) -> Image.Image:
    """Titles above, prompts at the left, one row a prompt; small images enlarged, or their titles would run into one another."""
    width, height = (max(1, 192 // side) * side for side in next(iter(columns.values()))[0].size)
    top, side = 24, max(160, max(len(p) for p in prompts) * 6 + 12)
    sheet = Image.new("RGB", (side + width * len(columns), top + height * len(prompts)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, (title, images) in enumerate(columns.items()):
        draw.text((side + j * width + 4, 6), title, fill="black")
        for i, image in enumerate(images):
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (side + j * width, top + i * height))
    for i, prompt in enumerate(prompts):
        draw.text((6, top + i * height + height // 2 - 6), prompt, fill="black")
    return sheet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=path_option, help="a run's output_dir, a student/ folder or a hub id")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--output", type=path, default=Path("samples.png"))
    parser.add_argument("--base-model", type=path_option, help="where the teacher lies now, if not where it was")
    parser.add_argument("--teacher-steps", type=whole(1), default=50)
    parser.add_argument("--teacher-guidance", type=typed(StockGuidance), default=7.5)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    with user_errors():
        draw(args)


def draw(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--output {str(args.output)!r}: expected the name of a picture, e.g. grid.png")
    info = read_info(find_student(args.student), "student")
    family = info.get("family")
    if family in KINDS and kind_named(family).takes != "prompt":
        raise UserError(f"{args.student!r} is a student of {kind_named(family).called}, which takes no prompts but classes")
    if family not in KINDS:
        raise UserError(f"{args.student!r} is a student of an EDM teacher, which takes no prompts; its pipeline draws grids")
    student = load_student(args.student, args.base_model, dtype=DTYPES[args.dtype]).to(args.device)
    teacher = load_pipeline(args.base_model or info["base_model"], DTYPES[args.dtype]).to(args.device)
    student.set_progress_bar_config(disable=True)
    size = info["image_size"]
    kind, config = kind_of(student), network_of(student).config
    latents = kind.latent_shape(config, student.vae_scale_factor, size)
    z = torch.randn(len(args.prompt), *latents, generator=torch.Generator().manual_seed(args.seed))
    z = kind.packed(z).to(args.device, DTYPES[args.dtype])
    shape = {"height": size, "width": size}
    many = {"num_inference_steps": args.teacher_steps, "guidance_scale": kind.stock_guidance(args.teacher_guidance)}
    columns = {}
    one, n = student_call(kind, config, student.scheduler, info), len(levels_of(info))
    cases = {
        f"teacher, {args.teacher_steps} steps": (teacher, many),
        f"student, {n} step{'s' * (n > 1)}": (student, one),
    }
    for title, (pipe, call) in cases.items():
        images, seconds = timed(pipe, args.prompt, z, **shape, **call)
        columns[f"{title}, {seconds:.2f} s"] = images
        print(f"{title}: {seconds:.3f} s an image")
    with new_file(args.output) as partial:
        grid(columns, args.prompt).save(partial)
    print(args.output)


if __name__ == "__main__":
    main()
