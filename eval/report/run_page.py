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
from html import escape
from pathlib import Path
from typing import Any

from pipelines.common.atomic import write_text
from pipelines.common.reading import read_json, read_text, read_yaml

from ..protocols import LOWER_IS_BETTER
from . import figures
from . import run_verdicts as rules
from .html import STYLE, data_uri
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
COLOURS = {"bad": "#b91c1c", "warn": "#d55e00", "open": "#6b7280", "good": "#047857"}
MARKS = {"bad": "&#10007;", "warn": "!", "open": "?", "good": "&#10003;"}
MORE_STYLE = """
.verdict { border-left: 4px solid var(--c); padding: 8px 14px; margin: 8px 0; background: #f9fafb; max-width: none; }
.verdict b { color: var(--c); } .main { font-size: 18px; padding: 14px 18px; }
.grids { display: flex; flex-wrap: wrap; gap: 18px; } .grids figure { margin: 0; width: 218px; }
.grids img { width: 218px; border: 1px solid var(--line); image-rendering: pixelated; } .teacher img { border-color: #0072b2; }
table { width: auto; min-width: 420px; }
pre { font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""

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
    """Lines and pictures of later steps are those of an earlier start, which this one has still to come to."""

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


def best_snapshot(run: RunFiles) -> str:
    """A sentence, as HTML: the snapshot that measured best, or what is needed to know it."""
    measured = evaluations(run)
    if not measured:
        needed = "Set <code>evaluation</code> and <code>snapshot_every</code> (docs/evaluation.md)"
        return f"Nothing is measured in this training, so no snapshot is known to be the best. {needed}, or measure the model."
    name, (steps, values) = next(iter(measured.items()))
    best = rules.best_step(steps, values, LOWER_IS_BETTER[name], run.snapshots)
    over_all = rules.best_step(steps, values, LOWER_IS_BETTER[name], steps)
    if over_all is None:
        raise ValueError(f"no step of {name} was measured")
    whole = f"best {escape(TITLES[name])}: {over_all[1]:.4g} at step {over_all[0]}"
    if best is None:
        return f"No snapshot is kept of a step that was measured ({whole}). Set <code>snapshot_every</code> as evaluation.every."
    path = f"snapshots/step_{best[0]:08d}"
    more = "" if best[0] == over_all[0] else f" ({whole}, of which no snapshot is kept)"
    return f'<a href="{path}">{path}</a> measured best: {escape(TITLES[name])} {best[1]:.4g}{more}.'


# The page ---------------------------------------------------------------------------------------------------------------------


def page(run: RunFiles, state: str, health: Sequence[HealthCheck], now: datetime) -> str:
    said = verdicts(run, health)
    main = rules.headline(said)
    steps = run.config.get("steps")
    title = f"{run.folder.absolute().name}: step {run.step} of {steps}"
    refresh = f'<meta http-equiv="refresh" content="{REFRESH}">' if state == "training" else ""
    what = {"training": "in training", "stopped": "stopped, to be continued with resume=latest", "complete": "complete"}[state]
    objective = run.config.get("objective", {})
    kind = " ".join(str(v) for v in (objective.get("name"), objective.get("estimator")) if v) or "a teacher"
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{refresh}
<title>{escape(title)}</title><style>{STYLE}{MORE_STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(kind)}, {what}. Drawn {now:%Y-%m-%d %H:%M:%S} UTC.</p>
{_verdict(main, "main")}
{"".join(_verdict(v) for v in said if v != main)}
<p>{best_snapshot(run)}</p>
<h2>Pictures</h2>{timeline(run)}
<h2>Curves</h2>{charts(run)}
<h2>Speed and memory</h2>{speed(run, state)}
<h2>Latest numbers</h2>{numbers(run)}
<h2>Settings</h2>{settings(run)}
</body></html>
"""


def _verdict(v: Verdict, more: str = "") -> str:
    said = f"{MARKS[v.kind]} <b>{escape(v.title)}</b><br>{escape(v.text)}"
    return f'<p class="verdict {more}" style="--c: {COLOURS[v.kind]}">{said}</p>'


