"""EDMPipeline: images from an EDM teacher (many Heun steps) or from a one-step student, with one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.reading import read_json
from ..denoiser import Denoiser
from ..loras import LORA_FILE, find_lora, layers_by_network, layers_in, refuse_unfit
from ..noise import EDMSchedule
from .patch_unet import PatchUNet
from .point_net import PointNet
from .scheduler import EDMScheduler
from .unet import EDMUNet


@dataclass(frozen=True)
class Churn:
    """Karras et al. 2022, Algorithm 2: noise added before each step whose sigma is in [S_min, S_max]; S_churn 0 adds none."""

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.S_churn < math.inf and 0 <= self.S_noise < math.inf and self.S_min <= self.S_max):
            raise UserError(f"S_churn and S_noise must be 0 or more, and S_min at most S_max; got {self}")

    def gamma(self, sigma: Tensor, steps: int) -> float:
        """By how much sigma is raised before a step, as a share of it, of so many steps in all."""
        return min(self.S_churn / steps, math.sqrt(2) - 1) if self.S_min <= sigma <= self.S_max else 0.0


class EDMPipeline(LoraBaseMixin, DiffusionPipeline):
    """unet: an EDMUNet, PatchUNet or PointNet; scheduler: an EDMScheduler: the preconditioning and the default sampler."""

    unet: EDMUNet | PatchUNet | PointNet
    scheduler: EDMScheduler
    model_cpu_offload_seq = "unet"  # type: ignore[assignment]  # diffusers has None
    _lora_loadable_modules = ("unet",)  # type: ignore[assignment]  # diffusers has a list

    def __init__(self, unet: EDMUNet | PatchUNet | PointNet, scheduler: EDMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._teacher_scheduler: EDMScheduler | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> EDMPipeline:
        """A teacher, a full student, or a LoRA student's folder: then its base model with the adapter on it.

        base_model=...: where a LoRA student's base model lies now, if not where it did.
        """
        folder, base_model = Path(pretrained_model_name_or_path), kwargs.pop("base_model", None)
        lora_student = (folder / LORA_FILE).is_file() and not (folder / "model_index.json").is_file()
        if not lora_student:
            if base_model is not None:
                raise UserError(f"base_model has no effect for {str(folder)!r}: it is a pipeline of its own")
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if base_model is None:
            if not (folder / "student.json").is_file():
                raise FileNotFoundError(f"{str(folder)!r} has no student.json to name its base model; give base_model=")
            base_model = read_json(folder / "student.json", "save or copy the student again").get("base_model")
        if not Path(base_model).is_dir() and str(base_model).count("/") != 1:
            raise FileNotFoundError(f"the base model of {str(folder)!r} is not at {base_model!r}; give base_model=")
        pipeline = super().from_pretrained(base_model, **kwargs)
        pipeline.load_lora_weights(folder, adapter_name="student")
        return pipeline

    def load_lora_weights(  # type: ignore[override]  # as diffusers' own pipelines override it
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """An adapter for the U-Net. From a student's folder, its scheduler comes with it: the adapter means something at its one
        noise level only. `unload_lora_weights` puts the scheduler back. kwargs: see diffusers' `load_lora_adapter`. UserError for
        weights that this network has not all of the layers for.
        """
        source: str | Path | dict[str, Tensor] = pretrained_model_name_or_path_or_dict
        if "weight_name" in kwargs and not isinstance(source, dict) and Path(source).is_dir():
            source = Path(source) / kwargs["weight_name"]
        if isinstance(source, dict):
            lora, layers = None, layers_by_network(source).get("unet", set())
        else:
            lora = find_lora(source, "load_lora_weights")
            name, source = kwargs.setdefault("weight_name", lora.file or LORA_FILE), lora.folder
            if not Path(source).is_dir():
                source = str(Path(hf_hub_download(source, name)).parent)
            layers = layers_in(Path(source) / name)
        unfit = f"{str(pretrained_model_name_or_path_or_dict)[:200]!r} does not fit this network"
        if not layers:
            raise UserError(f"{unfit}: it holds no LoRA weights for a U-Net: expected keys that start with 'unet.'")
        known = {name for name, _ in self.unet.named_modules()}
        refuse_unfit(unfit, sorted(layers - known), len(layers))
        try:
            self.unet.load_lora_adapter(source, prefix="unet", adapter_name=adapter_name, use_safetensors=True, **kwargs)
        except RuntimeError as error:
            raise UserError(f"{unfit}: {' '.join(str(error).split())[:300]}; it was made for another model") from error
        if lora is not None and lora.scheduler is not None:
            self._teacher_scheduler = self._teacher_scheduler or self.scheduler
            self.scheduler = EDMScheduler.from_pretrained(lora.scheduler)

    def unload_lora_weights(self) -> None:
        """Take adapters off; the scheduler that came with a student's goes too."""
        super().unload_lora_weights()
        if self._teacher_scheduler is not None:
            self.scheduler, self._teacher_scheduler = self._teacher_scheduler, None

    def fuse_lora(self, components: Sequence[str] | None = ("unet",), *args: Any, **kwargs: Any) -> None:
        super().fuse_lora(list(components or ()), *args, **kwargs)

    def unfuse_lora(self, components: Sequence[str] | None = ("unet",), **kwargs: Any) -> None:
        super().unfuse_lora(list(components or ()), **kwargs)

    @classmethod
    def save_lora_weights(  # type: ignore[override]  # as diffusers' own pipelines override it
        cls,
        save_directory: str | Path,
        unet_lora_layers: dict[str, nn.Module | Tensor],
        unet_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """The adapter alone, with its rank and alpha: what `load_lora_weights` reads."""
        cls._save_lora_weights(save_directory, {"unet": unet_lora_layers}, {"unet": unet_lora_adapter_metadata})

    def denoiser(self, guidance_scale: float = 1.0) -> Denoiser:
        """D(x_t, level, condition): the network behind its preconditioning; guidance uses the null class label."""
        num_classes = self.unet.config["num_classes"]
        null = {"class_labels": torch.tensor(num_classes)} if num_classes else None
        known, sigma_data = self.scheduler.preconditioner(), self.scheduler.config["sigma_data"]
        # What the network was made for: EDM's at every sigma > 0. The scheduler's range is only where it is sampled.
        low, high = known.sigma_range
        schedule = EDMSchedule(low, high, known.nearest)
        return Denoiser(self.unet, schedule, known, sigma_data, guidance_scale, null)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Tensor | list[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        sigmas: list[float] | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float | None = None,
        S_churn: float = 0.0,
        S_min: float = 0.0,
        S_max: float = math.inf,
        S_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        batch_size: None for as many as there are class_labels, latents or generators, else 1.
        class_labels: (b,) integers, num_classes of them being the null label, or (b, num_classes) floats; None: the null label.
        sigmas: the noise levels, descending, without the 0 that follows the last; each is moved to the nearest that the network
        knows. Instead of the grid of num_inference_steps from sigma_max to sigma_min with rho (None: the scheduler's own).
        S_churn, S_min, S_max, S_noise: stochasticity of the Heun sampler.
        latents: unit noise z (b, c, h, w) instead of a draw; generator: one, or one for each image, which then does not depend
        on the batch it is made in. output_type: "pil", "np" (b, h, w, c) in [0, 1] or "pt" (b, c, h, w) in [0, 1].
        """
        config, device = self.unet.config, self._execution_device
        if batch_size is None:
            generators = generator if isinstance(generator, list) else None
            batch_size = next((len(given) for given in (class_labels, latents, generators) if given is not None), 1)
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; expected 'pil', 'np', 'pt' or 'latent'")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for batch_size={batch_size}; give one for each image")
        if sigmas is not None and any(v is not None for v in (num_inference_steps, sigma_min, sigma_max, rho)):
            raise ValueError("sigmas and num_inference_steps, sigma_min, sigma_max, rho exclude each other; give one grid")
        heun = self.scheduler.config["sampler"] == "heun"
        churn = Churn(S_churn, S_min, S_max, S_noise)
        if guidance_scale != 1.0 and class_labels is None and config["num_classes"]:
            raise ValueError(f"guidance_scale={guidance_scale} needs class_labels: guidance needs a condition")
        if not heun and churn != Churn():
            raise ValueError("S_churn, S_min, S_max and S_noise are for the 'heun' sampler; this scheduler's is 'renoise'")
        shape = (batch_size, config["in_channels"], config["sample_size"], config["sample_size"])
        z = randn_tensor(shape, generator, device, dtype) if latents is None else latents.to(device, dtype)
        if z.shape != shape:
            raise ValueError(f"latents have shape {tuple(z.shape)}; expected {shape}")
        condition = None
        if class_labels is not None:
            condition = {"class_labels": self._labels(class_labels, batch_size, device)}

        denoiser = self.denoiser(guidance_scale)
        if sigmas is None and (sigma_min, sigma_max, rho) == (None, None, None):
            grid = self.scheduler.default_sigmas(num_inference_steps)
        elif sigmas is None:
            if self.scheduler.config["student_sigmas"] is not None:
                raise UserError("a student of several steps has levels of its own: sigma_min, sigma_max and rho have no effect")
            steps = self.scheduler.config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
            grid = self.scheduler.sigmas(steps, sigma_min, sigma_max, rho)
        else:
            grid = self.scheduler.given(sigmas)
        with self.progress_bar(total=len(grid)) as bar:
            if heun:
                x0 = _heun(denoiser, z, grid.to(device), condition, churn, generator, bar)
            else:
                x0 = _renoise(denoiser, z, grid.to(device), condition, generator, bar)

        images: Tensor | np.ndarray | list[Image.Image] = x0
        if output_type != "latent":
            images = pixels = (x0 / 2 + 0.5).clamp(0, 1)
            if output_type in ("pil", "np"):
                images = rows = pixels.cpu().float().permute(0, 2, 3, 1).numpy()
                if output_type == "pil":
                    images = self.numpy_to_pil(rows)
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)  # type: ignore[arg-type]  # tensors too, as of diffusers' own pipelines

    def _labels(self, class_labels: Tensor | list[int], b: int, device: torch.device) -> Tensor:
        """ValueError for labels that are not one for each image and known to the network."""
        labels, n = torch.as_tensor(class_labels, device=device), self.unet.config["num_classes"] or 0
        if not n:
            raise ValueError("class_labels were given to an unconditional network (num_classes=0)")
        if labels.is_floating_point():
            if isinstance(self.unet, PatchUNet):
                raise ValueError(f"class_labels of a PatchUNet are ({b},) integers; got {labels.dtype}")
            if labels.shape != (b, n) or not bool(labels.isfinite().all()):
                raise ValueError(
                    f"class_labels have shape {tuple(labels.shape)}; expected ({b}, {n}) finite floats, or ({b},) integers"
                )
            return labels
        if labels.shape != (b,):
            raise ValueError(f"class_labels have shape {tuple(labels.shape)}; expected ({b},), one for each image")
        if not bool(((labels >= 0) & (labels <= n)).all()):
            raise ValueError(f"class_labels must be in [0, {n}], where {n} is the null label; got {labels.tolist()}")
        return labels.long()


def tensors(output: ImagePipelineOutput | tuple[Any, ...]) -> Tensor:
    """The images (b, c, h, w) of a call with output_type "pt" or "latent"."""
    images: object = output[0] if isinstance(output, tuple) else output.images
    if not isinstance(images, Tensor):
        raise ValueError(f"images are a {type(images).__name__}, no tensor; ask for output_type='pt'")
    return images


def _at(denoiser: Denoiser, x: Tensor, sigma: Tensor, condition, dtype: torch.dtype) -> Tensor:
    return denoiser(x.to(dtype), denoiser.schedule.level(sigma.to(dtype).expand(len(x))), condition)


def _heun(denoiser: Denoiser, z: Tensor, sigmas: Tensor, condition, churn: Churn, generator, bar) -> Tensor:
    """Karras et al. 2022, Algorithm 2 (Algorithm 1 without churn): 2n - 1 network calls, the state in float64."""
    known, dtype, x = denoiser.preconditioner, z.dtype, z.double() * sigmas[0]
    for i, sigma in enumerate(sigmas):
        following = sigmas[i + 1] if i + 1 < len(sigmas) else torch.zeros_like(sigma)
        if churn.S_churn:
            eps = randn_tensor(z.shape, generator, z.device, torch.float64)
            raised = known.nearest(sigma * (1 + churn.gamma(sigma, len(sigmas))))
            x, sigma = x + (raised**2 - sigma**2).sqrt() * churn.S_noise * eps, raised
        slope = (x - _at(denoiser, x, sigma, condition, dtype)) / sigma
        step = following - sigma
        euler = x + step * slope
        if following > 0:
            slope_next = (euler - _at(denoiser, euler, following, condition, dtype)) / following
            x = x + step * (slope + slope_next) / 2
        else:
            x = euler
        bar.update()
    return x.to(dtype)


def _renoise(denoiser: Denoiser, z: Tensor, sigmas: Tensor, condition, generator, bar) -> Tensor:
    """x0 prediction, then fresh noise at the next level: n network calls; n = 1 is the one-step student."""
    x0 = torch.zeros_like(z)
    for i, sigma in enumerate(sigmas):
        eps = z if i == 0 else randn_tensor(z.shape, generator, z.device, z.dtype)
        x0 = _at(denoiser, (x0 if i else 0) + sigma.to(z.dtype) * eps, sigma, condition, z.dtype)
        bar.update()
    return x0
