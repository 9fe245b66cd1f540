"""report.html of a training, drawn while it runs from the files in its folder: verdicts, curves, pictures, speed, settings.

One file without scripts; pictures are links into samples/, so the folder can be copied and opened as it is. Everything is read
anew each time, so the page of a resumed run shows the whole of it. It holds no number that is not in a file beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.common.atomic import write_text
from pipelines.common.reading import read_json, read_text, read_yaml

from ..protocols import LOWER_IS_BETTER
from . import figures
from . import run_verdicts as rules
from .html import Picture, render
from .results import TITLES
from .run_verdicts import Verdict
from .training_log import curves, read_metrics

REFRESH = 60  # seconds after which a browser looks again, while the training goes on
CHARTS, POINTS, GRIDS = 8, 400, 12  # at most; of more grids the first, the last and some between
# What a page can show, most telling first: the end of a key, its title.
SHOWN: tuple[tuple[str, str], ...] = (
    ("information", "information (nats)"),
    ("x0_gap", "score gap (x0_gap)"),
    ("regression_error", ""),
    ("x0_std", "spread of x0"),
)
SHOWN += (("ess", "effective sample size"), ("loss", ""))

Curve = tuple[list[int], list[float]]
# (metric, its minimum, what to do below it, whether the student needs it from the start), as the training warns
HealthCheck = tuple[str, float, str, bool]


@dataclass
class RunFiles:
    """What a run's folder holds, up to `step`."""

    folder: Path
    step: int
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    logged: dict[str, Curve] = field(default_factory=dict)  # metrics.jsonl
    pictures: dict[str, Curve] = field(default_factory=dict)  # pictures.jsonl
    timings: list[dict[str, Any]] = field(default_factory=list)
    teacher: dict[str, float] = field(default_factory=dict)  # the numbers of its pictures
    grids: list[tuple[int, str]] = field(default_factory=list)  # (step, name)
    snapshots: list[int] = field(default_factory=list)


def write_page(folder: Path, state: str, step: int, health: Sequence[HealthCheck]) -> None:
    """<folder>/report.html, whole or not at all. state: "training", "stopped" or "complete" at `step` steps.

    UserError or OSError: a file of the run that cannot be read, or the page cannot be written.
    """
    write_text(folder / "report.html", page(read_run(folder, step), state, health, datetime.now(UTC)))


def read_run(folder: Path, step: int) -> RunFiles:
    """What the folder of a run holds up to `step`: lines and pictures of later steps are those of an earlier start, which this
    one has still to come to. UserError or OSError for a file that cannot be read.
    """

    def rows(name: str) -> list[dict[str, Any]]:
        file = folder / name
        return [row for row in (read_metrics(file) if file.is_file() else []) if row["step"] <= step]

    teacher = folder / "samples" / "teacher.json"
    history = folder / "history.jsonl"
    return RunFiles(
        folder,
        step,
        config=read_yaml(folder / "config.yaml"),
        environment=read_json(folder / "environment.json", "start the run again"),
        starts=[json.loads(line) for line in read_text(history).splitlines()] if history.is_file() else [],
        logged=finite_curves(rows("metrics.jsonl")),
        pictures=finite_curves(rows("pictures.jsonl")),
        timings=rows("timings.jsonl"),
        teacher=read_json(teacher, "remove it") if teacher.is_file() else {},
        grids=[(n, path.name) for path in (folder / "samples").glob("step_*.png") if (n := _number(path.stem)) and n <= step],
        snapshots=[n for path in (folder / "snapshots").glob("step_*") if (n := _number(path.name)) and n <= step],
    )


def _number(name: str) -> int | None:
    found = re.fullmatch(r"step_(\d+)", name)
    return int(found[1]) if found else None


def finite_curves(rows: list[dict[str, Any]]) -> dict[str, Curve]:
    """Rows of a log -> {key: (steps, values)}, of the values that are finite."""
    found = {}
    for key, (steps, values) in curves(rows, "").items():
        kept = [(s, v) for s, v in zip(steps, values, strict=True) if key != "step" and math.isfinite(v)]
        if kept:
            found[key] = ([s for s, _ in kept], [v for _, v in kept])
    return found


# Verdicts ---------------------------------------------------------------------------------------------------------------------


def verdicts(run: RunFiles, health: Sequence[HealthCheck]) -> list[Verdict]:
    """Measurements first: where nothing is wrong, the first is the headline."""
    said = [rules.evaluation(*curve, TITLES[name], LOWER_IS_BETTER[name]) for name, curve in evaluations(run).items()]
    falls = "x0_gap" if "objective" in run.config else "loss"  # other losses of distillation say nothing
    said += [rules.gap(*curve, falls) for key, curve in run.logged.items() if key.endswith(f"/{falls}")]
    for metric, minimum, message, needed in health:
        if same := [curve for key, curve in run.logged.items() if key.endswith(f"/{metric}")]:
            said.append(rules.health(*averaged(same), metric, minimum, message, needed))
    for name, rule in (("spread", rules.spread), ("diversity", rules.diversity)):
        if name in run.pictures and run.teacher.get(name):
            steps, values = run.pictures[name]
            said.append(rule(steps, [v / run.teacher[name] for v in values]))
    if "saturation" in run.pictures and "saturation" in run.teacher:
        said.append(rules.saturation(*run.pictures["saturation"], run.teacher["saturation"]))
    return said


def averaged(same: Sequence[Curve]) -> Curve:
    """One number that several phases log, each from a batch of its own: the mean at each step."""
    at: dict[int, list[float]] = {}
    for steps, values in same:
        for step, value in zip(steps, values, strict=True):
            at.setdefault(step, []).append(value)
    return sorted(at), [sum(at[step]) / len(at[step]) for step in sorted(at)]


