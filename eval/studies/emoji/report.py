"""Writes an evaluation down: report.json, samples.png and report.html, each whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from pipelines.common.atomic import write_atomically

from ...report import figures
from ...report.html import Picture
from ...report.training_log import curves
from .evaluate import Evaluation
from .page import page

FILES = ("samples.png", "report.html", "report.json")
COLUMNS = 12  # the first prompts, none picked


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Make all three files, then put them into the folder: report.json last, so where it is, all is."""
    samples = figures.png(samples_image(evaluation))
    pictures = figures_of(evaluation)
    report = evaluation.report()
    html = page(report, {"samples": [Picture(samples)]} | pictures)
    contents = (samples, html.encode(), (json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(FILES, contents, strict=True):
        write_atomically(folder / name, content)


def samples_image(evaluation: Evaluation) -> Image.Image:
    """The same prompts and noise in rows: the teacher with all steps, with one, each student."""
    rows = [(model.name, note(model.numbers), model.samples) for model in evaluation.models]
    return figures.captioned_rows(rows, evaluation.captions[: min(COLUMNS, len(evaluation.teacher.samples))])


def note(numbers: dict[str, Any]) -> str:
    """What stands below the name of a model in samples.png."""
    return f"FD {numbers['fd']:.3f}, CLIP {numbers['clip_score']:.2f}"


def figures_of(evaluation: Evaluation) -> dict[str, list[Picture]]:
    """The figures of each section of the page; a section without data stays empty."""
    colours = [figures.TEACHER, figures.INK, *(figures.student_colour(i) for i in range(len(evaluation.students)))]
    keys = ("seconds_per_image", "fd", "clip_score")
    points = [(m.name, c, *(m.numbers[key] for key in keys)) for m, c in zip(evaluation.models, colours, strict=True)]
    real = evaluation.real.facts
    losses = [
        (f"{model.name}: {key}", colour, *series)
        for model, colour in zip(evaluation.models, colours, strict=True)
        if model.run is not None
        for key, series in curves(model.run.metrics, "loss").items()
    ]

    def chart(figure: Figure) -> list[Picture]:
        return [Picture(figures.svg(figure), "image/svg+xml")]

    return {
        "time": chart(figures.time_chart(points, (real["fd"], real["clip_score"]))),
        "loss": chart(figures.loss_chart(losses)) if losses else [],
    }
