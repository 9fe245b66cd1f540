"""What a training run left behind: which folder holds the model, what it says about its training, its log."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.students import read_info

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

    FileNotFoundError or ValueError, naming the path, what was expected and how to get it.
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
    snapshots = [Run(name, f, read_info(f, role)) for f in sorted(folder.glob("snapshots/step_*"))]
    return Run(name, model, read_info(model, role), read_metrics(log) if log.is_file() else [], snapshots)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl. ValueError names the line that cannot be read; an unfinished last line is left out."""
    rows, lines = [], file.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # the run was killed, or is still running, in the middle of a write
                break
            raise ValueError(f"{file} line {number} is not valid JSON ({error}); mend or remove that line") from error
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{file} line {number} is not an object with a 'step'; mend or remove that line")
        rows.append(row)
    return rows


def curves(rows: list[dict[str, Any]], suffix: str) -> dict[str, tuple[list[int], list[float]]]:
    """{key: (steps, values)} for every logged number whose key ends with suffix, e.g. "loss" or "fd"."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.endswith(suffix) and isinstance(value, int | float):
                steps, values = found.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return found


def ess_by_level(rows: list[dict[str, Any]]) -> dict[float, tuple[list[int], list[float]]]:
    """{noise level: (steps, mean effective sample size)} of a run that logs it, levels ascending; {} for others.

    A log holds, for each level, the share of samples drawn there and their summed size: the mean is the ratio.
    """
    found: dict[float, tuple[list[int], list[float]]] = {}
    for row in rows:
        for key, share in row.items():
            _, marker, level = key.partition("ess_share@")
            if marker and share > 0:
                steps, values = found.setdefault(float(level), ([], []))
                steps.append(row["step"])
                values.append(row[key.replace("ess_share@", "ess_sum@")] / share)
    return dict(sorted(found.items()))
