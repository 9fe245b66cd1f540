"""Pixel-space EDM models (Karras et al. 2022) as diffusers components: networks, scheduler, pipeline.

Their modules stay where they are: model_index.json of every stored model names them.

Loaded when they are asked for: converting a snapshot needs neither torch nor diffusers, which take longer to import, and more
memory, than the conversion.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .patch_unet import PatchUNet
    from .pipeline import EDMPipeline
    from .point_net import PointNet
    from .scheduler import EDMScheduler
    from .unet import EDMUNet

_HOMES = {
    "EDMPipeline": "pipeline",
    "EDMScheduler": "scheduler",
    "EDMUNet": "unet",
    "PatchUNet": "patch_unet",
    "PointNet": "point_net",
}
__all__ = ["EDMPipeline", "EDMScheduler", "EDMUNet", "PatchUNet", "PointNet"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
