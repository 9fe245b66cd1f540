"""Class-conditional teachers on latents (DiT): as text-to-image ones (text_to_image.Family), with labels in the place of text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import Tensor

from pipelines import text_to_image as t2i
from pipelines.common.errors import UserError
from pipelines.common.identity import network_identity
from pipelines.data.images import to_unit
from pipelines.denoiser import Condition

from ..config.data import TEXT_DATA, MixtureData
from ..config.networks import Network
from ..config.run import DistillConfig, TeacherConfig
from ..data import shards
from ..data.examples import Labels, load_images, shown_classes
from ..engine.draws import derive_seed
from . import teacher_folder, text_to_image
from .base import Given, Learner, refuse
from .text_to_image import SmallUNet, small_unet

if TYPE_CHECKING:
    from ..cache import Encoded

FORMAT = 1  # of encoded rows


class Family(text_to_image.Family):
    """See base.Family and text_to_image.Family. Without data every class is drawn equally often."""

    teacher_keys = ("path", "guidance_scale", "guidance_normalization", "dtype", "variant")

    @classmethod
    def check_data(cls, config: DistillConfig) -> None:
        data = config.data
        if not config.objective.built.needs_data:
            refuse(f"{cls.called} and objective {config.objective.name!r}, which need no data", {"data": data})
        elif isinstance(data, (*TEXT_DATA, MixtureData)):
            takes = f"{cls.called} takes parquet, hub or folder, with labels"
            raise UserError(f"data: {data.name!r} has no images with labels; {takes}")

    @classmethod
    def check_guidance(cls, config: DistillConfig, network: Mapping[str, Any]) -> None:
        """A teacher of classes is guided away from none of them: all have that."""

    def given(self, config: DistillConfig, accelerator: Accelerator) -> Given:
        path, classes = teacher_folder(config.teacher.source), self.num_classes
        factor = t2i.vae_factor(path)
        shape = self.kind.latent_shape(self.network_config, factor, getattr(config.data, "image_size", None))
        rows = Labels(classes) if config.data is None else encoded(path, config, shape, classes, accelerator)
        null = {"class_labels": torch.tensor(classes)}
        return SimpleNamespace(examples=rows, shape=shape, image_size=shape[1] * factor, null=null)

    def condition(self, rows: Tensor) -> Condition:
        return {"class_labels": (rows % self.num_classes).to(self.device)}

    def shown(self, count: int) -> Tensor:
        return shown_classes(count, self.num_classes)

    def small_network(self, section: Network, out_channels: int, seed: int) -> SmallUNet:
        blocks, classes = ("AttnDownBlock2D", "AttnUpBlock2D"), self.num_classes + 1
        unet = small_unet(UNet2DModel, section, self.latent_shape, out_channels, seed, *blocks, num_class_embeds=classes)
        return SmallUNet(unet, self.kind.time_scale, "class_labels")

    @classmethod
    def in_training(cls, config: TeacherConfig, accelerator: Accelerator) -> Learner:
        raise UserError(f"trainers.train_teacher does not train {cls.called}")

    @classmethod
    def encoded(cls, config: DistillConfig | TeacherConfig, accelerator: Accelerator) -> Encoded:
        return super(text_to_image.Family, cls).encoded(config, accelerator)


def encoded(
    path: str, config: DistillConfig, shape: tuple[int, int, int], num_classes: int, accelerator: Accelerator
) -> shards.Cached:
    """The images of a data section as latents, with their labels, behind a cache in the run's folder. Noise depends on the row
    alone, so neither shards nor processes show.
    """
    data, seed, dtype = config.data, config.seed, t2i.DTYPES[config.teacher.dtype]
    if data is None:
        raise ValueError("nothing to encode")
    images = load_images(data)
    labels = images.labels
    if labels is None:
        raise UserError(
            f"data: {data.name} without labels, and this teacher draws {num_classes} classes; set data.labels, or "
            "data.label_column"
        )
    if len(images.class_names) != num_classes:
        # a part of them, numbered from 0, would silently be other classes than the teacher's
        raise UserError(f"data: {len(images.class_names)} classes, and this teacher draws {num_classes}; give all, in its order")
    if images.pixels.shape[1] != 3:
        raise UserError(f"data.channels={images.pixels.shape[1]}: this teacher makes images of 3")
    parts = [k for k, v in t2i.read_index(path).items() if isinstance(v, list) and k not in ("vae", "scheduler")]
    vae = t2i.load_pipeline(path, dtype, parts, config.teacher.variant).vae.to(accelerator.device)
    digest = hashlib.sha256(images.pixels.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    identity = {"format": FORMAT, "kind": data.name, "images": digest, "dtype": config.teacher.dtype, "seed": seed}
    identity |= network_identity("vae", vae, left_out=("decoder.", "post_quant_conv."))

    def noise(row: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(seed, "cache", row)))

    def encode(index: range) -> dict[str, Tensor]:
        rows = torch.tensor(index)
        drawn = torch.stack([noise(row) for row in index]).to(accelerator.device)
        latents = t2i.encode_images(vae, to_unit(images.pixels[rows]).to(accelerator.device), drawn)
        return {"latents": latents, "class_labels": labels[rows]}

    folder = Path(config.output_dir) / "cache"
    shards.build(folder, identity, len(images), encode, accelerator)
    return shards.Cached(folder)
