"""Reads a YAML file and `a.b=value` overrides into a strict model; says every fault at once, in the file's own terms."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.common.errors import UserError, shown
from pipelines.common.reading import Loader, parse_yaml, read_text

T = TypeVar("T", bound=BaseModel)
# Tags of a union told apart by the value's type: pydantic puts them into the path of a fault, the user's file has none there.
KINDS = ("by name", "by section", "by architecture", "by width")


class ConfigError(UserError):
    """What the user must mend, one line a fault."""


class _UniqueKeyLoader(Loader):
    """Plain YAML keeps the last of two equal keys; here it is an error. Merge keys (`<<: *anchor`) may be overridden."""

    def flatten_mapping(self, node):  # called first for every mapping, and again for one that an anchor brings in once more
        if not hasattr(node, "checked"):
            node.checked = True
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(f"line {node.start_mark.line + 1}: key {shown(key)} stands twice in one section")
        super().flatten_mapping(node)


def load_config(model: type[T], path: str, overrides: list[str]) -> T:
    """Read `path`, apply `a.b=value` overrides, validate. ConfigError lists every fault at once."""
    return validate(model, read_raw(path, overrides), path)


def read_raw(path: str, overrides: list[str]) -> dict:
    """The sections of a file, with overrides. ConfigError if that is no YAML of sections."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--config: no such file {path!r}")
    try:
        text = read_text(file, path)
    except UserError as error:
        raise ConfigError(str(error)) from error
    raw = _parse(text, path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not {type(raw).__name__}")
    raw = dict(raw)
    for override in overrides:
        _apply(raw, override)
    return raw


def validate(model: type[T], raw: dict, source: str) -> T:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(model, e) for e in error.errors()]
        raise ConfigError("\n".join([f"{source}: {len(lines)} fault(s)", *(f"  {line}" for line in lines)])) from None


def _apply(raw: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"override {override!r} must look like a.b=value")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
        # a copy: YAML's `*anchor` gives the same section twice, and an override means one of them
        node[parent] = node = dict(child)
    node[last] = _value(text, f"override {override!r}")


def _value(text: str, source: str) -> Any:
    """What YAML says `text` is; where YAML would take a part of it for a comment, the text itself (`output_dir=run #2`)."""
    value = _parse(text, source)
    kept = sum(token.value.count("#") for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken))
    return text if kept < text.count("#") else value


def _parse(text: str, source: str) -> Any:
    try:
        return parse_yaml(text, source, _UniqueKeyLoader)
    except UserError as error:
        raise ConfigError(str(error)) from error


def _explain(model: type[BaseModel], error: Any) -> str:
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
    where = ".".join(names)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), list(fields), n=1)
        return f"unknown key {where!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(fields)}")
    message = error["msg"].removeprefix("Value error, ")
    given = f", got {shown(error['input'], 200)}" if error["type"] != "missing" and not isinstance(error["input"], dict) else ""
    return f"{where}: {message}{given}" if where else message


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in typing.get_args(annotation) for m in _models_in(a)]
