"""Published numbers to stand beside an evaluation: docs/baselines.yaml, or a file of one's own. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import UserError

BASELINES = Path(__file__).resolve().parents[1] / "docs" / "baselines.yaml"

Row = dict[str, Any]  # {"name", "metrics": {metric: value}, "steps", "source", "note"}; "source" only of published rows


def read_baselines(file: str | None, protocol: str) -> list[Row]:
    """Published rows for a protocol. ValueError for a file that is not such a list."""
    path = Path(file) if file else BASELINES
    if not path.is_file():
        raise FileNotFoundError(f"--baselines: no such file {str(path)!r}")
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
        for row in rows:
            row["name"], row["source"], [float(v) for v in row["metrics"].values()]
    except (yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"--baselines: {path} must be a list of protocol, name, metrics, source ({error!r})") from error
    return [row for row in rows if row["protocol"] == protocol]
