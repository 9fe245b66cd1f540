"""metrics.jsonl of a training run: its rows, and series of numbers in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError
from pipelines.common.reading import read_text


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl. UserError names the line that cannot be read; an unfinished last line is left out."""
    rows, lines = [], read_text(file).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # the run was killed, or is still running, in the middle of a write
                break
            raise UserError(f"{file} line {number} is not valid JSON ({error}); mend or remove that line") from error
        if not isinstance(row, dict) or "step" not in row:
            raise UserError(f"{file} line {number} is not an object with a 'step'; mend or remove that line")
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
