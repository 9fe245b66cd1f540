"""Writes an evaluation down: report.json, samples.png and report.html, each whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipelines.common.atomic import write_atomically

from ...report import figures
from ...report.html import Picture
from ...report.training_log import curves, ess_by_level
from .evaluate import Evaluation, Measured
from .page import page

FILES = ("samples.png", "report.html", "report.json")
PAIRS = 8  # generated images shown with their nearest real ones


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Make all three files, then put them into the folder: report.json last, so where it is, all is."""
    report = evaluation.report()
    samples = figures.png(samples_image(evaluation))
    html = page(report, _pictures(evaluation, samples))
    contents = (samples, html.encode(), (json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(FILES, contents, strict=True):
        write_atomically(folder / name, content)


def samples_image(evaluation: Evaluation):
    """Real, teacher and students side by side, with their FD: a PIL image."""
    floor = evaluation.reference.floor["fd"]
    titled = [("Real", f"halves: FD {floor:.2f}", evaluation.reference.images.pixels[:64])]
    for title, measured in [("Teacher", evaluation.teacher), *((s.run.name, s) for s in evaluation.students)]:
        calls = measured.numbers["calls_per_image"]
        steps = f"{calls:g} network call{'' if calls == 1 else 's'}"
        titled.append((title, f"FD {measured.numbers['fd']:.2f}, {steps}", measured.samples))
    return figures.panels(titled)


def _pictures(evaluation: Evaluation, samples: bytes) -> dict[str, list[Picture]]:
    """The pictures of each section of the page; a section without data stays empty."""
    students = [(s, figures.student_colour(i)) for i, s in enumerate(evaluation.students)]
    models = [("Teacher", evaluation.teacher, figures.TEACHER), *((s.run.name, s, c) for s, c in students)]
    numbers = evaluation.report()

    def chart(figure) -> list[Picture]:
        return [Picture(figures.svg(figure), "image/svg+xml")]

    losses = [
        (f"{label}: {key}", colour, *series)
        for label, measured, colour in models
        for key, series in curves(measured.run.metrics, "loss").items()
    ]
    distances = [
        (s.run.name, colour, [p["seconds"] for p in s.numbers["curve"]], [p["fd"] for p in s.numbers["curve"]])
        for s, colour in students
        if s.numbers["curve"]
    ]
    sizes = [(s.run.name, ess_by_level(s.run.metrics)) for s, _ in students]
    sizes = [(label, by_level) for label, by_level in sizes if by_level]
    reference = numbers["protocol"]["reference"]
    shares = [("Real", figures.REAL, reference["class_balance"])]
    shares += [(label, colour, measured.numbers["class_balance"]) for label, measured, colour in models]
    real = evaluation.teacher.neighbours
    neighbours = [("real to nearest other real", figures.REAL, real.real_distances)]
    neighbours += [(label, colour, measured.neighbours.distances) for label, measured, colour in models]
    return {
        "samples": [Picture(samples)],
        "fd": chart(figures.fd_chart(distances, numbers["base_fd"], "base of this report")) if distances else [],
        "loss": chart(figures.loss_chart(losses)) if losses else [],
        "ess": chart(figures.ess_chart(sizes)) if sizes else [],
        "balance": chart(figures.balance_chart(shares, reference["class_names"])),
        "neighbours": chart(figures.distance_chart(neighbours, real.close_threshold))
        + [_pairs(label, measured, evaluation) for label, measured, _ in models],
    }


def _pairs(label: str, measured: Measured, evaluation: Evaluation) -> Picture:
    """The first few generated images above their nearest real ones, with the numbers of the whole set as caption."""
    check = measured.neighbours
    n = min(PAIRS, len(measured.samples))
    nearest = evaluation.reference.images.pixels[check.indices[:n].cpu()]
    caption = (
        f"{label}: median distance {check.median_generated:.2f} (real to real {check.median_real:.2f}); "
        f"{check.close_share:.2%} nearer than the 1st percentile of real to real; "
        f"{check.exact_duplicates} exact copies"
    )
    image = figures.grid(torch.cat([measured.samples[:n], nearest]), columns=n)
    return Picture(figures.png(image), caption=caption)
