"""Published numbers to stand beside an evaluation: docs/baselines.yaml, or a file of one's own. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError
from pipelines.common.reading import read_yaml

BASELINES = Path(__file__).resolve().parents[2] / "docs" / "baselines.yaml"

Row = dict[str, Any]  # {"name", "metrics": {metric: value}, "steps", "source", "note"}; "source" only of published rows


def read_baselines(file: str | None, protocol: str) -> list[Row]:
    """Published rows for a protocol. file: default docs/baselines.yaml. FileNotFoundError; UserError for a file that is not such
    a list.
    """
    path = Path(file) if file else BASELINES
    if not path.is_file():
        raise FileNotFoundError(f"--baselines: no such file {str(path)!r}")
    rows = read_yaml(path, f"--baselines: {path}")
    try:
        for row in rows:
            row["name"], row["source"], row["protocol"], [float(v) for v in row["metrics"].values()]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"--baselines: {path} must be a list of protocol, name, metrics, source ({error!r})") from error
    return [row for row in rows if row["protocol"] == protocol]
