"""What generated images are compared with: statistics of real ones, with everything they depend on beside them.

A reference is a folder: reference.json (images, processing, extractors) and <extractor>.npz (mu, sigma, n, and features where a
metric compares image by image). EDM's published .npz (mu, sigma) is read as it is.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.common.atomic import write_atomically
from pipelines.common.errors import UserError
from pipelines.common.identity import differences
from pipelines.common.reading import BY_FILES, loading, read_json, reason_of

from ..content import ExtractorFacts, ImageSetFacts, ReferenceFacts
from ..images.files import ImageFiles
from ..networks.extractors import Extractor
from ..networks.weights import sha256
from ..protocols import AGAINST_REFERENCE, Protocol
from .measure import Plan, without_logits
from .one_pass import Gathered, one_pass

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = 1
SYMMETRIC = 1e-5  # of its largest entry, what float32 statistics may be off by
IDENTITY = ("network", "input", "sha256", "settings")  # of an extractor, what features depend on


@dataclass(frozen=True)
class Reference:
    """moments: extractor -> (mean (d,), covariance (d, d)), float64; rows: extractor -> features (n, d) where they are kept."""

    facts: ReferenceFacts
    moments: dict[str, tuple[Tensor, Tensor]]
    rows: dict[str, Tensor]


def load_or_measure(
    source: str,
    made: Plan,
    extractors: Mapping[str, Extractor],
    accelerator: Accelerator,
    option: str,
    column: str | None = None,
    force: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    start_method: str | None = None,
) -> Reference:
    """source: statistics, checked against what they are used for, or images to be measured now (by all processes; only the main
    one gets their statistics). option: what the user calls it.

    UserError for another number of images than the protocol's, statistics of something else, or a column that is not there.
    """
    protocol, wanted = made.protocol, made.reference_extractors
    described = {key: extractors[key].describe() for key in wanted}
    if column is not None and is_statistics(source):
        raise UserError(f"{option}-column has no effect: {source} holds statistics; remove it")
    if is_statistics(source):
        dims = {key: extractors[key].outputs["features"] for key in wanted}
        stored = load(source, protocol, described, dims, made.raw)
        require_size(protocol, stored.facts["images"]["n"], option, force)
        return stored
    views = sorted({extractors[key].view for key in wanted})
    images = ImageFiles(source, protocol, views, column, option=option)
    if column is not None and images.rows is None:
        raise UserError(f"{option}-column has no effect: {source} has no columns; remove it")
    require_size(protocol, len(images), option, force)
    used = {key: without_logits(extractors[key]) for key in wanted}
    gathered = one_pass(images, used, made.raw, None, batch_size, workers, accelerator, "reference", start_method)
    if not accelerator.is_main_process:
        return Reference({"images": {"n": len(images)}}, {}, {})
    return of_images(gathered, protocol, images.identity(), described)


def require_size(protocol: Protocol, n: int | None, option: str, force: bool) -> None:
    """UserError for another number of images than the protocol's; n: None where a published file does not say."""
    if n is not None:
        protocol.require_images(n, option, tuple(m for m in protocol.metrics if m in AGAINST_REFERENCE))
    if n not in (None, protocol.reference_images) and protocol.name != "custom" and not force:
        raise UserError(
            f"{option} has {n:,} images, protocol {protocol.name} compares with {protocol.reference_images:,}; "
            "add --force to do it anyway (every report will say so)"
        )


def of_images(gathered: Gathered, protocol: Protocol, images: ImageSetFacts, extractors: dict[str, ExtractorFacts]) -> Reference:
    """What one pass over real images left. images: ImageFiles.identity(); extractors: describe() of each."""
    facts: ReferenceFacts = {
        "format": FORMAT,
        "protocol": protocol.name,
        "processing": protocol.processing,
        "images": images,
        "extractors": {key: extractors[key] for key in gathered.stats},
    }
    moments = {key: (stats.mean, stats.cov) for key, stats in gathered.stats.items()}
    return Reference(facts, moments, dict(gathered.rows))