def evaluations(run: RunFiles) -> dict[str, Curve]:
    """Metric -> its curve, for those measured in training."""
    keys = {key: key.removeprefix("evaluation/") for key in run.logged if key.startswith("evaluation/")}
    return {name: run.logged[key] for key, name in keys.items() if name in LOWER_IS_BETTER}


@dataclass
class Measured:
    """metric: its title. best: (step, value) of the best measurement; kept: of the best one with a snapshot, None without any."""

    metric: str
    best: tuple[int, float]
    kept: tuple[int, float] | None


def best_snapshot(run: RunFiles) -> Measured | None:
    """By the first metric that is measured in training; None where none is. ValueError where a metric has no point."""
    if not (measured := evaluations(run)):
        return None
    name, (steps, values) = next(iter(measured.items()))
    best, kept = (rules.best_step(steps, values, LOWER_IS_BETTER[name], among) for among in (steps, run.snapshots))
    if best is None:
        raise ValueError(f"no step of {name} was measured")
    return Measured(TITLES[name], best, kept)


# The page ---------------------------------------------------------------------------------------------------------------------


def page(run: RunFiles, state: str, health: Sequence[HealthCheck], now: datetime) -> str:
    """The HTML. state: see write_page; now: in UTC, as it is shown. UserError or OSError: config.yaml cannot be read."""
    said = verdicts(run, health)
    objective = run.config.get("objective", {})
    return render(
        "run.html",
        title=f"{run.folder.absolute().name}: step {run.step} of {run.config.get('steps')}",
        kind=" ".join(str(v) for v in (objective.get("name"), objective.get("estimator")) if v) or "a teacher",
        state=state,
        refresh=REFRESH,
        now=f"{now:%Y-%m-%d %H:%M:%S}",
        headline=rules.headline(said),
        verdicts=said,
        measured=best_snapshot(run),
        grids=timeline(run.grids),
        drawn=len(run.grids),
        teacher=run.teacher,
        curves=charts(run),
        speed=speed(run, state),
        numbers=numbers(run),
        starts=[
            (s["time"], f"step {s['step']}", "; ".join(f"{k}: {a} -> {b}" for k, (a, b) in s["changed"].items()))
            for s in run.starts
        ],
        config=read_text(run.folder / "config.yaml"),
        environment=json.dumps(run.environment, indent=1),
    )


def timeline(grids: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """(step, name) of all grids, or of GRIDS of them at even distances, in their order."""
    grids = sorted(grids)
    if len(grids) <= GRIDS:
        return grids
    return [grids[i] for i in sorted({round(i * (len(grids) - 1) / (GRIDS - 1)) for i in range(GRIDS)})]


def charts(run: RunFiles) -> Picture | None:
    """The first CHARTS curves of two points and more, most telling first; None without any."""
    series = [(TITLES[name], figures.TEACHER, curve) for name, curve in evaluations(run).items()]
    for name, curve in run.pictures.items():
        teacher = f" (teacher {run.teacher[name]:.3g})" if name in run.teacher else ""
        series.append((f"{name}{teacher}", figures.STUDENTS[1], curve))
    for suffix, title in SHOWN:
        keys = [key for key in run.logged if key.endswith(f"/{suffix}")]
        series += [(key if not title else f"{title}, {key.split('/')[0]}", figures.STUDENTS[0], run.logged[key]) for key in keys]
    drawn = [(title, colour, *thinned(curve)) for title, colour, curve in series if len(curve[0]) > 1][:CHARTS]
    return Picture(figures.quick_svg(figures.loss_chart(drawn)), "image/svg+xml") if drawn else None


def thinned(curve: Curve) -> Curve:
    """At most POINTS points: means of neighbours, each at its block's last step."""
    steps, values = curve
    size = -(-len(steps) // POINTS)
    return steps[size - 1 :: size], [sum(values[i : i + size]) / size for i in range(0, len(values) - size + 1, size)]


def speed(run: RunFiles, state: str) -> list[tuple[str, str]]:
    """(what, how much); empty before the first log line."""
    if not run.timings:
        return []
    last, before = run.timings[-1], run.timings[-1 - max(1, len(run.timings) // 4)] if len(run.timings) > 1 else None
    rows = [("Training so far", duration(last["seconds"]))]
    if before and last["seconds"] > before["seconds"]:
        rate = (last["step"] - before["step"]) / (last["seconds"] - before["seconds"])
        rows.append(("Steps a second, of late", f"{rate:.3g}"))
        rows.append(("Images a second, of late", f"{rate * run.config['batch_size']:.3g}"))
        if state != "complete":
            rows.append(("Still to come, at this speed", duration((run.config["steps"] - run.step) / rate)))
    if "peak_memory_mib" in last:
        whose = "on the GPU of the main process" if "cuda" in str(run.environment.get("device")) else "of the main process"
        rows.append((f"Most memory {whose}", f"{last['peak_memory_mib'] / 1024:.2f} GiB"))
    return rows + [(k.capitalize(), str(run.environment.get(k))) for k in ("device", "processes", "threads", "mixed_precision")]


def duration(seconds: float) -> str:
    """In the unit, or the two, that suit it.

    >>> duration(0.0421), duration(47.3), duration(754), duration(8000)
    ('0.0421 s', '47.3 s', '12 min 34 s', '2 h 13 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


def numbers(run: RunFiles) -> list[tuple[str, str, str]]:
    """(key, first value, latest value) of everything that is logged."""
    curves = [*sorted(run.logged.items()), *((f"pictures/{key}", curve) for key, curve in run.pictures.items())]
    return [(key, f"{values[0]:.4g}", f"{values[-1]:.4g}") for key, (_, values) in curves]
