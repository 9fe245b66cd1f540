"""EDM teachers: one frozen network; students and scores are adapters on it or copies, posteriors decoders on its encoder too."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipelines.adapters import AdapterHead, Role, SharedNetwork, block_layers, last_layer, whole_copy
from pipelines.common.errors import UserError
from pipelines.common.identity import weights_sha256
from pipelines.common.reading import damaged_weights, loading, read_json, refuse_single_file
from pipelines.denoiser import Condition, Denoiser, FeatureMaps, FewStepGenerator
from pipelines.edm import EDMPipeline, EDMScheduler, EDMUNet, PatchUNet, PointNet
from pipelines.edm.features import second_decoder, with_outputs
from pipelines.noise import EDMSchedule
from pipelines.students import save_edm_student

from ..config.data import TEXT_DATA
from ..config.level_range import check_levels
from ..config.networks import Lora
from ..config.run import DistillConfig, Student, TeacherConfig
from ..data import augment, examples
from ..data.examples import Examples, Images, Labels, Points
from ..networks import build_unet
from ..posteriors import UNetPosterior
from ..posteriors.section import Posterior
from ..preview import preview
from . import base
from .base import Learner, add_role, build_covariance, refuse, unit_noise

Network = EDMUNet | PatchUNet | PointNet


class Family(base.Family):
    """See base.Family. Students run without dropout: g(z) has to be one function of z for its score to mean anything."""

    called = "an EDM teacher"
    teacher_keys, student_keys = ("path", "guidance_scale"), ("sigma_init", "steps", "inputs", "image_range", "lora")
    gives = ("lora", "augment", "posterior", "condition_vector", "features_of", "batch_proposals")

    def __init__(self, config: DistillConfig, accelerator: Accelerator | None = None) -> None:
        super().__init__(config, accelerator)
        pipeline = load_edm_teacher(config.teacher.source)
        self._of_teacher = pipeline.denoiser(config.teacher.guidance_scale)
        grid = pipeline.scheduler.config
        low = grid["sigma_min"]
        self.sampling_range = (low, grid["sigma_max"])
        check_levels(config, self._of_teacher.schedule, self.sampling_range)
        shape, lora = pipeline.unet.config, config.student.lora
        self.latent_shape = (shape["in_channels"], shape["sample_size"], shape["sample_size"])
        self.num_classes = shape["num_classes"] or 0
        for need in config.objective.needs():
            if need.what == "condition_vector" and need.value and not self.num_classes:
                raise UserError(f"{need.key} has no effect: the teacher is unconditional; remove it")
        if config.data:
            data = examples.load_data(config.data)
            self._check_data(data)
            self.examples = data
        else:
            self.examples = Labels(self.num_classes) if self.num_classes else None
        base_weights = weights_sha256({"unet": pipeline.unet})
        self.base = SharedNetwork(pipeline.unet)
        self.teacher = self._denoiser(self.base.teacher(), guided=True)
        scheduler, levels = self._sampler(pipeline.scheduler, config.student)
        network = self._role("student", lora)
        self.pipeline = EDMPipeline(pipeline.unet if isinstance(network, Role) else network, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        points = isinstance(self.base.network, PointNet)
        if points:
            refuse("a teacher of points", {"student.image_range": config.student.image_range, "evaluation": config.evaluation})
        image_range = not points and config.student.image_range is not False
        self.student = FewStepGenerator(self._denoiser(network), levels, image_range, config.inputs)
        self.facts = {"family": "edm", "weights": "lora" if lora else "unet", "readout_sigma": levels[0]}
        if len(levels) > 1:
            self.facts["levels"] = levels
        self.facts |= {"base_weights": base_weights, "base_dtype": "float32"}

    @classmethod
    def check(cls, config: DistillConfig) -> None:
        if isinstance(config.data, TEXT_DATA):
            takes = "an EDM teacher takes digits, parquet, hub or folder"
            raise UserError(f"data: {config.data.name!r} is for Stable Diffusion teachers; {takes}")
        super().check(config)
        posterior = getattr(config.objective, "posterior", None)
        if posterior is not None and posterior.network == "shared" and posterior.lora != Lora():
            raise UserError(f"objective.posterior.lora has no effect for {cls.called} with network=shared; remove it")
        if not config.objective.built.needs_data:
            refuse(f"{cls.called} and objective {config.objective.name!r}, which need no data", {"data": config.data})

    def _sampler(self, teacher: EDMScheduler, student: Student) -> tuple[EDMScheduler, list[float]]:
        """The student's, and its levels, each the nearest that the teacher knows."""
        steps, sigma_init = student.steps, 2.5 if student.sigma_init is None else student.sigma_init
        if isinstance(steps, list):
            levels = [self._known_level("student.steps", sigma) for sigma in steps]
            return teacher.for_student(levels, levels[0]), levels
        sigma_init = self._known_level("student.sigma_init", sigma_init)
        made = teacher.for_student(steps, sigma_init)
        return made, [sigma_init] if steps == 1 else made.default_sigmas().tolist()

    def _known_level(self, key: str, sigma: float) -> float:
        known = self._of_teacher.preconditioner
        low, high = known.sigma_range
        if not low <= sigma <= high:
            raise UserError(f"{key}: {sigma:g} is outside the teacher's noise levels, {low:g} to {high:g}")
        return float(known.nearest(torch.tensor(sigma, dtype=torch.float64)))

    def _denoiser(self, network: nn.Module, guided: bool = False) -> Denoiser:
        """A network behind the teacher's preconditioning."""
        b = self._of_teacher
        guidance = (b.guidance_scale, b.null_condition) if guided else ()
        return Denoiser(network, b.schedule, b.preconditioner, b.sigma_data, *guidance)

    def _role(self, name: str, lora: Lora | None) -> Role | Network:
        """An adapter on the teacher's weights, or a copy of them."""
        return self._copy() if lora is None else self._adapter(name, lora)

    def _copy(self) -> Network:
        """Of the teacher's network, to be trained."""
        made = whole_copy(self.base.network)
        if not isinstance(made, EDMUNet | PatchUNet | PointNet):
            raise ValueError(f"an EDM teacher has no {type(made).__name__}")
        return made

    def _adapter(self, name: str, lora: Lora) -> Role:
        return add_role(self.base, name, lora, block_layers(self.base.network), self.config.seed)

    def _check_data(self, given: Images | Points) -> None:
        """The data must be what the teacher makes: same channels, resolution and classes."""
        if given.shape != self.latent_shape:
            raise UserError(
                f"data: images are {given.shape} (channels, height, width), the teacher "
                f"{self.config.teacher.path!r} makes {self.latent_shape}; set data.image_size={self.latent_shape[1]} and "
                f"data.channels={self.latent_shape[0]}, or another teacher"
            )
        if self.num_classes != len(given.class_names):
            raise UserError(
                f"data: {len(given.class_names)} classes, the teacher has {self.num_classes}; "
                "give labels for a class-conditional teacher and none for an unconditional one"
            )

    def features(self) -> FeatureMaps:
        """Without guidance: x_t of either side is compared under its own label."""
        return FeatureMaps(self._denoiser(self.base.teacher()), (self.base.network.bottom,))

    def features_of(self, path: str) -> FeatureMaps:
        return feature_maps(path, self)

    def fake_score(self, section: Any) -> Denoiser:
        """A copy trains with the teacher's dropout."""
        labels = self.base.network.config.get("augment_dim", 0)
        if section.augment and labels != augment.DIM:
            raise UserError(
                f"objective.fake_score.augment: the teacher has augment_dim={labels}, {augment.DIM} are needed; set it to 0"
            )
        return self._denoiser(self._role("aux", section.lora).train())

    def posterior(self, section: Posterior, with_mean: bool) -> UNetPosterior:
        p, own, known = section, self.base.network, self._of_teacher
        covariance = build_covariance(p, self.config.seed, self.latent_shape)
        out_channels = UNetPosterior.num_channels(covariance, with_mean)
        if isinstance(p.network, str):
            make: dict[str, Callable[[], nn.Module]] = {
                "shared": lambda: second_decoder(self._copy().dec, out_channels),
                "copy": lambda: with_outputs(self._copy(), out_channels),
                "adapter": lambda: AdapterHead(self._adapter("aux", p.lora), out_channels),
            }
            posterior = UNetPosterior(make[p.network](), covariance, known.sigma_data, with_mean, known.preconditioner)
            if with_mean:
                posterior.start_mean(last_layer(own))
            return posterior
        channels, size, _ = self.latent_shape
        shape = {"in_channels": channels, "out_channels": out_channels, "num_classes": self.num_classes}
        network = build_unet(p.network, self.config.seed, "posterior", size, **shape)
        return UNetPosterior(network, covariance, known.sigma_data, with_mean)

    def preview(self) -> Tensor:
        with self.base.running("student" if self.config.student.lora else None):
            return preview(self.pipeline, self.config.num_samples, self.config.seed)

    @torch.no_grad()
    def images(self, index: range) -> Tensor:
        z = unit_noise(self.config, index, self.latent_shape).to(self.device)
        condition = self.condition(torch.tensor(index))
        return self.decode(self.student.sample(z, condition and {k: v.to(self.device) for k, v in condition.items()}))

    @classmethod
    def in_training(cls, config: TeacherConfig, accelerator: Accelerator) -> Learner:
        return NewTeacher(config)

    @classmethod
    def network_of(cls, path: str, dtype: torch.dtype, variant: str | None) -> nn.Module:
        return load_edm_teacher(path).unet

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        save_edm_student(folder, self.pipeline, info, "student" if self.config.student.lora else None)


