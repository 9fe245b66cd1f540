"""Training an EDMUNet: the shipped CIFAR-10 recipe, shrunk; what the network is told of augmentation; what does not fit."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image

from pipelines.common.config import load_config
from pipelines.common.errors import UserError
from pipelines.edm import EDMPipeline, EDMUNet
from trainers import train_teacher
from trainers.config.networks import EDMNetwork
from trainers.config.run import TeacherConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "cifar10_teacher.yaml"
SMALL = [
    *("network.model_channels=8", "network.channel_mult=[1,2]", "network.num_blocks=1", "steps=3", "batch_size=6", "log_every=1"),
    *("num_samples=4", "sample_every=3", "checkpoint_every=null", "snapshot_every=null", "optimizer.warmup_steps=1"),
]
pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerator")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """Twelve pictures as CIFAR-10 has them."""
    generator = np.random.default_rng(0)
    rows = {"img": [], "label": []}
    for i in range(12):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "png")
        rows["img"].append({"bytes": file.getvalue(), "path": None})
        rows["label"].append(i % 3)
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    file = tmp_path_factory.mktemp("data") / "train.parquet"
    datasets.Dataset.from_dict(rows, features).to_parquet(str(file))
    return file


@pytest.mark.parametrize("label_column", ["null", "label"])
@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
@pytest.mark.slow
def test_the_recipe_trains_from_parquet(architecture, label_column, parquet, tmp_path):
    data = f"data={{name: parquet, files: [{parquet}], image_column: img, label_column: {label_column}, image_size: 32}}"
    run = [f"output_dir={tmp_path}", data, f"network.architecture={architecture}", *SMALL]
    train_teacher.main(["--config", str(RECIPE), *run])
    pipe = EDMPipeline.from_pretrained(tmp_path / "teacher")
    assert isinstance(pipe.unet, EDMUNet)
    config = pipe.unet.config
    assert (config.augment_dim, config.num_classes) == (9, 3 if label_column == "label" else 0)
    assert config.dropout == 0.13
    assert config.architecture == ("adm" if architecture == "adm" else "song")
    assert config.encoder_type == ("residual" if architecture == "ncsnpp" else "standard")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(2, num_inference_steps=2, output_type="np").images.shape == (2, 32, 32, 3)
    assert (tmp_path / "samples" / "step_00000003.png").is_file()


def test_the_recipe_is_the_published_network():
    """55.7M parameters, and the settings of the paper."""
    config = load_config(TeacherConfig, str(RECIPE), [])
    with torch.device("meta"):
        unet = EDMUNet(sample_size=32, augment_dim=9, **config.network.options())
    assert sum(p.numel() for p in unet.parameters()) == 55_733_891
    assert config.steps * config.batch_size == 200_000_000
    assert (config.augment, config.ema_halflife, config.optimizer.lr, config.network.dropout) == (0.12, 500_000, 1e-3, 0.13)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["network.architecture=ddpm"], "network.architecture: Input should be 'ddpmpp', 'ncsnpp' or 'adm', got 'ddpm'"),
        (["network.chanels=3"], "unknown key 'network.chanels'"),
        (["network={channels: 8}"], "augment: only a network with network.architecture can be told of it"),
        (["ema_decay=0.9"], "ema_halflife, ema_decay: give one of them"),
        (["augment=1.5"], "augment: Input should be less than or equal to 1, got 1.5"),
        (["network.model_channels=10"], "network.model_channels: Input should be a multiple of 4, got 10"),
    ],
)
def test_settings_that_do_not_fit(overrides, match):
    with pytest.raises(UserError, match=match):
        load_config(TeacherConfig, str(RECIPE), overrides)


def test_small_networks_stay_as_they_were():
    config = load_config(TeacherConfig, str(ROOT / "configs" / "digits_teacher.yaml"), [])
    assert not isinstance(config.network, EDMNetwork)
    assert load_config(TeacherConfig, str(RECIPE), []).network.options()["channel_mult"] == [2, 2, 2]
