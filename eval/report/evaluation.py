"""report.html, samples.png and metrics.json of an evaluation, and of a comparison: each file whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipelines.common.atomic import write_atomically

from ..content import Content, Latency, OverDraws, Speed
from ..protocols import LOWER_IS_BETTER
from . import figures
from .baselines import Row, read_baselines
from .html import STYLE, data_uri
from .results import TITLES, comparable

if TYPE_CHECKING:
    from ..images.files import Images

SAMPLES, TILE = 64, 128


def write_report(content: Content, images: Images, folder: Path, baselines: str | None = None) -> None:
    """content: results.results; images: an ImageFiles. metrics.json comes last: where it is, all is."""
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
    """comparison.json, metrics.png and report.html of several evaluations; returns the table as text. samples: PNG by name."""
    faults = comparable(contents)
    published = read_baselines(baselines, contents[0][1]["protocol"]["name"])
    published = published if not faults and all(c["beside_published"] for _, c in contents) else []
    rows = [own_row(name, content) for name, content in contents]
    plot = chart(rows, published)
    warning = "".join(f"<li>{escape(fault)}</li>" for fault in faults)
    warning = f'<div class="warn"><b>Not comparable:</b><ul>{warning}</ul></div>' if faults else ""
    warning += "".join(f'<p class="warn">{escape(name)}: {w}</p>' for name, c in contents for w in warnings(c))
    grids = "".join(
        f'<figure><figcaption>{escape(name)}</figcaption><img alt="{escape(name)}" src="{data_uri(png, "image/png")}"></figure>'
        for name, png in samples.items()
    )
    body = f"""<h1>Comparison: {escape(contents[0][1]["protocol"]["name"])}</h1>
<p class="lead">{escape(contents[0][1]["protocol"]["computed"])}</p>{warning}
{table(rows, published)}
<h2>Metrics</h2><figure><img alt="Metrics" src="{data_uri(plot, "image/png")}"></figure>
<h2>Samples</h2><p class="soft">The first images of each, in the order of their seeds or names, none picked.</p>{grids}
<h2>What was computed</h2>
<dl>{"".join(f"<dt>{escape(name)}</dt><dd>{escape(c['protocol']['computed'])}</dd>" for name, c in contents)}</dl>"""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "metrics.png", plot)
    write_atomically(folder / "report.html", _document("Comparison", body).encode())
    write_atomically(folder / "comparison.json", to_json({"not_comparable": faults, "runs": rows, "published": published}))
    return text_table(rows, faults)


def to_json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def own_row(name: str, content: Content) -> Row:
    call = (content["model"] or {}).get("call", {})
    steps = call.get("num_inference_steps") or (len(call["timesteps"]) if "timesteps" in call else None)
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


def table(rows: Sequence[Row], published: Sequence[Row]) -> str:
    """Runs above published rows; the best run of several in each column is marked."""
    names = [m for m in TITLES if any(m in row["metrics"] for row in rows)]
    best = {m: (min if LOWER_IS_BETTER[m] else max)(r["metrics"][m] for r in rows if m in r["metrics"]) for m in names}
    lines = []
    for row in (*rows, *published):
        cells = [f"<td>{escape(row['name'])}</td>", f"<td>{row.get('steps') or '&ndash;'}</td>"]
        for m in names:
            value, std = row["metrics"].get(m), row.get("std", {}).get(m)
            text = "&ndash;" if value is None else f"{value:.4g}" + (f" &plusmn; {std:.2g}" if std is not None else "")
            mark = "source" not in row and len(rows) > 1 and value == best[m]
            cells.append(f"<td><b>{text}</b></td>" if mark else f"<td>{text}</td>")
        seconds = row.get("seconds_per_image")
        cells.append(f"<td>{f'{1000 * seconds:.3g} ms' if seconds else '&ndash;'}</td>")
        note = "; ".join(filter(None, (row.get("source"), row.get("note")))) or "this evaluation"
        cells.append(f'<td class="note">{escape(note)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{t}</th>" for t in ("Method", "Steps", *(TITLES[m] for m in names), "Time / image", "Source"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def text_table(rows: Sequence[Row], faults: Sequence[str]) -> str:
    names = [m for m in TITLES if any(m in row["metrics"] for row in rows)]
    lines = [["", *(TITLES[m] for m in names)]]
    lines += [[r["name"], *(f"{r['metrics'][m]:.5g}" if m in r["metrics"] else "-" for m in names)] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return text + "".join(f"\nNOT COMPARABLE: {fault}" for fault in faults)


def page(content: Content, name: str, samples: bytes, plot: bytes, published: Sequence[Row]) -> str:
    protocol = content["protocol"]
    figure = f'<h2>Metrics</h2><figure><img alt="Metrics" src="{data_uri(plot, "image/png")}"></figure>' if published else ""
    body = f"""<h1>{escape(name)}: {escape(protocol["name"])}</h1>
