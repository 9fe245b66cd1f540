"""A folder (or zip file) of images with captions, laid out as `datasets` documents it: metadata.csv, .jsonl or .parquet.

The library itself is not asked: it takes words like "train", "test" and "val" in names for splits, and leaves out rows or all.
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
import unicodedata
from typing import Any

from pipelines.common.errors import UserError
from pipelines.common.reading import decode_text
from pipelines.data.prompts import columns_of, parse_table
from pipelines.data.walk import Pictures, examples, say

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def captioned_folder(path: str, image_column: str, caption_column: str) -> tuple[Pictures, list[str], list[Any]]:
    """The pictures, and for each row of the metadata the name of its picture and its cell of captions, in the order of the rows.

    image_column: "image" is named in the column file_name, "x" in x_file_name, relative to the metadata file; each folder may
    have one. UserError for rows without a picture; pictures without a row are notes.
    """
    pictures = Pictures(path, "data.paths")
    files = _metadata(pictures)
    known = {_plain(name): name for name in pictures.names} | {name: name for name in pictures.names}
    names, gone = list[str](), list[str]()
    cells: list[Any] = []
    for file in files:
        for named, cell in _cells(pictures, file, image_column, caption_column):
            name = posixpath.normpath(posixpath.join(posixpath.dirname(file), str(named or "")))
            found = known.get(name) or known.get(_plain(name))
            if found is None:
                gone.append(name)
                continue
            names.append(found)
            cells.append(cell)
    if gone:
        raise UserError(
            f"data.paths: {len(gone):,} rows of the metadata of {path} name files that are not among its pictures "
            f"({examples(gone)}); bring them or remove the rows"
        )
    used, left_out = set(names), pictures.left_out(used=files)
    unused = [name for name in pictures.names if name not in used]
    notes = [f"{len(unused):,} pictures have no row in the metadata and are not used ({examples(unused)})"] if unused else []
    notes += [left_out] if left_out else []
    say(f"data.paths: {len(names):,} rows; {'; '.join(notes)}" if notes else "")
    return pictures, names, cells


def _metadata(pictures: Pictures) -> list[str]:
    """Its files, one a folder at most. UserError for none."""
    files = [name for name in pictures.others if posixpath.basename(name) in METADATA]
    if not files:
        raise UserError(
            f"data.caption_column: no metadata.csv, .jsonl or .parquet in {pictures.source}, so its images have no captions; put "
            "one there, with the columns file_name and caption"
        )
    folders = [posixpath.dirname(file) for file in files]
    twice = [file for file, folder in zip(files, folders, strict=True) if folders.count(folder) > 1]
    if twice:
        raise UserError(f"data.paths: {pictures.source} has several files of metadata in a folder ({examples(twice)}); keep one")
    return files


def _cells(pictures: Pictures, file: str, image_column: str, caption_column: str) -> list[tuple[Any, Any]]:
    """Of each row of a file of metadata: the cell that names its picture, as `datasets` has it, and that of captions."""
    rows, where = _rows(pictures, file), f"{file!r} in {pictures.source}"
    if not rows:
        raise UserError(f"data.paths: no rows in {where}; add some or remove it")
    plain = image_column == "image" and "file_name" in rows[0]
    column = "file_name" if plain else f"{image_column}_file_name"
    for i, row in enumerate(rows):
        if column not in row:
            wanted = "'file_name'" if image_column == "image" else repr(column)
            raise UserError(f"data.image_column: no column {wanted} in row {i + 1} of {where}; it has {columns_of(row)}")
        if caption_column not in row:
            raise UserError(
                f"data.caption_column: no column {caption_column!r} in row {i + 1} of {where}, so its images have no captions; "
                f"it has {columns_of(row)}"
            )
    return [(row[column], row[caption_column]) for row in rows]


def _rows(pictures: Pictures, file: str) -> list[dict[str, Any]]:
    content, fault = pictures.read(file), f"data.paths: cannot read {file!r} in {pictures.source}"
    try:
        if file.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        return parse_table(decode_text(content, "it"), os.path.splitext(file)[1])
    except (ValueError, csv.Error, OSError, RecursionError) as error:
        raise UserError(f"{fault}: {error}") from error


def _plain(name: str) -> str:
    """As other systems may write the same name: Windows with "\\\\", macOS with accents apart from their letters."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))
