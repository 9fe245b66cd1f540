"""Networks with random weights in the published formats, and images on disk; all made once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.__main__ import main
from pipelines.edm import EDMPipeline, EDMScheduler, EDMUNet
from scripts.bench.parts import random_networks

DIM = 37
# Whichever quotes or tag a text stands in, it would leave them; escaped twice it would be another one.
PLANT = """ "'><planted onplanted='1'>&lt;&"""


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


def planted(value: Any, names: bool = False) -> Any:
    """The same with PLANT behind every text in it; of keys, behind those that are names of students or packages."""
    if isinstance(value, dict):
        named = ("students", "versions")
        return {f"{key}{PLANT}" if names else key: planted(inner, key in named) for key, inner in value.items()}
    if isinstance(value, list):
        return [planted(inner) for inner in value]
    return f"{value}{PLANT}" if isinstance(value, str) else value


class Structure(HTMLParser):
    """The tags of a page with the names of their attributes, and its text with theirs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attributes)))
        self.text += "".join(f" {value} " for _, value in attributes)

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="session")
def hostile() -> SimpleNamespace:
    """plant(value): hostile text behind every text in it. check(plain, page): the page of the inputs with such texts has the tags
    and attributes of the plain one, and each of the texts as a text.
    """

    def check(plain: str, page: str) -> None:
        found = Structure(page)
        assert found.tags == Structure(plain).tags
        assert found.text.count(PLANT.split("'>", 1)[1]) == page.count("onplanted") > 20
        assert "planted" not in plain

    return SimpleNamespace(text=PLANT, plant=planted, check=check)
