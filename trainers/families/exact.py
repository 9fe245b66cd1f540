"""Exact teachers: the score of a known density, or of a data set itself. Nothing is learned, so every other network is new."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from pipelines.analytic import EmpiricalPosterior, GaussianMixture
from pipelines.common.errors import UserError
from pipelines.denoiser import Denoiser
from pipelines.preconditioning import EDM

from ..config.data import TEXT_DATA, Data
from ..config.run import DistillConfig
from ..data.examples import Images, Points
from ..objectives.base import Need
from ..posteriors import UNetPosterior
from ..posteriors.section import Posterior
from . import scratch
from .base import build_covariance


class Family(scratch.Family):
    """See base.Family. A student from scratch beside an exact score; fake score and posterior, too, are networks of their own
    behind EDM's preconditioning and start from the seed.
    """

    called = "an exact teacher"
    teacher_keys = ("exact",)
    gives = ("network", "posterior", "features_of", "batch_proposals")
    has_teacher = True

    def __init__(self, config: DistillConfig, accelerator: Accelerator | None = None) -> None:
        super().__init__(config, accelerator)
        exact: GaussianMixture | EmpiricalPosterior
        if config.teacher.exact == "density" and isinstance(self.data, Points):
            exact = self.data.mixture
        else:
            exact = EmpiricalPosterior(self.data.rows(torch.arange(len(self.data)))[0], self.schedule)
        self.sampling_range = (0.004 * self.sigma_data, 160 * self.sigma_data)  # EDM's 0.002 to 80, of data of spread 0.5
        self.teacher = Denoiser(exact, self.schedule, "sample", self.sigma_data)

    @classmethod
    def _section(cls, config: DistillConfig) -> Data:
        if config.data is None or isinstance(config.data, TEXT_DATA):
            raise UserError("data: an exact teacher is that of a mixture or of an image set; add one, e.g. data={name: mixture}")
        return config.data

    @classmethod
    def check(cls, config: DistillConfig) -> None:
        t, data = config.teacher, cls._section(config)
        if t.exact == "density" and data.name != "mixture":
            raise UserError(f"teacher.exact: the density of {data.name!r} is unknown; use exact=samples or data.name=mixture")
        if getattr(data, "labels", False) or getattr(data, "label_column", None):
            raise UserError("data: an exact teacher is unconditional; remove the labels")
        super().check(config)

    @classmethod
    def refusal(cls, need: Need) -> str | None:
        if need.what == "posterior" and isinstance(need.value, str):
            return (
                f"{need.key}: {need.value!r} builds on a teacher's network, an exact teacher has none; "
                "give a section, e.g. {width: 400, layers: 4}"
            )
        return super().refusal(need)

    def _spread(self, data: Images | Points) -> float:
        """Of the law itself where its density is known."""
        if self.config.teacher.exact == "density" and isinstance(data, Points):
            return data.mixture.std
        return super()._spread(data)

    def fake_score(self, section: Any) -> Denoiser:
        """From nothing, so it wants warm-up updates: an exact teacher has no weights to start from."""
        network = self._network(section.network or self.config.student.network, "fake_score", self.latent_shape[0])
        return Denoiser(network, self.schedule, EDM(self.sigma_data), self.sigma_data)

    def posterior(self, section: Posterior, with_mean: bool) -> UNetPosterior:
        covariance = build_covariance(section, self.config.seed, self.latent_shape)
        out_channels = UNetPosterior.num_channels(covariance, with_mean)
        network = self._network(section.network, "posterior", out_channels)
        return UNetPosterior(network, covariance, self.sigma_data, with_mean)