def save(reference: Reference, folder: Path) -> None:
    """reference.json is written last: where it is, all is. That of an earlier reference goes first, since its statistics do.

    ValueError for published statistics, whose number of images is not known; WriteError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reference.json").unlink(missing_ok=True)
    for key, (mean, cov) in reference.moments.items():
        count = reference.facts["images"]["n"]
        if count is None:
            raise ValueError("published statistics are not saved again: of how many images they are is not known")
        mu, sigma, n = mean.numpy(), cov.numpy(), np.int64(count)
        buffer = io.BytesIO()
        if key in reference.rows:
            np.savez(buffer, mu=mu, sigma=sigma, n=n, features=reference.rows[key].numpy())
        else:
            np.savez(buffer, mu=mu, sigma=sigma, n=n)
        write_atomically(folder / f"{key}.npz", buffer.getvalue())
    write_atomically(folder / "reference.json", (json.dumps(reference.facts, indent=1) + "\n").encode())


def is_statistics(source: str) -> bool:
    """Whether a source is statistics, a .npz or a folder with a reference.json, and no images."""
    path = Path(source)
    return path.suffix == ".npz" or (path / "reference.json").is_file()


def load(
    source: str, protocol: Protocol, extractors: dict[str, ExtractorFacts], dims: dict[str, int], raw: list[str]
) -> Reference:
    """extractors: describe() of each that is needed, dims: its columns, raw: those whose feature rows are needed.

    FileNotFoundError or UserError name the file and what of it belongs to another protocol or extractor.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return _published(path, extractors, dims, raw)
    file = path / "reference.json"
    again = "make it again with python -m eval reference"
    facts = read_json(file, again)
    with loading(f"{file} cannot be read as a reference", again):
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
        known = facts["processing"], dict(facts["extractors"]), int(facts["images"]["n"])
        facts["protocol"]
    if known[0] != protocol.processing:
        raise UserError(
            f"{source} was made for protocol {facts['protocol']} with {known[0]}, protocol {protocol.name} has "
            f"{protocol.processing}; make a reference for this protocol: python -m eval reference"
        )
    moments, rows = {}, {}
    for key, mine in extractors.items():
        theirs = known[1].get(key)
        if theirs is None:
            raise UserError(f"{source} has no statistics of {key}, only of {', '.join(known[1])}; make it with these --metrics")
        for part in IDENTITY:
            there, here = theirs.get(part), mine.get(part)
            if there != here:
                if isinstance(here, dict):
                    faults = "; ".join(differences(there or {}, here))
                    raise UserError(f"{source}: {part} of {key} are others there: {faults}; make it again")
                raise UserError(f"{source}: {part} of {key} is {there!r} there and {here!r} here; make it again")
        arrays = _read(path / f"{key}.npz", ("mu", "sigma", *(("features",) if key in raw else ())), dims[key])
        moments[key] = arrays["mu"], arrays["sigma"]
        if key in raw:
            if len(arrays["features"]) != known[2]:
                raise UserError(
                    f"{path / key}.npz has {len(arrays['features'])} rows, reference.json says {known[2]}; make it again"
                )
            rows[key] = arrays["features"].float()
    return Reference(facts, moments, rows)


def _published(path: Path, extractors: dict[str, ExtractorFacts], dims: dict[str, int], raw: list[str]) -> Reference:
    if not path.is_file():
        raise FileNotFoundError(f"--reference: no such file {str(path)!r}")
    others = [key for key in extractors if key != "inception"]
    if others or raw:
        raise UserError(
            f"{path} holds a mean and a covariance of Inception features, which is enough for fid only; for other metrics make a "
            "reference of the images: python -m eval reference"
        )
    arrays = _read(path, ("mu", "sigma"), dims["inception"])
    facts: ReferenceFacts = {
        "file": path.name,
        "sha256": sha256(path),
        "images": {"n": None},
        "extractors": {},
        "note": "as published: nothing in it says of which images",
    }
    return Reference(facts, {"inception": (arrays["mu"], arrays["sigma"])}, {})


def _read(file: Path, keys: tuple[str, ...], dim: int) -> dict[str, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {key: torch.from_numpy(np.asarray(stored[key])) for key in keys}
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file {str(file)!r}; make the reference again with python -m eval reference") from None
    except (*BY_FILES, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read ({reason_of(error)}): expected the arrays {', '.join(keys)}; get or make it again"
        ) from error
    shapes = {"mu": (dim,), "sigma": (dim, dim)}
    for key, value in arrays.items():
        if key in shapes and tuple(value.shape) != shapes[key]:
            raise UserError(f"{file}: {key} has shape {tuple(value.shape)}, the extractor gives {shapes[key]}")
        if not (value.is_floating_point() and bool(torch.isfinite(value).all())):
            what = "NaN or infinite values" if value.is_floating_point() else f"{str(value.dtype).removeprefix('torch.')}"
            raise UserError(f"{file}: {key} holds {what}, expected finite floating point; get or make it again")
    if "sigma" in arrays:
        _check_covariance(arrays["sigma"].double(), file)
    return {key: value.double() if key in shapes else value for key, value in arrays.items()}


def _check_covariance(sigma: Tensor, file: Path) -> None:
    """UserError for what is none: a distance to it would be a number that means nothing."""
    largest = float(sigma.abs().max())
    if float((sigma - sigma.T).abs().max()) > SYMMETRIC * largest:
        raise UserError(f"{file}: sigma is not symmetric, as covariances are; get or make it again")
    if float(sigma.diagonal().min()) < -SYMMETRIC * largest:
        raise UserError(f"{file}: sigma has negative variances on its diagonal; get or make it again")