class NewTeacher:
    """A new EDM network on an image set. See base.Learner."""

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        scheduler = EDMScheduler(
            sigma_data=config.sigma_data,
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            num_inference_steps=config.sampling_steps,
        )
        scheduler.sigmas(config.sampling_steps)  # a grid that cannot be sampled is an error now
        check_levels(config, EDMSchedule(0.0, math.inf), (config.sigma_min, config.sigma_max))
        data = examples.load_data(config.data)
        self.examples: Examples = data
        self.latent_shape = data.shape
        channels, size = self.latent_shape[:2]
        num_classes = len(data.class_names)
        shape = {"in_channels": channels, "out_channels": channels, "num_classes": num_classes}
        if config.augment:
            shape["augment_dim"] = augment.DIM
        if config.network is None:
            raise ValueError("network: a new teacher needs one")
        self.unet = build_unet(config.network, config.seed, "teacher", size, **shape)
        self.pipeline = EDMPipeline(self.unet, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.denoiser = self.pipeline.denoiser().train()
        self.null_condition: Condition = {"class_labels": torch.tensor(num_classes)}
        self.facts: dict[str, Any] = {"image_size": size, "class_names": list(data.class_names)}

    def preview(self) -> Tensor:
        self.unet.eval()
        drawn = preview(self.pipeline, self.config.num_samples, self.config.seed)
        self.unet.train()
        return drawn


def load_edm_teacher(path: str, key: str = "teacher.path") -> EDMPipeline:
    """An EDMPipeline folder, or the output_dir of train_teacher that holds one in teacher/. key: the setting that names it.

    FileNotFoundError / ValueError name what is missing or damaged, before anything is loaded.
    """
    folder = Path(path)
    refuse_single_file(folder, key)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{key}: no such folder {path!r}; train one with `accelerate launch -m trainers.train_teacher "
            "--config configs/digits_teacher.yaml` or give an EDMPipeline folder"
        )
    if not (folder / "model_index.json").is_file() and (folder / "teacher").is_dir():
        folder = folder / "teacher"
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{key}: {str(folder)!r} is not an EDMPipeline folder: it has no {name}")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(
            f"{key}: {str(folder)!r} has no weights: expected {weights.name} in unet/ (safetensors; pickles are refused)"
        )
    again = "copy or train it again"
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        try:
            read_json(folder / name, again)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    named = read_json(folder / "model_index.json", again).get("unet")
    networks = {cls.__name__: cls for cls in (EDMUNet, PatchUNet, PointNet)}
    if not isinstance(named, list) or named[-1] not in networks:
        raise UserError(f"{key}: {str(folder)!r} has {named!r} as unet; expected one of {', '.join(networks)}")
    network = networks[named[-1]]
    try:
        with safe_open(weights, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{key}: {damaged_weights(weights, error)}") from error
    with loading(f"{key}: {str(folder / 'unet' / 'config.json')!r} makes no network", again), torch.device("meta"):
        expected = {n: tuple(t.shape) for n, t in network.from_config(network.load_config(folder / "unet")).state_dict().items()}
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            raise UserError(
                f"{key}: {str(weights)!r} does not fit its config.json: {name} is {stored.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such tensor')}; copy or train it again"
            )
    with loading(f"{key}: {str(folder)!r} cannot be loaded", again):
        return EDMPipeline.from_pretrained(folder, use_safetensors=True)


def feature_maps(path: str, models: base.Family) -> FeatureMaps:
    """Maps of another trained EDM network, for a student of the same shape; those of an unconditional one are of x_t alone.

    FileNotFoundError / UserError, by name, where there is none, or it is of other images, classes or noise levels.
    """
    key = "objective.features"
    pipeline = load_edm_teacher(path, key)
    shape, denoiser = pipeline.unet.config, pipeline.denoiser()
    made, classes = (shape["in_channels"], shape["sample_size"], shape["sample_size"]), shape["num_classes"] or 0
    if made != models.latent_shape:
        wanted = f"the student's are {models.latent_shape}"
        raise UserError(f"{key}: the network in {path!r} is of images of {made} (channels, height, width), {wanted}")
    if classes not in (0, models.num_classes):
        raise UserError(f"{key}: the network in {path!r} knows {classes} classes, the student {models.num_classes}")
    try:
        check_levels(models.config, denoiser.schedule)
    except UserError as error:
        raise UserError(f"{key}: {path!r}: {error}") from error
    return FeatureMaps(denoiser, (pipeline.unet.bottom,), conditional=bool(classes))
