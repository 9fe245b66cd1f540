"""Pixel-space EDM models (Karras et al. 2022) as diffusers components: network, scheduler, pipeline."""

from .pipeline import EDMPipeline
from .scheduler import EDMScheduler
from .unet import EDMDecoder, EDMUNet

__all__ = ["EDMDecoder", "EDMPipeline", "EDMScheduler", "EDMUNet"]
