"""Train a teacher: a small EDM network on images or points, or the network of a Stable Diffusion pipeline further, on captions.

    accelerate launch -m trainers.train_teacher --config configs/digits_teacher.yaml [a.b=value ...]

Writes <output_dir>/teacher, a pipeline folder that `trainers.distill` and `from_pretrained` take.
"""

from __future__ import annotations

import torch

from pipelines.common.errors import UserError
from pipelines.common.launch import user_errors
from pipelines.common.provenance import git_commit, versions
from pipelines.students import save_model

from . import command
from .config import level_range
from .config.run import TeacherConfig
from .engine.draws import DrawSource
from .engine.loop import Trainer
from .families import family_for
from .objectives.denoising import Denoising


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        run(command.parse(TeacherConfig, __doc__, argv))


def run(config: TeacherConfig) -> None:
    accelerator = command.make_accelerator(config)
    if command.sharded():
        raise UserError("FSDP shards frozen weights, and a teacher in training has none; use configs/accelerate/gpu_8.yaml")
    command.check_output(config, accelerator)
    teacher = family_for(config).in_training(config, accelerator)
    drawn = level_range.sampler(config.levels, config.steps, teacher.denoiser.schedule.t_range)
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
    facts |= {"versions": versions(command.PACKAGES), "git_commit": git_commit()}
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
        record=lambda start: command.record(config, accelerator, start),
        page=command.page(config, objective.health),
    )
    trainer.fit()
    accelerator.end_training()


if __name__ == "__main__":
    main()
