"""What the report pages share: one self-contained file each, no script, no outside resource."""

from __future__ import annotations

import base64

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
