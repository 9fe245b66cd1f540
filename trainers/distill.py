"""Distil a teacher into a one-step student, or train one from scratch, without a teacher.

`accelerate launch -m trainers.distill --config configs/X.yaml [a.b=value ...]`

Writes <output_dir>/{config.yaml, environment.json, history.jsonl, metrics.jsonl, timings.jsonl,
pictures.jsonl, report.html, samples/, checkpoints/, student/}.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipelines.common.errors import UserError
from pipelines.common.launch import user_errors
from pipelines.common.provenance import git_commit, versions

from . import command
from .config.data import TEXT_DATA
from .config.run import DistillConfig
from .data.sources import load_rows
from .engine.draws import DrawSource
from .engine.loop import Trainer
from .engine.pictures import Watch
from .families import family_for, teacher_folder
from .families.base import Family


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        run(command.parse(DistillConfig, __doc__, argv))


def run(config: DistillConfig) -> None:
    trainer = make_trainer(config)
    trainer.fit()
    trainer.accelerator.end_training()


def make_trainer(config: DistillConfig) -> Trainer:
    """All of a run, ready to start; nothing has been written yet."""
    accelerator = command.make_accelerator(config)
    family = family_for(config)
    command.check_output(config, accelerator)
    planned = plan_evaluation(config)  # weights that are missing are an error now, not when a teacher has been loaded
    models = family(config, accelerator)
    objective = config.objective.build(models, config.steps)
    if command.sharded():
        models.shard()
    draws = DrawSource(
        config.seed,
        config.batch_size,
        models.latent_shape,
        accelerator.device,
        models.examples,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        micro_batch_size=config.micro_batch_size,
    )
    exact = f"exact {config.teacher.exact}" if config.teacher.exact else None  # null: from scratch
    facts = models.facts | {
        "base_model": teacher_folder(config.teacher.path) if config.teacher.path else exact,
        "objective": config.objective.name,
        "estimator": getattr(config.objective, "estimator", None),
        "seed": config.seed,
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        "versions": versions(command.PACKAGES),
        "git_commit": git_commit(),
    }
    return Trainer(
        config,
        accelerator,
        objective,
        "student",
        {"student": config.student.optimizer} | config.objective.optimizers(),
        draws,
        preview=models.preview,
        export=lambda folder, info: models.export(folder, facts | info),
        record=lambda start: command.record(config, accelerator, start),
        evaluate=build_evaluation(config, planned, models, accelerator) if planned else None,
        evaluate_every=config.evaluation.every if config.evaluation else 0,
        watch=build_watch(config, models, accelerator),
        page=command.page(config, objective.health),
    )


def build_watch(config: DistillConfig, models: Family, accelerator: Accelerator) -> Watch | None:
    """Points are no pictures: theirs is a map of where they lie."""
    points = models.latent_shape[1:] == (1, 1)
    return Watch(models, config.seed, accelerator.device) if config.sample_every and not points else None


def plan_evaluation(config: DistillConfig) -> Any:
    """What the evaluations of this run need, or None. This command is the only place outside scripts/ that knows eval/."""
    if config.evaluation is None:
        return None
    from eval.in_training import make_plan

    return make_plan(config.evaluation.model_dump())


def build_evaluation(
    config: DistillConfig, planned: Any, models: Family, accelerator: Accelerator
) -> Callable[[int], dict[str, float]]:
    """Image i is of prompt i, from the first again where there are fewer."""
    from eval.in_training import InTraining

    captions, e = None, config.evaluation
    if e is None:
        raise ValueError("evaluation: this run has none")
    if "clip_score" in e.metrics:
        if not isinstance(config.data, TEXT_DATA):
            raise UserError("evaluation.metrics: clip_score needs prompts, which this data has not")
        prompts = load_rows(config.data).prompts
        captions = [prompts[i % len(prompts)] for i in range(e.num_images)]
    return InTraining(planned, e.model_dump(), models.images, accelerator, captions, Path(config.output_dir))


if __name__ == "__main__":
    main()
