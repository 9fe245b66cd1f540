"""The section of a configuration for a posterior: its network, its covariance and how it learns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pipelines.common.config import KINDS
from pipelines.common.strict import PositiveInt, Strict

from ..config.networks import AnyNetwork, Lora, Optimizer, kind_of_network
from . import CovarianceName
from .flow import Transform


class FlowOptions(Strict):
    blocks: PositiveInt = 4  # couplings at each scale
    transform: Transform = "affine"
    hidden: PositiveInt = 32  # channels inside a coupling's network


PosteriorNetwork = Annotated[
    Annotated[Literal["shared", "copy", "adapter"], Tag(KINDS[0])] | AnyNetwork, Discriminator(kind_of_network)
]


class Posterior(Strict):
    # shared: on what the teacher's call makes on the way: a decoder of its own (EDM), or LoRA on the last part of the teacher's
    # network, a U-Net's way up or a third of a transformer's blocks;
    # adapter: LoRA and a last layer of its own on all of the teacher's frozen weights; copy: the teacher's network, copied (EDM);
    # or a section: one from scratch
    network: PosteriorNetwork = "shared"
    lora: Lora = Lora()  # where it is an adapter
    covariance: CovarianceName = "linear"
    rank: PositiveInt = 8  # lowrank only: correlated directions
    block: PositiveInt | None = None  # learned only: side of a block; None: the largest of 4, 2, 1 that divides both sides
    flow: FlowOptions = FlowOptions()
    optimizer: Optimizer
    updates: Annotated[int, Field(ge=0)] = 0  # of the posterior alone, before each joint update
    warmup_updates: Annotated[int, Field(ge=0)] = 500
    min_information: float = 0.05  # nats; below it the run is reported as collapsed

    @model_validator(mode="after")
    def _options_fit_the_covariance(self):
        if self.lora != Lora() and self.network not in ("adapter", "shared"):
            raise ValueError("lora has no effect unless network=adapter or shared; remove it")
        for key, covariance in (("rank", "lowrank"), ("block", "learned"), ("flow", "flow")):
            if getattr(self, key) != type(self).model_fields[key].default and self.covariance != covariance:
                raise ValueError(f"{key} has no effect with covariance={self.covariance!r}; remove it (it is for {covariance})")
        return self

    def covariance_options(self) -> dict[str, Any]:
        """Keyword arguments of COVARIANCES[self.covariance]."""
        options: dict[str, dict[str, Any]]
        options = {"lowrank": {"rank": self.rank}, "learned": {"block": self.block}, "flow": self.flow.model_dump()}
        return options.get(self.covariance, {})
