"""Options that would do nothing beside the others that were given: refused by name. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from pipelines.common.errors import UserError
from pipelines.common.options import flag
from pipelines.common.strict import Idle

from .protocols import AGAINST_REFERENCE, METRICS, get_protocol
from .settings import Generate, Metrics, Reference, Run


class Asked(NamedTuple):
    """What Idle rules decide by: a command's settings (None: of a training) and the metrics that are computed."""

    settings: Any
    metrics: Collection[str]


def reads(*extractors: str) -> Callable[[Asked], bool]:
    """Whether a metric is computed from one of these networks."""
    return lambda asked: any(METRICS[m] in extractors for m in asked.metrics)


def compares(asked: Asked) -> bool:
    return any(m in AGAINST_REFERENCE for m in asked.metrics)


def in_columns(asked: Asked) -> bool:
    return bool(asked.settings.captions) and not asked.settings.captions.endswith((".txt", ".json"))


OF_A_MODEL = ("lora", "base_model", "steps", "guidance_scale", "image_size", "dtype", "seed", "batch_size", "exact", "teacher")
TEXT = "--metrics clip_score, or a --model that takes text"
COMPARED = f"--metrics {', '.join(AGAINST_REFERENCE)}"
METRIC = ("metrics", "protocol")
IDLE: dict[tuple[str, ...], tuple[Idle, ...]] = {  # by the options that decide
    ("model", "images"): (
        *(Idle(key, "--model", lambda asked: asked.settings.model) for key in OF_A_MODEL),
        Idle("draws", "--model: images that are there are one set", lambda asked: asked.settings.model),
        Idle("image_column", "--images", lambda asked: asked.settings.images),
    ),
    ("teacher",): tuple(
        Idle(key, "--teacher", lambda asked: asked.settings.teacher) for key in ("teacher_steps", "latency_batch")
    ),
    ("captions",): (Idle("caption_column", "--captions of a file with columns (.csv, .jsonl, .parquet)", in_columns),),
    (*METRIC, "model", "images"): tuple(
        Idle(key, TEXT, lambda asked: asked.settings.model or "clip_score" in asked.metrics)
        for key in ("captions", "caption_column")
    ),
    ("reference",): (Idle("reference_column", "--reference", lambda asked: asked.settings.reference),),
    ("workers",): (Idle("start_method", "--workers", lambda asked: asked.settings.workers),),
    METRIC: (
        *(Idle(key, COMPARED, compares) for key in ("reference", "reference_column")),
        Idle("inception", "a metric of Inception features", reads("inception", "inception_patch")),
        Idle("inception_mode", "a metric of whole images' Inception features", reads("inception")),
        *(Idle(key, "--metrics clip_score", reads("clip")) for key in ("clip", "clip_model", "clip_prefix")),
        Idle("clip_336", "--metrics cmmd", reads("clip_336")),
        Idle("dinov2", "--metrics fd_dinov2", reads("dinov2")),
        *(Idle(key, "--metrics aesthetic", reads("clip_aesthetic")) for key in ("clip_aesthetic", "aesthetic")),
    ),
}


def refuse_idle(settings: Run | Metrics | Generate | Reference, given: set[str]) -> None:
    """UserError for an option that has no effect. given: those that stood on the command line itself.

    What a metric would read that is not asked for (a network, the reference) is let be, and said: one set of options may serve
    several calls. Let be is an option of the --config file where the command line itself decided so: a file describes a whole
    evaluation, of which a command may want a part (`generate` and `reference` always do).
    """
    known = getattr(settings, "metrics", None) or get_protocol(settings.protocol).metrics
    metrics = [m for m in known if m in METRICS]  # unknown ones are refused where they are read
    if isinstance(settings, Reference):
        metrics = [m for m in metrics if m in AGAINST_REFERENCE]
    asked, part = Asked(settings, metrics), isinstance(settings, Generate | Reference)
    for by, rules in IDLE.items():
        counted = given if part or given & {*by} else settings.model_fields_set
        for rule in rules:
            if rule.key not in counted or rule.acts(asked):
                continue
            fault = rule.fault(flag(rule.key))
            if "metrics" not in by:
                raise UserError(f"{fault}; remove it")
            if os.environ.get("RANK", "0") == "0":
                print(f"eval: {fault}", file=sys.stderr)


def refuse_unread(options: Mapping[str, Any], metrics: Collection[str], prefix: str) -> None:
    """UserError for one of `options` (by name, None where not given) that no metric reads. prefix: of their names."""
    for rule in IDLE[METRIC]:
        if options.get(rule.key) is not None and not rule.acts(Asked(None, metrics)):
            raise UserError(f"{rule.fault(prefix + rule.key).replace('--metrics', 'metric')}; remove it")
