"""Peak memory of one training step of each objective, beside that of training the student's network alone.

    python -m scripts.bench.memory [--teacher RUN] [--batch-size 128] [--output outputs/bench]

Counts the bytes of all tensors alive at a time (weights, gradients, moments, EMA, activations, data), which are the same on every
machine; a library's scratch space and the allocator's rounding come on top. Writes <output>/memory.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import weakref
from contextlib import redirect_stderr
from os import devnull
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.common.config import load_config
from pipelines.common.launch import user_errors
from pipelines.common.options import path, whole
from trainers import distill, train_teacher
from trainers.config.run import DistillConfig, TeacherConfig

CASES = {
    "VarDiU, amortised score (the recipe)": ("vardiu", []),
    "VarDiU, amortised score, 8 noise draws": ("vardiu", ["objective.noise_draws=8"]),
    "VarDiU, amortised score, K=4": ("vardiu", ["objective.num_samples=4"]),
    "VarDiU, amortised score, K=16": ("vardiu", ["objective.num_samples=16"]),
    "VarDiU, bound": ("vardiu_bound_linear", ["objective.antithetic=false"]),
    "VarDiU, multi-sample, K=4": ("vardiu_multi_sample", ["objective.num_samples=4"]),
    "VarDiU, multi-sample, K=16": ("vardiu_multi_sample", ["objective.num_samples=16"]),
    "VarDiU, resampled score, K=4": ("vardiu_resampled", ["objective.num_samples=4"]),
    "VarDiU, resampled score, K=16": ("vardiu_resampled", ["objective.num_samples=16"]),
    "Diff-Instruct": ("diff_instruct", []),
    "VarFlow": ("varflow", []),
}


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensor storages made inside this context: `now` alive, `peak` the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def peak_bytes(run, config) -> int:
    """Of two steps and a warm-up update of a training command in this process, from loading on."""
    with PeakMemory() as memory, open(devnull, "w") as quiet, redirect_stderr(quiet):
        run(config)
    return memory.peak


def short(output: Path, batch_size: int) -> list[str]:
    plain = {"sample_every": "null", "snapshot_every": "null", "checkpoint_every": "null", "log_every": 1, "steps": 2}
    return [f"output_dir={output}", f"batch_size={batch_size}", *(f"{k}={v}" for k, v in plain.items())]


def student_alone(folder: Path, batch_size: int, overrides: list[str]) -> int:
    """Training the student's network by itself: one forward and backward pass a step, Adam, EMA."""
    own = [o for o in short(folder, batch_size) if not o.startswith("snapshot")]
    return peak_bytes(train_teacher.run, load_config(TeacherConfig, "configs/digits_teacher.yaml", own + overrides))


def distillation(name: str, folder: Path, batch_size: int, teacher: Path, overrides: list[str]) -> int:
    given = [*short(folder, batch_size), f"teacher.path={teacher}", *overrides]
    if name.startswith("vardiu"):
        given.append("objective.posterior.warmup_updates=1")
    return peak_bytes(distill.run, load_config(DistillConfig, f"configs/digits_{name}.yaml", given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=path, default=Path("outputs/bench/digits/teacher"))
    parser.add_argument("--batch-size", type=whole(1), default=128)
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    args = parser.parse_args()
    numbers = {}
    with tempfile.TemporaryDirectory() as scratch:
        numbers["the student alone"] = student_alone(Path(scratch) / "alone", args.batch_size, [])
        for i, (label, (name, overrides)) in enumerate(CASES.items()):
            numbers[label] = distillation(name, Path(scratch) / str(i), args.batch_size, args.teacher, overrides)
    for label, peak in numbers.items():
        print(f"{label:42} {peak / 2**20:8.1f} MiB {peak / numbers['the student alone']:6.2f}x")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "memory.json").write_text(json.dumps({"batch_size": args.batch_size, "peak_bytes": numbers}, indent=1))


if __name__ == "__main__":
    with user_errors():
        main()
