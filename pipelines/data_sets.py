"""The one way to the `datasets` library, whose many errors become one."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError


def load_files(kind: str, files: Sequence[str | Path], fault: str) -> Any:
    """`datasets.Dataset` of local files, all of their rows, whatever splits their names suggest.

    kind: "parquet", "webdataset", ... UserError starting with `fault` for what it cannot read.
    """
    # names are no patterns, whatever brackets they have
    return _load(kind, fault, data_files={"train": [glob.escape(str(f)) for f in files]}, split="train")


def load_named(name: str, split: str, fault: str) -> Any:
    """`datasets.Dataset` of a hub id or of a folder that holds a data set."""
    return _load(name, fault, split=split)


def _load(what: str, fault: str, **options: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        return load_dataset(what, **options)
    except (DatasetGenerationError, DatasetsError, ValueError, TypeError, KeyError, OSError, tarfile.TarError) as error:
        raise UserError(f"{fault}: {error.__cause__ or error}") from error
