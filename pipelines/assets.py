"""The files of assets/: whether they are those that its manifest.json lists. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from .common.errors import UserError
from .common.reading import read_json

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMOJI, EMOJI_SD, EMOJI_CLIP = ASSETS / "emoji", ASSETS / "emoji_sd", ASSETS / "emoji_clip"


def sum_of(file: Path) -> dict[str, int | str]:
    """An entry of the manifest: size and sha256."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def check_assets(*folders: Path, assets: Path = ASSETS) -> None:
    """Each file of these folders of `assets` (none named: of all) is there and is what manifest.json says; 30 MB take 0.1 s.

    UserError names the files that are missing or damaged, and the command that makes them again.
    """
    manifest = assets / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{shown(manifest)} is missing; {remedy([manifest])}")
    listed = read_json(manifest, remedy([manifest]))
    wanted = {f.name for f in folders} or {name.split("/")[0] for name in listed}
    if unlisted := sorted(wanted - {name.split("/")[0] for name in listed}):
        raise UserError(f"{shown(manifest)} lists no file of {', '.join(unlisted)}; {remedy([manifest])}")
    missing, damaged = [], []
    for name, entry in listed.items():
        if name.split("/")[0] not in wanted:
            continue
        file = assets / name
        if not file.is_file():
            missing.append(file)
        elif sum_of(file) != entry:
            damaged.append(file)
    faults = [f"{what} {', '.join(map(shown, files))}" for what, files in (("missing", missing), ("damaged", damaged)) if files]
    if faults:
        raise UserError(
            f"files of the embedded teacher are not what {shown(manifest)} lists: {'; '.join(faults)}; "
            f"{remedy([*missing, *damaged])}"
        )


def remedy(files: Sequence[Path]) -> str:
    paths = " ".join(map(shown, files))
    return f"get them again: git checkout -- {paths} (or train all of it anew, for hours: make assets START=)"


def shown(file: Path) -> str:
    """As somebody would type it here."""
    return os.path.relpath(file)
