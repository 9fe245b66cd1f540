"""Train a teacher: a small EDM network on images or points, or the network of a Stable Diffusion pipeline further, on captions.

    accelerate launch -m trainers.train_teacher --config configs/digits_teacher.yaml [a.b=value ...]

Writes <output_dir>/teacher, a pipeline folder that `trainers.distill` and `from_pretrained` take.
"""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines import stable_diffusion
from pipelines.adapters import Whole
from pipelines.edm import EDMPipeline, EDMScheduler
from pipelines.errors import UserError
from pipelines.launch import user_errors
from pipelines.noise import EDMSchedule
from pipelines.provenance import git_commit, versions
from pipelines.students import save_model

from . import augment, levels, setup
from .cache import open_cache
from .config import TeacherConfig
from .draws import DrawSource
from .loop import Trainer
from .objectives.denoising import Denoising


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        run(setup.parse(TeacherConfig, __doc__, argv))


def run(config: TeacherConfig) -> None:
    accelerator = setup.make_accelerator(config)
    if setup.sharded():
        raise UserError("FSDP shards frozen weights, and a teacher in training has none; use configs/accelerate/gpu_8.yaml")
    setup.check_output(config, accelerator)
    teacher = NewEDM(config) if config.pipeline is None else FurtherStableDiffusion(config, accelerator)
    drawn = levels.sampler(config.levels, config.steps, teacher.denoiser.schedule.t_range)
    objective = Denoising(teacher.denoiser, drawn, config.weighting)
    draws = DrawSource(
        config.seed,
        config.batch_size,
        teacher.latent_shape,
        accelerator.device,
        teacher.examples,
        teacher.null_condition,
        config.label_dropout,
        accelerator.process_index,
        accelerator.num_processes,
        config.micro_batch_size,
        config.augment,
    )
    facts = {"device": str(accelerator.device), "threads": torch.get_num_threads()}
    facts |= {"versions": versions(setup.PACKAGES), "git_commit": git_commit()}
    facts |= {"objective": "denoising", "data": config.data.name} | teacher.facts
    trainer = Trainer(
        config,
        accelerator,
        objective,
        "teacher",
        {"teacher": config.optimizer},
        draws,
        teacher.preview,
        export=lambda folder, info: save_model(folder, teacher.pipeline, "teacher", facts | info),
        record=lambda start: setup.record(config, accelerator, start),
        page=setup.page(config, objective.health),
    )
    trainer.fit()
    accelerator.end_training()


class NewEDM:
    """A new EDM network on an image set."""

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        scheduler = EDMScheduler(
            sigma_data=config.sigma_data,
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            num_inference_steps=config.sampling_steps,
        )
        scheduler.sigmas(config.sampling_steps)  # a grid that cannot be sampled is an error now
        levels.check_levels(config, EDMSchedule(0.0, math.inf), (config.sigma_min, config.sigma_max))
        self.examples = data = setup.load_data(config.data)
        self.latent_shape = data.shape
        channels, size = self.latent_shape[:2]
        num_classes = len(data.class_names)
        shape = {"in_channels": channels, "out_channels": channels, "num_classes": num_classes}
        if config.augment:
            shape["augment_dim"] = augment.DIM
        self.unet = setup.build_unet(config.network, config.seed, "teacher", size, **shape)
        self.pipeline = EDMPipeline(self.unet, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.denoiser = self.pipeline.denoiser().train()
        self.null_condition = {"class_labels": torch.tensor(num_classes)}
        self.facts = {"image_size": size, "class_names": list(data.class_names)}

    def preview(self) -> Tensor:
        self.unet.eval()
        drawn = setup.preview(self.pipeline, self.config.num_samples, self.config.seed)
        self.unet.train()
        return drawn


class FurtherStableDiffusion:
    """The network of a Stable Diffusion pipeline, all of its weights, on encoded images and captions."""

    def __init__(self, config: TeacherConfig, accelerator: Accelerator) -> None:
        self.config, self.device = config, accelerator.device
        stable_diffusion.check_parts(config.pipeline)  # before its text encoders work, which may take hours
        levels.check_levels(config, stable_diffusion.load_schedule(config.pipeline))
        encoded = open_cache(config, accelerator)
        self.examples, self.latent_shape, self.null_condition = encoded.examples, encoded.shape, encoded.null
        self.pipeline = stable_diffusion.load_pipeline(config.pipeline)
        unet = self.pipeline.unet.requires_grad_(True).train()
        self.denoiser = stable_diffusion.denoiser(self.pipeline, Whole(unet))
        self.prompts, self.image_size = encoded.prompts[: config.num_samples], encoded.image_size
        self.facts = {"image_size": encoded.image_size, "base_model": config.pipeline}

    @torch.no_grad()
    def preview(self) -> Tensor:
        self.pipeline.to(self.device).unet.eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        options = {"height": self.image_size, "width": self.image_size, "num_inference_steps": 25, "output_type": "pt"}
        drawn = self.pipeline(self.prompts, generator=generator, **options).images
        self.pipeline.unet.train()
        return drawn.float()


if __name__ == "__main__":
    main()
