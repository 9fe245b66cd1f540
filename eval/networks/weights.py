"""Where the networks behind the metrics lie: one documented folder, then the libraries' caches, then a download.

Imports neither torch nor transformers: a missing file is an error in a second, not after minutes of generating.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.paths import user_path

from ..content import WeightsFacts

WEIGHTS_DIR = "ONE_STEP_WEIGHTS"  # environment variable
OPEN_CLIP = "open_clip:"


@dataclass(frozen=True)
class File:
    """A single file with a known content. caches: where other libraries put it."""

    name: str
    url: str
    sha256: str
    caches: tuple[str, ...]


FILES = {
    "inception": File(
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        ("{tmp}/inception-2015-12-05.pt",),  # clean-fid
    ),
    "inception_pytorch": File(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        ("{torch}/pt_inception-2015-12-05-6726825d.pth", "{torch}/weights-inception-2015-12-05-6726825d.pth"),
    ),
    "aesthetic": File(
        "sac+logos+ava1-l14-linearMSE.pth",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        (),
    ),
}

# Hub id -> {its weights, best first: sha256}. Others are taken too, but not called published where they are local copies.
MODELS = {
    "openai/clip-vit-large-patch14": {
        "model.safetensors": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    },
    "openai/clip-vit-large-patch14-336": {
        "pytorch_model.bin": "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
    },
    "facebook/dinov2-large": {
        "model.safetensors": "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    },
}
# open_clip:model:tag -> hub id, file, sha256.
OPEN_CLIP_FILES = {
    "open_clip:ViT-g-14:laion2b_s12b_b42k": (
        "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
        "open_clip_pytorch_model.bin",
        "6aac683f899159946bc4ca15228bb7016f3cbb1a2c51f365cba0b23923f344da",
    ),
    "open_clip:ViT-H-14:laion2b_s32b_b79k": (
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "open_clip_pytorch_model.bin",
        "9a78ef8e8c73fd0df621682e7a8e8eb36c6916cb3c16b291a082ecd52ab79cc4",
    ),
}
SETTINGS = ("*.json", "*.txt", "*.model")  # of a transformers model, beside its weights


@dataclass(frozen=True)
class Found:
    """A file or folder of weights. published: whether it is the file everybody uses, by its sha256 or hub id."""

    path: Path
    sha256: str
    published: bool

    def describe(self) -> WeightsFacts:
        """file (its name alone), sha256, published."""
        return {"file": self.path.name, "sha256": self.sha256, "published": self.published}


def offline() -> bool:
    """Whether HF_HUB_OFFLINE says that nothing may be downloaded."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def weights_dir(given: str | os.PathLike | None = None) -> Path:
    """--weights-dir, else $ONE_STEP_WEIGHTS, else ~/.cache/one-step-distill."""
    named = os.environ.get(WEIGHTS_DIR)
    return Path(given or (named and user_path(named)) or Path.home() / ".cache" / "one-step-distill")


def find(key: str, given: str | None, folder: Path) -> Found:
    """Weights of extractor `key` ("inception", "inception_pytorch", "aesthetic", a hub id, or open_clip:model:tag).

    given: a file or folder named by the user instead, taken as it is. FileNotFoundError names what is missing, where it is looked
    for and where it comes from; UserError a file whose content is not the published one.
    """
    if given is not None:
        path = Path(given)
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder {given!r} for the extractor {key!r}")
        return _taken(path, key)
    if key in FILES:
        return _find_file(FILES[key], folder)
    return _find_open_clip(key, folder) if key.startswith(OPEN_CLIP) else _find_model(key, folder)


def _taken(path: Path, key: str) -> Found:
    """A file, or the weights in a folder; published where its sha256 is the one that is known for `key`."""
    known = {FILES[key].sha256} if key in FILES else {*MODELS.get(key, {}).values(), *OPEN_CLIP_FILES.get(key, ())[2:]}
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name in ("model.safetensors", "pytorch_model.bin"))
        if not files:
            raise FileNotFoundError(f"{path} has neither model.safetensors nor pytorch_model.bin; copy the whole model")
        digest = sha256(files[0])
    else:
        digest = sha256(path)
    return Found(path, digest, digest in known)


