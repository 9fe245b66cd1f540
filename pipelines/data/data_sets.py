"""The one way to the `datasets` library: files are read anew where their content has changed, and its many errors become one.

That library keeps what it has read under the paths and times of the files; a file that was replaced by one of the same time (a
copy that keeps times, an archive unpacked) would be taken for the old one. Here its cache is kept under the contents.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError


def load_files(kind: str, files: Sequence[str | Path], fault: str) -> Any:
    """`datasets.Dataset` of local files, all of their rows, whatever splits their names suggest.

    kind: "parquet", "webdataset", ...; UserError starting with `fault` for what it cannot read.
    """
    # names are no patterns, whatever brackets they have
    named = {"train": [glob.escape(str(f)) for f in files]}
    return _load(kind, fault, data_files=named, split="train", cache_dir=_cache_of(files))


def load_named(name: str, split: str, fault: str) -> Any:
    """`datasets.Dataset` of a hub id, whose commit the library knows it by, or of a folder that holds a data set."""
    folder = Path(name)
    where = {"cache_dir": _cache_of(f for f in sorted(folder.rglob("*")) if f.is_file())} if folder.is_dir() else {}
    return _load(name, fault, split=split, **where)


def _cache_of(files: Iterable[str | Path]) -> str:
    from datasets import config

    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return str(Path(config.HF_DATASETS_CACHE) / "by_content" / digest.hexdigest()[:32])


def _load(what: str, fault: str, **options: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        return load_dataset(what, **options)
    except (DatasetGenerationError, DatasetsError, ValueError, TypeError, KeyError, OSError, tarfile.TarError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            from datasets import config

            place = options.get("cache_dir", config.HF_DATASETS_CACHE)
            raise UserError(f"{fault}: no space left for the cache of data sets, {place}; set HF_DATASETS_CACHE") from error
        raise UserError(f"{fault}: {cause}") from error
