"""One file a family of teachers: all that is known of its kind, behind the interface of base.py.

The registry is FAMILIES; a family is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipelines.common.errors import UserError
from pipelines.common.identity import weights_sha256
from pipelines.common.reading import refuse_single_file
from pipelines.kinds import KINDS
from pipelines.text_to_image import read_index

from ..config.run import DistillConfig, TeacherConfig

if TYPE_CHECKING:
    from .base import Family

# the file -> what model_index.json calls the pipelines of that family; none without a teacher (scratch), and for an exact one
OWN: dict[str, tuple[str, ...]] = {"scratch": (), "exact": (), "edm": ("EDMPipeline",)}
# stock pipelines are one family, of as many kinds as there are files with one in pipelines/
STOCK = {e.module: tuple(o.pipeline for o in KINDS.values() if o.module == e.module) for e in KINDS.values()}
FAMILIES = OWN | STOCK


def load_family(name: str) -> type[Family]:
    """By its key in FAMILIES."""
    if name in OWN:
        return import_module(f".{name}", __name__).Family
    kind = import_module(f"pipelines.{name}").KIND
    room = ".text_to_image" if kind.takes == "prompt" else ".class_to_image"
    return import_module(room, __name__).Family.of(kind)


def family_for(config: DistillConfig | TeacherConfig) -> type[Family]:
    """That of the teacher that is distilled, or trained."""
    if isinstance(config, TeacherConfig):
        return load_family("edm" if config.pipeline is None else further_family(config.pipeline))
    if config.teacher.given:
        return load_family("exact" if config.teacher.exact else family_of(config.teacher.source))
    return load_family("scratch")


def teacher_folder(path: str) -> str:
    """The pipeline folder that a path means: an output_dir of train_teacher is its teacher/; hub ids are left alone."""
    folder = Path(path)
    inside = (folder / "teacher" / "model_index.json").is_file() and not (folder / "model_index.json").is_file()
    return str(folder / "teacher") if inside else path


def family_of(path: str) -> str:
    """The key in FAMILIES of what a pipeline folder (see teacher_folder) or hub id says it holds."""
    path = teacher_folder(path)
    refuse_single_file(path, "teacher.path")
    try:
        kind = read_index(path).get("_class_name")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"teacher.path: {error}; give a pipeline folder or hub id, or train a teacher with `accelerate launch -m "
            "trainers.train_teacher --config configs/digits_teacher.yaml`"
        ) from error
    found = {kind: name for name, kinds in FAMILIES.items() for kind in kinds}
    if kind not in found:
        raise UserError(f"teacher.path: {path!r} holds a {kind}; expected one of {', '.join(found)}")
    return found[kind]


def further_family(pipeline: str) -> str:
    """The key in FAMILIES of a stock pipeline that is trained further."""
    kind = read_index(pipeline).get("_class_name")
    found = next((name for name, kinds in STOCK.items() if kind in kinds), None)
    if found is None:
        raise UserError(f"pipeline: {pipeline!r} holds a {kind}; expected one of {', '.join(e.pipeline for e in KINDS.values())}")
    return found


def base_weights(path: str, dtype: torch.dtype, variant: str | None) -> str:
    """The hash of a teacher's network that its students note as base_weights."""
    family = load_family(family_of(path))
    return weights_sha256({family.component: family.network_of(path, dtype, variant)})
