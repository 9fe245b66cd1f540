"""What a run tells: metrics.jsonl and pictures.jsonl (numbers that depend on the configuration alone), timings.jsonl, trackers.

Seconds and memory live in a file of their own, so that the other two of an interrupted and resumed run equal, byte for byte,
those of a run that was never stopped.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from pipelines.common import atomic
from pipelines.common.launch import on_main

from ..objectives.base import HealthCheck

LOGS = ("metrics.jsonl", "timings.jsonl", "pictures.jsonl")


class Terminal:
    """sys.stderr, which may go away (a closed window, a pipe's reader that was stopped too) without taking the run with it."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str):
        return getattr(sys.stderr, name)


class RunLog:
    """Running means between two log lines; `state` is what a checkpoint must keep of them."""

    def __init__(self, accelerator: Accelerator, folder: Path, steps: int, health: tuple[HealthCheck, ...]) -> None:
        self.accelerator, self.folder, self.health = accelerator, folder, health
        self.sums: dict[str, tuple[float, int]] = {}
        self.terminal, self.steps = Terminal(), steps

    @cached_property
    def bar(self) -> tqdm:
        """Drawn when it is first needed: a run that cannot start shows none."""
        hidden = not self.accelerator.is_main_process
        return tqdm(total=self.steps, disable=hidden, unit="step", dynamic_ncols=True, file=self.terminal)

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in LOGS]

    @property
    def state(self) -> dict[str, tuple[float, int]]:
        return dict(self.sums)

    def resume(self, state: dict[str, list], step: int) -> None:
        """Take up the running means."""
        self.sums = {name: (total, count) for name, (total, count) in state.items()}
        self.bar.update(step - self.bar.n)

    def rewind(self, checkpoint: Path | None, step: int) -> None:
        """The files as they were at this step: as the checkpoint holds them, or without the lines written later."""
        for file in self.files:
            copy = checkpoint and checkpoint / file.name
            source = copy if copy and copy.is_file() else file
            if source.is_file():
                atomic.write_text(file, "".join(f"{line}\n" for line in _until(source, step)))

    def add(self, values: dict[str, float]) -> None:
        """Values of one update by name; they are averaged until the next line of the log."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def write(self, step: int, seconds: float, extra: dict[str, float]) -> None:
        """One line of means since the last one; warnings where a health check fails."""
        metrics = {name: total / count for name, (total, count) in sorted(self.sums.items())} | extra
        self.sums = {}
        for check in self.health:
            low = {n: v for n, v in metrics.items() if n.endswith(f"/{check.metric}") and v < check.minimum}
            for name, value in low.items():
                if check.needed or self._was(name, check.minimum):
                    self.warn(f"step {step}: {name} = {value:.3g} is below {check.minimum:g}: {check.message}")
        timing = {
            "step": step,
            "seconds": round(seconds, 3),
            "peak_memory_mib": round(peak_memory(self.accelerator.device) / 2**20),
        }
        rows = ({"step": step} | metrics, timing)

        def append() -> None:
            for name, row in zip(LOGS[:2], rows, strict=True):
                self._append(name, row)

        on_main(self.accelerator, append)
        self.accelerator.log(metrics | {"seconds": seconds}, step=step)
        brief = {n: v for n, v in metrics.items() if "norm" not in n and "@" not in n}
        shown = {n if "loss" in n else n.split("/")[-1]: f"{v:.3g}" for n, v in brief.items()}
        self.bar.set_postfix(shown, refresh=False)

    def write_pictures(self, step: int, numbers: dict[str, float]) -> None:
        """A line of pictures.jsonl and of the trackers; on the main process."""
        self._append("pictures.jsonl", {"step": step} | numbers)
        self.accelerator.log({f"pictures/{name}": value for name, value in numbers.items()}, step=step)

    def _was(self, name: str, minimum: float) -> bool:
        """Whether a logged number has ever been so high."""
        rows = (json.loads(line) for line in self.files[0].read_text().splitlines()) if self.files[0].is_file() else ()
        return any(row.get(name, -math.inf) >= minimum for row in rows)

    def _append(self, name: str, row: dict[str, float]) -> None:
        atomic.append_line(self.folder / name, json.dumps(row))

    def warn(self, message: str) -> None:
        """On the terminal of the main process, above its progress bar."""
        if self.accelerator.is_main_process:
            self.bar.write(f"WARNING: {message}", file=self.terminal)

    def say(self, message: str) -> None:
        """On the terminal of the main process, above its progress bar."""
        if self.accelerator.is_main_process:
            self.bar.write(message, file=self.terminal)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors on a GPU, or else this whole process, have taken since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _until(file: Path, step: int) -> list[str]:
    """The lines up to `step`, without one that a killed process was writing."""
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    return kept
