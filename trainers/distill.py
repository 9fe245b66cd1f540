"""Distil a teacher into a one-step student: `accelerate launch -m trainers.distill --config configs/X.yaml [a.b=value ...]`.

Writes <output_dir>/{config.yaml, environment.json, metrics.jsonl, timings.jsonl, samples/, checkpoints/, student/}.
"""

from __future__ import annotations

import copy

import torch

from pipelines.denoiser import Denoiser, OneStepGenerator
from pipelines.edm import EDMPipeline, EDMScheduler, EDMUNet
from pipelines.images import ImageSet
from pipelines.provenance import versions
from pipelines.students import save_model

from . import setup
from .config import DistillConfig, Network, VarDiUConfig
from .config import Optimizer as OptimizerConfig
from .draws import DrawSource
from .loop import Trainer
from .objectives.base import Objective
from .objectives.diff_instruct import DiffInstruct
from .objectives.vardiu import VarDiU
from .objectives.varflow import VarFlow
from .posteriors import UNetPosterior
from .teachers import load_edm_teacher


def main(argv: list[str] | None = None) -> None:
    try:
        run(setup.parse(DistillConfig, __doc__, argv))
    except setup.USER_ERRORS as error:
        setup.fail(error)


def run(config: DistillConfig) -> None:
    accelerator = setup.make_accelerator(config)
    teacher_pipeline = load_edm_teacher(config.teacher.path)
    setup.check_output(config, accelerator)
    data = setup.load_data(config.data) if config.data else None
    check_data(config, teacher_pipeline, data)
    teacher = teacher_pipeline.denoiser(config.teacher.guidance_scale).eval()
    shape = teacher_pipeline.unet.config
    # The student runs without dropout: g(z) has to be one function of z for its posterior and its score to mean anything.
    student_unet = copy.deepcopy(teacher_pipeline.unet).eval().requires_grad_(True)
    scheduler = EDMScheduler.from_config(
        teacher_pipeline.scheduler.config, sigma_max=config.student.sigma_init, sampler="renoise", num_inference_steps=1
    )
    pipeline = EDMPipeline(student_unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    student = OneStepGenerator(pipeline.denoiser(), config.student.sigma_init, config.student.image_range)
    objective, optimizers = build_objective(config, student, teacher)
    draws = DrawSource(
        config.seed,
        config.batch_size,
        (shape.in_channels, shape.sample_size, shape.sample_size),
        accelerator.device,
        data if objective.needs_data else None,
        shape.num_classes or 0,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        micro_batch_size=config.micro_batch_size,
    )
    facts = {
        "family": "edm",
        "base_model": config.teacher.path,
        "objective": config.objective.name,
        "estimator": getattr(config.objective, "estimator", None),
        "readout_sigma": config.student.sigma_init,
        "seed": config.seed,
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        "versions": versions(setup.PACKAGES),
    }
    trainer = Trainer(
        config,
        accelerator,
        objective,
        "student",
        {"student": config.student.optimizer} | optimizers,
        draws,
        preview=lambda path: setup.write_preview(pipeline, path, config.num_samples, config.seed),
        export=lambda folder, info: save_model(folder, pipeline, "student", facts | info),
        record=lambda: setup.record(config, accelerator),
    )
    trainer.fit()
    accelerator.end_training()


def check_data(config: DistillConfig, teacher: EDMPipeline, data: ImageSet | None) -> None:
    """The data must be what the teacher makes: same channels, resolution and classes."""
    if data is None:
        return
    unet = teacher.unet.config
    expected = (unet.in_channels, unet.sample_size, unet.sample_size)
    if tuple(data.pixels.shape[1:]) != expected:
        raise ValueError(
            f"data: images are {tuple(data.pixels.shape[1:])} (channels, height, width), the teacher {config.teacher.path!r} "
            f"makes {expected}; set data.image_size={unet.sample_size} and data.channels={unet.in_channels}, or another teacher"
        )
    if config.objective.name == "varflow" and (unet.num_classes or 0) != len(data.class_names):
        raise ValueError(
            f"data: {len(data.class_names)} classes, the teacher has {unet.num_classes or 0}; "
            "give labels for a class-conditional teacher and none for an unconditional one"
        )


def build_objective(
    config: DistillConfig, student: OneStepGenerator, teacher: Denoiser
) -> tuple[Objective, dict[str, OptimizerConfig]]:
    """The objective and the optimisers of its networks other than the student. The only place that lists objectives."""
    o = config.objective
    levels, sigma_data = o.levels.sampler(), teacher.sigma_data
    if o.name == "varflow":
        return VarFlow(student, teacher.schedule, levels, o.weighting, o.beta, o.cross, sigma_data), {}
    if o.name == "diff_instruct":
        f = o.fake_score
        fake = Denoiser(copy.deepcopy(teacher.network).train().requires_grad_(True), teacher.schedule, "edm", sigma_data)
        objective = DiffInstruct(
            student,
            teacher,
            fake,
            levels,
            f.levels.sampler(),
            o.weighting,
            f.weighting,
            f.updates,
            f.warmup_updates,
        )
        return objective, {"fake_score": f.optimizer}
    p = o.posterior
    network = build_posterior_unet(config, teacher.network)
    objective = VarDiU(
        student,
        teacher,
        UNetPosterior(network, p.covariance, sigma_data, is_calibrated(o)),
        levels,
        o.weighting,
        o.estimator,
        o.num_samples,
        o.calibration_weight,
        o.antithetic,
        o.control_variate,
        p.updates,
        p.warmup_updates,
        p.min_information,
    )
    return objective, {"posterior": p.optimizer}


def is_calibrated(objective: VarDiUConfig) -> bool:
    return objective.estimator == "resampled_score" and objective.calibrated


def build_posterior_unet(config: DistillConfig, teacher: EDMUNet) -> EDMUNet:
    """A U-Net with the posterior's output channels, whose last layer starts at zero: q starts as the prior."""
    network, shape = config.objective.posterior.network, teacher.config
    unet = setup.build_unet(
        network or Network(**{k: shape[k] for k in Network.model_fields}),
        config.seed,
        "posterior",
        shape.sample_size,
        in_channels=shape.in_channels,
        out_channels=UNetPosterior.num_channels(
            shape.in_channels, config.objective.posterior.covariance, is_calibrated(config.objective)
        ),
        num_classes=shape.num_classes,
    )
    if network is None:
        weights = {k: v for k, v in teacher.state_dict().items() if not k.startswith("conv_out.")}
        missing = unet.load_state_dict(weights, strict=False).missing_keys
        assert set(missing) == {"conv_out.weight", "conv_out.bias"}, missing
    return unet


if __name__ == "__main__":
    main()
