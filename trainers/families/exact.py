"""Exact teachers: the score of a known density, or of a data set itself. Nothing is learned, so every other network is new."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipelines.analytic import EmpiricalPosterior, GaussianMixture
from pipelines.common.errors import UserError
from pipelines.denoiser import Denoiser, FeatureMaps, FewStepGenerator
from pipelines.edm import EDMPipeline, EDMScheduler, EDMUNet, PatchUNet, PointNet
from pipelines.noise import EDMSchedule
from pipelines.preconditioning import EDM
from pipelines.students import save_edm_student

from ..config.data import TEXT_DATA, Data
from ..config.level_range import check_levels
from ..config.run import DistillConfig
from ..data.examples import Points, load_data
from ..networks import build_unet
from ..objectives.base import Need
from ..posteriors import UNetPosterior
from ..posteriors.section import Posterior
from ..preview import preview
from . import base
from .base import build_covariance, refuse, unit_noise


class Family(base.Family):
    """See base.Family. Student, fake score and posterior are networks of their own behind EDM's preconditioning, whose
    sigma_data is the standard deviation of the data; all start from the seed. The student's last layer starts at zero, so that
    with EDM's preconditioning it starts as a Gaussian: at sigma_init = sigma_data as one of half the data's standard deviation.
    """

    called = "an exact teacher"
    teacher_keys, student_keys = ("exact",), ("network", "preconditioning", "sigma_init", "steps", "inputs", "image_range")
    gives = ("network", "posterior")

    def __init__(self, config: DistillConfig, accelerator: Accelerator | None = None) -> None:
        super().__init__(config, accelerator)
        check_levels(config, EDMSchedule(0.0, math.inf))
        data = load_data(self._section(config))
        self.latent_shape = data.shape
        exact: GaussianMixture | EmpiricalPosterior
        if config.teacher.exact == "density" and isinstance(data, Points):
            exact, self.sigma_data = data.mixture, data.mixture.std
        else:
            samples = data.rows(torch.arange(len(data)))[0]
            exact, self.sigma_data = EmpiricalPosterior(samples, EDMSchedule(0.0, math.inf)), float(samples.std())
        self.schedule = exact.schedule
        self.sampling_range = (0.004 * self.sigma_data, 160 * self.sigma_data)  # EDM's 0.002 to 80, of data of spread 0.5
        self.teacher = Denoiser(exact, self.schedule, "sample", self.sigma_data)
        self.examples = data if config.objective.built.needs_data else None
        sigma_init, steps = config.student.sigma_init or self.sigma_data, config.student.steps
        known = config.student.preconditioning or "edm"
        network = self._network(config.student.network, "student", self.latent_shape[0])
        scheduler = EDMScheduler(sigma_data=self.sigma_data, preconditioning=known).for_student(steps, sigma_init)
        levels = [sigma_init] if steps == 1 else scheduler.default_sigmas().tolist()
        self.pipeline = EDMPipeline(network.eval(), scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        image_range = not isinstance(data, Points) if config.student.image_range is None else config.student.image_range
        student = Denoiser(network, self.schedule, known, self.sigma_data)
        self.student = FewStepGenerator(student, levels, image_range, config.inputs)
        self.facts = {"family": "edm", "weights": "unet", "readout_sigma": levels[0], "teacher": config.teacher.exact}
        if len(levels) > 1:
            self.facts["levels"] = levels

    @staticmethod
    def _section(config: DistillConfig) -> Data:
        if config.data is None or isinstance(config.data, TEXT_DATA):
            raise UserError("data: an exact teacher is that of a mixture or of an image set; add one, e.g. data={name: mixture}")
        return config.data

    @classmethod
    def check(cls, config: DistillConfig) -> None:
        t, s, data = config.teacher, config.student, cls._section(config)
        if t.exact == "density" and data.name != "mixture":
            raise UserError(f"teacher.exact: the density of {data.name!r} is unknown; use exact=samples or data.name=mixture")
        if getattr(data, "labels", False) or getattr(data, "label_column", None):
            raise UserError("data: an exact teacher is unconditional; remove the labels")
        if s.network is None:
            raise UserError("student.network: an exact teacher has no network to copy; give one, e.g. {width: 400, layers: 4}")
        super().check(config)
        if data.name == "mixture":
            refuse(cls.called, {"student.image_range": s.image_range, "evaluation": config.evaluation})

    @classmethod
    def refusal(cls, need: Need) -> str | None:
        if need.what == "posterior" and isinstance(need.value, str):
            return (
                f"{need.key}: {need.value!r} builds on a teacher's network, an exact teacher has none; "
                "give a section, e.g. {width: 400, layers: 4}"
            )
        return super().refusal(need)

    def _network(self, section: Any, role: str, out_channels: int) -> PatchUNet | EDMUNet | PointNet:
        channels, size, _ = self.latent_shape
        shape = {"in_channels": channels, "out_channels": out_channels, "num_classes": 0}
        return build_unet(section, self.config.seed, role, size, **shape)

    def _denoiser(self, network: nn.Module) -> Denoiser:
        return Denoiser(network, self.schedule, EDM(self.sigma_data), self.sigma_data)

    def fake_score(self, section: Any) -> Denoiser:
        """From nothing, so it wants warm-up updates: an exact teacher has no weights to start from."""
        network = section.network or self.config.student.network
        return self._denoiser(self._network(network, "fake_score", self.latent_shape[0]))

    def features(self) -> FeatureMaps:
        raise UserError("objective.features: an exact teacher has no network and no feature maps; remove it")

    def posterior(self, section: Posterior, with_mean: bool) -> UNetPosterior:
        covariance = build_covariance(section, self.config.seed, self.latent_shape)
        out_channels = UNetPosterior.num_channels(covariance, with_mean)
        network = self._network(section.network, "posterior", out_channels)
        return UNetPosterior(network, covariance, self.sigma_data, with_mean)

    def preview(self) -> Tensor:
        return preview(self.pipeline, self.config.num_samples, self.config.seed)

    @torch.no_grad()
    def images(self, index: range) -> Tensor:
        return self.decode(self.student.sample(unit_noise(self.config, index, self.latent_shape).to(self.device)))

    def shard(self) -> None:
        raise UserError("FSDP has no effect for an exact teacher, which has no weights; use configs/accelerate/gpu_8.yaml")

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        save_edm_student(folder, self.pipeline, info)
