"""From named metrics to numbers: which networks they need, and what is computed from what one pass leaves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Required, TypedDict

from pipelines.common.errors import UserError

from ..content import OverDraws
from ..networks import weights
from ..networks.weights import Found
from ..protocols import AGAINST_REFERENCE, METRICS, RAW_FEATURES, Protocol

if TYPE_CHECKING:  # a plan is made before torch is imported
    import torch

    from ..networks.extractors import Extractor
    from .one_pass import Gathered
    from .reference import Reference

CLIP_336, CLIP_L14, DINOV2 = "openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14", "facebook/dinov2-large"


class Number(TypedDict, total=False):
    """A metric of one set of images. std_over_...: of its parts (None for one image); images_below_dimension: the features'
    dimension, where there are not more images than that.
    """

    value: Required[float]
    images_below_dimension: int
    std_over_subsets: float
    subset_size: int
    std_over_splits: float
    std_over_images: float | None


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
        """The views of an image (images.files.VIEWS) that its extractors see, sorted."""
        return sorted({view_of(key, self.protocol) for key in self.found})


def view_of(key: str, protocol: Protocol) -> str:
    """Which view of an image (images.files.VIEWS) an extractor sees."""
    return {"inception_patch": "patch", "clip": "clip" if protocol.clip_crop else "image"}.get(key, "image")


def plan(protocol: Protocol, given: dict[str, str | None], folder: Path) -> Plan:
    """given: files or folders named by the user, by "inception", "clip", "clip_336", "dinov2", "clip_aesthetic", "aesthetic".

    FileNotFoundError or UserError for weights that are not there or damaged; UserError for an inception score of other weights
    than TensorFlow's.
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


def build(plan: Plan, device: torch.device | str = "cpu") -> dict[str, Extractor]:
    """The extractors themselves, by name. Metrics that read one network the same way share it. UserError for weights that do not
    fit.
    """
    from ..networks.extractors import Clip, DinoV2, Inception

    protocol = plan.protocol
    extractors: dict[str, Extractor] = {}
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


def without_logits(extractor: Extractor) -> Extractor:
    """The same network for the reference, of which no score is taken."""
    if "logits" not in extractor.outputs:
        return extractor
    view = copy.copy(extractor)
    view.outputs = {"features": extractor.outputs["features"]}
    return view


def compute(metrics: Sequence[str], gathered: Gathered, reference: Reference | None) -> dict[str, Number]:
    """The numbers of one set of images, by name, from what one pass left; precision_recall gives "precision" and "recall".

    reference: None where no metric compares with real images; ValueError where one does.
    """
    from .distances import cmmd, kernel_distance, precision_recall
    from .frechet import frechet_from_moments

    def real() -> Reference:
        if reference is None:
            raise ValueError(f"{', '.join(metrics)}: a metric compares with real images, and there is no reference")
        return reference

    numbers: dict[str, Number] = {}
    for metric in metrics:
        key = METRICS[metric]
        if metric in ("fid", "patch_fid", "fd_dinov2"):
            stats = gathered.stats[key]
            numbers[metric] = {"value": frechet_from_moments(stats.mean, stats.cov, *real().moments[key])}
            if gathered.n <= stats.dim:
                numbers[metric]["images_below_dimension"] = stats.dim
        elif metric == "kid":
            size = min(1000, gathered.n, len(real().rows[key]))
            mean, std = kernel_distance(gathered.rows[key], real().rows[key], size=size)
            numbers[metric] = {"value": mean, "std_over_subsets": std, "subset_size": size}
        elif metric == "precision_recall":
            precision, recall = precision_recall(gathered.rows[key], real().rows[key])
            numbers |= {"precision": {"value": precision}, "recall": {"value": recall}}
        elif metric == "cmmd":
            numbers[metric] = {"value": cmmd(gathered.rows[key], real().rows[key])}
        elif metric == "inception_score":
            mean, std = gathered.inception[key].value()
            numbers[metric] = {"value": mean, "std_over_splits": std}
        else:
            values = gathered.single["cosine" if metric == "clip_score" else "aesthetic"].double()
            numbers[metric] = {"value": values.mean().item(), "std_over_images": values.std().item() if len(values) > 1 else None}
    return numbers


def over_draws(draws: Sequence[dict[str, Number]], report: str) -> dict[str, OverDraws]:
    """Numbers of each draw -> {number: {value, draws, mean, std, min}}; value: the least of the draws where report is "min" and
    lower is better, else their mean; std: None for a single draw.
    """
    from statistics import fmean, stdev

    from ..protocols import LOWER_IS_BETTER

    joined: dict[str, OverDraws] = {}
    for name in draws[0]:
        values, rows = [draw[name]["value"] for draw in draws], [dict(draw[name]) for draw in draws]
        least = report == "min" and LOWER_IS_BETTER[name]
        facts = {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "min": min(values)}
        more = {key: [row[key] for row in rows] for key in rows[0] if key != "value"}
        joined[name] = {"value": min(values) if least else fmean(values), "draws": values, **facts, **more}
        joined[name]["value_is"] = (
            "the least of the draws" if least and len(values) > 1 else "the mean" if len(values) > 1 else "one draw"
        )
    return joined
