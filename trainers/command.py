"""What all training commands do around the loop: read the configuration, check the ground, record the run, draw its page."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration

from pipelines.common import atomic
from pipelines.common.config import load_config, one_file
from pipelines.common.errors import UserError
from pipelines.common.launch import check_processes, on_main
from pipelines.common.launch_options import TRAINING, check_launch
from pipelines.common.lock import check_unlocked
from pipelines.common.options import path_option
from pipelines.common.provenance import git_commit, versions

from .config.run import Run, TeacherConfig
from .engine import resume
from .engine.draws import split
from .engine.log import LOGS
from .engine.resume import Start
from .objectives.base import HealthCheck

PACKAGES = ("one-step-distill", "torch", "diffusers", "accelerate", "peft", "safetensors", "numpy")

R = TypeVar("R", bound=Run)


def parse(model: type[R], description: str, argv: list[str] | None) -> R:
    """--config FILE [a.b=value ...] -> a validated configuration."""
    file, overrides = arguments(description, argv)
    return load_config(model, file, overrides)


def arguments(description: str, argv: list[str] | None) -> tuple[str, list[str]]:
    """--config FILE [a.b=value ...] -> (FILE, the overrides)."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", required=True, action="append", type=path_option, help="a YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="replace single values of it")
    args = parser.parse_args(argv)
    return one_file(args.config), args.overrides


def make_accelerator(run: Run) -> Accelerator:
    """As the launcher and the configuration say; UserError for what they cannot do together."""
    check_launch(TRAINING)
    check_trackers(run.trackers)
    project = ProjectConfiguration(project_dir=run.output_dir)
    accelerator = Accelerator(log_with=run.trackers or None, project_config=project)
    check_processes(accelerator)
    if sharded() and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("FSDP: only version 2 is supported; set fsdp_config.fsdp_version: 2 (configs/accelerate/fsdp2.yaml)")
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """UserError for trackers that accelerate does not know or, as it does in silence, would leave out: those not installed."""
    known, installed = LoggerType.list(), [str(t) for t in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(f"trackers: accelerate knows no {name!r}; expected some of {', '.join(known)}")
        if name != "all" and name not in installed:
            package = 'pip install -e ".[tensorboard]"' if name == "tensorboard" else "install its package"
            raise UserError(
                f"trackers: {name!r} is not installed; {package}, or leave it out of trackers "
                f"(installed: {', '.join(installed) or 'none'})"
            )


def sharded() -> bool:
    """Whether the launch asked for FSDP. accelerate itself forgets it on a CPU, where it works as well."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_output(run: Run, accelerator: Accelerator) -> None:
    """Refuse a batch that these processes cannot share, an output_dir that cannot be written, is in use or holds another run, and
    a checkpoint to resume from that does not fit, before anything is loaded. Writes nothing.
    """
    split(run.batch_size, accelerator.num_processes, run.micro_batch_size)
    folder = Path(run.output_dir)
    primary = "teacher" if isinstance(run, TeacherConfig) else "student"
    _check_writable(run, primary)
    check_unlocked(folder)
    resume.plan(run, primary)
    accelerator.wait_for_everyone()  # every process has looked before the first one writes


def _check_writable(run: Run, primary: str) -> None:
    folder, fault = Path(run.output_dir), f"output_dir {run.output_dir!r} cannot be written: {{}}; name another folder"
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        what = "is a link to nothing" if not existing.exists() else "is a file"
        raise UserError(fault.format(f"{str(existing)!r} {what}"))
    for part in (existing, *(folder / name for name in ("checkpoints", "samples", "snapshots", primary))):
        if os.path.lexists(part) and not part.is_dir():
            raise UserError(fault.format(f"{str(part)!r} is to be a folder, and is none"))
        if part.is_dir() and not os.access(part, os.W_OK | os.X_OK):
            raise UserError(fault.format(f"{str(part)!r} may not be written"))
    for file in (folder / name for name in (*LOGS, "history.jsonl")):
        if os.path.lexists(file) and not (file.is_file() and os.access(file, os.W_OK)):
            raise UserError(fault.format(f"{str(file)!r} is no file that may be written"))


def record(run: Run, accelerator: Accelerator, start: Start) -> list[str]:
    """Write config.yaml and environment.json as they are from now on and a line of history.jsonl, and start the trackers.

    Called once a run is known to be able to start. Returns what has changed in the environment of a run that goes on.
    """
    folder, about = Path(run.output_dir), environment(accelerator)
    before = resume.read_config(start.checkpoint.parent.parent / "environment.json") if start.checkpoint else None
    changed = resume.lines(resume.differences({"environment": before}, {"environment": about})) if before else []
    accelerator.wait_for_everyone()  # every process has read what is now written anew
    now = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": start.step}
    now |= {"checkpoint": str(start.checkpoint) if start.checkpoint else None, "changed": start.changed, "environment": about}

    def write() -> None:
        atomic.write_text(folder / "environment.json", json.dumps(about, indent=1) + "\n")
        atomic.write_text(folder / "config.yaml", yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
        atomic.append_line(folder / "history.jsonl", json.dumps(now))

    on_main(accelerator, write)
    if run.trackers:
        accelerator.init_trackers("one-step-distill", config={"config": json.dumps(run.model_dump(mode="json"))})
    return changed


def environment(accelerator: Accelerator) -> dict:
    """Library versions, git commit (None outside a checkout), device, processes and threads."""
    return {
        "versions": versions(PACKAGES),
        "git_commit": git_commit(),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "sharded": sharded(),
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }


def page(run: Run, health: Sequence[HealthCheck]) -> Callable[[str, int], None] | None:
    """page(state, step) writes report.html, which eval/ draws from the files in output_dir; None for a run without pictures.

    Charts and pages are made in eval/ for all commands: this is one of the two lines that import against the arrows. They are
    loaded when the first page is drawn.
    """
    if not run.sample_every:
        return None

    def write(state: str, step: int) -> None:
        from eval.report.run_page import write_page

        write_page(Path(run.output_dir), state, step, [(c.metric, c.minimum, c.message, c.needed) for c in health])

    return write
