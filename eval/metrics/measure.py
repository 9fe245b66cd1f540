"""From named metrics to numbers: which networks they need, and what is computed from what one pass leaves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError

from ..networks import weights
from ..networks.weights import Found
from ..protocols import AGAINST_REFERENCE, METRICS, RAW_FEATURES, Protocol

CLIP_336, CLIP_L14, DINOV2 = "openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14", "facebook/dinov2-large"


@dataclass(frozen=True)
class Plan:
    """What a set of metrics needs: extractor -> weights, and what is wanted of each. Made before anything heavy is imported.

    found: weights by extractor; aesthetic: the head's, where it is wanted. names: of the CLIP networks.
    """

    protocol: Protocol
    found: dict[str, Found]
    names: dict[str, str]
    aesthetic: Found | None = None

    @property
    def reference_extractors(self) -> list[str]:
        """Those whose features are compared with real images."""
        return [key for key in self.found if any(METRICS[m] == key and m in AGAINST_REFERENCE for m in self.protocol.metrics)]

    @property
    def raw(self) -> list[str]:
        """Those whose features are kept one by one."""
        return [key for key in self.found if any(METRICS[m] == key and m in RAW_FEATURES for m in self.protocol.metrics)]

    @property
    def shares_clip(self) -> bool:
        """Whether the CLIP score and the aesthetic score read one network the same way, so that it runs once for both."""
        same = {"clip", "clip_aesthetic"} <= self.found.keys() and self.found["clip"].path == self.found["clip_aesthetic"].path
        return same and view_of("clip", self.protocol) == "image"

    @property
    def views(self) -> list[str]:
        return sorted({view_of(key, self.protocol) for key in self.found})


def view_of(key: str, protocol: Protocol) -> str:
    """Which view of an image (images.files.VIEWS) an extractor sees."""
    return {"inception_patch": "patch", "clip": "clip" if protocol.clip_crop else "image"}.get(key, "image")


def plan(protocol: Protocol, given: dict[str, str | None], folder: Path) -> Plan:
    """given: files or folders named by the user, by "inception", "clip", "clip_336", "dinov2", "clip_aesthetic", "aesthetic".

    FileNotFoundError or ValueError for weights that are not there.
    """
    inception = "inception_pytorch" if protocol.inception == "legacy_pytorch" else "inception"
    names = {"clip": protocol.clip_model, "clip_336": CLIP_336, "clip_aesthetic": CLIP_L14, "dinov2": DINOV2}
    found: dict[str, Found] = {}
    for key in dict.fromkeys(METRICS[m] for m in protocol.metrics):
        if key.startswith("inception"):
            # patches are 299 pixels already, so there is no resize to choose: always the TorchScript network
            file = "inception" if key == "inception_patch" else inception
            found[key] = weights.find(file, given.get("inception"), folder)
        else:
            found[key] = weights.find(names[key], given.get(key), folder)
    head = weights.find("aesthetic", given.get("aesthetic"), folder) if "aesthetic" in protocol.metrics else None
    if "inception_score" in protocol.metrics and protocol.inception == "legacy_pytorch":
        raise UserError("inception_score: published scores use the TensorFlow network; choose --inception-mode legacy_tensorflow")
    return Plan(protocol, found, names, head)


def build(plan: Plan, device: Any = "cpu") -> dict[str, Any]:
    """The extractors themselves. Metrics that read one network the same way share it."""
    from ..networks.extractors import Clip, DinoV2, Inception

    protocol, extractors = plan.protocol, {}
    shared = plan.shares_clip
    for key, found in plan.found.items():
        if key == "clip_aesthetic" and shared:
            continue
        view = view_of(key, protocol)
        if key == "inception":
            extractors[key] = Inception(found, protocol.inception, device, "inception_score" in protocol.metrics, view)
        elif key == "inception_patch":
            extractors[key] = Inception(found, "clean", device, view=view)
        elif key == "dinov2":
            extractors[key] = DinoV2(found, device)
        else:
            wanted = {"clip": ["cosine"], "clip_336": ["features"], "clip_aesthetic": ["aesthetic"]}[key]
            wanted += ["aesthetic"] if key == "clip" and shared else []
            head = plan.aesthetic if "aesthetic" in wanted else None
            extractors[key] = Clip(
                plan.names[key], found, wanted, device, protocol.clip_prefix if key == "clip" else "", head, view
            )
    return extractors


def without_logits(extractor: Any) -> Any:
    """The same network for the reference, of which no score is taken."""
    if "logits" not in extractor.outputs:
        return extractor
    view = copy.copy(extractor)
    view.outputs = {"features": extractor.outputs["features"]}
    return view


def compute(metrics: Sequence[str], gathered: Any, reference: Any) -> dict[str, dict[str, Any]]:
    """{number: {"value": v, ...}} of one set: gathered (one_pass.Gathered) against reference (reference.Reference, or None where
    no metric needs it). precision_recall gives "precision" and "recall".
    """
    from .distances import cmmd, kernel_distance, precision_recall
    from .frechet import frechet_from_moments

    numbers: dict[str, dict[str, float]] = {}
    for metric in metrics:
        key = METRICS[metric]
        if metric in ("fid", "patch_fid", "fd_dinov2"):
            stats = gathered.stats[key]
            numbers[metric] = {"value": frechet_from_moments(stats.mean, stats.cov, *reference.moments[key])}
            if gathered.n <= stats.dim:
                numbers[metric]["images_below_dimension"] = stats.dim
        elif metric == "kid":
            size = min(1000, gathered.n, len(reference.rows[key]))
            mean, std = kernel_distance(gathered.rows[key], reference.rows[key], size=size)
            numbers[metric] = {"value": mean, "std_over_subsets": std, "subset_size": size}
        elif metric == "precision_recall":
            precision, recall = precision_recall(gathered.rows[key], reference.rows[key])
            numbers |= {"precision": {"value": precision}, "recall": {"value": recall}}
        elif metric == "cmmd":
            numbers[metric] = {"value": cmmd(gathered.rows[key], reference.rows[key])}
        elif metric == "inception_score":
            mean, std = gathered.inception[key].value()
            numbers[metric] = {"value": mean, "std_over_splits": std}
        else:
            values = gathered.single["cosine" if metric == "clip_score" else "aesthetic"].double()
            numbers[metric] = {"value": values.mean().item(), "std_over_images": values.std().item() if len(values) > 1 else None}
    return numbers


def over_draws(draws: Sequence[dict[str, dict[str, float]]], report: str) -> dict[str, dict[str, Any]]:
    """Numbers of each draw -> {number: {value, draws, mean, std, min}}; value: the least of the draws where report is "min" and
    lower is better, else their mean; std: None for a single draw.
    """
    from statistics import fmean, stdev

    from ..protocols import LOWER_IS_BETTER

    joined: dict[str, dict[str, Any]] = {}
    for name in draws[0]:
        values = [draw[name]["value"] for draw in draws]
        least = report == "min" and LOWER_IS_BETTER[name]
        facts = {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "min": min(values)}
        more = {key: [draw[name][key] for draw in draws] for key in draws[0][name] if key != "value"}
        joined[name] = {"value": min(values) if least else fmean(values), "draws": values, **facts, **more}
        joined[name]["value_is"] = (
            "the least of the draws" if least and len(values) > 1 else "the mean" if len(values) > 1 else "one draw"
        )
    return joined
