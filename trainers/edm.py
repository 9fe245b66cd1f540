"""EDM teachers: pixel-space networks whose students, fake scores and posteriors are copies, or decoders on the frozen encoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.denoiser import Denoiser, FeatureMaps, OneStepGenerator
from pipelines.edm import EDMDecoder, EDMPipeline, EDMScheduler
from pipelines.images import ImageSet
from pipelines.students import save_model

from . import setup
from .config import DistillConfig, Network
from .config_data import TEXT_DATA
from .data import Images, Labels
from .models import build_covariance, refuse
from .posteriors import UNetPosterior
from .teachers import load_edm_teacher


class EDMModels:
    """See models.Models."""

    facts: dict[str, Any]

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        check(config)
        pipeline = load_edm_teacher(config.teacher.path)
        self.teacher = pipeline.denoiser(config.teacher.guidance_scale).eval()
        shape = pipeline.unet.config
        self.latent_shape = (shape.in_channels, shape.sample_size, shape.sample_size)
        self.num_classes = shape.num_classes or 0
        if not self.num_classes and config.objective.name == "varflow" and config.objective.condition_scale:
            raise ValueError("objective.condition_scale has no effect: the teacher is unconditional; remove it")
        data = setup.load_data(config.data) if config.data else None
        self._check_data(data)
        if data is not None and config.objective.name == "varflow":
            self.examples = Images(data)
        else:
            self.examples = Labels(self.num_classes) if self.num_classes else None
        sigma_init = 2.5 if config.student.sigma_init is None else config.student.sigma_init
        # The student runs without dropout: g(z) has to be one function of z for its posterior and its score to mean anything.
        unet = copy.deepcopy(pipeline.unet).eval().requires_grad_(True)
        scheduler = EDMScheduler.from_config(
            pipeline.scheduler.config, sigma_max=sigma_init, sampler="renoise", num_inference_steps=1
        )
        self.pipeline = EDMPipeline(unet, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.student = OneStepGenerator(self.pipeline.denoiser(), sigma_init, config.student.image_range is not False)
        self.facts = {"family": "edm", "readout_sigma": sigma_init}

    def _check_data(self, data: ImageSet | None) -> None:
        """The data must be what the teacher makes: same channels, resolution and classes."""
        if data is None:
            return
        if tuple(data.pixels.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"data: images are {tuple(data.pixels.shape[1:])} (channels, height, width), the teacher "
                f"{self.config.teacher.path!r} makes {self.latent_shape}; set data.image_size={self.latent_shape[1]} and "
                f"data.channels={self.latent_shape[0]}, or another teacher"
            )
        if self.config.objective.name == "varflow" and self.num_classes != len(data.class_names):
            raise ValueError(
                f"data: {len(data.class_names)} classes, the teacher has {self.num_classes}; "
                "give labels for a class-conditional teacher and none for an unconditional one"
            )

    def features(self) -> FeatureMaps:
        """Without guidance: x_t of either side is compared under its own label."""
        network, teacher = self.teacher.network, self.teacher
        return FeatureMaps(Denoiser(network, teacher.schedule, "edm", teacher.sigma_data), (network.bottom,))

    def fake_score(self) -> Denoiser:
        network = copy.deepcopy(self.teacher.network).train().requires_grad_(True)
        return Denoiser(network, self.teacher.schedule, "edm", self.teacher.sigma_data)

    def posterior(self, with_mean: bool) -> UNetPosterior:
        p, unet, shape = self.config.objective.posterior, self.teacher.network, self.teacher.network.config
        covariance = build_covariance(self.config, self.latent_shape)
        out_channels = UNetPosterior.num_channels(covariance, with_mean)
        if p.network == "shared":
            network = EDMDecoder(unet, out_channels)
        else:
            network = setup.build_unet(
                Network(**{k: shape[k] for k in Network.model_fields}) if p.network == "copy" else p.network,
                self.config.seed,
                "posterior",
                shape.sample_size,
                in_channels=shape.in_channels,
                out_channels=out_channels,
                num_classes=shape.num_classes,
            )
            if p.network == "copy":
                started = {k: v for k, v in unet.state_dict().items() if not k.startswith("conv_out.")}
                network.load_state_dict(started, strict=False)
        posterior = UNetPosterior(network, covariance, self.teacher.sigma_data, with_mean)
        if with_mean and p.network in ("shared", "copy"):
            posterior.start_mean(unet.conv_out)
        return posterior

    def preview(self) -> Tensor:
        return setup.preview(self.pipeline, self.config.num_samples, self.config.seed)

    def shard(self) -> None:
        raise ValueError("FSDP has no effect for an EDM teacher, whose networks are small; use configs/accelerate/gpu_8.yaml")

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        save_model(folder, self.pipeline, "student", info)


def check(config: DistillConfig) -> None:
    """Settings that only Stable Diffusion has are refused, before anything is loaded."""
    t, s, o = config.teacher, config.student, config.objective
    if isinstance(config.data, TEXT_DATA):
        raise ValueError(
            f"data: {config.data.name!r} is for Stable Diffusion teachers; an EDM teacher takes digits, parquet, hub or folder"
        )
    settings = {
        "teacher.negative_prompt": t.negative_prompt,
        "teacher.variant": t.variant,
        "teacher.dtype": None if t.dtype == "float32" else t.dtype,
        "student.readout_t": s.readout_t,
        "student.lora": s.lora,
        "objective.fake_score.lora": o.fake_score.lora if o.name == "diff_instruct" else None,
        "objective.posterior.network=adapter": (o.name == "vardiu" and o.posterior.network == "adapter") or None,
    }
    refuse("an EDM teacher", settings)
