"""metrics.json: every number with all that it depends on, and one sentence that says what was computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.common.provenance import git_commit, versions

from ..content import Content, Facts, OverDraws
from ..protocols import Protocol

PACKAGES = ("torch", "torchvision", "numpy", "Pillow", "diffusers", "transformers", "peft", "clean-fid", "open_clip_torch")
TITLES = {
    "fid": "FID",
    "kid": "KID",
    "inception_score": "Inception score",
    "precision": "Precision",
    "recall": "Recall",
    "patch_fid": "Patch FID",
    "fd_dinov2": "FD-DINOv2",
    "cmmd": "CMMD",
    "clip_score": "CLIP score",
    "aesthetic": "Aesthetic score",
}


def results(protocol: Protocol, metrics: dict[str, OverDraws], facts: Facts) -> Content:
    """beside_published: whether published numbers may stand in one table with these; fewer draws do not forbid it.

    metrics: measure.over_draws.
    """
    reference = facts["reference"]
    count = reference["images"]["n"] if reference else None
    n = protocol.num_images
    seeds = [[facts["seed"], draw * n, (draw + 1) * n - 1] for draw in range(protocol.draws)] if facts["model"] else None
    departures = protocol.departures(count)
    others = [key for key, e in facts["extractors"].items() if not e["published"]]
    return {
        "protocol": {
            "name": protocol.name,
            "source": protocol.source,
            "n": n,
            "draws": protocol.draws,
            "departures": departures,
            "computed": sentence(protocol, facts),
            "processing": protocol.processing | {"inception": protocol.inception, "clip_crop": protocol.clip_crop},
        },
        "metrics": {name: numbers | {"n": n} for name, numbers in metrics.items()},
        "not_published_weights": others,
        "beside_published": protocol.name != "custom" and not others and all("draws" in d for d in departures),
        "seeds": seeds,
        **facts,
        "versions": versions(PACKAGES),
        "git_commit": git_commit(),
    }


def sentence(protocol: Protocol, facts: Facts) -> str:
    """What was computed, for a reader who knows the field."""
    names = ", ".join("precision, recall" if m == "precision_recall" else TITLES[m] for m in protocol.metrics)
    reference, n = facts["reference"], protocol.num_images
    what = f"{names} of {n:,} images"
    if facts["model"]:
        last = protocol.draws * n - 1
        sets = f" in each of {protocol.draws} draws" if protocol.draws > 1 else ""
        what += f"{sets} (one seed an image, 0 to {last:,}, set {facts['seed']})"
    else:
        what += f" of {facts['images'][0]['source']}"
    if protocol.crop_to:
        what += f", cropped to the largest centred square and resized (Lanczos) to {protocol.crop_to}"
    if reference:
        images = reference["images"]
        what += f", against {images['n']:,} images of {images['source']}" if images["n"] else f", against {reference['file']}"
    for key, extractor in facts["extractors"].items():
        mark = "" if extractor["published"] else ", not the published weights"
        what += f"; {key}: {extractor['network']}, {extractor['input']}{mark}"
    departures = protocol.departures(reference["images"]["n"] if reference else None)
    if departures:
        what += f". Not the protocol {protocol.name}: {'; '.join(departures)}"
    return what + "."


def comparable(contents: Sequence[tuple[str, Content]]) -> list[str]:
    """Why numbers of these evaluations must not stand in one table; [] if they may. (name, metrics.json's content)."""
    faults, (first, base) = [], contents[0]
    for name, other in contents[1:]:
        for key in ("name", "n", "processing"):
            ours, others = (c["protocol"].get(key) for c in (base, other))
            if others != ours:
                faults.append(f"{key}: {ours} in {first}, {others} in {name}")
        for key in base["extractors"].keys() & other["extractors"].keys():
            mine, theirs = (_compared(c["extractors"][key]) for c in (base, other))
            for part in sorted(mine.keys() | theirs.keys()):
                if mine.get(part) != theirs.get(part):
                    faults.append(f"{part} of {key} {'differ' if part == 'settings' else 'differs'} between {first} and {name}")
        images, theirs_too = (_reference_id(c) for c in (base, other))
        if None not in (images, theirs_too) and images != theirs_too:
            faults.append(f"the reference images differ between {first} and {name}")
        if (base["captions"] or {}).get("sha256") != (other["captions"] or {}).get("sha256"):
            faults.append(f"the captions differ between {first} and {name}")
    return faults


def _compared(extractor: Mapping[str, object]) -> dict[str, object]:
    """All that its numbers depend on: not the names of its files."""
    kept = {key: value for key, value in extractor.items() if key not in ("file", "published")}
    return {key: _compared(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _reference_id(content: Content) -> str | None:
    reference = content["reference"]
    return None if reference is None else reference.get("sha256") or reference["images"].get("sha256")
