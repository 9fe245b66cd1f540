"""Reads a YAML file and `a.b=value` overrides into a strict model; says every fault at once, in the user's own terms."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .errors import UserError, shown
from .reading import parse_yaml, read_yaml

T = TypeVar("T", bound=BaseModel)
# Tags of a union told apart by the value's type: pydantic puts them into the path of a fault, the user's file has none there.
KINDS = ("by name", "by section", "by architecture", "by width")


def load_config(model: type[T], path: str, overrides: list[str]) -> T:
    """Read `path`, apply `a.b=value` overrides, validate. UserError lists every fault at once."""
    return validate(model, read_raw(path, overrides), path)


def one_file(paths: list[str]) -> str:
    """UserError for several --config."""
    if len(paths) > 1:
        raise UserError(f"--config takes one file; {len(paths)} were given: {', '.join(paths)}")
    return paths[0]


def read_raw(path: str, overrides: Iterable[str] = ()) -> dict:
    """The sections of a file, with overrides. UserError if that is no YAML of sections."""
    if not Path(path).is_file():
        raise UserError(f"--config: no such file {path!r}")
    raw = read_yaml(path, path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold `key: value` lines, not {type(raw).__name__}")
    raw = dict(raw)
    for override in overrides:
        _apply(raw, override)
    return raw


def validate(model: type[T], raw: dict, source: str, named: Callable[[str], str] = str) -> T:
    """UserError lists every fault. source: the file. named: how the user wrote a key of the model."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise faults(source, [_explain(model, e, named) for e in error.errors()]) from None


def faults(source: str, lines: list[str]) -> UserError:
    return UserError("\n  ".join([*([f"{source}: {len(lines)} fault(s)"] if source else []), *lines]))


def unknown_key(key: str, known: Iterable[str], where: str = "") -> str:
    """The fault of an unknown key, with the nearest known one. where: its path, if it stands in a section."""
    near = difflib.get_close_matches(key, known := list(known), n=1)
    return f"unknown key {(where or key)!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}")


def _apply(raw: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(f"override {override!r} must look like a.b=value")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {parent!r} is a value, not a section")
        # a copy: YAML's `*anchor` gives the same section twice, and an override means one of them
        node[parent] = node = dict(child)
    node[last] = _value(text, f"override {override!r}")


def _value(text: str, source: str) -> Any:
    """What YAML says `text` is; where YAML would take a part of it for a comment, the text itself (`output_dir=run #2`)."""
    value = parse_yaml(text, source)
    kept = sum(token.value.count("#") for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken))
    return text if kept < text.count("#") else value


def _explain(model: type[BaseModel], error: Any, named: Callable[[str], str]) -> str:
    """One line for one pydantic error; misspelt keys get a suggestion from the section they stand in."""
    names, candidates = [], [model]
    for i, part in enumerate(error["loc"]):
        unknown = error["type"] == "extra_forbidden" and i + 1 == len(error["loc"])
        fields = {k: f for c in candidates for k, f in c.model_fields.items()}
        variants = [c for c in candidates if "name" in c.model_fields]
        tagged = [c for c in variants if part in typing.get_args(c.model_fields["name"].annotation)]
        if part in fields:
            names.append(str(part))
            candidates = _models_in(fields[part].annotation)
        elif tagged and not unknown:
            candidates = tagged  # pydantic puts a union's tag into the path; the user's file has none there
        elif part in KINDS:
            continue
        else:
            names.append(str(part))
    where = ".".join([named(names[0]), *names[1:]]) if names else ""
    if error["type"] == "extra_forbidden":
        return unknown_key(str(error["loc"][-1]), fields, where)
    if error["type"] == "missing" and (about := fields[error["loc"][-1]].description):
        return f"{where}: {error['msg']}: {about}"
    return f"{where}: {explain_value(error)}" if where else error["msg"].removeprefix("Value error, ")


def explain_value(error: Any) -> str:
    """What pydantic says of a value, and the value."""
    given = f", got {shown(error['input'], 200)}" if error["type"] != "missing" and not isinstance(error["input"], dict) else ""
    return error["msg"].removeprefix("Value error, ") + given


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in typing.get_args(annotation) for m in _models_in(a)]
