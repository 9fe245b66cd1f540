"""Prompts and captions as they lie in files: .txt, .csv, .jsonl and .parquet. Imports nothing heavy."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ..common.errors import UserError, printable
from ..common.reading import BY_FILES, read_text, reason_of


def read_rows(file: str, column: str, file_key: str, column_key: str) -> list[Any]:
    """The cells of one column, in order; of a .txt its lines. FileNotFoundError or ValueError start with the key at fault."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{file_key}: no such file {file!r}; give a .txt, .csv, .jsonl or .parquet of prompts")
    if path.suffix.lower() not in (".txt", ".csv", ".jsonl", ".parquet"):
        raise UserError(f"{file_key}: {file!r} is none of .txt, .csv, .jsonl, .parquet")
    try:
        rows = _read_rows(path, column)
    except UserError as error:
        raise UserError(f"{file_key}: cannot read {file!r}: {error}") from error
    except (csv.Error, RecursionError, *BY_FILES) as error:  # not CSV, not parquet
        raise UserError(f"{file_key}: cannot read {file!r}: {reason_of(error)}") from error
    for i, row in enumerate(rows):
        if column not in row:
            raise UserError(f"{column_key}: no column {column!r} in row {i + 1} of {file!r}; it has {columns_of(row)}")
    return [row[column] for row in rows]


def columns_of(row: dict[str, Any]) -> str:
    """Their names for a message; one with a space at an end in quotes, so that it shows."""
    return printable(", ".join(n if n == n.strip() else repr(n) for n in map(str, row)), 200)


def as_text(cell: Any) -> str | None:
    """A cell as the text that it is to be; a whole number is one ("7" is a caption of a digit). None for what is no text: a
    missing value (NaN), half of a character ("\\ud83d" alone, which JSON can say and no tokenizer takes).
    """
    if isinstance(cell, str):
        return None if any("\ud800" <= c <= "\udfff" for c in cell) else cell
    return str(cell) if isinstance(cell, int) and not isinstance(cell, bool) else None


def _read_rows(path: Path, column: str) -> list[dict[str, Any]]:
    """Rows by column; of a .txt its lines under the name asked for. Numbers of a .jsonl as the text that stands there."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        return table.read([column]).to_pylist() if column in names else [dict.fromkeys(names)]
    return parse_table(read_text(path, "it"), path.suffix.lower(), column)  # spreadsheets put a byte order mark first


def parse_table(text: str, suffix: str, column: str = "") -> list[dict[str, Any]]:
    """The rows of the text of a .csv, .jsonl or .txt (column: its lines' name). UserError names the line at fault."""
    if suffix == ".csv":
        # strict: a quote that is not closed would take all that follows
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names, rows = reader.fieldnames or [], []
        if len(set(names)) < len(names):
            raise UserError(f"its header has a column twice ({', '.join(names)}); rename one")
        if len(names) == 1 and (separator := next((c for c in ";\t|" if c in names[0]), None)):
            raise UserError(f"its columns are separated by {separator!r}, expected commas; save it with those, or as .jsonl")
        for row in reader:
            if None in row:
                raise UserError(f"line {reader.line_num} has more cells than the header; put text with commas in quotes")
            rows.append(row)
        return rows
    lines = text.removesuffix("\n").split("\n") if text else []  # splitlines would also cut at rarer characters within a prompt
    if suffix == ".txt":
        return [{column: line} for line in lines]
    rows = []
    while lines and not lines[-1].strip():  # many programs end a file so; between rows, one may be missing
        lines.pop()
    for i, line in enumerate(lines):
        try:
            # NaN stays a number, which is no caption: so Python writes a missing value
            rows.append(json.loads(line, parse_int=str, parse_float=str, parse_constant=float, object_pairs_hook=_unique))
        except ValueError as error:
            raise UserError(f"line {i + 1} is not valid JSON ({error})") from error
        if not isinstance(rows[-1], dict):
            raise UserError(f"line {i + 1} is no JSON object, {{...}}")
    return rows


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError for a key that stands twice in it, of which json would keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in it")
    return content
