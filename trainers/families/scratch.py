"""No teacher: a student from scratch, of data alone, for objectives that never ask for a score. All networks are new."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.common.errors import UserError
from pipelines.denoiser import Denoiser, FeatureMaps, FewStepGenerator
from pipelines.edm import EDMPipeline, EDMScheduler, EDMUNet, PatchUNet, PointNet
from pipelines.noise import EDMSchedule
from pipelines.students import save_edm_student

from ..config.data import TEXT_DATA, Data
from ..config.level_range import check_levels
from ..config.run import DistillConfig
from ..data.examples import Images, Points, load_data
from ..networks import build_unet
from ..preview import preview
from . import base
from .base import refuse, unit_noise
from .edm import feature_maps

ROWS = 4096  # of data at a time


class Family(base.Family):
    """See base.Family. The student is a network behind EDM's preconditioning, whose sigma_data is the standard deviation of the
    data; with labels it is told of the class. It starts from the seed, its last layer at zero, so that with EDM's preconditioning
    it starts as a Gaussian: at sigma_init = sigma_data as one of half the data's standard deviation.
    """

    called = "a student from scratch"
    teacher_keys: ClassVar[tuple[str, ...]] = ()
    student_keys = ("network", "preconditioning", "sigma_init", "steps", "inputs", "image_range")
    gives: ClassVar[tuple[str, ...]] = ("condition_vector", "features_of")
    has_teacher = False

    def __init__(self, config: DistillConfig, accelerator: Accelerator | None = None) -> None:
        super().__init__(config, accelerator)
        self.schedule = EDMSchedule(0.0, math.inf)
        check_levels(config, self.schedule)
        self.data = load_data(self._section(config))
        self.examples = self.data if config.objective.built.needs_data else None
        self.latent_shape, self.num_classes = self.data.shape, len(self.data.class_names)
        for need in config.objective.needs():
            if need.what == "condition_vector" and need.value and not self.num_classes:
                raise UserError(f"{need.key} has no effect: the data have no labels; remove it, or ask for them in data")
        self.sigma_data = self._spread(self.data)
        sigma_init, steps = config.student.sigma_init or self.sigma_data, config.student.steps
        known = config.student.preconditioning or "edm"
        network = self._network(config.student.network, "student", self.latent_shape[0])
        scheduler = EDMScheduler(sigma_data=self.sigma_data, preconditioning=known).for_student(steps, sigma_init)
        levels = [sigma_init] if steps == 1 else scheduler.default_sigmas().tolist()
        self.pipeline = EDMPipeline(network.eval(), scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        image_range = not isinstance(self.data, Points) if config.student.image_range is None else config.student.image_range
        student = Denoiser(network, self.schedule, known, self.sigma_data)
        self.student = FewStepGenerator(student, levels, image_range, config.inputs)
        self.facts = {"family": "edm", "weights": "unet", "readout_sigma": levels[0], "teacher": config.teacher.exact}
        if len(levels) > 1:
            self.facts["levels"] = levels

    @classmethod
    def _section(cls, config: DistillConfig) -> Data:
        if config.data is None or isinstance(config.data, TEXT_DATA):
            given = "there is none" if config.data is None else f"{config.data.name!r} is for text-to-image teachers"
            raise UserError(f"data: {given}; {cls.called} takes an image set or a mixture, e.g. data={{name: digits}}")
        return config.data

    @classmethod
    def check(cls, config: DistillConfig) -> None:
        data = cls._section(config)
        if config.student.network is None:
            example = "{width: 400, layers: 4}" if data.name == "mixture" else "{channels: 32, channel_mult: [1, 2, 4]}"
            raise UserError(f"student.network: {cls.called} has no network to copy; give one, e.g. {example}")
        super().check(config)
        if data.name == "mixture":
            refuse(cls.called, {"student.image_range": config.student.image_range, "evaluation": config.evaluation})

    def _spread(self, data: Images | Points) -> float:
        """The standard deviation of all elements of the data, in float64."""
        total, squares, count = 0.0, 0.0, 0
        for index in torch.arange(len(data)).split(ROWS):
            x0 = data.rows(index)[0].double()
            total, squares, count = total + float(x0.sum()), squares + float(x0.square().sum()), count + x0.numel()
        return math.sqrt((squares - total**2 / count) / (count - 1))

    def _network(self, section: Any, role: str, out_channels: int) -> PatchUNet | EDMUNet | PointNet:
        channels, size, _ = self.latent_shape
        shape = {"in_channels": channels, "out_channels": out_channels, "num_classes": self.num_classes}
        return build_unet(section, self.config.seed, role, size, **shape)

    def features(self) -> FeatureMaps:
        raise UserError(
            f"objective.features: {self.called} has no teacher's network whose maps could be compared; give the folder of a "
            "trained one, or remove it"
        )

    def features_of(self, path: str) -> FeatureMaps:
        return feature_maps(path, self)

    def preview(self) -> Tensor:
        return preview(self.pipeline, self.config.num_samples, self.config.seed)

    @torch.no_grad()
    def images(self, index: range) -> Tensor:
        z, condition = unit_noise(self.config, index, self.latent_shape).to(self.device), self.condition(torch.tensor(index))
        return self.decode(self.student.sample(z, condition and {k: v.to(self.device) for k, v in condition.items()}))

    def shard(self) -> None:
        raise UserError(f"FSDP has no effect for {self.called}: no weights are frozen; use configs/accelerate/gpu_8.yaml")

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        save_edm_student(folder, self.pipeline, info)