def timeline(run: RunFiles) -> str:
    if not run.grids:
        return '<p class="soft">None has been drawn yet.</p>'
    grids = sorted(run.grids)
    chosen = (
        sorted({round(i * (len(grids) - 1) / max(1, GRIDS - 1)) for i in range(GRIDS)})
        if len(grids) > GRIDS
        else range(len(grids))
    )
    shown = [_grid(name, f"step {step}") for step, name in (grids[i] for i in chosen)]
    if run.teacher:
        note = f"the teacher, {run.teacher['steps']} steps, from other noise"
        shown.insert(0, _grid("teacher.png", note, "teacher"))
    count = f"{len(chosen)} of {len(grids)} grids; all are in samples/. " if len(chosen) < len(grids) else ""
    said = f"{count}The same conditions and the same noise at each step, averaged weights."
    return f'<p class="soft">{said}</p><div class="grids">{"".join(shown)}</div>'


def _grid(name: str, caption: str, kind: str = "") -> str:
    link = f"samples/{name}"
    image = f'<a href="{link}"><img loading="lazy" alt="{escape(caption)}" src="{link}"></a>'
    return f'<figure class="{kind}">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def charts(run: RunFiles) -> str:
    series = [(TITLES[name], figures.TEACHER, curve) for name, curve in evaluations(run).items()]
    for name, curve in run.pictures.items():
        teacher = f" (teacher {run.teacher[name]:.3g})" if name in run.teacher else ""
        series.append((f"{name}{teacher}", figures.STUDENTS[1], curve))
    for suffix, title in SHOWN:
        keys = [key for key in run.logged if key.endswith(f"/{suffix}")]
        series += [(key if not title else f"{title}, {key.split('/')[0]}", figures.STUDENTS[0], run.logged[key]) for key in keys]
    drawn = [(title, colour, *thinned(curve)) for title, colour, curve in series if len(curve[0]) > 1][:CHARTS]
    if not drawn:
        return '<p class="soft">Two points make the first curve.</p>'
    image = figures.quick_svg(figures.loss_chart(drawn))
    return f'<figure><img alt="Curves of this run" src="{data_uri(image, "image/svg+xml")}"></figure>'


def thinned(curve: Curve) -> Curve:
    """At most POINTS points: means of neighbours, each at its block's last step."""
    steps, values = curve
    size = -(-len(steps) // POINTS)
    return steps[size - 1 :: size], [sum(values[i : i + size]) / size for i in range(0, len(values) - size + 1, size)]


def speed(run: RunFiles, state: str) -> str:
    if not run.timings:
        return '<p class="soft">Nothing has been logged yet.</p>'
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
    rows += [(k.capitalize(), str(run.environment.get(k))) for k in ("device", "processes", "threads", "mixed_precision")]
    note = '<p class="soft">Seconds of the updates; pictures, evaluations and saving come on top.</p>'
    return note + _table(rows)


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return (
        f"{hours} h {rest // 60:02d} min"
        if hours
        else f"{rest // 60} min {rest % 60:02d} s"
        if rest >= 60
        else f"{seconds:.3g} s"
    )


def numbers(run: RunFiles) -> str:
    rows = [(key, f"{v[0]:.4g}", f"{v[-1]:.4g}") for key, (_, v) in sorted(run.logged.items())]
    rows += [(f"pictures/{key}", f"{v[0]:.4g}", f"{v[-1]:.4g}") for key, (_, v) in run.pictures.items()]
    return f"<details><summary>{len(rows)} numbers: first and latest</summary>{_table(rows)}</details>"


def settings(run: RunFiles) -> str:
    starts = [
        (s["time"], f"step {s['step']}", "; ".join(f"{k}: {a} -> {b}" for k, (a, b) in s["changed"].items())) for s in run.starts
    ]
    config = escape(read_text(run.folder / "config.yaml"))
    about = escape(json.dumps(run.environment, indent=1))
    return f"""{_table(starts)}
<details><summary>config.yaml: every setting, defaults included</summary><pre>{config}</pre></details>
<details><summary>environment.json</summary><pre>{about}</pre></details>"""


def _table(rows: Sequence[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{body}</table></div>'
