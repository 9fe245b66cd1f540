"""A strict model as options of a command: flags, help and defaults are the model's; a --config FILE holds the same keys."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .config import explain_value, faults, one_file, read_raw, unknown_key, validate
from .strict import Strict, UserPath, leaves

T = TypeVar("T", bound=Strict)
REPEATED = "may be given several times, which adds up"  # in the Annotated of a list; of other options the last one counts
POSITIONAL = "stands without a flag"


def typed(kind: Any) -> Callable[[str], Any]:
    """A `type` of argparse that takes what a field of this type takes, for commands that have no model."""
    adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))

    def read(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(explain_value(error.errors()[0])) from None

    return read


def whole(least: int) -> Callable[[str], int]:
    """A whole number of at least `least`."""
    return typed(Annotated[int, Field(ge=least)])


finite, path_option = typed(float), typed(UserPath)


def path(text: str) -> Path:
    """What path_option takes, of a file or folder that is here."""
    return Path(path_option(text))


def option(metavar: str | None, help: str, default: Any = None, **limits: Any) -> Any:  # noqa: A002
    """A field of a model that is an option. metavar None: its choices. default ...: it is needed."""
    return Field(default, title=metavar, description=help, **limits)


def flag(key: str) -> str:
    """How an option of this key is written.

    >>> flag("image_size")
    '--image-size'
    """
    return f"--{key.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, model: type[Strict], config: bool) -> None:
    """An option for each field, of which argparse collects the words as they come; config: and --config for a file of them."""
    if config:
        about = "a YAML file of these options; those on the command line prevail"
        parser.add_argument("--config", action="append", type=path_option, default=[], metavar="FILE", help=about)
    for key, field in model.model_fields.items():
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
        if leaves(field.annotation) <= {bool, NoneType}:
            parser.add_argument(flag(key), action="append_const", const=True, dest=key, **how)
            if field.default is None:
                how["help"] = f"not {flag(key)}"
                parser.add_argument(flag(f"no_{key}"), action="append_const", const=False, dest=key, **how)
            continue
        metavar = field.title or f"{{{','.join(_choices(field.annotation))}}}"
        name = key if POSITIONAL in field.metadata else flag(key)
        parser.add_argument(name, action="append", nargs="+" if _several(field) else None, metavar=metavar, **how)


def read_options(model: type[T], words: dict[str, list], known: Collection[str]) -> tuple[T, set[str]]:
    """(The settings, the keys that stood on the command line itself) of what add_options has collected.

    A file may describe more than this command does: of the `known` keys it takes its own. UserError lists every fault.
    """
    files = words.pop("config", [])
    raw = read_raw(one_file(files)) if files else {}
    if wrong := [unknown_key(str(key), known) for key in raw if key not in known]:
        raise faults(files[0], wrong)
    fields = model.model_fields
    raw = {key: value for key, value in raw.items() if key in fields and key not in words and value is not None}
    raw = {key: [value] if _several(fields[key]) and not isinstance(value, list) else value for key, value in raw.items()}
    given = {key: _given(key, values, fields[key]) for key, values in words.items()}
    return validate(model, raw | given, "".join(files), lambda key: key if key in raw else flag(key)), set(given)


def _given(key: str, values: list, field: FieldInfo) -> Any:
    if REPEATED in field.metadata:
        return [word for words in values for word in words]
    if len(values) > 1 and field.default is not False:
        print(f"{flag(key)} is given {len(values)} times; the last one counts", file=sys.stderr)
    return values[-1]


def _help(field: FieldInfo) -> str:
    """With what happens where it is not given, unless the description says that."""
    silent = isinstance(field.default, bool | NoneType | list)
    more = " (needed)" if field.is_required() else "" if silent else f" (default: {field.default})"
    return f"{field.description}{more}".replace("%", "%%")


def _several(field: FieldInfo) -> bool:
    return any(typing.get_origin(part) is list for part in (field.annotation, *typing.get_args(field.annotation)))


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return [choice for part in typing.get_args(annotation) for choice in _choices(part)]
