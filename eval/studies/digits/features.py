"""Feature extractors: pixels uint8 (n, c, h, w) -> float64 (n, d), with an identity that goes into the report.

A Frechet distance means something only together with the network whose features it compares. `digits-classifier` is
trained here, in seconds, on the digits themselves, so that the smallest experiments need no download.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.data.images import load_digits, to_unit


class FeatureExtractor(Protocol):
    """What a metric needs of an extractor. `classify` is for extractors that know the classes of the data set."""

    name: str
    dim: int

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (n, c, h, w) -> float64 (n, dim)."""

    def classify(self, pixels: Tensor) -> Tensor:
        """uint8 (n, c, h, w) -> long (n,)."""

    def describe(self) -> dict[str, Any]:
        """Name, sha256 of the weights and what else identifies the extractor, for the report."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that sums are taken in one order on every machine; then restore the count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class DigitsNet(nn.Module):
    """Three convolutions, 32 linear features, 10 logits; for x (n, 1, 8, 8) in [-1, 1].

    The features are linear in the last hidden layer: a rectified one can be dead on all real images, and standardising
    it would blow any stray activation on generated ones up without bound.
    """

    def __init__(self, channels: int = 12, features: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.features = nn.Linear(2 * channels * 4 * 4, features)
        self.logits = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> features (n, 32), logits (n, 10)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.silu(conv(x))
        features = self.features(x.flatten(1))
        return features, self.logits(features)


class DigitsExtractor:
    """The 32 penultimate features of a trained DigitsNet, standardised to mean 0 and variance 1 over the real digits.

    accuracy: share of the held-out digits that it classifies correctly. sha256: of the weights.
    """

    name = "digits-classifier"
    image_shape = (1, 8, 8)
    chunk = 512

    def __init__(self, net: DigitsNet, real: Tensor, accuracy: float) -> None:
        self.net = net.eval().requires_grad_(False)
        self.accuracy = accuracy
        self.dim = net.features.out_features
        self.sha256 = _weights_sha256(net)
        self._mean = torch.zeros(self.dim, dtype=torch.float64)
        self._std = torch.ones(self.dim, dtype=torch.float64)
        features = self(real)
        self._std, self._mean = torch.std_mean(features, dim=0)

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (n, 1, 8, 8) -> float64 (n, 32) on the CPU. ValueError for another type or shape."""
        return (self._forward(pixels)[0] - self._mean) / self._std

    def classify(self, pixels: Tensor) -> Tensor:
        """uint8 (n, 1, 8, 8) -> long (n,): the most likely digit."""
        return self._forward(pixels)[1].argmax(dim=1)

    def describe(self) -> dict[str, Any]:
        """name, dim, sha256 and accuracy."""
        return {"name": self.name, "dim": self.dim, "sha256": self.sha256, "accuracy": self.accuracy}

    @torch.no_grad()
    def _forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if pixels.dtype != torch.uint8:
            raise ValueError(f"{self.name} takes uint8 pixels, got {pixels.dtype}; see pipelines.data.images.to_pixels")
        if pixels.ndim != 4 or pixels.shape[1:] != self.image_shape or not len(pixels):
            raise ValueError(f"{self.name} takes images (n, 1, 8, 8) with n > 0, got {tuple(pixels.shape)}")
        with one_thread():
            parts = [self.net(to_unit(part).double()) for part in pixels.cpu().split(self.chunk)]
        return torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts])


