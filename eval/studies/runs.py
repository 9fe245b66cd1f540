"""What a training run left behind: which folder holds the model, what it says about its training, its log."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.students import read_info

from ..report.training_log import read_metrics

Role = Literal["teacher", "student"]


@dataclass(frozen=True)
class Run:
    """A model to evaluate. model: its folder; info: teacher.json or student.json; metrics: rows of metrics.jsonl;
    snapshots: the same model earlier in its training, oldest first."""

    name: str
    model: Path
    info: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    snapshots: list[Run] = field(default_factory=list)


def find_run(name: str, path: Path, role: Role) -> Run:
    """A run folder (with student/ or teacher/ in it) or a model folder itself -> Run.

    FileNotFoundError or UserError, naming the path, what was expected and how to get it.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{role} {name!r}: no such folder: {path}")
    model = path / role if (path / role).is_dir() else path
    marker = f"{role}.json" if role == "student" else "model_index.json"
    if not (model / marker).is_file():
        where = f"{model} has no {marker}" if model != path else f"{path} has neither {role}/ nor {marker}"
        train = "trainers.distill" if role == "student" else "trainers.train_teacher"
        raise FileNotFoundError(
            f"{role} {name!r}: {where}; give the output folder of a finished run of {train}, or its {role}/ folder"
        )
    folder = path if model != path else path.parent
    log = folder / "metrics.jsonl"
    saved = (f for f in folder.glob("snapshots/step_*") if re.fullmatch(r"step_\d{8,}", f.name))  # not somebody's copies of them
    snapshots = [Run(name, f, read_info(f, role)) for f in sorted(saved)]
    return Run(name, model, read_info(model, role), read_metrics(log) if log.is_file() else [], snapshots)