def _find_file(file: File, folder: Path) -> Found:
    torch_home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch"
    caches = [c.format(tmp=tempfile.gettempdir(), torch=Path(torch_home) / "hub" / "checkpoints") for c in file.caches]
    places = [folder / file.name, *map(Path, caches)]
    for place in places:
        if place.is_file():
            return _checked(file, place)
    missing = (
        f"{file.name} is in none of {', '.join(map(str, places))}. It comes from {file.url}, sha256 "
        f"{file.sha256}. Put it into {folder} "
        f"(another folder: --weights-dir or ${WEIGHTS_DIR})"
    )
    if offline():
        raise FileNotFoundError(f"{missing}; nothing is downloaded, since HF_HUB_OFFLINE is set")
    partial = folder / f".{file.name}.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        urllib.request.urlretrieve(file.url, partial)
        os.replace(partial, folder / file.name)
    except OSError as error:  # URLError is one
        raise FileNotFoundError(f"{missing}; downloading it failed: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return _checked(file, folder / file.name)


def _checked(file: File, place: Path) -> Found:
    digest = sha256(place)
    if digest != file.sha256:
        raise UserError(
            f"{place} has sha256 {digest}, the published file {file.sha256}: it is damaged or another one. Remove it, or "
            f"get it again from {file.url}"
        )
    return Found(place, digest, True)


def _find_open_clip(name: str, folder: Path) -> Found:
    local = [folder / f"{name.removeprefix(OPEN_CLIP).replace(':', '-')}{suffix}" for suffix in (".safetensors", ".bin", ".pt")]
    for place in local:
        if place.is_file():
            return _taken(place, name)
    if name not in OPEN_CLIP_FILES:
        raise FileNotFoundError(f"{name}: none of {', '.join(map(str, local))} is there, and where to get it is not known here")
    repository, file, _ = OPEN_CLIP_FILES[name]
    return _taken(_from_hub(repository, [file], (), local[1]), name)


def _find_model(name: str, folder: Path) -> Found:
    """A transformers model: <folder>/<owner>--<name>, else the hub's cache, else the hub."""
    local = folder / name.replace("/", "--")
    if local.is_dir():
        return _taken(local, name)
    return _taken(_from_hub(name, list(MODELS.get(name, {"model.safetensors": ""})), SETTINGS, local), name)


def _from_hub(repository: str, files: list[str], settings: tuple[str, ...], local: Path) -> Path:
    """The path of files[0] in the hub's cache, of its folder where there are settings. FileNotFoundError: see find."""
    from huggingface_hub import snapshot_download

    reason = ""
    for cached in (True, False):
        if not cached and offline():
            reason = "and nothing is downloaded, since HF_HUB_OFFLINE is set"
            break
        try:
            found = Path(snapshot_download(repository, allow_patterns=[*files, *settings], local_files_only=cached))
            if (found / files[0]).is_file():
                return found if settings else found / files[0]
            reason = f"and {repository} has no {files[0]}"
        except (OSError, ValueError) as error:
            reason = f"and the hub could not be asked for it: {str(error).splitlines()[0]}"
    known = next((f", sha256 {h}" for r, f, h in OPEN_CLIP_FILES.values() if (r, f) == (repository, files[0])), "")
    known = known or (f", sha256 {MODELS[repository][files[0]]}" if repository in MODELS else "")
    raise FileNotFoundError(
        f"{files[0]} of {repository} is neither at {local} nor in the hub's cache, {reason}. It comes from "
        f"https://huggingface.co/{repository}{known}. Put it there (another folder: --weights-dir or ${WEIGHTS_DIR})"
    )


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
