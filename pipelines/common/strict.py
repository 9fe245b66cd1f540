"""What users set, as models: unknown keys, truth values for numbers and settings without effect are refused."""

from __future__ import annotations

import typing
from collections.abc import Callable
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .paths import user_path

UserPath = Annotated[str, AfterValidator(user_path)]  # of a file or folder, or what may stand in its place (a hub id)
PositiveFloat = Annotated[float, Field(gt=0)]
StockGuidance = Annotated[float, Field(ge=1)]  # 1: none; diffusers' Stable Diffusion pipelines take all below for 1 too
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]  # what a tensor's shape can hold


class Idle(NamedTuple):
    """A key (a.b within its section) that has an effect only where acts(section); needs: what that is, in words."""

    key: str
    needs: str
    acts: Callable[[Any], Any]

    def fault(self, name: str) -> str:
        """name: the key as the user wrote it."""
        return f"{name} has no effect without {self.needs}"


def _holds_truth(value: Any) -> bool:
    """Itself or in a list; not deeper: what YAML's anchors make may have no end."""
    return isinstance(value, bool) or (isinstance(value, list) and any(isinstance(v, bool) for v in value))


def _of_numbers(annotation: Any) -> bool:
    """Whether a field takes numbers and no truth values."""
    kinds = leaves(annotation)
    return bool(kinds & {int, float}) and bool not in kinds


def leaves(annotation: Any) -> set[type]:
    """The types that an annotation is made of; of a Literal those of its values."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return {annotation}
    if typing.get_origin(annotation) is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return set().union(*map(leaves, typing.get_args(annotation)))


class Strict(BaseModel):
    """idle: keys that other settings can make void. There they must have their defaults: what would have no effect is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
    idle: ClassVar[tuple[Idle, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, section: Any) -> Any:
        """pydantic takes true for 1: one step, a rate of 1.0."""
        for key, value in section.items() if isinstance(section, dict) else ():
            if _holds_truth(value) and key in cls.model_fields and _of_numbers(cls.model_fields[key].annotation):
                truth = str(value).lower()
                raise ValueError(f"{key} is {truth}, expected a number (YAML makes true and false of yes, no, on and off too)")
        return section

    @model_validator(mode="after")
    def _nothing_idle(self):
        for rule in self.idle:
            *parents, name = rule.key.split(".")
            section = attrgetter(".".join(parents))(self) if parents else self
            field = getattr(type(section), "model_fields", {}).get(name)  # None: this kind of section has no such key
            if field is None or getattr(section, name) == field.get_default(call_default_factory=True) or rule.acts(self):
                continue
            default = "" if field.is_required() or field.default is None else f", or set it to its default, {field.default}"
            raise ValueError(f"{rule.fault(rule.key)}; remove it{default}")
        return self
