"""Small evaluations of a student while it trains: a few images of its averaged weights, the same seeds every time.

A distance of 1,000 images is far above that of 50,000 and no substitute for a protocol; it shows the trend. trainers.distill is
the one command outside that calls this (evaluation: in its configuration).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from pipelines.common.atomic import write_atomically
from pipelines.common.errors import UserError

from .idle import refuse_unread
from .images.files import VIEWS, Images
from .metrics.measure import Plan, build, compute, plan
from .metrics.one_pass import one_pass
from .metrics.reference import load_or_measure
from .networks.weights import weights_dir
from .protocols import AGAINST_REFERENCE, Protocol, get_protocol
from .report import figures
from .report.training_log import curves, read_metrics

NETWORKS = ("inception", "clip", "clip_336", "dinov2")


def make_plan(options: Mapping[str, Any]) -> Plan:
    """options: of `evaluation` in a configuration. UserError or FileNotFoundError before anything is loaded."""
    protocol = get_protocol(options["protocol"])
    if protocol.name == "custom" and options["inception_mode"]:
        protocol = replace(protocol, inception=options["inception_mode"])
    elif options["inception_mode"]:
        raise UserError(f"evaluation.inception_mode is fixed by protocol {protocol.name}; use protocol custom")
    protocol = protocol.adjusted(options["num_images"], 1, options["metrics"], force=True)
    if any(m in AGAINST_REFERENCE for m in protocol.metrics) and not options["reference"]:
        raise UserError(f"evaluation.reference is needed for {', '.join(protocol.metrics)}: images, or statistics of them")
    if "inception_score" in protocol.metrics and protocol.num_images < 10:
        raise UserError("evaluation.num_images: the inception score takes 10 parts, and more images")
    protocol.require_images(protocol.num_images, "evaluation.num_images")
    refuse_unread(options, protocol.metrics, "evaluation.")
    return plan(protocol, {key: options[key] for key in NETWORKS}, weights_dir(options["weights_dir"]))


class InTraining:
    """Called on every process while the averaged weights are in place -> {metric: value} on the main one, {} on others.

    images(index) draws images (b, 3, h, w) in [0, 1], image i from the seed and i alone. captions: of the first images, where the
    CLIP score is asked for. output: the run's folder, for the curve. UserError for a student whose images have not 3 channels.
    """

    def __init__(
        self,
        made: Plan,
        options: Mapping[str, Any],
        images: Callable[[range], Tensor],
        accelerator: Any,
        captions: Sequence[str] | None,
        output: Path,
    ) -> None:
        self.plan, self.images, self.accelerator, self.captions, self.output = made, images, accelerator, captions, output
        self.batch_size, self.extractors = options["batch_size"], build(made, accelerator.device)
        self.reference = None
        if made.reference_extractors:
            call = (options["reference"], made, self.extractors, accelerator, "evaluation.reference")
            self.reference = load_or_measure(*call, batch_size=self.batch_size, force=True)

    def __call__(self, step: int) -> dict[str, float]:
        drawn = Drawn(self._draw(), self.plan.protocol, self.plan.views)
        gathered = one_pass(drawn, self.extractors, self.plan.raw, self.captions, self.batch_size, accelerator=self.accelerator)
        if not self.accelerator.is_main_process:
            return {}
        numbers = compute(self.plan.protocol.metrics, gathered, self.reference)
        values = {name: found["value"] for name, found in numbers.items()}
        self._draw_curve(step, values)
        return values

    def _draw(self) -> Tensor:
        """All images on every process, each having drawn its share: uint8 (n, 3, h, w)."""
        n, world, rank = self.plan.protocol.num_images, self.accelerator.num_processes, self.accelerator.process_index
        share = -(-n // world)
        parts = []
        for start in range(rank * share, (rank + 1) * share, self.batch_size):
            index = range(start, min(start + self.batch_size, (rank + 1) * share))
            parts.append((self.images(index).float() * 255).round().clamp(0, 255).to(torch.uint8))
        mine = torch.cat(parts)
        if mine.shape[1] != 3:
            raise UserError(f"evaluation: the metrics' networks see colours, the student makes {mine.shape[1]} channel(s)")
        every = mine if world == 1 else self.accelerator.gather(mine.to(self.accelerator.device))
        return every[:n].cpu()

    def _draw_curve(self, step: int, values: dict[str, float]) -> None:
        log = self.output / "metrics.jsonl"
        rows = read_metrics(log) if log.is_file() else []
        known = [(key, *series) for key, series in curves(rows, "").items() if key.startswith("evaluation/")]
        series = {key.removeprefix("evaluation/"): (steps, points) for key, steps, points in known}
        for name, value in values.items():
            steps, points = series.setdefault(name, ([], []))
            if step not in steps:
                steps.append(step)
                points.append(value)
        chart = figures.loss_chart([(name, figures.TEACHER, *points) for name, points in series.items()])
        self.output.mkdir(parents=True, exist_ok=True)
        write_atomically(self.output / "evaluation.svg", figures.svg(chart))


class Drawn(Images):
    """Images in memory, uint8 (n, 3, h, w), prepared as files are."""

    def __init__(self, pixels: Tensor, protocol: Protocol, views: Sequence[str]) -> None:
        self.pixels, self.protocol, self.views = pixels, protocol, views

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        image = to_pil_image(self.pixels[i])
        return {view: pil_to_tensor(VIEWS[view](image, self.protocol, f"image {i} of the student")) for view in self.views}
