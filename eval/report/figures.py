"""Pictures: image grids with Pillow, so that every pixel stays a square, and charts with matplotlib as SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Okabe & Ito's colours, which stay apart for colour-blind readers; grey is for the real images, blue for the teacher.
REAL, TEACHER = "#6b7280", "#0072b2"
STUDENTS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b5a2b", "#111827")
INK, FAINT = "#1f2937", "#e5e7eb"
TILE = 32  # screen pixels that an image should at least take
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def student_colour(index: int) -> str:
    """One colour a student, the same in every chart."""
    return STUDENTS[index % len(STUDENTS)]


def grid(pixels: Tensor, columns: int = 8, gap: int = 2) -> Image.Image:
    """uint8 (n, c, h, w), c 1 or 3 -> RGB grid in reading order, enlarged by a whole factor without smoothing. gap: white pixels
    between. ValueError for another type or shape, or no image.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not len(pixels):
        raise ValueError(f"a grid takes uint8 (n, 1 or 3, h, w) with n > 0, got {pixels.dtype} {tuple(pixels.shape)}")
    factor = max(1, math.ceil(TILE / pixels.shape[3]))
    tiles = pixels.expand(-1, 3, -1, -1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    n, _, h, w = tiles.shape
    rows = math.ceil(n / columns)
    canvas = torch.full((3, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        canvas[:, y : y + h, x : x + w] = tile
    return Image.fromarray(canvas.permute(1, 2, 0).numpy())


def panels(titled: Sequence[tuple[str, str, Tensor]], columns: int = 6) -> Image.Image:
    """(title, subtitle, pixels uint8 (n, c, h, w)) side by side, `columns` of them a row."""
    margin, title_height, size = 20, 52, 18
    bold, plain = (ImageFont.truetype(FONTS / name, size) for name in ("DejaVuSans-Bold.ttf", "DejaVuSans.ttf"))
    plain = plain.font_variant(size=size - 4)
    grids = [grid(pixels) for _, _, pixels in titled]
    width = max(g.width for g in grids)
    height = max(g.height for g in grids) + title_height
    per_row = min(columns, len(grids))
    rows = math.ceil(len(grids) / per_row)
    canvas = Image.new("RGB", (margin + per_row * (width + margin), margin + rows * (height + margin)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, ((title, subtitle, _), image) in enumerate(zip(titled, grids, strict=True)):
        x, y = margin + i % per_row * (width + margin), margin + i // per_row * (height + margin)
        draw.text((x, y), _fitted(title, bold, width), fill=INK, font=bold)
        draw.text((x, y + size + 6), _fitted(subtitle, plain, width), fill=REAL, font=plain)
        canvas.paste(image, (x, y + title_height))
    return canvas


def captioned_rows(rows: Sequence[tuple[str, str, Tensor]], captions: Sequence[str], side: int = 96) -> Image.Image:
    """(name, note, pixels uint8 (n, 3, h, w)): the pictures of each in one row, a column a caption, enlarged smoothly to `side`.

    Captions stand above their columns in as many lines as they need, broken between words.
    """
    gap, margin, left, size = 8, 16, 150, 12
    plain, bold = (ImageFont.truetype(FONTS / name, size) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    titles = [_wrapped(caption, plain, side) for caption in captions]
    top = margin + (size + 4) * max(map(len, titles)) + gap
    width = margin + left + len(captions) * (side + gap) - gap + margin
    canvas = Image.new("RGB", (width, top + len(rows) * (side + gap) - gap + margin), "white")
    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(titles):
        first = top - gap - (size + 4) * len(lines)  # the last lines of all captions are level
        for j, line in enumerate(lines):
            draw.text((margin + left + i * (side + gap), first + j * (size + 4)), line, fill=REAL, font=plain)
    for r, (name, note, pixels) in enumerate(rows):
        y = top + r * (side + gap)
        text = [(line, bold, INK) for line in _wrapped(name, bold, left - gap)]
        text += [(line, plain, REAL) for line in _wrapped(note, plain, left - gap)]
        for j, (line, font, colour) in enumerate(text):
            draw.text((margin, y + (side - (size + 4) * len(lines)) // 2 + j * (size + 4)), line, fill=colour, font=font)
        for i, picture in enumerate(pixels[: len(captions)]):
            tile = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(tile, (margin + left + i * (side + gap), y))
    return canvas


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of whole words that fit, a longer word cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_fitted(line, font, width) for line in lines]


def time_chart(models: Sequence[tuple[str, str, float, float, float]], real: tuple[float, float]) -> Figure:
    """(label, colour, seconds an image, FD, CLIP score): both against time, which is logarithmic. real: those of real images."""
    figure = Figure(figsize=(10.8, 3.2), layout="constrained")
    for i, title in enumerate(("FD-CLIP-mini (lower is better)", "CLIP score (higher is better)")):
        axes = figure.add_subplot(1, 2, i + 1)
        for label, colour, seconds, *values in models:
            axes.plot(seconds, values[i], color=colour, marker="o", markersize=8, linestyle="", label=label)
        axes.axhline(real[i], color=REAL, linewidth=1, linestyle=(0, (4, 3)), label="real pictures")
        axes.set_xscale("log")
        axes.margins(0.1, 0.2)  # markers are as wide as that
        if i == 0:  # the scores lie so close together that from 0 they would be one line
            axes.set_ylim(bottom=0)
        style_axes(axes, title, "seconds an image (logarithmic)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than its panel."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text + "\u2026"


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure: no date, fixed ids."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "eval"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def quick_svg(figure: Figure) -> bytes:
    """The same of small multiples in a third of the time: fixed margins instead of two layouts, text in the page's font."""
    height = figure.get_figheight()
    figure.set_layout_engine(None)
    figure.subplots_adjust(left=0.05, right=0.99, top=1 - 0.25 / height, bottom=0.4 / height, hspace=0.55, wspace=0.25)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "eval", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def loss_chart(series: Sequence[tuple[str, str, list[int], list[float]]]) -> Figure:
    """(title, colour, steps, values) -> one small chart each, since losses of different objectives share no scale."""
    figure, columns, rows = _small_multiples(len(series), height=2.0)
    for i, (title, colour, steps, values) in enumerate(series):
        axes = figure.add_subplot(rows, columns, i + 1)
        smooth_steps, smooth = _running_mean(steps, values)
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
        axes.plot(smooth_steps, smooth, color=colour, linewidth=1.5)
        if len(smooth) > 1 and max(smooth) > min(smooth):  # single spikes must not flatten the rest
            low, high = np.quantile(values, [0.01, 0.99])
            pad = 0.1 * (max(high, max(smooth)) - min(low, min(smooth)))
            axes.set_ylim(min(low, min(smooth)) - pad, max(high, max(smooth)) + pad)
        style_axes(axes, title, "step")
    return figure


def _running_mean(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Means over windows of about a fiftieth of the run, at the middle step of each window."""
    window = max(1, len(values) // 50)
    half = window // 2
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return steps[half : half + len(means)], means.tolist()


def fd_chart(series: Sequence[tuple[str, str, list[float], list[float]]], base: float, base_label: str) -> Figure:
    """(label, colour, seconds of training, FD) in one chart, FD logarithmic, with a line at `base`."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for label, colour, seconds, values in series:
        axes.plot(seconds, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)
    axes.axhline(base, color=REAL, linewidth=1, linestyle=(0, (4, 3)), label=base_label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    style_axes(axes, "FD (logarithmic)", "seconds of training")
    return figure


def ess_chart(runs: Sequence[tuple[str, dict[float, tuple[list[int], list[float]]]]]) -> Figure:
    """(label, {noise level: (steps, effective sample size)}): one chart a run, dark lines for low noise."""
    figure = Figure(figsize=(7.2, 2.8 * len(runs)), layout="constrained")
    shades = matplotlib.colormaps["viridis"]
    for i, (label, by_level) in enumerate(runs):
        axes = figure.add_subplot(len(runs), 1, i + 1)
        for j, (level, (steps, values)) in reversed(list(enumerate(by_level.items()))):  # the legend in the order of the lines
            axes.plot(*_running_mean(steps, values), color=shades(j / len(by_level)), linewidth=1.5, label=f"{level:g}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend(
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            title="noise level",
            title_fontsize=8,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
        )
        style_axes(axes, label, "step")
    return figure


def benchmark_chart(
    curves: dict[str, dict[str, list[dict[str, float]]]],
    titles: dict[str, str],
    floor: dict[str, float],
    floor_label: str = "two halves of the real images",
) -> Figure:
    """method -> seed -> points: for each key of titles a chart against seconds and one against calls, all axes logarithmic.

    Lines are medians over seeds, bands the range; the dashed line is `floor`.
    """
    figure = Figure(figsize=(11, 3.1 * len(titles) + 0.6), layout="constrained")
    for row, (key, title) in enumerate(titles.items()):
        for column, x in enumerate(("seconds", "calls")):
            axes = figure.add_subplot(len(titles), 2, 2 * row + column + 1)
            for i, (label, by_seed) in enumerate(curves.items()):
                points = list(zip(*by_seed.values(), strict=True))
                where = [np.median([p[x] for p in same]) for same in points]
                low, middle, high = np.array([np.quantile([max(p[key], 1e-4) for p in same], [0, 0.5, 1]) for same in points]).T
                axes.plot(where, middle, color=student_colour(i), linewidth=1.6, marker="o", markersize=2.5, label=label)
                axes.fill_between(where, low, high, color=student_colour(i), alpha=0.15, linewidth=0)
            if key in floor:
                axes.axhline(floor[key], color=REAL, linewidth=1, linestyle=(0, (4, 3)), label=floor_label)
            axes.set_xscale("log")
            axes.set_yscale("log")
            style_axes(axes, title, "seconds of training on one thread" if x == "seconds" else "network calls in training")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return figure


def ablations_chart(ablations: dict[str, dict[str, Any]], key: str, name: str, teacher: float) -> Figure:
    """One panel an ablation, of its `values`: label -> {"seeds": [numbers], ...}: the median of `key`, a bar over the range of
    its seeds. The value that all other ablations have (`own`) is filled; the dashed line is the teacher's number.
    """
    columns = min(3, len(ablations))
    rows = math.ceil(len(ablations) / columns)
    figure = Figure(figsize=(3.7 * columns, 2.5 * rows), layout="constrained")
    for i, ablation in enumerate(ablations.values()):
        axes = figure.add_subplot(rows, columns, i + 1)
        labels = list(ablation["values"])
        for x, label in enumerate(labels):
            values = [seed[key] for seed in ablation["values"][label]["seeds"]]
            if not values:  # all failed
                continue
            low, middle, high = np.quantile(values, [0, 0.5, 1])
            axes.vlines(x, low, high, color=STUDENTS[0], linewidth=2)
            face = STUDENTS[0] if label == ablation["own"] else "white"
            axes.plot([x], [middle], "o", color=STUDENTS[0], markerfacecolor=face, markersize=6)
        axes.axhline(teacher, color=TEACHER, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_ylabel(name, fontsize=8, color=REAL)
        style_axes(axes, ablation["title"], ablation["key"])
        if len(labels) > 4:
            axes.tick_params(axis="x", labelsize=7)
    return figure


def balance_chart(shares: Sequence[tuple[str, str, list[float]]], class_names: Sequence[str]) -> Figure:
    """(label, colour, share of each class): one row of bars a set; the first set's shares are the ticks on all."""
    figure, columns, rows = _small_multiples(len(shares), height=1.7)
    top = 100 * max(max(values) for _, _, values in shares)
    x = np.arange(len(class_names))
    for i, (label, colour, values) in enumerate(shares):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.bar(x, [100 * v for v in values], color=colour, width=0.75)
        if i:
            axes.hlines([100 * v for v in shares[0][2]], x - 0.45, x + 0.45, color=INK, linewidth=1)
        axes.set_xticks(x, class_names)
        axes.set_ylim(0, 1.1 * top)
        style_axes(axes, f"{label} (%)", "")
    return figure


def distance_chart(series: Sequence[tuple[str, str, Tensor]], threshold: float) -> Figure:
    """(label, colour, nearest-neighbour distances (n,)) as outlined histograms of equal area, with the copy threshold."""
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    top = max(float(values.quantile(0.999)) for _, _, values in series)
    for label, colour, values in series:
        style: dict[str, Any] = (
            {"histtype": "stepfilled", "alpha": 0.25} if colour == REAL else {"histtype": "step", "linewidth": 1.6}
        )
        axes.hist(values.numpy(), bins=np.linspace(0, top, 60).tolist(), density=True, color=colour, label=label, **style)
    axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="1st percentile of real to real")
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    style_axes(axes, "", "distance to the nearest real image")
    axes.spines["left"].set_visible(False)
    return figure


def _small_multiples(n: int, height: float) -> tuple[Figure, int, int]:
    """A figure of the page's width for n charts in rows of at most four: figure, columns, rows."""
    columns = min(n, 3 if n % 3 == 0 else 4)
    rows = math.ceil(n / columns)
    return Figure(figsize=(10.8 / max(columns, 3) * columns, height * rows), layout="constrained"), columns, rows


def style_axes(axes: Axes, title: str, xlabel: str) -> None:
    """The look of every chart: a small title at the left, faint lines across, no frame."""
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=8, color=REAL)
    axes.tick_params(which="both", labelsize=8, colors=REAL, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
