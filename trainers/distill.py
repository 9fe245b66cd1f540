"""Distil a teacher into a one-step student: `accelerate launch -m trainers.distill --config configs/X.yaml [a.b=value ...]`.

Writes <output_dir>/{config.yaml, environment.json, metrics.jsonl, timings.jsonl, samples/, checkpoints/, student/}.
"""

from __future__ import annotations

import copy

import torch

from pipelines.denoiser import Denoiser, OneStepGenerator
from pipelines.edm import EDMDecoder, EDMPipeline, EDMScheduler
from pipelines.images import ImageSet
from pipelines.provenance import versions
from pipelines.students import save_model

from . import setup
from .config import DistillConfig, Network, VarDiUConfig
from .config import Optimizer as OptimizerConfig
from .draws import DrawSource, derive_seed
from .loop import Trainer
from .objectives.amortized import AmortizedScore
from .objectives.base import Objective
from .objectives.diff_instruct import DiffInstruct
from .objectives.resampled import ResampledScore
from .objectives.vardiu import VarDiU
from .objectives.varflow import VarFlow
from .posteriors import COVARIANCES, UNetPosterior
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
    pipeline, student = build_student(config, teacher_pipeline)
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


def build_student(config: DistillConfig, teacher: EDMPipeline) -> tuple[EDMPipeline, OneStepGenerator]:
    """The student as the pipeline that is saved and as the generator that is trained: one network, started as the teacher's."""
    # The student runs without dropout: g(z) has to be one function of z for its posterior and its score to mean anything.
    unet = copy.deepcopy(teacher.unet).eval().requires_grad_(True)
    scheduler = EDMScheduler.from_config(
        teacher.scheduler.config, sigma_max=config.student.sigma_init, sampler="renoise", num_inference_steps=1
    )
    pipeline = EDMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, OneStepGenerator(pipeline.denoiser(), config.student.sigma_init, config.student.image_range)


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
    return build_vardiu(config, student, teacher), {"posterior": o.posterior.optimizer}


def build_vardiu(config: DistillConfig, student: OneStepGenerator, teacher: Denoiser) -> VarDiU:
    o: VarDiUConfig = config.objective
    p = o.posterior
    common = {
        "levels": o.levels.sampler(),
        "weighting": o.weighting,
        "num_samples": o.samples,
        "posterior_updates": p.updates,
        "warmup_updates": p.warmup_updates,
        "min_information": p.min_information,
    }
    parts = (student, teacher, build_posterior(config, teacher, with_mean=o.estimator == "amortized_score"))
    if o.estimator == "amortized_score":
        return AmortizedScore(*parts, **common, regression_weight=o.regression_weight, noise_draws=o.noise_draws)
    if o.estimator == "resampled_score":
        extra = {"target_ess": o.target_ess, "moves": o.moves, "ess_levels": o.ess_levels}
        return ResampledScore(*parts, **common, antithetic=o.antithetic, **extra)
    return VarDiU(*parts, **common, antithetic=o.antithetic, control_variate=o.control_variate)


def build_posterior(config: DistillConfig, teacher: Denoiser, with_mean: bool) -> UNetPosterior:
    """q starts as the prior and, where the network is the teacher's, x0_mean as the teacher's."""
    p, unet, shape = config.objective.posterior, teacher.network, teacher.network.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "init", "covariance"))
        covariance = COVARIANCES[p.covariance](
            (shape.in_channels, shape.sample_size, shape.sample_size), **p.covariance_options()
        )
    out_channels = UNetPosterior.num_channels(covariance, with_mean)
    if p.network == "shared":
        network = EDMDecoder(unet, out_channels)
    else:
        network = setup.build_unet(
            Network(**{k: shape[k] for k in Network.model_fields}) if p.network == "copy" else p.network,
            config.seed,
            "posterior",
            shape.sample_size,
            in_channels=shape.in_channels,
            out_channels=out_channels,
            num_classes=shape.num_classes,
        )
        if p.network == "copy":
            network.load_state_dict({k: v for k, v in unet.state_dict().items() if not k.startswith("conv_out.")}, strict=False)
    posterior = UNetPosterior(network, covariance, teacher.sigma_data, with_mean)
    if with_mean and p.network in ("shared", "copy"):
        posterior.start_mean(unet.conv_out)
    return posterior


if __name__ == "__main__":
    main()
