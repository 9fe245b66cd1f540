"""EDMPipeline: images from an EDM teacher (many Heun steps) or from a one-step student, with one call."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..denoiser import Denoiser
from ..noise import EDMSchedule
from .scheduler import EDMScheduler
from .unet import EDMUNet


class EDMPipeline(DiffusionPipeline):
    """unet: an EDMUNet; scheduler: an EDMScheduler, which knows the preconditioning and the default sampler."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: EDMUNet, scheduler: EDMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def denoiser(self, guidance_scale: float = 1.0) -> Denoiser:
        """The network behind EDM preconditioning; guidance uses the null class label."""
        num_classes = self.unet.config.num_classes
        null = {"class_labels": torch.tensor(num_classes)} if num_classes else None
        # The network is defined at every sigma > 0; the scheduler's range is only where it is sampled.
        schedule = EDMSchedule(sigma_min=0.0, sigma_max=float("inf"))
        return Denoiser(self.unet, schedule, "edm", self.scheduler.config.sigma_data, guidance_scale, null)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Tensor | list[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        class_labels (b,): required by a class-conditional network unless its null label is wanted.
        sigmas: the noise levels, descending, instead of the scheduler's grid of num_inference_steps.
        latents: unit noise z (b, c, h, w) instead of a draw; generator: one, or one for each image.
        output_type: "pil", "np" (b, h, w, c) in [0, 1] or "pt" (b, c, h, w) in [0, 1].
        """
        config, device, dtype = self.unet.config, self._execution_device, self.unet.dtype
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}; expected 'pil', 'np' or 'pt'")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for batch_size={batch_size}; give one for each image")
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        z = randn_tensor(shape, generator, device, dtype) if latents is None else latents.to(device, dtype)
        if z.shape != shape:
            raise ValueError(f"latents have shape {tuple(z.shape)}; expected {shape}")
        condition = None
        if class_labels is not None:
            condition = {"class_labels": torch.as_tensor(class_labels, device=device).long()}

        denoiser = self.denoiser(guidance_scale)
        if sigmas is None:
            default = self.scheduler.config.num_inference_steps
            grid = self.scheduler.sigmas(default if num_inference_steps is None else num_inference_steps)
        else:
            grid = torch.tensor(sigmas, dtype=torch.float64)
        sample = _heun if self.scheduler.config.sampler == "heun" else _renoise
        with self.progress_bar(total=len(grid)) as bar:
            x0 = sample(denoiser, z, grid.to(device), condition, generator, bar)

        images = (x0 / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().float().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _at(denoiser: Denoiser, x: Tensor, sigma: Tensor, condition) -> Tensor:
    return denoiser(x, denoiser.schedule.level(sigma.to(x.dtype).expand(len(x))), condition)


def _heun(denoiser: Denoiser, z: Tensor, sigmas: Tensor, condition, generator, bar) -> Tensor:
    """Karras et al. 2022, Algorithm 1: 2n - 1 network calls."""
    x = z * sigmas[0].to(z.dtype)
    for i, sigma in enumerate(sigmas):
        following = sigmas[i + 1] if i + 1 < len(sigmas) else torch.zeros_like(sigma)
        slope = (x - _at(denoiser, x, sigma, condition)) / sigma.to(x.dtype)
        step = (following - sigma).to(x.dtype)
        euler = x + step * slope
        if following > 0:
            slope_next = (euler - _at(denoiser, euler, following, condition)) / following.to(x.dtype)
            x = x + step * (slope + slope_next) / 2
        else:
            x = euler
        bar.update()
    return x


def _renoise(denoiser: Denoiser, z: Tensor, sigmas: Tensor, condition, generator, bar) -> Tensor:
    """x0 prediction, then fresh noise at the next level: n network calls; n = 1 is the one-step student."""
    x0 = torch.zeros_like(z)
    for i, sigma in enumerate(sigmas):
        eps = z if i == 0 else randn_tensor(z.shape, generator, z.device, z.dtype)
        x0 = _at(denoiser, (x0 if i else 0) + sigma.to(z.dtype) * eps, sigma, condition)
        bar.update()
    return x0
