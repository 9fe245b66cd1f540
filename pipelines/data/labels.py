"""Which class each picture of a folder or zip file is of: by EDM's dataset.json, or by the folders below it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError, printable
from .walk import Pictures, examples

LABELS_FILE = "dataset.json"  # NVlabs' dataset_tool.py: {"labels": [["00000/img00000000.png", 6], ...]} or {"labels": null}
MAX_CLASSES = 100_000  # four times ImageNet-21k: a number beyond it counts no classes, and each costs memory
CHUNK = 1000  # pictures a folder, of those that number them


@dataclass(frozen=True)
class Classes:
    """labels: long (n,), 0 .. len(names) - 1, in the order of the pictures; summary: what was taken, for one line."""

    labels: Tensor
    names: tuple[str, ...]
    summary: str


def folder_labels(pictures: Pictures, required: bool) -> Classes | None:
    """dataset.json decides where there is one. Else the folders directly below are the classes, sorted by their names as text
    (as torchvision does: "10" before "2"), where every picture lies in one and they do not merely number the pictures.

    None where there are no classes; UserError says why where they are required, or names what is wrong in dataset.json.
    """
    given = _read(pictures) if pictures.top + LABELS_FILE in pictures.others else {}
    images = [name.removeprefix(pictures.top) for name in pictures.names]
    if "labels" in given and given["labels"] is not None:
        return _of_file(pictures, images, given["labels"])
    why = ""
    folders = [name.partition("/")[0] for name in images if "/" in name]
    if "labels" in given:
        why = f"its {LABELS_FILE} says that there are none (labels: null)"
    elif len(folders) < len(images):
        outside = [name for name in images if "/" not in name]
        why = f"{len(outside):,} images lie outside sub-folders ({examples(outside)})"
    elif _number_pictures(images):
        why = (
            f"its sub-folders ({examples(sorted(set(folders)))}) only number the images, and there is no {LABELS_FILE}; put the "
            "one that NVlabs' dataset_tool.py makes beside them, or give the folders the names of classes"
        )
    if why:
        if required:
            raise UserError(f"data.labels: {pictures.source!r} has no classes: {why}; or set data.labels=false")
        return None
    found = sorted(set(folders))
    number = {name: i for i, name in enumerate(found)}
    names = tuple(printable(name) for name in found)
    return Classes(torch.tensor([number[f] for f in folders]), names, f"{len(names):,} classes by folder ({examples(names)})")


def _read(pictures: Pictures) -> dict[str, Any]:
    """The content of dataset.json; {} for a file of that name that is not EDM's."""
    try:
        content = json.loads(pictures.read(pictures.top + LABELS_FILE))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"data.labels: {LABELS_FILE} of {pictures.source} is not valid JSON ({error}); mend or remove it"
        ) from error
    return content if isinstance(content, dict) and "labels" in content else {}


def _of_file(pictures: Pictures, images: list[str], rows: Any) -> Classes:
    where = f"data.labels: {LABELS_FILE} of {pictures.source}"
    try:
        pairs = [(str(name).replace("\\", "/"), label) for name, label in (rows.items() if isinstance(rows, dict) else rows)]
    except (TypeError, ValueError):
        raise UserError(f'{where} must hold {{"labels": [["00000/img00000000.png", 6], ...]}}; make it again') from None
    for name, label in pairs:
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise UserError(
                f"{where} gives {examples([name])} the label {label!r:.50}; expected a class number 0, 1, ... below "
                f"{MAX_CLASSES:,}"
            )
    by_name = dict(pairs)
    if len(by_name) < len(pairs):
        raise UserError(f"{where} has {len(pairs) - len(by_name):,} names twice; make it again")
    missing = [name for name in images if name not in by_name]
    if missing:
        raise UserError(f"{where} has no label for {len(missing):,} of {len(images):,} images ({examples(missing)})")
    labels = torch.tensor([by_name[name] for name in images])
    names = tuple(map(str, range(max(by_name.values()) + 1)))
    gone = sorted(by_name.keys() - set(images))
    summary = f"{len(names):,} classes by {LABELS_FILE}"
    if gone:
        summary += f", which also labels {len(gone):,} images that are not there ({examples(gone)})"
    return Classes(labels, names, summary)


def _number_pictures(names: list[str]) -> bool:
    """Whether folders are chunks of numbered pictures: 00000/img00000012.png (EDM), 00000/000000012.jpg (img2dataset),
    001000/001012.png (eval/images/generation.py).
    """
    for name in names:
        parts = re.fullmatch(r"(\d{5,})/[A-Za-z]*(\d+)\.\w+", name, re.ASCII)
        if parts is None:
            return False
        folder, file = parts.groups()
        begins = len(file) > len(folder) and file.startswith(folder)
        counts = len(file) == len(folder) and 0 <= int(file) - int(folder) < CHUNK
        if not begins and not counts:
            return False
    return True
