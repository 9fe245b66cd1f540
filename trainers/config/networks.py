"""The sections of configurations for networks, their optimisers and adapters, which the commands and objectives share."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pipelines.common.config import KINDS
from pipelines.common.strict import Idle, PositiveFloat, PositiveInt, Strict
from pipelines.edm.layout import ARCHITECTURES


class Network(Strict):
    """pipelines.edm.PatchUNet without what the data decide (resolution, channels, classes)."""

    channels: Annotated[int, Field(gt=0, multiple_of=2)] = 64
    channel_mult: Annotated[list[PositiveInt], Field(min_length=1)] = [1]
    num_blocks: PositiveInt = 2
    attention_levels: list[int] = []
    patch_size: PositiveInt = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _levels_exist(self):
        for level in self.attention_levels:
            if not 0 <= level < len(self.channel_mult):
                last = len(self.channel_mult) - 1
                raise ValueError(f"attention_levels: there is no level {level}; channel_mult {self.channel_mult} has 0 to {last}")
        return self


class EDMNetwork(Strict):
    """pipelines.edm.EDMUNet without what the data decide. None: the architecture's own, as Karras et al. 2022 have it."""

    architecture: Literal["ddpmpp", "ncsnpp", "adm"]
    model_channels: Annotated[int, Field(gt=0, multiple_of=4)] | None = None
    channel_mult: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    num_blocks: PositiveInt | None = None
    attention_resolutions: list[PositiveInt] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def options(self) -> dict[str, Any]:
        """Keyword arguments of EDMUNet."""
        given = {k: v for k, v in self.model_dump(exclude={"architecture"}).items() if v is not None}
        return ARCHITECTURES[self.architecture] | given


class PointNetwork(Strict):
    """pipelines.edm.PointNet, for points."""

    width: PositiveInt
    layers: Annotated[int, Field(ge=2)] = 4
    frequencies: Annotated[int, Field(ge=0)] = 0

    def options(self) -> dict[str, Any]:
        return self.model_dump()


def kind_of_network(value: Any) -> str:
    """Networks are told apart by a key that only they have, names by their type: a fault is one of the kind that was meant."""
    if isinstance(value, str):
        return KINDS[0]
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", ())
    return KINDS[2] if "architecture" in keys else KINDS[3] if "width" in keys else KINDS[1]


AnyNetwork = Annotated[Network, Tag(KINDS[1])] | Annotated[EDMNetwork, Tag(KINDS[2])] | Annotated[PointNetwork, Tag(KINDS[3])]
NewNetwork = Annotated[AnyNetwork, Discriminator(kind_of_network)]


class Optimizer(Strict):
    """Adam (decoupled weight decay). The rate rises linearly over `warmup_steps` and follows `schedule` down to final_ratio * lr.

    Both count the updates of its own network, as a scheduler of PyTorch does. For the student these are the run's steps; a
    posterior or fake score makes `warmup_updates` before the first step, which are the first of its `warmup_steps`, and then all
    of its updates in each step. A decay ends with its last update. `<role>/lr` in metrics.jsonl is the rate of the latest one.
    """

    idle = (Idle("final_ratio", "schedule linear or cosine", lambda o: o.schedule != "constant"),)
    lr: PositiveFloat
    bits: Literal[8, 32] = 32  # of each moment; 8 needs bitsandbytes
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: PositiveFloat | None = 10.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _installed(self):
        if self.bits == 8 and find_spec("bitsandbytes") is None:
            raise ValueError('bits: 8 needs bitsandbytes, which is not installed; pip install -e ".[8bit]", or use 32')
        return self


class Lora(Strict):
    """Low-rank adapters, W + alpha/rank B A, on every layer whose name ends with a target.

    targets None: the layers of the published LoRAs (text-to-image), all layers of all blocks (EDM).
    """

    rank: PositiveInt = 64
    alpha: PositiveFloat | None = None  # None: rank
    targets: Annotated[list[str], Field(min_length=1)] | None = None
