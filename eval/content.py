"""What metrics.json and reference.json hold, as types: made in metrics/ and images/, read in report/ and by comparisons."""

from __future__ import annotations

from typing import Any, Required, TypedDict

# Of one metric over all draws: value, draws, mean, std (None for one draw), min, value_is, n; and of what measure.Number has
# besides, lists with an entry for each draw.
OverDraws = dict[str, Any]
# Of a model: where it came from, pipeline, scheduler, and the arguments of its call (images.sampler).
ModelFacts = dict[str, Any]


def steps_in(call: dict[str, Any]) -> int | None:
    """How many steps a pipeline's call makes, however it was told; None where it does not say.

    >>> steps_in({"num_inference_steps": 4}), steps_in({"timesteps": [999, 400]}), steps_in({"sigmas": [1.0, 0.9]}), steps_in({})
    (4, 2, 2, None)
    """
    levels = call.get("timesteps") or call.get("sigmas")
    return call.get("num_inference_steps") or (len(levels) if levels else None)


class WeightsFacts(TypedDict):
    """Weights of a network; published: whether their sha256 is the known one."""

    file: str
    sha256: str
    published: bool


class ExtractorFacts(TypedDict, total=False):
    """What identifies features. settings: where the weights do not say all; the rest of a CLIP network that reads texts."""

    network: Required[str]
    input: Required[str]
    file: Required[str]
    sha256: Required[str]
    published: Required[bool]
    settings: dict[str, Any]
    prefix: str
    scale: float
    longest_text: int
    tokenizer: str
    aesthetic: WeightsFacts


class ImageSetFacts(TypedDict, total=False):
    """sha256: over contents in their order; turned: how many EXIF would turn. Of published statistics only n, None."""

    source: str
    n: Required[int | None]
    sha256: str
    turned: int


class ReferenceFacts(TypedDict, total=False):
    """format, protocol and processing: of a reference made here; file, sha256 and note: of published statistics."""

    format: int
    protocol: str
    processing: dict[str, Any]
    file: str
    sha256: str
    images: Required[ImageSetFacts]
    extractors: dict[str, ExtractorFacts]
    note: str


class Speed(TypedDict):
    """Of a model's calls; call: its arguments."""

    seconds_per_image: float
    images_per_s: float
    batch_size: int
    repeats: int
    device: str
    call: dict[str, Any]


class Latency(TypedDict, total=False):
    """Of the model and of the teacher that it is compared with; empty without one. speedup: seconds over seconds."""

    model: Speed
    teacher: Speed
    speedup: float


class ProtocolFacts(TypedDict):
    """computed: one sentence; departures: how this differs from the protocol of that name."""

    name: str
    source: str
    n: int
    draws: int
    departures: list[str]
    computed: str
    processing: dict[str, Any]


class Facts(TypedDict):
    """What an evaluation depends on. images: of each draw; model, captions, reference: None where there is none."""

    reference: ReferenceFacts | None
    images: list[ImageSetFacts]
    extractors: dict[str, ExtractorFacts]
    captions: dict[str, Any] | None
    seed: int
    model: ModelFacts | None
    device: str
    latency: Latency
    timings: dict[str, float]


class Content(Facts):
    """metrics.json. beside_published: whether published numbers may stand in one table with these."""

    protocol: ProtocolFacts
    metrics: dict[str, OverDraws]
    not_published_weights: list[str]
    beside_published: bool
    seeds: list[list[int]] | None
    versions: dict[str, str]
    git_commit: str | None