<p class="lead">{escape(protocol["computed"])}</p>
{"".join(f'<p class="warn">{w}</p>' for w in warnings(content))}
{table([own_row(name, content)], published)}
{figure}
{_latency(content["latency"])}
<h2>Samples</h2><p class="soft">The first images, in the order of their seeds or names, none picked.</p>
<figure><img alt="Samples" src="{data_uri(samples, "image/png")}"></figure>
<h2>Draws and spreads</h2>{_draws(content["metrics"])}
<h2>What the numbers depend on</h2>
<pre>{escape(json.dumps({k: v for k, v in content.items() if k != "metrics"}, indent=1, ensure_ascii=False))}</pre>"""
    return _document(name, body)


def warnings(content: Content) -> list[str]:
    """What a reader must know before comparing, as HTML."""
    found = []
    if content["protocol"]["departures"]:
        found.append(f"<b>Not the protocol:</b> {escape('; '.join(content['protocol']['departures']))}.")
    if content["not_published_weights"]:
        others = ", ".join(content["not_published_weights"])
        found.append(f"<b>Not the published weights</b> of {escape(others)}: compare with nothing but runs on the same file.")
    for metric, numbers in content["metrics"].items():
        if "images_below_dimension" in numbers:
            found.append(
                f"<b>{TITLES[metric]}</b> of {numbers['n']:,} images on {numbers['images_below_dimension'][0]:,} features: "
                "the covariance has not full rank, and the value is far above that of many images."
            )
    return found


def _latency(latency: Latency) -> str:
    if not latency:
        return ""
    speeds: dict[str, Speed] = {"model": latency["model"], "teacher": latency["teacher"]}
    rows = "".join(
        f"<tr><td>{who}</td><td>{speed['call'].get('num_inference_steps', '1')}</td>"
        f"<td>{speed['seconds_per_image']:.4g} s</td><td>{speed['images_per_s']:.4g}</td></tr>"
        for who, speed in speeds.items()
    )
    head = "<tr><th></th><th>Steps</th><th>An image</th><th>Images / s</th></tr>"
    return f"<h2>Latency</h2><p>{latency['speedup']:.1f} times as fast as the teacher.</p><table>{head}{rows}</table>"


def _draws(metrics: dict[str, OverDraws]) -> str:
    rows = "".join(
        f"<tr><td>{TITLES[name]}</td><td>{numbers['value']:.6g}</td><td>{numbers['value_is']}</td>"
        f"<td>{', '.join(f'{v:.6g}' for v in numbers['draws'])}</td></tr>"
        for name, numbers in metrics.items()
    )
    return f"<table><tr><th></th><th>Value</th><th>It is</th><th>Draws</th></tr>{rows}</table>"


def _document(title: str, body: str) -> str:
    more = "pre { font-size: 12px; white-space: pre-wrap; } td.note { white-space: normal; font-size: 12px; text-align: left; }"
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}{more}</style></head>
<body>
{body}
</body></html>
"""
