"""Pictures of studies in the plane: samples on the density's contours, numbers against time, bounds against divergences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipelines.analytic import GaussianMixture

from ...report.figures import INK, REAL, STUDENTS, student_colour, style_axes
from .numbers import NO_NOISE

SIDE = 50.0  # pictures show [-SIDE, SIDE] squared
CURVES = {
    "log_density": "log-density, nats (higher is nearer to a mode)",
    "mmd": "MMD, biased, as in the paper",
    "modes": "modes with a thousandth of the samples",
    "in_mode": "share of samples in a mode",
}


def scatter_chart(samples: Mapping[str, Tensor], mixture: GaussianMixture, columns: int = 5) -> Figure:
    """title -> points (n, 2): one panel each, on contours of the mixture's log-density."""
    axis = torch.linspace(-SIDE, SIDE, 200, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    log_p = mixture.log_density(grid, NO_NOISE.level(torch.zeros(len(grid)))).view(200, 200).T
    rows = math.ceil(len(samples) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.75 * rows), layout="constrained")
    for i, (title, x) in enumerate(samples.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.contour(axis, axis, log_p.clamp(min=-20), levels=8, linewidths=0.4, colors=REAL, alpha=0.6)
        across, up = x[:5000].T.cpu()
        axes.scatter(across, up, s=0.6, color=student_colour(0), alpha=0.5, linewidths=0)
        axes.set(xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), xticks=[], yticks=[], aspect="equal")
        axes.set_title(title, fontsize=7.5, color=INK)
    return figure


def curves_chart(curves: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], truth: Mapping[str, float]) -> Figure:
    """label -> seed -> points: each number of CURVES against seconds, medians over seeds; dashed: true samples."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for i, (key, title) in enumerate(CURVES.items()):
        axes = figure.add_subplot(2, 2, i + 1)
        for j, (label, by_seed) in enumerate(curves.items()):
            points = list(zip(*by_seed.values(), strict=True))
            seconds = [np.median([p["seconds"] for p in same]) for same in points]
            values = [np.median([p[key] for p in same]) for same in points]
            style = ("-", "--", ":")[j // len(STUDENTS) % 3]
            axes.plot(seconds, values, style, color=student_colour(j), linewidth=1.4, marker="o", markersize=2, label=label)
        axes.axhline(truth[key], color=REAL, linewidth=1, linestyle=(0, (4, 3)), label="true samples")
        if key == "mmd":
            axes.set_yscale("log")
        if key == "log_density":
            axes.set_ylim(-16, -6)
        style_axes(axes, title, "seconds of training on one thread")
    _legend(figure)
    return figure


def tightness_chart(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """label -> {sigma, kl, bound, gap, gap_error} by level: the diffusive KL by quadrature, the bound on it, and their gap."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for j, (label, levels) in enumerate(rows.items()):
        sigma = [r["sigma"] for r in levels]
        line: dict[str, Any] = {"color": student_colour(j), "linewidth": 1.4, "marker": "o", "markersize": 2.5}
        left.plot(sigma, [r["bound"] for r in levels], label=label, **line)
        left.plot(sigma, [r["kl"] for r in levels], "--", color=student_colour(j), linewidth=1.2)
        gap, error = ([r[k] for r in levels] for k in ("gap", "gap_error"))
        right.errorbar(sigma, gap, [4 * e for e in error], **line)
    right.axhline(0, color=REAL, linewidth=1)
    for axes, title in ((left, "bound (solid) and diffusive KL (dashed), nats"), (right, "their gap, with 4 standard errors")):
        axes.set_xscale("log")
        style_axes(axes, title, "noise level sigma")
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7.5, labelcolor=INK)
