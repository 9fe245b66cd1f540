"""Files that users give, read so that an error names them: text, JSON, YAML, and what libraries load."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from .errors import UserError, shown

INT = re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
NUMBERS = {"tag:yaml.org,2002:int": INT, "tag:yaml.org,2002:float": FLOAT}
# What libraries raise at files that are damaged, incomplete or of something else. Not MemoryError, nor what ends a program.
BY_FILES = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ImportError, SafetensorError)
DEEP = "it is nested too deeply"
REASON = 300  # characters of a library's own words


class Loader(yaml.SafeLoader):
    """Values as they look. YAML 1.1 reads 010 as 8, 1:30 as 90 and 2026-01-31 as a date; here they are text, of which a number
    is made where one is expected (010 is ten). Of two equal keys plain YAML keeps the last; here they are an error."""

    def flatten_mapping(self, node):  # called first for every mapping, and again for one that an anchor brings in once more
        if not hasattr(node, "checked"):
            node.checked = True
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(f"line {node.start_mark.line + 1}: key {shown(key)} stands twice in one section")
        super().flatten_mapping(node)  # merge keys (`<<: *anchor`) may be overridden


Loader.yaml_implicit_resolvers = {
    first: [(tag, NUMBERS.get(tag, pattern)) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_text(file: str | Path, name: str | None = None) -> str:
    """A text file in UTF-8, with or without a byte order mark. UserError names the file (as `name`), the line and the byte."""
    return decode_text(Path(file).read_bytes(), name or repr(str(file)))


def decode_text(content: bytes, name: str) -> str:
    """The same of a content that has been read: that of a file in a zip, say."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{name} is UTF-16 text (as Windows writes it with `>`); save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} is not UTF-8 text: line {line} has the byte 0x{content[error.start]:02x}; save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as every way of opening a text file does


def read_json(file: str | Path, remedy: str, kind: type = dict) -> Any:
    """The content of a JSON file that must be a `kind`. UserError: its name, what is wrong, the remedy."""
    name = repr(str(file))
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = DEEP if isinstance(error, RecursionError) else error
        raise UserError(f"{name} is not valid JSON ({reason}); {remedy}") from error
    if not isinstance(content, kind):
        names: dict[type, str] = {dict: "an object {...}", list: "a list [...]"}
        raise UserError(f"{name} holds a {type(content).__name__}, expected {names[kind]}; {remedy}")
    return content


def parse_yaml(text: str, source: str) -> Any:
    """UserError starting with `source` for whatever the parser makes of it: a date that is none, nesting without end, ..."""
    try:
        return yaml.load(text, Loader)  # a SafeLoader: it makes plain values only
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = DEEP if isinstance(error, RecursionError) else error
        raise UserError(f"{source} is not valid YAML: {reason}") from error


def read_yaml(file: str | Path, source: str | None = None) -> Any:
    """What a YAML file holds, plain values; UserError says what is wrong with it. source: the file in that message."""
    source = source or repr(str(file))
    return parse_yaml(read_text(file, source), source)


@contextmanager
def loading(fault: str, remedy: str = "") -> Iterator[None]:
    """Around a library that loads what a user named: its errors become a UserError, `fault`: reason; remedy.

    What already is one, or is a file that is not there, keeps its own words. A library's OSError without a number says that
    something is missing, and becomes a FileNotFoundError (unless it comes of one about a content).
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except BY_FILES as error:
        missing = isinstance(error, OSError) and error.errno is None and not isinstance(error.__context__, ValueError)
        kind = FileNotFoundError if missing else UserError
        raise kind(f"{fault}: {reason_of(error)}{remedy and f'; {remedy}'}") from error


def reason_of(error: BaseException) -> str:
    """The first words of a library's error: its first line, or two where that says little."""
    if isinstance(error, KeyError):
        return f"{shown(error.args[0] if error.args else '', 80)} is missing"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0] if len(lines) == 1 or not lines[0].endswith(":") else f"{lines[0]} {lines[1]}"
    text = text.rstrip(".")
    return text if len(text) <= REASON else f"{text[:REASON]}..."


def damaged_weights(file: str | Path, error: BaseException) -> UserError:
    """For a file of safetensors that cannot be read."""
    with open(file, "rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            return UserError(f"{str(file)!r} is a pointer of Git LFS, not the weights; run git lfs pull")
    return UserError(f"{str(file)!r} is damaged ({error}); copy or download it again")


def refuse_single_file(path: str | Path, name: str) -> None:
    """UserError if a model that must be a folder is one file, with the way from there to a folder."""
    file = Path(path)
    if not file.is_file():
        return
    if file.suffix.lower() in (".pkl", ".pth"):
        way = f"an EDM snapshot is converted once: python -m scripts.convert_edm {file} <folder>"
    elif file.name.startswith("pytorch_lora_weights"):
        way = "give the folder that it lies in"
    elif (file.parent.parent / "model_index.json").is_file():
        way = f"give the pipeline that it is a part of: {str(file.parent.parent)!r}"
    else:
        way = (
            "a checkpoint of Stable Diffusion is made into a folder once: "
            f'StableDiffusionPipeline.from_single_file("{file}").save_pretrained("<folder>")'
        )
    raise UserError(f"{name} is a single file, {str(path)!r}, expected a pipeline folder; {way}")