def train_digits_extractor(seed: int = 0, epochs: int = 15) -> DigitsExtractor:
    """Train DigitsNet on four fifths of the digits, hold out the rest, and standardise its features over all of them.

    The same on every machine: all draws come from generators of its own, training is float64 on one thread (where machines differ
    by about 1e-14, against 1e-4 in float32) and the final weights are rounded to multiples of 2^-16, which swallows that
    difference. Global random state and thread count are left as they were. Takes a few seconds. ValueError for digits without
    labels.
    """
    digits = load_digits()
    x, y = to_unit(digits.pixels).double(), digits.labels
    if y is None:
        raise ValueError("digits without labels train no classifier")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    held_out, training = order[: len(x) // 5], order[len(x) // 5 :]
    with torch.inference_mode(False), torch.enable_grad(), one_thread():
        net = _initialised(generator)
        _fit(net, x[training], y[training], epochs, generator)
        with torch.no_grad():
            for weight in net.parameters():
                weight.copy_((weight * 2**16).round() / 2**16)
            accuracy = (net(x[held_out])[1].argmax(1) == y[held_out]).double().mean().item()
    return DigitsExtractor(net, digits.pixels, accuracy)


def _initialised(generator: torch.Generator) -> DigitsNet:
    """A float64 DigitsNet with PyTorch's usual uniform initialisation, drawn from the generator alone."""
    with torch.device("meta"):  # the constructor would otherwise draw from, and so advance, the global generator
        net = DigitsNet()
    net = net.to(torch.float64).to_empty(device="cpu")
    for layer in (net.conv1, net.conv2, net.conv3, net.features, net.logits):
        bound = layer.weight[0].numel() ** -0.5
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return net


def _fit(net: DigitsNet, x: Tensor, y: Tensor, epochs: int, generator: torch.Generator, batch: int = 64) -> None:
    """AdamW with a linearly decaying rate; label smoothing keeps the features of sure and unsure images comparable."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2, foreach=False)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps + 1))
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(net(x[rows])[1], y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _weights_sha256(net: nn.Module) -> str:
    """Over names, shapes and little-endian float64 values, in the order of state_dict."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.double().cpu().numpy().astype("<f8").tobytes())
    return digest.hexdigest()


class AreaDownsampled:
    """Another extractor's features of images averaged down to size x size; images of that size go through unchanged.

    ValueError for images that are no squares of a multiple of `size` pixels.
    """

    def __init__(self, extractor: FeatureExtractor, size: int) -> None:
        self.extractor, self.size = extractor, size
        self.name, self.dim = f"{extractor.name} at {size}x{size}", extractor.dim

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.extractor(self._small(pixels))

    def classify(self, pixels: Tensor) -> Tensor:
        """uint8 (n, c, h, w) -> long (n,), the other extractor's verdict."""
        return self.extractor.classify(self._small(pixels))

    def describe(self) -> dict[str, Any]:
        """The other extractor's, under this one's name."""
        return self.extractor.describe() | {"name": self.name}

    def _small(self, pixels: Tensor) -> Tensor:
        factor, rest = divmod(pixels.shape[-1], self.size)
        if rest or pixels.shape[-2] != pixels.shape[-1] or not factor:
            raise ValueError(f"{self.name} takes square images of a multiple of {self.size} pixels, got {tuple(pixels.shape)}")
        return F.avg_pool2d(pixels.double(), factor).round().to(torch.uint8) if factor > 1 else pixels


class PcaPixels:
    """Pixels on the leading principal axes of the real images, each axis scaled to unit variance there: no network to trust.

    What a classifier is blind to, background noise for one, counts here. Axes beyond `dim` are left out because whitening would
    blow up what the real images hardly have. sha256: of the axes, rounded to 1e-6. real uint8 (m, c, h, w): ValueError unless it
    has more than `dim` images of at least `dim` values.
    """

    name = "pca-pixels"

    def __init__(self, real: Tensor, dim: int = 32) -> None:
        x = to_unit(real).flatten(1).double()
        self.shape, self.dim = tuple(real.shape[1:]), dim
        if min(len(x) - 1, x.shape[1]) < dim:
            raise ValueError(
                f"{dim} principal axes need more than {dim} images of at least {dim} pixels, got {tuple(real.shape)}"
            )
        self.mean = x.mean(0)
        centred = x - self.mean
        variances, axes = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
        axes, variances = axes[:, -dim:].flip(1), variances[-dim:].flip(0)
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # eigh leaves the signs open
        self.axes = axes / variances.sqrt()

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (n, c, h, w) -> float64 (n, dim). ValueError for images of another shape."""
        if tuple(pixels.shape[1:]) != self.shape:
            raise ValueError(f"{self.name} was made from images {self.shape}, got {tuple(pixels.shape[1:])}")
        return (to_unit(pixels).flatten(1).double() - self.mean) @ self.axes

    def describe(self) -> dict[str, Any]:
        """name, dim and the sha256 of the axes."""
        digest = hashlib.sha256((self.axes * 1e6).round().numpy().astype("<f8").tobytes()).hexdigest()
        return {"name": self.name, "dim": self.dim, "sha256": digest}


@cache
def digits_extractor() -> DigitsExtractor:
    """The extractor behind every published digits number, trained once a process."""
    return train_digits_extractor()


EXTRACTORS: dict[str, Callable[[], FeatureExtractor]] = {DigitsExtractor.name: digits_extractor}
