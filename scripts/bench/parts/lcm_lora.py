"""LCM-LoRA (Luo et al. 2023) by the update of diffusers' example: what a user would distil with instead.

    python -m scripts.bench.parts.lcm_lora --steps 2000 --output DIR [--teacher assets/emoji_sd]
                                           [--data assets/emoji/captioned_32.parquet]

Consistency between t and the point that the guided teacher's DDIM step reaches from there, on encoded pictures and captions; a
pseudo-Huber distance; no second student network (diffusers, examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py).
Writes <output>/pytorch_lora_weights.safetensors and scheduler/, which load_lora_weights and LCMScheduler read, and lcm.json.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from pipelines.adapters import SharedNetwork
from pipelines.common.launch import user_errors
from pipelines.common.options import finite, path, whole
from pipelines.stable_diffusion import KIND
from pipelines.students import save_lora
from pipelines.text_to_image import load_pipeline
from trainers.config.data import Captions
from trainers.families.encoding import encode

SOLVER_STEPS = 50  # of the DDIM grid between whose points the student is made consistent
SIGMA_DATA, TIME_SCALE = 0.5, 10.0  # of the boundary condition: f(x, 0) = x
HUBER = 1e-3


@dataclass(frozen=True)
class Grid:
    """The teacher's noise at the points of the solver's grid. abar (T,): alpha^2."""

    abar: Tensor

    def at(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t, the time one step of the grid before, abar of that step's end) for index (b,) in 0..SOLVER_STEPS - 1.

        The step from the first point ends at abar of time 0.
        """
        stride = len(self.abar) // SOLVER_STEPS
        t = (index + 1) * stride - 1
        before = (t - stride).clamp(min=0)
        return t, before, self.abar[before]


def scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip, c_out (b, 1, 1, 1) of the boundary condition (Song et al. 2023, Eq. 25, with diffusers' time scale)."""
    s = (TIME_SCALE * t.double()).view(-1, 1, 1, 1)
    squared = s.square() + SIGMA_DATA**2
    return (SIGMA_DATA**2 / squared).float(), (s / squared.sqrt()).float()


def x0_of(out: Tensor, x: Tensor, abar: Tensor) -> Tensor:
    """x0 from predicted noise; abar (b, 1, 1, 1)."""
    return (x - (1 - abar).sqrt() * out) / abar.sqrt()


def lcm_loss(
    student: Callable[..., Tensor],
    teacher: Callable[..., Tensor],
    grid: Grid,
    x0: Tensor,
    eps: Tensor,
    index: Tensor,
    w: Tensor,
    text: Tensor,
    empty: Tensor,
) -> Tensor:
    """The mean pseudo-Huber distance of f(x_t, t) from f at the teacher's DDIM step from there, a constant.

    x0, eps (b, c, h, w); index (b,); w (b,): guidance, cond + w (cond - uncond); text, empty (b, l, d). Both networks predict
    noise.
    """
    (t, before, abar_before), w = grid.at(index), w.view(-1, 1, 1, 1)
    abar, abar_before = grid.abar[t].view(-1, 1, 1, 1), abar_before.view(-1, 1, 1, 1)
    (skip, out), (skip_before, out_before) = scalings(t), scalings(before)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    predicted = skip * x_t + out * x0_of(student(x_t, t, encoder_hidden_states=text), x_t, abar)
    with torch.no_grad():
        given, free = (teacher(x_t, t, encoder_hidden_states=c) for c in (text, empty))
        noise = given + w * (given - free)
        x_before = abar_before.sqrt() * x0_of(noise, x_t, abar) + (1 - abar_before).sqrt() * noise
        again = x0_of(student(x_before, before, encoder_hidden_states=text), x_before, grid.abar[before].view(-1, 1, 1, 1))
        target = skip_before * x_before + out_before * again
    return ((predicted - target).square() + HUBER**2).sqrt().sub(HUBER).mean()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="assets/emoji_sd")
    parser.add_argument(
        "--data", default="assets/emoji/captioned_32.parquet", help="a parquet file with columns image and caption"
    )
    parser.add_argument("--output", type=path, required=True)
    parser.add_argument("--steps", type=whole(1), required=True)
    parser.add_argument("--rank", type=whole(1), default=32)
    parser.add_argument("--batch-size", type=whole(1), default=32)
    parser.add_argument("--lr", type=finite, default=1e-4, help="constant, AdamW's; the example's default")
    parser.add_argument(
        "--w", type=finite, nargs=2, default=(5.0, 15.0), help="range of w, one below guidance_scale; the example's"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    args = parser.parse_args(argv)
    with user_errors():
        train(args)


def train(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    data = Captions(name="captions", source="parquet", paths=[args.data])
    encoded = encode(args.teacher, data, args.output / "cache", accelerator, torch.float32, seed=args.seed)
    pipe = load_pipeline(args.teacher)
    shared = SharedNetwork(pipe.unet.requires_grad_(False).eval())
    torch.manual_seed(args.seed)
    student = shared.add_adapter("student", LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(KIND.layers)))
    teacher = shared.teacher()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-2)
    grid, empty = Grid(pipe.scheduler.alphas_cumprod), encoded.null["encoder_hidden_states"]
    generator, start = torch.Generator().manual_seed(args.seed), time.perf_counter()
    low, high = args.w
    for _ in range(args.steps):
        rows = torch.randint(len(encoded.examples), (args.batch_size,), generator=generator)
        x0, condition = encoded.examples.rows(rows)
        text = condition["encoder_hidden_states"].float()
        eps = torch.randn(x0.shape, generator=generator)
        index = torch.randint(SOLVER_STEPS, (len(x0),), generator=generator)
        w = low + (high - low) * torch.rand(len(x0), generator=generator)
        loss = lcm_loss(student, teacher, grid, x0, eps, index, w, text, empty.float().expand(len(x0), -1, -1))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    spent = time.perf_counter() - start
    save_lora(args.output, StableDiffusionPipeline, pipe.unet, "student")
    known = inspect.signature(LCMScheduler.__init__).parameters  # an unknown key would be complained of at every loading
    scheduler = LCMScheduler.from_config({key: value for key, value in pipe.scheduler.config.items() if key in known})
    scheduler.save_pretrained(args.output / "scheduler")
    facts = {
        "seconds": spent,
        "steps": args.steps,
        "rank": args.rank,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "w": list(args.w),
    }
    (args.output / "lcm.json").write_text(json.dumps(facts | {"seed": args.seed}, indent=1) + "\n")
    print(f"{args.steps} updates in {spent:.0f} s: {args.output}")


if __name__ == "__main__":
    main()
