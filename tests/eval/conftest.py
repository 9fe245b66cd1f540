"""Networks with random weights in the published formats, and images on disk; all made once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.__main__ import main
from pipelines.edm import EDMPipeline, EDMScheduler, EDMUNet
from scripts.bench.parts import random_networks

DIM = 37


def pictures(n: int, seed: int, side: int = 32) -> Tensor:
    """uint8 (n, 3, side, side): coarse random colours with some noise, so that images differ as a whole and in detail."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)
    return ((smooth + 0.1 * torch.rand(n, 3, side, side, generator=generator)).clamp(0, 1) * 255).to(torch.uint8)


def save(pixels: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="session")
def make_pictures() -> Callable[..., Tensor]:
    return pictures


@pytest.fixture(scope="session")
def save_pictures() -> Callable[[Tensor, Path], Path]:
    return save


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> SimpleNamespace:
    """inception: a small TorchScript file of 37 features; clip, clip_768, dinov2: folders; aesthetic: a .pth."""
    folder = tmp_path_factory.mktemp("networks")
    return SimpleNamespace(
        dim=DIM,
        inception=random_networks.inception(folder / "small.pt", pictures(31, 1), dim=DIM, classes=11)[0],
        clip=random_networks.clip(folder / "clip"),
        clip_768=random_networks.clip(folder / "clip_768", projection=768),
        dinov2=random_networks.dinov2(folder / "dinov2"),
        aesthetic=random_networks.aesthetic(folder / "aesthetic.pth"),
    )


@pytest.fixture(scope="session")
def full_inception(tmp_path_factory) -> tuple[Path, Path]:
    """The published architecture: a TorchScript file and the same weights as pytorch-fid's .pth."""
    return random_networks.inception(tmp_path_factory.mktemp("full") / "inception.pt", pictures(11, 2), full=True)


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> SimpleNamespace:
    """a: 61 images, b: 97 others: folders of 32x32 PNG files, and their pixels."""
    folder = tmp_path_factory.mktemp("sets")
    a, b = pictures(61, 3), (pictures(97, 4).float() * 0.9).to(torch.uint8)
    return SimpleNamespace(a=save(a, folder / "a"), b=save(b, folder / "b"), a_pixels=a, b_pixels=b)


@pytest.fixture(scope="session")
def edm(tmp_path_factory) -> Path:
    """A class-conditional EDM pipeline of 32x32 images with attention, 3 Heun steps."""
    torch.manual_seed(5)
    shape = {"num_blocks": 1, "channel_mult": (1, 2), "channel_mult_emb": 2, "attention_resolutions": (16,)}
    unet = EDMUNet(sample_size=32, model_channels=16, num_classes=5, **shape)
    for parameter in unet.parameters():  # the network's own zeros would leave little but the noise
        torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("edm") / "edm"
    EDMPipeline(unet, EDMScheduler(num_inference_steps=3)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def measured() -> Callable[[Path], dict]:
    return lambda output: json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="session")
def values(measured) -> Callable[[Path], dict[str, float]]:
    return lambda output: {name: numbers["value"] for name, numbers in measured(output)["metrics"].items()}


@pytest.fixture
def command(networks, sets, tmp_path):
    """command(*more): `metrics` of set a against set b -> exit code."""

    def run(*more: str, mode: str = "legacy_tensorflow", output: str = "out") -> int:
        call = ["metrics", "--protocol", "custom", "--images", str(sets.a), "--reference", str(sets.b), "--inception-mode", mode]
        return main([*call, "--inception", str(networks.inception), "--output", str(tmp_path / output), *more])

    return run
