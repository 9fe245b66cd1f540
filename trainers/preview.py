"""What a model of EDM's kind shows of itself: images from fixed noise, or a map of where its points lie."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.edm import EDMPipeline, PointNet
from pipelines.edm.pipeline import tensors

from .data.examples import shown_classes
from .engine.draws import derive_seed
from .engine.pictures import enlarged

PREVIEW_POINTS = 10_000


def preview(pipeline: EDMPipeline, count: int, seed: int) -> Tensor:
    """Images (count, c, h, w) in [0, 1] from fixed noise, so that pictures of one run can be compared; small ones enlarged.

    Of a model of points (PointNet) it is one picture: a map of where PREVIEW_POINTS of its samples lie.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "preview"))
    if isinstance(pipeline.unet, PointNet):
        points = tensors(pipeline(PREVIEW_POINTS, generator=generator, output_type="latent")).flatten(1)
        return scatter(points, pipeline.scheduler.config["sigma_data"])
    num_classes = pipeline.unet.config["num_classes"]
    labels = shown_classes(count, num_classes) if num_classes else None
    return enlarged(tensors(pipeline(count, class_labels=labels, generator=generator, output_type="pt")))


def scatter(points: Tensor, spread: float, side: int = 256) -> Tensor:
    """Where points (n, d) lie by their first two coordinates, each within 3 spreads of 0: (1, 1, side, side) in [0, 1].

    Black on white, y upwards, darker by the logarithm of how many there are; those outside are left out.
    """
    plane = points[:, [0, min(1, points.shape[1] - 1)]].double().cpu()
    counts = torch.histogramdd(plane, side, range=[-3 * spread, 3 * spread] * 2).hist.log1p()
    return (1 - counts / counts.max().clamp_min(1e-12)).T.flip(0)[None, None].float()
