"""A classifier of 32x32 images in ten classes, made here in minutes: features for a Frechet distance where nothing is downloaded.

Not FID: it compares models with one another, within one study.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from eval.metrics.frechet import GaussianStats, frechet_distance
from pipelines.common.atomic import new_file
from pipelines.data.images import ImageSet, to_unit


class Classifier(nn.Module):
    """Convolutions at 32, 16 and 8 pixels; 64 linear features, 10 logits; x (n, 3, 32, 32) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64, 128, 128)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2 if i in (2, 4) else 1, padding=1) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.features = nn.Linear(128, 64)
        self.logits = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        features = self.features(x.mean((2, 3)))
        return features, self.logits(features)

    @torch.no_grad()
    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (n, 3, 32, 32) -> float64 features (n, 64), classes (n,)."""
        self.eval()
        parts = [self(to_unit(p)) for p in pixels.split(500)]
        return torch.cat([f for f, _ in parts]).double(), torch.cat([logits.argmax(1) for _, logits in parts])


def train(module: nn.Module, loss: Callable[[Tensor], Tensor], rows: int, steps: int, batch: int, lr: float, name: str) -> None:
    """AdamW with a one-cycle rate on random rows."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in (bar := tqdm(range(steps), desc=name, unit="step")):
        value = loss(torch.randint(rows, (batch,), generator=generator))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(value):.4f}", refresh=False)


def _made_with(file: Path) -> dict[str, str] | None:
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as stored:
        return stored.metadata()


class Judge:
    """A classifier trained on real images; `measure` compares generated ones with them.

    file: where its weights are kept, with what they were trained on; trained again where that differs. held_out: the numbers of a
    tenth of the images, kept apart. identity: what its numbers depend on.
    """

    def __init__(self, data: ImageSet, file: Path, steps: int = 800) -> None:
        pixels, labels, rest = data.pixels, data.labels, len(data) // 10
        torch.manual_seed(0)
        self.net = Classifier()
        digests = [hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in (pixels, labels)]
        self.identity = {"format": "1", "pixels": digests[0], "labels": digests[1], "steps": str(steps)}
        if _made_with(file) == self.identity:
            self.net.load_state_dict(load_file(file))
        else:

            def loss(rows: Tensor) -> Tensor:
                x = to_unit(pixels[rest:][rows])
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
                return F.cross_entropy(self.net.train()(x)[1], labels[rest:][rows])

            train(self.net, loss, len(pixels) - rest, steps, 128, 5e-3, "classifier")
            with new_file(file) as partial:
                save_file(self.net.state_dict(), partial, self.identity)
        features, classes = self.net.read(pixels)
        self.real = GaussianStats.of(features[rest:])
        self.held_out_features = features[:rest]
        fd = frechet_distance(GaussianStats.of(features[:rest]), self.real)
        self.held_out = {"fd": fd, "accuracy": (classes[:rest] == labels[:rest]).double().mean().item()}

    def measure(self, pixels: Tensor, wanted: Tensor | None = None) -> dict[str, float]:
        """pixels uint8 (n, 3, 32, 32); wanted (n,): the classes that were asked for, where they were."""
        features, classes = self.net.read(pixels)
        numbers = {"fd": frechet_distance(GaussianStats.of(features), self.real)}
        return numbers if wanted is None else numbers | {"accuracy": (classes == wanted).double().mean().item()}
