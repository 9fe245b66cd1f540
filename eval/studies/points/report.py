"""`python -m eval points`: a model of points against the density that it should have, with true samples beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.analytic import GaussianMixture, make_mixture
from pipelines.common.atomic import write_atomically
from pipelines.common.errors import UserError
from pipelines.common.provenance import git_commit, versions
from pipelines.common.reading import loading, read_yaml
from pipelines.edm import EDMPipeline, PointNet
from pipelines.edm.pipeline import tensors

from ...images.sampler import load_sampler
from .figures import scatter_chart
from .numbers import BLOCK, evaluate


def measure_points(model: str, num_points: int, seed: int, law: str | None, output: Path) -> dict[str, Any]:
    """Write <output>/points.json and points.png; law: a configuration whose `data` is the mixture (default: the run's own, else
    the forty modes). UserError for a model of something else, or a mixture of other dimensions; FileNotFoundError.
    """
    mixture = read_law(law, Path(model))
    sampler = load_sampler(model)
    if not isinstance(sampler.pipe, EDMPipeline) or not isinstance(sampler.pipe.unet, PointNet):
        raise UserError(f"--model: {model!r} makes images; `python -m eval run` measures them")
    dimensions = sampler.pipe.unet.config["in_channels"]
    if dimensions != mixture.shape[0]:
        raise UserError(f"--law: a mixture in {mixture.shape[0]} dimensions, but {model!r} makes points in {dimensions}")
    x = draw(sampler.pipe, num_points, seed)
    truth = mixture.sample(num_points, torch.Generator().manual_seed(seed + 1)).flatten(1)
    found = {"model": sampler.describe(), "num_points": num_points, "seed": seed, "git_commit": git_commit()}
    found |= {"versions": versions(("torch", "numpy", "diffusers"))}
    found |= {"metrics": evaluate(x, mixture, seed + 2), "true_samples": evaluate(truth, mixture, seed + 2)}
    write_atomically(output / "points.json", json.dumps(found, indent=1).encode())
    if mixture.shape[0] == 2:
        scatter_chart({Path(model).name: x, "true samples": truth}, mixture, columns=2).savefig(output / "points.png", dpi=130)
    return found


def draw(pipe: EDMPipeline, n: int, seed: int) -> Tensor:
    """n points (n, d), in blocks, which change nothing."""
    z = torch.randn(n, pipe.unet.config["in_channels"], 1, 1, generator=torch.Generator().manual_seed(seed))
    return torch.cat([tensors(pipe(latents=rows, output_type="latent")).flatten(1) for rows in z.split(BLOCK)])


def read_law(law: str | None, model: Path) -> GaussianMixture:
    """The mixture in `law`; without one that of the run's config.yaml, else the forty modes. FileNotFoundError; UserError for a
    file without a mixture.
    """
    file = Path(law) if law else next((f for f in (model / "config.yaml", model.parent / "config.yaml") if f.is_file()), None)
    if file is None:
        return make_mixture()
    if not file.is_file():
        raise FileNotFoundError(f"--law: no such file {law!r}")
    content = read_yaml(file) or {}
    data = (content.get("data") if isinstance(content, dict) else None) or {}
    if not isinstance(data, dict) or data.get("name") != "mixture":
        if law:
            raise UserError(f"--law: {law!r} has no `data: {{name: mixture}}`")
        return make_mixture()  # distilled from a learned teacher, a run needs no data
    with loading(f"--law: {str(file)!r} holds no mixture"):
        return make_mixture(*(data.get(key) for key in ("means", "std", "weights")))


def table(found: dict[str, Any]) -> str:
    """The numbers of points.json for a terminal: a line each, those of true samples beside them."""
    rows = [f"{'':14} {'model':>12} {'true samples':>14}"]
    rows += [f"{key:14} {value:12.6g} {found['true_samples'][key]:14.6g}" for key, value in found["metrics"].items()]
    return "\n".join(rows)
