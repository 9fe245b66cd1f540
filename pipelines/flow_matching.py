"""What transformers of rectified flow have in common (SD3, Flux, Z-Image): x_t = (1 - t) x0 + t eps, v = eps - x0.

A network is told 1000 t. One stock step from noise z, at t = 1, gives z - v(z, 1), which is x0.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler, ModelMixin
from torch import Tensor, nn

from .adapters import linear
from .common.errors import UserError
from .kinds import Kind
from .noise import PredictionType, RectifiedFlowSchedule, shifted_t
from .stock import StockPipeline

SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
# of a sampler of many steps, and in the way of a single one
OFF = {"shift_terminal": None, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}


class FlowMatching(Kind):
    """See kinds.Kind. t5: what the pipeline calls that encoder and its tokenizer."""

    component, scheduler = "transformer", FlowMatchEulerDiscreteScheduler
    time_scale = 1000.0
    step_dtype = torch.float32  # in which these schedulers draw noise
    forgets_generator = True
    t5: tuple[str, str]

    def text_width(self, config: Mapping[str, Any]) -> int:
        return config["joint_attention_dim"]

    def check_folder(self, folder: Path, index: Mapping[str, Any], left_out: Iterable[str]) -> None:
        """T5, which is often left out: asked for, it must be there."""
        for name in (n for n in self.t5 if n not in left_out):
            asked, may_lack = index.get(name, [None])[0] is not None, name in self.optional
            if asked and not (folder / name).is_dir():
                zeros = f', or write "{name}": [null, null] there for zeros in its place, as in the stock pipeline'
                mend = f"copy it{zeros if may_lack else ''}"
                raise FileNotFoundError(f"{str(folder)!r} has no {name}/ (T5), which its model_index.json asks for; {mend}")
            if not asked and not may_lack:
                raise UserError(f"{str(folder)!r}: model_index.json has no {name} (T5), without which it cannot read prompts")

    def check_scheduler(self, scheduler: Any, source: str) -> None:
        name, config = type(scheduler).__name__, scheduler.config
        if not isinstance(scheduler, SCHEDULERS):
            raise UserError(
                f"{source!r}: its scheduler is {name}, which is none of flow matching; expected one of "
                f"{', '.join(s.__name__ for s in SCHEDULERS)}"
            )
        if config["num_train_timesteps"] != self.time_scale:
            raise UserError(
                f"{source!r}: num_train_timesteps is {config['num_train_timesteps']}, and networks of its kind are told "
                f"{self.time_scale:g} t; mend its scheduler_config.json"
            )
        if config.get("invert_sigmas"):
            raise UserError(f"{source!r}: invert_sigmas is set: its time runs the other way, which is not supported")

    def schedule(self, scheduler: Any) -> RectifiedFlowSchedule:
        return RectifiedFlowSchedule()

    def prediction(self, scheduler: Any) -> PredictionType:
        return "flow"

    def student_levels(self, scheduler: Any, steps: int) -> list[float]:
        """1, 1 - 1/N, ..., 1/N under the teacher's own time shift: where it depends on the size of images, the largest."""
        config = scheduler.config
        shift = math.exp(config["max_shift"]) if config.get("use_dynamic_shifting") else config["shift"]
        even = torch.tensor([1 - i / steps for i in range(steps)], dtype=torch.float64)
        return [round(t, 6) for t in shifted_t(even, shift).tolist()]

    def student_scheduler(self, scheduler: Any, levels: Sequence[float]) -> FlowMatchEulerDiscreteScheduler:
        """The teacher's, without what spoils a step. Its time shift leaves a single step at t = 1 where it is; other levels are
        given to the pipeline as they are, so that none is left, and noise is drawn anew between steps.
        """
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        config = dict(scheduler.config) | OFF | {"stochastic_sampling": list(levels) != [1.0]}
        if list(levels) != [1.0]:
            config |= {"shift": 1.0, "use_dynamic_shifting": False}
        return FlowMatchEulerDiscreteScheduler.from_config({k: v for k, v in config.items() if k in known})

    def call(self, levels: Sequence[float], scheduler: Any) -> dict[str, Any]:
        """By sigmas, since a pipeline's own grid would be another."""
        return {"num_inference_steps": 1} if list(levels) == [1.0] else {"sigmas": list(levels)}

    def start(self, scheduler: Any, levels: Sequence[float]) -> bool:
        call, shift = self.call(levels, scheduler), {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(call.pop("num_inference_steps", None), **call, **shift)
        told = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)
        wanted = self.time_scale * torch.tensor(list(levels), dtype=torch.float64)
        return told.shape == wanted.shape and torch.allclose(told, wanted, rtol=1e-5)

    def why_not(self, scheduler: Any) -> str:
        spoils = [f"{k}={scheduler.config.get(k)}" for k, v in OFF.items() if scheduler.config.get(k) not in (v, None)]
        return f": its {', '.join(spoils)} leaves none; set it to null" if spoils else ""

    def null_condition(
        self,
        pipe: StockPipeline,
        negative_prompt: str | None,
        device: torch.device,
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The empty prompt."""
        return {k: v[0] for k, v in self.encode_prompts(pipe, [negative_prompt or ""], (0, 0), device, config).items()}

    def most_tokens(self, pipe: StockPipeline) -> tuple[Any, int]:
        """T5's, where it is there; CLIP's encoders read the first 77 tokens in any case."""
        tokenizer = getattr(pipe, self.t5[1], None)
        if getattr(pipe, self.t5[0], None) is None or tokenizer is None:
            return super().most_tokens(pipe)
        return tokenizer, inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default

    def side_of(self, image_size: int | None, factor: int, own: int, step: int) -> int:
        """Latents on a side, a multiple of `step`; own: of the network's own size."""
        side, rest = (own, 0) if image_size is None else divmod(image_size, factor)
        if rest or side % step:
            raise UserError(f"data.image_size={image_size} must be a multiple of {factor * step} for this teacher")
        return side


def last_layer(network: ModelMixin) -> nn.Linear:
    """A transformer's own last projection, also where an adapter sits on it."""
    return linear(network.proj_out)


def to_dtype(condition: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) for k, v in condition.items()}
