"""Train a small EDM teacher: `accelerate launch -m trainers.train_teacher --config configs/digits_teacher.yaml [a.b=value ...]`.

Writes <output_dir>/teacher, an EDMPipeline folder that `trainers.distill` and `EDMPipeline.from_pretrained` take.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.edm import EDMPipeline, EDMScheduler
from pipelines.students import save_model

from . import setup
from .config import TeacherConfig
from .draws import DrawSource
from .loop import Trainer
from .objectives.denoising import Denoising


def main(argv: list[str] | None = None) -> None:
    try:
        run(setup.parse(TeacherConfig, __doc__, argv))
    except setup.USER_ERRORS as error:
        setup.fail(error)


def run(config: TeacherConfig) -> None:
    accelerator = setup.make_accelerator(config)
    setup.check_output(config, accelerator)
    data = setup.load_data(config.data)
    channels, size = data.pixels.shape[1:3]
    num_classes = len(data.class_names)
    unet = setup.build_unet(
        config.network,
        config.seed,
        "teacher",
        size,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
    )
    scheduler = EDMScheduler(
        sigma_data=config.sigma_data,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        num_inference_steps=config.sampling_steps,
    )
    pipeline = EDMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    objective = Denoising(pipeline.denoiser().train(), config.levels.sampler(), config.weighting)
    draws = DrawSource(
        config.seed,
        config.batch_size,
        (channels, size, size),
        accelerator.device,
        data,
        num_classes,
        config.label_dropout if num_classes else 0.0,
        accelerator.process_index,
        accelerator.num_processes,
        config.micro_batch_size,
    )
    facts = {"device": str(accelerator.device), "threads": torch.get_num_threads()} | {
        "objective": "denoising",
        "data": config.data.name,
        "image_size": size,
        "class_names": list(data.class_names),
    }

    def preview(path: Path) -> None:
        unet.eval()
        setup.write_preview(pipeline, path, config.num_samples, config.seed)
        unet.train()

    trainer = Trainer(
        config,
        accelerator,
        objective,
        "teacher",
        {"teacher": config.optimizer},
        draws,
        preview,
        export=lambda folder, info: save_model(folder, pipeline, "teacher", facts | info),
        record=lambda: setup.record(config, accelerator),
    )
    trainer.fit()
    accelerator.end_training()


if __name__ == "__main__":
    main()
