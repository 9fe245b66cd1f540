"""What is used of diffusers' own pipelines, as a type: their classes annotate neither their parts nor how they are called."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:  # which take seconds to import
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class StockPipeline(Protocol):
    """One of kinds.KINDS, or one that is used like them. A part that was left out is None; a kind has not all of them.

    scheduler: any of diffusers'; each has attributes of its own. A call's result has `images`: a list of Pillow's for output_type
    "pil", an array (b, h, w, c) in [0, 1] for "np", a tensor (b, c, h, w) in [0, 1] for "pt", latents for "latent".
    """

    unet: UNet2DConditionModel
    transformer: Any
    text_encoder_3: Any
    vae: AutoencoderKL
    vae_scale_factor: int
    tokenizer: PreTrainedTokenizerBase
    scheduler: Any

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def components(self) -> dict[str, Any]: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]: ...

    def to(self, device: torch.device | str) -> Self: ...

    def set_progress_bar_config(self, **kwargs: Any) -> None: ...

    def load_lora_weights(self, source: str | dict[str, Tensor], adapter_name: str | None = None, **kwargs: Any) -> None: ...

    def lora_state_dict(self, source: str, **kwargs: Any) -> Any: ...

    def set_adapters(self, names: list[str]) -> None: ...

    def fuse_lora(self) -> None: ...

    def unload_lora_weights(self) -> None: ...

    @classmethod
    def save_lora_weights(cls, save_directory: str | PathLike[str], **kwargs: Any) -> None: ...

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None: ...
