"""report.html, samples.png and metrics.json of an evaluation, and of a comparison: each file whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipelines.common.atomic import write_atomically

from ..content import Content, Latency, Speed, steps_in
from ..protocols import LOWER_IS_BETTER
from . import figures
from .baselines import Row, read_baselines
from .html import Picture, render
from .results import TITLES, comparable

if TYPE_CHECKING:
    from ..images.files import Images

SAMPLES, TILE = 64, 128


def write_report(content: Content, images: Images, folder: Path, baselines: str | None = None) -> None:
    """report.html, samples.png, metrics.png and metrics.json in `folder`, the last one last: where it is, all is.

    content: results.results; images: an ImageFiles; baselines: see read_baselines, as for errors. WriteError.
    """
    published = read_baselines(baselines, content["protocol"]["name"])
    published = published if content["beside_published"] else []
    samples = figures.png(figures.grid(thumbnails(images)))
    plot = chart([own_row(folder.name, content)], published)
    html = page(content, folder.name, samples, plot, published)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "samples.png", samples)
    write_atomically(folder / "metrics.png", plot)
    write_atomically(folder / "report.html", html.encode())
    write_atomically(folder / "metrics.json", to_json(content))


def write_comparison(
    contents: Sequence[tuple[str, Content]], folder: Path, samples: dict[str, bytes], baselines: str | None = None
) -> str:
    """comparison.json, metrics.png and report.html of several evaluations; returns the table as text. samples: PNG by name.

    contents: (name, metrics.json's content), one at least; baselines: see read_baselines, as for errors. WriteError.
    """
    faults = comparable(contents)
    published = read_baselines(baselines, contents[0][1]["protocol"]["name"])
    published = published if not faults and all(c["beside_published"] for _, c in contents) else []
    rows = [own_row(name, content) for name, content in contents]
    plot = chart(rows, published)
    html = render(
        "comparison.html",
        protocols=[(name, content["protocol"]) for name, content in contents],
        faults=faults,
        warnings=[(name, warnings(content)) for name, content in contents],
        runs=table(rows, published),
        plot=Picture(plot),
        samples=[Picture(png, caption=name) for name, png in samples.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "metrics.png", plot)
    write_atomically(folder / "report.html", html.encode())
    write_atomically(folder / "comparison.json", to_json({"not_comparable": faults, "runs": rows, "published": published}))
    return text_table(rows, faults)


def to_json(content: Mapping[str, object]) -> bytes:
    """Indented, in UTF-8. ValueError for NaN and infinities, which are no JSON."""
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def own_row(name: str, content: Content) -> Row:
    """An evaluation as a row: value and spread of its metrics, steps of its model's call (None without a model), seconds an image
    where it was timed.
    """
    call = (content["model"] or {}).get("call", {})
    steps = steps_in(call)
    values = {key: numbers["value"] for key, numbers in content["metrics"].items()}
    spread = {key: numbers["std"] for key, numbers in content["metrics"].items() if numbers["std"] is not None}
    latency = content["latency"]["model"]["seconds_per_image"] if "model" in content["latency"] else None
    return {"name": name, "steps": steps, "metrics": values, "std": spread, "seconds_per_image": latency}


def thumbnails(images: Images, n: int = SAMPLES) -> Tensor:
    """The first n images, uint8 (n, 3, h, w): as they are if they are small and of one size, else squares of 128."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    from ..images.files import square

    first = [images[i]["image"] if "image" in images[i] else next(iter(images[i].values())) for i in range(min(n, len(images)))]
    if len({i.shape for i in first}) > 1 or max(first[0].shape) > TILE:
        first = [pil_to_tensor(square(to_pil_image(i), TILE)) for i in first]
    return torch.stack(first)


def chart(rows: Sequence[Row], published: Sequence[Row]) -> bytes:
    """A bar for each run and published row, one panel a metric; PNG."""
    names = [m for m in TITLES if any(m in row["metrics"] for row in rows)]
    heights = [sum(m in row["metrics"] for row in (*rows, *published)) for m in names]
    figure = Figure(figsize=(9, 0.6 * len(names) + 0.26 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, metric in zip(panels, names, strict=True):
        shown = [(r["name"], r["metrics"][metric], "source" in r) for r in (*rows, *published) if metric in r["metrics"]]
        shown.sort(key=lambda bar: bar[1], reverse=not LOWER_IS_BETTER[metric])
        colours = [figures.REAL if is_published else figures.TEACHER for *_, is_published in shown]
        axes.barh(
            [f"{i} {name}" for i, (name, *_) in enumerate(shown)], [value for _, value, _ in shown], color=colours, height=0.7
        )
        axes.set_yticks(range(len(shown)), [name for name, *_ in shown])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        for i, (_, value, _) in enumerate(shown):
            axes.annotate(f" {value:.4g}", (max(value, 0), i), va="center", fontsize=8, color=figures.INK)
        direction = "lower is better" if LOWER_IS_BETTER[metric] else "higher is better"
        figures.style_axes(axes, f"{TITLES[metric]} ({direction})", "")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def table(rows: Sequence[Row], published: Sequence[Row]) -> dict[str, Any]:
    """What the template's macro `table` takes: runs above published rows; the best of several runs in each column is bold."""
    names = [m for m in TITLES if any(m in row["metrics"] for row in rows)]
    best = {m: (min if LOWER_IS_BETTER[m] else max)(r["metrics"][m] for r in rows if m in r["metrics"]) for m in names}
    lines, bold = [], set()
    for i, row in enumerate((*rows, *published)):
        cells = [row["name"], str(row.get("steps") or "–")]
        for m in names:
            value, std = row["metrics"].get(m), row.get("std", {}).get(m)
            if "source" not in row and len(rows) > 1 and value == best[m]:
                bold.add((i, len(cells)))
            cells.append("–" if value is None else f"{value:.4g}" + (f" ± {std:.2g}" if std is not None else ""))
        seconds = row.get("seconds_per_image")
        note = "; ".join(filter(None, (row.get("source"), row.get("note")))) or "this evaluation"
        lines.append([*cells, f"{1000 * seconds:.3g} ms" if seconds else "–", note])
    columns = ["Method", "Steps", *(TITLES[m] for m in names), "Time / image", "Source"]
    return {"rows": lines, "columns": columns, "bold": bold, "notes": True}


def text_table(rows: Sequence[Row], faults: Sequence[str]) -> str:
    """The numbers of the runs for a terminal: a line a run, a column a metric; below, why they must not be compared."""
    names = [m for m in TITLES if any(m in row["metrics"] for row in rows)]
    lines = [["", *(TITLES[m] for m in names)]]
    lines += [[r["name"], *(f"{r['metrics'][m]:.5g}" if m in r["metrics"] else "-" for m in names)] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return text + "".join(f"\nNOT COMPARABLE: {fault}" for fault in faults)


def page(content: Content, name: str, samples: bytes, plot: bytes, published: Sequence[Row]) -> str:
    """The HTML of one evaluation. samples, plot: PNG; the plot is shown where there are published rows."""
    return render(
        "evaluation.html",
        name=name,
        protocol=content["protocol"],
        warnings=warnings(content),
        runs=table([own_row(name, content)], published),
        plot=Picture(plot) if published else None,
        latency=content["latency"],
        speeds=_speeds(content["latency"]),
        samples=Picture(samples),
        draws=[
            (TITLES[metric], f"{n['value']:.6g}", n["value_is"], ", ".join(f"{v:.6g}" for v in n["draws"]))
            for metric, n in content["metrics"].items()
        ],
        facts=json.dumps({k: v for k, v in content.items() if k != "metrics"}, indent=1, ensure_ascii=False),
    )


def warnings(content: Content) -> list[tuple[str, str]]:
    """What a reader must know before comparing: (what it is, more on it)."""
    found = []
    if content["protocol"]["departures"]:
        found.append(("Not the protocol:", f"{'; '.join(content['protocol']['departures'])}."))
    if content["not_published_weights"]:
        others = ", ".join(content["not_published_weights"])
        found.append(("Not the published weights", f"of {others}: compare with nothing but runs on the same file."))
    for metric, numbers in content["metrics"].items():
        if "images_below_dimension" in numbers:
            text = (
                f"of {numbers['n']:,} images on {numbers['images_below_dimension'][0]:,} features: "
                "the covariance has not full rank, and the value is far above that of many images."
            )
            found.append((TITLES[metric], text))
    return found


def _speeds(latency: Latency) -> list[tuple[str, str, str, str]]:
    speeds: dict[str, Speed] = {"model": latency["model"], "teacher": latency["teacher"]} if latency else {}
    return [
        (who, str(steps_in(s["call"]) or "–"), f"{s['seconds_per_image']:.4g} s", f"{s['images_per_s']:.4g}")
        for who, s in speeds.items()
    ]
