"""The loop of the autoencoder and of CLIP: AdamW, cosine, an average of the weights, checkpoints to resume from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.common.errors import UserError
from trainers.config.networks import Optimizer
from trainers.engine import checkpoint
from trainers.engine.draws import derive_seed
from trainers.engine.ema import Ema, constant_decay
from trainers.engine.optimizers import build_optimizer, learning_rate
from trainers.engine.resume import read_config

SAVE_EVERY = 100


def draws(seed: int, step: int) -> torch.Generator:
    """The random numbers of a step: a function of the step, so that a resumed run equals one never stopped."""
    return torch.Generator().manual_seed(derive_seed(seed, "assets", step))


def fit(
    network: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    folder: Path,
    optimizer: Optimizer,
    steps: int,
    picture: Callable[[Path], None],
    ema_decay: float = 0.998,
    picture_every: int = 500,
    save_every: int = SAVE_EVERY,
    task: dict[str, Any] | None = None,
) -> Ema:
    """Train `network` to `steps`, from the last checkpoint in `folder` if there is one; returns the average of its weights.

    task: options that say what is learned. UserError where the checkpoint's are others.
    loss(step) -> (loss, numbers for the log); picture(file) is called with the average in place. Writes <folder>/log.jsonl.
    """
    networks, optimizers = {"network": network}, {"network": build_optimizer(network.parameters(), optimizer)}
    ema = Ema(network, constant_decay(ema_decay))
    step = _restore(folder, networks, optimizers, ema, task or {})
    parameters = [p for p in network.parameters() if p.requires_grad]
    bar, start, shown = tqdm(total=steps, initial=step, mininterval=5), time.perf_counter(), {}
    while step < steps:
        for group in optimizers["network"].param_groups:
            group["lr"] = learning_rate(optimizer, step, steps)
        value, numbers = loss(step)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, optimizer.clip or float("inf"), error_if_nonfinite=True)
        optimizers["network"].step()
        optimizers["network"].zero_grad()
        ema.update()
        step += 1
        for key, number in ({"loss": float(value.detach()), "grad_norm": float(norm)} | numbers).items():
            shown[key] = shown.get(key, 0.0) + number / 50
        bar.update()
        if step % 50 == 0:
            entry = {"step": step, "seconds": round(time.perf_counter() - start, 1)} | {k: round(v, 5) for k, v in shown.items()}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            shown = {}
        if step % picture_every == 0 or step == steps:
            with ema.swapped():
                network.eval()
                picture(folder / f"step_{step:06d}.png")
                network.train()
        if step % save_every == 0 or step == steps:
            tensors = {
                "networks": checkpoint.network_tensors(networks),
                "ema": ema.average,
                "optimizers": checkpoint.optimizer_tensors(optimizers, networks),
            }
            state = {"step": step, "ema_updates": ema.updates}
            about = optimizer.model_dump(mode="json") | {"steps": steps, "task": task or {}}
            checkpoint.save(folder / "checkpoints", step, tensors, state, about, [], keep=1)
    bar.close()
    return ema


def _restore(
    folder: Path, networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], ema: Ema, task: dict[str, Any]
) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    saved = checkpoint.list_checkpoints(folder / "checkpoints")
    if not saved:
        return 0
    before = (read_config(saved[-1] / "config.json") or {}).get("task", {})
    if before != task:
        raise UserError(f"{folder} holds a training with {before}, this one has {task}; give another --output, or remove it")
    tensors, state = checkpoint.load(saved[-1])
    checkpoint.restore_tensors(checkpoint.network_tensors(networks), tensors["networks"], str(saved[-1]))
    checkpoint.restore_tensors(ema.average, tensors["ema"], str(saved[-1]))
    checkpoint.restore_optimizers(optimizers, networks, tensors["optimizers"], str(saved[-1]))
    ema.updates = state["ema_updates"]
    return state["step"]
