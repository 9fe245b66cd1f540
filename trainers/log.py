"""What a run tells: metrics.jsonl (numbers that depend on the configuration alone), timings.jsonl, trackers, a bar.

Seconds live in a file of their own, so that metrics.jsonl of an interrupted and resumed run equals, byte for byte, that of a
run that was never stopped.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from .objectives.base import HealthCheck


class RunLog:
    """Running means between two log lines; `state` is what a checkpoint must keep of them."""

    def __init__(self, accelerator: Accelerator, folder: Path, steps: int, health: tuple[HealthCheck, ...]) -> None:
        self.accelerator, self.folder, self.health = accelerator, folder, health
        self.sums: dict[str, tuple[float, int]] = {}
        self.bar = tqdm(total=steps, disable=not accelerator.is_main_process, unit="step", dynamic_ncols=True)

    @property
    def state(self) -> dict[str, tuple[float, int]]:
        return dict(self.sums)

    def resume(self, state: dict[str, list], step: int) -> None:
        """Take up the running means, and forget the lines a killed run wrote after its last checkpoint."""
        self.sums = {name: (total, count) for name, (total, count) in state.items()}
        if self.accelerator.is_main_process:
            for name in ("metrics.jsonl", "timings.jsonl"):
                _keep_until(self.folder / name, step)
        self.bar.update(step - self.bar.n)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def write(self, step: int, seconds: float, extra: dict[str, float]) -> None:
        """One line of means since the last one; warnings where a health check fails."""
        metrics = {name: total / count for name, (total, count) in sorted(self.sums.items())} | extra
        self.sums = {}
        for check in self.health:
            for name, value in metrics.items():
                if name.endswith(f"/{check.metric}") and value < check.minimum:
                    self.warn(f"step {step}: {name} = {value:.3g} is below {check.minimum:g}: {check.message}")
        if self.accelerator.is_main_process:
            _append(self.folder / "metrics.jsonl", {"step": step} | metrics)
            _append(self.folder / "timings.jsonl", {"step": step, "seconds": round(seconds, 3)})
        self.accelerator.log(metrics | {"seconds": seconds}, step=step)
        brief = {n: v for n, v in metrics.items() if "norm" not in n and "@" not in n}
        shown = {n if "loss" in n else n.split("/")[-1]: f"{v:.3g}" for n, v in brief.items()}
        self.bar.set_postfix(shown, refresh=False)

    def warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            self.bar.write(f"WARNING: {message}", file=sys.stderr)

    def say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            self.bar.write(message, file=sys.stderr)


def _append(file: Path, line: dict) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def _keep_until(file: Path, step: int) -> None:
    """Rewrite a JSON-lines file without the lines after `step` and without a half-written last line."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue  # the line a killed process was writing
    partial = file.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    os.replace(partial, file)
