"""Time and memory of one training step of a LoRA student: one frozen network with adapters against the usual layouts.

    python -m scripts.bench.step [--shapes sd15 mid sd35 sd35_half] [--objectives vardiu ...] [--layouts ours three_copies ...]
                                  [--repeats 3] [--threads 4] [--output outputs/bench]

Writes <output>/step.json: shape -> objective -> layout -> {seconds, peak_bytes, peak_bytes_above_base}. Weights are random, made
from the network's configuration; text embeddings too. Each layout is a process of its own, and they take turns, a step each, so
that whatever else slows the machine slows all; of large shapes one after the other, since memory does not hold all of them.
seconds: the median over turns. peak_bytes: the most memory of the process (of the
device, where there is one) less what it held before the first network was made. base: one frozen copy of the network's weights.

    ours          trainers.distill's step: adapters on one network
    shared        the same with the second network on what the teacher's call has made (network: shared)
    three_copies  the same with a network each for teacher, student and posterior or fake score, as other repositories hold them;
                  Diff-Instruct as they run it, in two phases with a student call each
    lcm_update    what diffusers' LCM-LoRA example does for each step: teacher twice, student twice, two networks
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from peft import LoraConfig
from torch import Tensor, nn

from pipelines.adapters import AdapterHead, Role, SharedNetwork
from pipelines.common.config import validate
from pipelines.common.options import path, whole
from pipelines.common.provenance import git_commit, versions
from pipelines.denoiser import Denoiser, FewStepGenerator
from pipelines.kinds import kind_named
from pipelines.last_blocks import LastBlocks, last_part, layers_of_last_part
from pipelines.up_half import UpDenoiser, UpHalf
from trainers.config.networks import Lora
from trainers.config.run import DistillConfig
from trainers.data.examples import Tensors
from trainers.engine.draws import DrawSource
from trainers.engine.loop import Trainer
from trainers.posteriors import COVARIANCES, UNetPosterior

from ..jobs import cores, exit_cleanly
from .parts.lcm_lora import Grid, lcm_loss

# SD3.5-M: 2.24 B weights, 24 blocks, the first 13 with a second attention (stabilityai/stable-diffusion-3.5-medium, config.json)
SD35 = {
    **{"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16},
    **{"joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384},
    **{"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "patch_size": 2},
}
TEXT_SD35 = {"encoder_hidden_states": (77 + 256, 4096), "pooled_projections": (2048,)}
# family: in pipelines.kinds; network: its settings; side: of latents; text: what a prompt is; together: whether all layouts fit
SHAPES: dict[str, dict[str, Any]] = {
    # Stable Diffusion 1.5: 859.5M weights, 512x512 images
    "sd15": {
        **{"family": "sd", "network": {"cross_attention_dim": 768}, "text": {"encoder_hidden_states": (77, 768)}},
        **{"dtype": torch.bfloat16, "side": 64, "rank": 64, "together": True},
    },
    "mid": {
        "family": "sd",
        "network": {"cross_attention_dim": 512, "block_out_channels": (128, 256, 512, 512)},
        "text": {"encoder_hidden_states": (77, 512)},
        **{"dtype": torch.float32, "side": 32, "rank": 32, "together": True},
    },
    "sd35": {
        **{"family": "sd3", "network": SD35, "text": TEXT_SD35},
        **{"dtype": torch.bfloat16, "side": 64, "rank": 32, "together": False},
    },
}
# half of its depth, for machines that do not hold three copies
SHAPES["sd35_half"] = SHAPES["sd35"] | {"network": SD35 | {"num_layers": 12, "dual_attention_layers": tuple(range(7))}}
BATCH = {"vardiu": 1, "diff_instruct": 1, "sid": 1, "varflow": 16, "varflow_k2": 2}
SCORES = ("ours", "shared", "three_copies")
LAYOUTS = {
    "vardiu": (*SCORES, "lcm_update"),
    "diff_instruct": (*SCORES, "lcm_update"),
    "sid": SCORES,
    "varflow": ("ours",),
    "varflow_k2": ("ours",),
}
GUIDANCE = 7.5
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class RandomModels:
    """objectives.base.Parts of a network with random weights; `copies`: a network for each role instead of adapters on one."""

    num_classes = 0

    def __init__(self, shape: dict[str, Any], copies: bool, lora: Lora, device: torch.device) -> None:
        self.lora, self.copies, self.device, self.kind = lora, copies, device, kind_named(shape["family"])
        network = random_network(shape, device)
        self.base = SharedNetwork(network, self.kind.anatomy(network.config, 1.0))
        self.latent_shape = (network.config["in_channels"], shape["side"], shape["side"])
        scheduler: Any = DDIMScheduler(**NOISE) if shape["family"] == "sd" else FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.schedule, self.prediction = self.kind.schedule(scheduler), self.kind.prediction(scheduler)
        latents = torch.randn(8, *self.latent_shape, generator=torch.Generator().manual_seed(1))
        text = {k: torch.randn(8, *v, generator=torch.Generator().manual_seed(0)) for k, v in shape["text"].items()}
        self.examples = Tensors(text | {"latents": latents})
        null = {k: v[0] for k, v in text.items()}
        self.teacher = Denoiser(self.base.teacher(), self.schedule, self.prediction, 1.0, GUIDANCE, null)
        self.student = FewStepGenerator(self._denoiser(self._role("student")), self.kind.student_levels(scheduler, 1))

    def _role(self, name: str) -> Role:
        base = SharedNetwork(copy.deepcopy(self.base.network), self.base.anatomy) if self.copies else self.base
        layers = list(self.lora.targets or self.kind.layers)
        return base.add_adapter(name, LoraConfig(r=self.lora.rank, lora_alpha=self.lora.rank, target_modules=layers))

    def _denoiser(self, network: nn.Module) -> Denoiser:
        return Denoiser(network, self.schedule, self.prediction, 1.0)

    def _last_part(self, out_channels: int) -> LastBlocks | UpHalf:
        layers = layers_of_last_part(self.base.network, self.base.anatomy, self.kind.layers)
        config = LoraConfig(r=self.lora.rank, lora_alpha=self.lora.rank, target_modules=layers)
        return last_part(self.base.add_adapter("aux", config), out_channels)

    def fake_score(self, section: Any) -> Denoiser | UpDenoiser:
        if section.network == "shared":
            return UpDenoiser(self._last_part(self.latent_shape[0]), self.teacher)
        return self._denoiser(self._role("aux"))

    def posterior(self, section: Any, with_mean: bool) -> UNetPosterior:
        covariance = COVARIANCES["learned"](self.latent_shape)
        out_channels = UNetPosterior.num_channels(covariance, with_mean)
        shared = section.network == "shared"
        head = self._last_part(out_channels) if shared else AdapterHead(self._role("aux"), out_channels)
        posterior = UNetPosterior(head, covariance, 1.0, with_mean, self.prediction)
        posterior.start_mean(head.replaced)
        return posterior


def random_network(shape: dict[str, Any], device: torch.device) -> ModelMixin:
    """Made in its own dtype on its own device: a float32 copy on the way would be part of the peak."""
    torch.set_default_dtype(shape["dtype"])
    with device:
        network = kind_named(shape["family"]).network(sample_size=shape["side"], **shape["network"]).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return network


def our_step(shape: dict[str, Any], objective: str, layout: str, device: torch.device) -> Callable[[], None]:
    """One step of trainers.distill on random weights: draws, losses, backward passes, AdamW and EMA."""
    copies = layout == "three_copies"
    vp = shape["family"] == "sd"
    adam, low, high = {"lr": 1e-5}, *((20, 980) if vp else (0.02, 0.98))
    levels = {"name": "uniform", "low": low, "high": high}
    lora = {"rank": shape["rank"]}
    network = "shared" if layout == "shared" else None
    fake_score = {"network": network, "lora": lora, "optimizer": adam, "levels": levels, "weighting": "snr" if vp else "edm"}
    sections: dict[str, dict[str, Any]] = {
        "vardiu": {
            "name": "vardiu",
            "weighting": "dmd",
            "pool": "own",
            "noise_draws": 1,
            "regression_weighting": "snr" if vp else "edm",
            "posterior": {
                **{"network": network or "adapter", "lora": lora, "covariance": "learned"},
                **{"warmup_updates": 0, "optimizer": adam},
            },
        },
        "diff_instruct": {"name": "diff_instruct", "weighting": "dmd", "joint": not copies, "fake_score": fake_score},
        "sid": {"name": "sid", "fake_score": fake_score},
        "varflow": {"name": "varflow"},
    }
    raw = {
        "output_dir": tempfile.mkdtemp(),
        "teacher": {"path": "random", "guidance_scale": 1.0 if objective.startswith("varflow") else GUIDANCE},
        "student": {"lora": lora, "optimizer": adam},
        "objective": sections[objective.removesuffix("_k2")] | {"levels": levels},
        "data": {"name": "teacher_samples", "file": "none"},
        "steps": 1000,
        "batch_size": BATCH[objective],
        "micro_batch_size": 1,
        "gradient_checkpointing": True,
        "ema_decay": 0.0,
        "log_every": 1000,
    }
    config = validate(DistillConfig, raw, "the benchmark's configuration")
    models = RandomModels(shape, copies, config.student.lora, device)
    built, optimizers = config.objective.build(models, config.steps), config.objective.optimizers()
    draws = DrawSource(0, config.batch_size, models.latent_shape, device, models.examples, micro_batch_size=1)
    trainer = Trainer(
        config, Accelerator(), built, "student", {"student": config.student.optimizer} | optimizers, draws, None, None, None
    )
    return trainer.one_step


def lcm_step(shape: dict[str, Any], device: torch.device) -> Callable[[], None]:
    """The update of diffusers' LCM-LoRA example (Luo et al. 2023): consistency between t and the teacher's DDIM step from t."""
    teacher = random_network(shape, device)
    student = SharedNetwork(copy.deepcopy(teacher))
    layers = list(kind_named(shape["family"]).layers)
    role = student.add_adapter("student", LoraConfig(r=shape["rank"], target_modules=layers))
    student.network.enable_gradient_checkpointing(student.checkpointed)
    optimizer = torch.optim.AdamW(role.parameters(), lr=1e-5)
    grid = Grid(DDIMScheduler(**NOISE).alphas_cumprod.to(device))
    z, eps = torch.randn(2, 1, 4, shape["side"], shape["side"], device=device)
    text, empty = torch.randn(2, 1, *shape["text"]["encoder_hidden_states"], device=device)
    index, w = torch.tensor([24], device=device), torch.tensor([GUIDANCE - 1], device=device)

    def frozen(x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return teacher(x_t.to(shape["dtype"]), t, encoder_hidden_states.to(shape["dtype"])).sample.float()

    def step() -> None:
        lcm_loss(role, frozen, grid, z, eps, index, w, text, empty).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory(device: torch.device) -> int:
    """The most bytes that this process, or its device, has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(pipe: Connection, name: str, objective: str, layout: str, threads: int) -> None:
    """Builds one case, then answers each request with the seconds of one step and the peak so far."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, before = SHAPES[name], memory(device)
    step = lcm_step(shape, device) if layout == "lcm_update" else our_step(shape, objective, layout, device)
    while pipe.recv():
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, memory(device) - before))


def measure(name: str, objective: str, layouts: Sequence[str], repeats: int, threads: int) -> dict[str, dict[str, float]]:
    """layout -> numbers; the first step of each is a warm-up."""
    # freed tensors leave the process, so that its peak is what was in use and not what the allocator had set aside
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    groups = [list(layouts)] if SHAPES[name]["together"] else [[layout] for layout in layouts]
    return {layout: row for group in groups for layout, row in in_turn(name, objective, group, repeats, threads).items()}


def in_turn(name: str, objective: str, layouts: list[str], repeats: int, threads: int) -> dict[str, dict[str, float]]:
    """Each in a process, all of them at once; a step each in turn."""
    context = multiprocessing.get_context("spawn")
    running = {}
    for layout in layouts:
        mine, theirs = context.Pipe()
        process = context.Process(target=worker, args=(theirs, name, objective, layout, threads), daemon=True)
        process.start()
        running[layout] = (process, mine)
    seconds: dict[str, list[float]] = {layout: [] for layout in running}
    peak: dict[str, int] = {}
    for turn in range(repeats + 1):
        order = list(running) if turn % 2 else list(reversed(running))  # nobody is always first
        for layout in order:
            running[layout][1].send(True)
            taken, peak[layout] = running[layout][1].recv()
            if turn or not repeats:
                seconds[layout].append(taken)
    for process, pipe in running.values():
        pipe.send(False)
        process.join()
    base = base_bytes(name)
    return {
        layout: {
            "seconds": statistics.median(seconds[layout]),
            "peak_bytes": peak[layout],
            "peak_bytes_above_base": peak[layout] - base,
        }
        for layout in running
    }


def base_bytes(name: str) -> int:
    network = random_network(SHAPES[name], torch.device("meta"))
    return sum(p.numel() for p in network.parameters()) * SHAPES[name]["dtype"].itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["sd15", "mid"])
    parser.add_argument("--objectives", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS["vardiu"], default=list(LAYOUTS["vardiu"]))
    parser.add_argument("--repeats", type=whole(0), default=3, help="steps after one to warm up; 0: that one alone")
    parser.add_argument("--threads", type=whole(1), default=cores())
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "step.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    found["facts"] = {"git_commit": git_commit(), "versions": versions(("torch", "diffusers", "peft")), "threads": args.threads}
    for name in args.shapes:
        print(f"\n{name}: {base_bytes(name) / 2**30:.2f} GiB of weights, {SHAPES[name]['dtype']}", flush=True)
        for objective in args.objectives:
            known = [layout for layout in LAYOUTS[objective] if layout in args.layouts]
            if SHAPES[name]["family"] != "sd":  # it is of U-Nets that predict noise
                known = [layout for layout in known if layout != "lcm_update"]
            numbers = measure(
                name, objective, known, args.repeats if BATCH[objective] < 16 else min(1, args.repeats), args.threads
            )
            found.setdefault(name, {})[objective] = numbers
            file.write_text(json.dumps(found, indent=1))
            for layout, row in numbers.items():
                above = row["peak_bytes_above_base"] / 2**30
                print(
                    f"{objective:14} {layout:13} {row['seconds']:7.2f} s {row['peak_bytes'] / 2**30:6.2f} GiB, {above:.2f} above"
                )
    print(f"\n{file}")


if __name__ == "__main__":
    exit_cleanly(main)
