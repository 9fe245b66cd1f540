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
    """What rules decide by: a command's settings (None: of a training) and the metrics that are computed."""

    settings: Any
    metrics: Collection[str]


def without(needs: str, acts: Callable[[Asked], Any], *keys: str) -> tuple[Idle, ...]:
    """A rule for each of `keys`: it has no effect where `acts` is false. needs: what it has one with, for the message."""
    return tuple(Idle(key, needs, acts) for key in keys)


def reads(*extractors: str) -> Callable[[Asked], bool]:
    """Whether a metric is computed from one of these networks."""
    return lambda asked: any(METRICS[m] in extractors for m in asked.metrics)


OF_A_MODEL = ("lora", "base_model", "steps", "guidance_scale", "image_size", "dtype", "seed", "batch_size", "exact", "teacher")
METRIC = ("metrics", "protocol")
IDLE: dict[tuple[str, ...], tuple[Idle, ...]] = {  # by the options that decide
    ("model", "images"): (
        *without("--model", lambda asked: asked.settings.model, *OF_A_MODEL),
        Idle("draws", "--model: images that are there are one set", lambda asked: asked.settings.model),
        Idle("image_column", "--images", lambda asked: asked.settings.images),
    ),
    ("teacher",): without("--teacher", lambda asked: asked.settings.teacher, "teacher_steps", "latency_batch"),
    ("captions",): without(
        "--captions of a file with columns (.csv, .jsonl, .parquet)",
        lambda asked: not (asked.settings.captions or ".txt").endswith((".txt", ".json")),
        "caption_column",
    ),
    (*METRIC, "model", "images"): without(
        "--metrics clip_score, or a --model that takes text",
        lambda asked: asked.settings.model or "clip_score" in asked.metrics,
        *("captions", "caption_column"),
    ),
    ("reference",): without("--reference", lambda asked: asked.settings.reference, "reference_column"),
    ("workers",): without("--workers", lambda asked: asked.settings.workers, "start_method"),
    METRIC: (
        *without(
            f"--metrics {', '.join(AGAINST_REFERENCE)}",
            lambda asked: any(m in AGAINST_REFERENCE for m in asked.metrics),
            *("reference", "reference_column"),
        ),
        *without("a metric of Inception features", reads("inception", "inception_patch"), "inception"),
        *without("a metric of whole images' Inception features", reads("inception"), "inception_mode"),
        *without("--metrics clip_score", reads("clip"), "clip", "clip_model", "clip_prefix"),
        *without("--metrics cmmd", reads("clip_336"), "clip_336"),
        *without("--metrics fd_dinov2", reads("dinov2"), "dinov2"),
        *without("--metrics aesthetic", reads("clip_aesthetic"), "clip_aesthetic", "aesthetic"),
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
