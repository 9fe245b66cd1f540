"""What the report pages share: one self-contained file each, no script, no outside resource."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

Picture = tuple[str, bytes, str]  # caption, content, media type

STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --best: #ecfdf5; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 40px 24px 80px; max-width: 1240px; color: var(--ink); background: #fff;
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 44px 0 10px; }
p, li { max-width: 78ch; }
p.lead, p.soft, figcaption, footer { color: var(--soft); }
.warn { background: #fff7ed; border-left: 4px solid #d55e00; padding: 10px 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--soft); font-size: 13px; vertical-align: bottom; }
th, td { padding: 8px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
td { text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 11em; }
tr.best td { background: var(--best); font-weight: 600; }
img { max-width: 100%; height: auto; }
figure { margin: 0 0 18px; }
dt { font-weight: 600; margin-top: 10px; }
dd { margin: 0; color: var(--soft); max-width: 78ch; }
footer { margin-top: 56px; border-top: 1px solid var(--line); padding-top: 12px; font-size: 13px;
         overflow-wrap: anywhere; }
"""


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def section(title: str, note: str, pictures: Sequence[Picture]) -> str:
    """A heading with pictures; nothing where there are none."""
    if not pictures:
        return ""
    parts = [f'<h2>{title}</h2><p class="soft">{note}</p>']
    for caption, content, media_type in pictures:
        shown = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        image = f'<img alt="{escape(caption or title)}" src="{data_uri(content, media_type)}">'
        parts.append(f"<figure>{shown}{image}</figure>")
    return "".join(parts)


def duration(seconds: float) -> str:
    """A time with the unit that suits it.

    >>> duration(0.00002), duration(0.0213), duration(47.3), duration(600), duration(8000)
    ('20 &micro;s', '21.3 ms', '47.3 s', '10.0 min', '2.2 h')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} &micro;s"
    for limit, in_unit, unit in ((1, seconds * 1e3, "ms"), (120, seconds, "s"), (7200, seconds / 60, "min")):
        if seconds < limit:
            return f"{in_unit:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"


def footer(report: dict[str, Any], extractor: str) -> str:
    """What made a report.json: commit, versions, and a sentence about the network."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    commit = report["git_commit"] or "unknown (no git repository)"
    lines = (f"Commit {commit}. {versions}.", extractor, "All numbers are in report.json beside this file.")
    return "<footer>" + "<br>".join(escape(line) for line in lines) + "</footer>"


def study_page(title: str, report: dict[str, Any], things: str, body: str, extractor: str) -> str:
    """The page of a study: what was computed, a warning where numbers were forced, `body`. things: what was drawn."""
    protocol = report["protocol"]
    warning = (
        ""
        if protocol["standard"]
        else f'<p class="warn"><b>Not the protocol:</b> {protocol["n"]:,} {things} were forced. Compare these distances '
        f"only with others at the same number of {things}.</p>"
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation {escape(protocol["name"])}</title><style>{STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(protocol["computed"])}</p>
{warning}
{body}
{footer(report, f"Extractor {extractor}, sha256 {report['extractor']['sha256']}.")}
</body></html>
"""
