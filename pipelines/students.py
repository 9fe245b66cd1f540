"""How a trained model is stored, described and found again: a diffusers folder, one JSON of facts, a model card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .edm import EDMPipeline

CARD = """---
library_name: diffusers
tags: [one-step, distillation]
---
# {title}

{facts}

```python
from pipelines.students import load_student

pipe = load_student("{folder}")
images = pipe(batch_size=16).images
```
"""


def save_model(folder: Path, pipeline: DiffusionPipeline, kind: str, info: dict[str, Any]) -> None:
    """Write the pipeline, <kind>.json and README.md to `folder`, replacing it whole. kind: "student" or "teacher"."""
    partial = folder.with_name(f".partial_{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(partial)
    (partial / f"{kind}.json").write_text(json.dumps(info, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in info.items())
    title = f"One-step {kind}" if kind == "student" else "EDM teacher"
    (partial / "README.md").write_text(CARD.format(title=title, facts=facts, folder=folder.name))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def load_student(folder: str | Path) -> EDMPipeline:
    """The pipeline in a student's folder, or in student/ of a training run's output_dir; one step is its default.

    FileNotFoundError says which file is missing.
    """
    folder = Path(folder)
    if not (folder / "student.json").is_file():
        folder = folder / "student"
    if not (folder / "student.json").is_file():
        raise FileNotFoundError(f"{str(folder.parent)!r} holds no student: expected student.json in it or in its student/")
    return EDMPipeline.from_pretrained(folder, use_safetensors=True)


def read_info(folder: str | Path, kind: str) -> dict[str, Any]:
    """The facts stored beside a model by `save_model`; {} where there are none (a converted teacher). ValueError if damaged."""
    file = Path(folder) / f"{kind}.json"
    if not file.is_file():
        return {}
    try:
        info = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); save the model again") from error
    if not isinstance(info, dict):
        raise ValueError(f"{file} holds a {type(info).__name__}, expected an object with steps, train_seconds, calls")
    return info
