"""Options that would do nothing beside the others that were given: refused by name. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from pipelines.common.errors import UserError

from .protocols import AGAINST_REFERENCE, METRICS, get_protocol


class Rule(NamedTuple):
    """options act only where acts(args, metrics); needs: what that is, in words; by: the options that decide it."""

    options: tuple[str, ...]
    needs: str
    by: tuple[str, ...]
    acts: Callable[[Namespace, Collection[str]], bool]


def reads(*extractors: str) -> Callable[[Namespace, Collection[str]], bool]:
    """Whether a metric is computed from one of these networks."""
    return lambda args, metrics: any(METRICS[m] in extractors for m in metrics)


def compares(args: Namespace, metrics: Collection[str]) -> bool:
    return any(m in AGAINST_REFERENCE for m in metrics)


OF_A_MODEL = ("lora", "base_model", "steps", "guidance_scale", "image_size", "dtype", "seed", "batch_size", "exact", "teacher")
METRIC = ("metrics", "protocol")
RULES = (
    Rule(OF_A_MODEL, "--model", ("model", "images"), lambda args, metrics: bool(args.model)),
    Rule(("draws",), "--model: images that are there are one set", ("model", "images"), lambda args, metrics: not args.images),
    Rule(("image_column",), "--images", ("model", "images"), lambda args, metrics: bool(args.images)),
    Rule(("teacher_steps", "latency_batch"), "--teacher", ("teacher",), lambda args, metrics: bool(args.teacher)),
    Rule(
        ("caption_column",),
        "--captions of a file with columns (.csv, .jsonl, .parquet)",
        ("captions",),
        lambda args, metrics: bool(args.captions) and not args.captions.endswith((".txt", ".json")),
    ),
    Rule(
        ("captions", "caption_column"),
        "--metrics clip_score, or a --model that takes text",
        (*METRIC, "model", "images"),
        lambda args, metrics: bool(args.model) or "clip_score" in metrics,
    ),
    Rule(("reference_column",), "--reference", ("reference",), lambda args, metrics: bool(args.reference)),
    Rule(("reference", "reference_column"), f"--metrics {', '.join(AGAINST_REFERENCE)}", METRIC, compares),
    Rule(("start_method",), "--workers", ("workers",), lambda args, metrics: args.workers > 0),
    Rule(("inception",), "a metric of Inception features", METRIC, reads("inception", "inception_patch")),
    Rule(("inception_mode",), "a metric of whole images' Inception features", METRIC, reads("inception")),
    Rule(("clip", "clip_model", "clip_prefix"), "--metrics clip_score", METRIC, reads("clip")),
    Rule(("clip_336",), "--metrics cmmd", METRIC, reads("clip_336")),
    Rule(("dinov2",), "--metrics fd_dinov2", METRIC, reads("dinov2")),
    Rule(("clip_aesthetic", "aesthetic"), "--metrics aesthetic", METRIC, reads("clip_aesthetic")),
)


def refuse_idle(args: Namespace, command: str = "") -> None:
    """UserError for an option that has no effect.

    What a metric would read that is not asked for (a network, the reference) is let be, and said: one set of options may serve
    several calls. Let be is an option of the --config file where the command line itself decided so: a file describes a whole
    evaluation, of which a command may want a part (`command`: one that always does).
    """
    protocol = get_protocol(args.protocol)
    metrics = [m for m in args.metrics or protocol.metrics if m in METRICS]  # unknown ones are refused where they are read
    if command == "reference":
        metrics = [m for m in metrics if m in AGAINST_REFERENCE]
    for rule in RULES:
        if rule.acts(args, metrics):
            continue
        for key in rule.options:
            decided = command or args.given & set(rule.by)
            if key not in args.given and (key not in args.listed or decided):
                continue
            message = f"--{key.replace('_', '-')} has no effect without {rule.needs}"
            if "metrics" not in rule.by:
                raise UserError(f"{message}; remove it")
            if os.environ.get("RANK", "0") == "0":
                print(f"eval: {message}", file=sys.stderr)


def refuse_unread(options: Mapping[str, Any], metrics: Collection[str], prefix: str) -> None:
    """UserError for one of `options` (by name, None where not given) that no metric reads. prefix: of their names."""
    for rule in RULES:
        given = [key for key in rule.options if rule.by == METRIC and options.get(key) is not None]
        if given and not rule.acts(Namespace(), metrics):
            raise UserError(f"{prefix}{given[0]} has no effect without {rule.needs.replace('--metrics', 'metric')}; remove it")
