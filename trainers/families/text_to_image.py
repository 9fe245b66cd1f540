"""Text-to-image teachers of any kind (pipelines.text_to_image): one frozen network, adapters for every other role, text and
images encoded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator, init_empty_weights
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from pipelines import kinds
from pipelines import text_to_image as t2i
from pipelines.adapters import AdapterHead, Role, SharedNetwork, Whole, check_targets, in_float32, whole_copy
from pipelines.common.errors import UserError
from pipelines.common.identity import weights_sha256
from pipelines.denoiser import Condition, Denoiser, FeatureMaps, FewStepGenerator, check_readout
from pipelines.kinds import Kind
from pipelines.last_blocks import LastBlocks, last_part, layers_of_last_part
from pipelines.students import save_text_to_image
from pipelines.up_half import UpDenoiser, UpHalf

from ..cache import Encoded
from ..command import sharded
from ..config.data import TEXT_DATA
from ..config.level_range import check_levels
from ..config.networks import Lora, Network
from ..config.run import DistillConfig, TeacherConfig
from ..data.examples import Examples, evenly
from ..engine.draws import derive_seed
from ..objectives.base import Need
from ..posteriors import UNetPosterior
from ..posteriors.section import Posterior
from . import base, teacher_folder
from .base import Given, Learner, add_role, build_covariance, refuse, unit_noise
from .encoding import encode

U = TypeVar("U", UNet2DConditionModel, UNet2DModel)


class Family(base.Family):
    """See base.Family. kind: what the teacher is; `of` makes the class of one."""

    kind: ClassVar[Kind]
    examples: Examples
    teacher_keys: ClassVar[tuple[str, ...]] = (
        "path",
        "guidance_scale",
        "guidance_normalization",
        "negative_prompt",
        "dtype",
        "variant",
    )
    gives = ("lora", "last_part", "posterior", "condition_vector")

    @classmethod
    def of(cls, kind: Kind) -> type[Family]:
        """The family of a kind of teachers."""
        keys = (*(("readout_t",) if kind.any_readout else ()), "steps", "inputs", "lora")
        own = {"kind": kind, "called": kind.called, "component": kind.component, "student_keys": keys}
        return type(f"{type(kind).__name__}Family", (cls,), own)

    def __init__(self, config: DistillConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        t, kind = config.teacher, self.kind
        path = teacher_folder(t.source)
        index = t2i.read_index(path)
        self.network_config = t2i.network_config(path, kind)
        self.check_guidance(config, self.network_config)
        self.check_targets(config)
        t2i.check_parts(path)  # before its text encoders work, which may take hours
        scheduler = t2i.load_scheduler(path)
        schedule = kind.schedule(scheduler)
        check_levels(config, schedule)
        self.sampling_range = schedule.t_range
        self.levels = self._levels(config, scheduler)
        for timestep in self.levels:
            check_readout(schedule, timestep)
        kind.check_steps(scheduler, self.levels)
        self.num_classes = kind.num_classes(self.network_config)
        rows = self.given(config, accelerator)
        self.examples, self.latent_shape, null = rows.examples, rows.shape, rows.null
        kept = {kind.component, "scheduler"} | ({"vae"} if config.sample_every or config.evaluation else set())
        left_out = [k for k in index if not k.startswith("_") and k not in kept]
        self.pipe = t2i.load_pipeline(path, t2i.DTYPES[t.dtype], left_out, t.variant)
        network = kinds.network_of(self.pipe)
        base_weights = weights_sha256({kind.component: network})
        self.base = SharedNetwork(network, kind.anatomy(self.network_config, t.guidance_scale))
        guided = kind.guidance(self.network_config) == "null"
        keep_norm = self.base.anatomy.side if t.guidance_normalization else None
        self.teacher = t2i.denoiser(self.pipe, self.base.teacher(), t.guidance_scale if guided else 1.0, null, keep_norm)
        role = self._role("student", config.student.lora)
        self.trained = role.network if isinstance(role, Whole) else None
        self.student = FewStepGenerator(t2i.denoiser(self.pipe, role), self.levels, inputs=config.inputs)
        if getattr(self.pipe, "vae", None) is not None:
            self.pipe.vae.to(self.device)  # type: ignore[arg-type]  # diffusers' wrapper of it hides its arguments
        self.facts = {
            "family": kinds.family_name(self.pipe),
            "weights": "lora" if config.student.lora else kind.component,
            "readout_t": self.levels[0],
            **({"levels": self.levels} if len(self.levels) > 1 else {}),
            "guidance_scale": t.guidance_scale,
            "image_size": rows.image_size,
            "base_weights": base_weights,
            "base_dtype": t.dtype,
        }
        if without := list(t2i.absent_text(index)):
            self.facts["without"] = without

    @classmethod
    def check(cls, config: DistillConfig) -> None:
        if config.compile and sharded():
            raise UserError("compile: FSDP and compiled blocks do not go together; set compile: null, or use gpu_8.yaml")
        super().check(config)
        if config.teacher.guidance_scale == 1:
            unguided = "a teacher without guidance (guidance_scale 1)"
            settings = {key: getattr(config.teacher, key) or None for key in ("negative_prompt", "guidance_normalization")}
            refuse(unguided, {f"teacher.{key}": value for key, value in settings.items()})
        cls.check_data(config)
        if getattr(config.objective, "features", None) and not cls.kind.has_features:
            raise UserError(f"objective.features: {cls.called} has no feature maps; remove it")

    @classmethod
    def check_data(cls, config: DistillConfig) -> None:
        """UserError for data that this teacher has no use for, or lacks."""
        if not isinstance(config.data, TEXT_DATA):
            raise UserError(cls.no_text())

    @classmethod
    def no_text(cls) -> str:
        return f"data: {cls.called} needs data.name prompts, captions or teacher_samples"

    @classmethod
    def check_guidance(cls, config: DistillConfig, network: Mapping[str, Any]) -> None:
        """UserError for guidance that a network of these settings does not have."""
        t, guidance = config.teacher, cls.kind.guidance(network)
        if guidance == "none" and t.guidance_scale != 1:
            raise UserError(
                f"teacher.guidance_scale: {t.guidance_scale:g}, and this teacher has no guidance: its {cls.kind.component} is "
                "not told one (guidance_embeds is false); remove it"
            )
        if guidance != "null":
            given = {"negative_prompt": t.negative_prompt, "guidance_normalization": t.guidance_normalization or None}
            refuse("a teacher without a null condition", {f"teacher.{key}": value for key, value in given.items()})

    @classmethod
    def refusal(cls, need: Need) -> str | None:
        if need.what != "posterior" or need.value in ("adapter", "shared"):
            return super().refusal(need)
        if not isinstance(need.value, Network):
            kind = repr(need.value) if isinstance(need.value, str) else "a section of this kind"
            return (
                f"{need.key}: {kind} is for EDM teachers; set shared, adapter, or a section {{channels: ..., channel_mult: "
                "[...]} for a small network of its own"
            )
        for key in ("patch_size", "dropout"):
            if getattr(need.value, key) != Network.model_fields[key].default:
                return f"{need.key}.{key} has no effect for {cls.called}; remove it"
        return None

    @classmethod
    def _levels(cls, config: DistillConfig, scheduler: Any) -> list[float]:
        """Those of the student's steps. scheduler: the teacher's."""
        steps, readout_t = config.student.steps, config.student.readout_t
        if isinstance(steps, int):
            return [readout_t] if readout_t is not None else cls.kind.student_levels(scheduler, steps)
        if not cls.kind.whole_levels:
            return list(steps)
        if odd := [t for t in steps if t != int(t)]:
            raise UserError(f"student.steps: {odd[0]:g} is no timestep; {config.teacher.path!r} knows whole ones")
        return [int(t) for t in steps]

    def _role(self, name: str, lora: Lora | None) -> Role | Whole:
        """An adapter on the teacher's weights, or a network of its own in float32."""
        if lora is None:
            return Whole(whole_copy(self.base.network), self.base.anatomy)
        return add_role(self.base, name, lora, self.kind.layers, self.config.seed)

    def fake_score(self, section: Any) -> Denoiser | UpDenoiser:
        if section.network == "shared":
            part = self.last_part(section.lora or Lora(), self.latent_shape[0], "objective.fake_score.lora.targets")
            return UpDenoiser(part, self.teacher)
        return t2i.denoiser(self.pipe, self._role("aux", section.lora))

    def last_part(self, lora: Lora, out_channels: int, key: str) -> UpHalf | LastBlocks:
        """The way up of the teacher's U-Net, or the last third of its transformer's blocks, under an adapter of its own. key: of
        the adapter's targets, in messages.
        """
        layers = self.last_layers(self.base.network, lora, key)
        role = add_role(self.base, "aux", lora.model_copy(update={"targets": layers}), layers, self.config.seed)
        return last_part(role, out_channels)

    def last_layers(self, network: ModelMixin, lora: Lora, key: str) -> list[str]:
        """The layers of that part that an adapter lies on; UserError where its targets fit none."""
        anatomy = self.kind.anatomy(self.network_config, 1.0)
        layers = layers_of_last_part(network, anatomy, tuple(lora.targets or self.kind.layers))
        if not layers:
            where = "last third of the blocks" if anatomy.repeats else "up blocks"
            raise UserError(f"{key}: none of {lora.targets} is a layer of the {where}")
        return layers

    def check_targets(self, config: DistillConfig) -> None:
        """UserError for targets of adapters that fit no layer: on a network without weights, before anything is encoded."""
        with init_empty_weights():
            network = self.kind.network.from_config(dict(self.network_config))  # type: ignore[attr-defined]  # of ConfigMixin, as they all are
        roles = {"objective." + key: getattr(config.objective, key, None) for key in ("fake_score", "posterior")}
        loras = [config.student.lora]
        for key, section in roles.items():
            if section is not None and section.network == "shared":
                self.last_layers(network, section.lora or Lora(), f"{key}.lora.targets")
            elif section is not None and section.network in (None, "adapter"):
                loras.append(section.lora)
        for lora in loras:
            check_targets(network, (lora and lora.targets) or ())

    def features(self) -> FeatureMaps:
        """Without guidance: x_t of either side is compared under its own condition."""
        layers = self.kind.feature_layers(self.base.network)
        return FeatureMaps(t2i.denoiser(self.pipe, self.base.teacher()), layers)

    def posterior(self, section: Posterior, with_mean: bool) -> UNetPosterior:
        p = section
        covariance = build_covariance(p, self.config.seed, self.latent_shape)
        out_channels = UNetPosterior.num_channels(covariance, with_mean)
        network: AdapterHead | SmallUNet | UpHalf
        if p.network == "shared":
            network = self.last_part(p.lora, out_channels, "objective.posterior.lora.targets")
        elif isinstance(p.network, Network):
            network = self.small_network(p.network, out_channels, derive_seed(self.config.seed, "init", "posterior"))
        else:
            network = AdapterHead(add_role(self.base, "aux", p.lora, self.kind.layers, self.config.seed), out_channels)
        posterior = UNetPosterior(network, covariance, self.teacher.sigma_data, with_mean, self.teacher.parameterization)
        if with_mean and not isinstance(network, SmallUNet):
            posterior.start_mean(network.replaced)
        return posterior

    def small_network(self, section: Network, out_channels: int, seed: int) -> SmallUNet:
        """With the widths of a `network` section; its last layer starts at zero."""
        width = self.kind.text_width(self.network_config)
        blocks = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
        shape = (section, self.latent_shape, out_channels, seed)
        unet = small_unet(UNet2DConditionModel, *shape, *blocks, cross_attention_dim=width)
        return SmallUNet(unet, self.kind.time_scale, "encoder_hidden_states")

    @torch.no_grad()
    def preview(self) -> Tensor:
        """The student's images of the rows that are shown."""
        images = []
        for start, index in enumerate(self.shown(self.config.num_samples).split(8)):
            generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "preview", 8 * start))
            z = torch.randn(self.student.steps, len(index), *self.latent_shape, generator=generator).to(self.device)
            images.append(self.decode(self.student.sample(z, self.condition(index))).cpu())
        return torch.cat(images)

    def shown(self, count: int) -> Tensor:
        return evenly(count, len(self.examples))

    def condition(self, rows: Tensor) -> Condition:
        condition = self.examples.rows(rows % len(self.examples))[1]
        return condition and {k: v.to(self.device) for k, v in condition.items()}

    def decode(self, x0: Tensor) -> Tensor:
        return t2i.decode_latents(self.pipe.vae, x0) / 2 + 0.5

    @torch.no_grad()
    def images(self, index: range) -> Tensor:
        z = unit_noise(self.config, index, self.latent_shape).to(self.device)
        return self.decode(self.student.sample(z, self.condition(torch.tensor(index)))).cpu()

    def given(self, config: DistillConfig, accelerator: Accelerator) -> Given:
        """The rows to distil on."""
        return self.encoded(config, accelerator)

    @classmethod
    def in_training(cls, config: TeacherConfig, accelerator: Accelerator) -> Learner:
        return FurtherTeacher(cls, config, accelerator)

    @classmethod
    def network_of(cls, path: str, dtype: torch.dtype, variant: str | None) -> nn.Module:
        return kinds.network_of(t2i.load_pipeline(teacher_folder(path), dtype, t2i.TEXT_AND_IMAGES, variant))

    @classmethod
    def encoded(cls, config: DistillConfig | TeacherConfig, accelerator: Accelerator) -> Encoded:
        data = config.data
        if not isinstance(data, TEXT_DATA):
            raise UserError(cls.no_text())
        folder = Path(data.cache or f"{config.output_dir}/cache")
        if isinstance(config, TeacherConfig):
            return encode(pipeline_of(config), data, folder, accelerator, torch.float32, seed=config.seed)
        t = config.teacher
        options = {"negative_prompt": t.negative_prompt, "variant": t.variant, "seed": config.seed}
        return encode(teacher_folder(t.source), data, folder, accelerator, t2i.DTYPES[t.dtype], **options)

    def shard(self) -> None:
        self.base.shard()

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        scheduler = self.kind.student_scheduler(self.pipe.scheduler, self.levels)
        if self.config.student.lora:
            save_text_to_image(folder, type(self.pipe), scheduler, info, adapter=(self.base.network, "student"))
        else:
            save_text_to_image(folder, type(self.pipe), scheduler, info, network=self.trained)


class SmallUNet(nn.Module):
    """A small U-Net of its own that reads x_t, t and one part of the condition; the others are left to the teacher."""

    def __init__(self, network: UNet2DConditionModel | UNet2DModel, time_scale: float, reads: str) -> None:
        super().__init__()
        self.network, self.out_channels, self.time_scale, self.reads = network, network.config["out_channels"], time_scale, reads

    @property
    def conv_out(self) -> nn.Conv2d:
        return self.network.conv_out

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        read = condition[self.reads]
        read = read.to(x_t.dtype) if read.is_floating_point() else read
        with in_float32(self.network.conv_out):
            return self.network(x_t, self.time_scale * t, **{self.reads: read}).sample


def small_unet(
    kind: type[U],
    network: Network,
    shape: tuple[int, int, int],
    out_channels: int,
    seed: int,
    down: str,
    up: str,
    **more: Any,
) -> U:
    """One of diffusers' U-Nets with the widths of a `network` section; its last layer starts at zero. down, up: its blocks with
    attention.
    """
    attends = [i in network.attention_levels for i in range(len(network.channel_mult))]
    widths = tuple(network.channels * m for m in network.channel_mult)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = kind(
            sample_size=shape[1],
            in_channels=shape[0],
            out_channels=out_channels,
            down_block_types=tuple(down if attention else "DownBlock2D" for attention in attends),
            up_block_types=tuple(up if attention else "UpBlock2D" for attention in reversed(attends)),
            block_out_channels=widths,
            layers_per_block=network.num_blocks,
            norm_num_groups=next(g for g in (32, 16, 8, 4, 2, 1) if all(w % g == 0 for w in widths)),
            **more,
        )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


class FurtherTeacher:
    """The network of a text-to-image pipeline, all of its weights, on encoded images and captions. See base.Learner."""

    def __init__(self, family: type[Family], config: TeacherConfig, accelerator: Accelerator) -> None:
        self.config, self.device = config, accelerator.device
        source = pipeline_of(config)
        t2i.check_parts(source)  # before its text encoders work, which may take hours
        check_levels(config, family.kind.schedule(t2i.load_scheduler(source)))
        encoded = family.encoded(config, accelerator)
        self.examples, self.latent_shape, self.null_condition = encoded.examples, encoded.shape, encoded.null
        self.pipeline = t2i.load_pipeline(source)
        self.network = kinds.network_of(self.pipeline).requires_grad_(True).train()
        self.denoiser = t2i.denoiser(self.pipeline, Whole(self.network, family.kind.anatomy(self.network.config, 1.0)))
        self.prompts = [encoded.prompts[i] for i in evenly(config.num_samples, len(encoded.prompts))]
        self.image_size = encoded.image_size
        self.facts = {"image_size": encoded.image_size, "base_model": config.pipeline}

    @torch.no_grad()
    def preview(self) -> Tensor:
        self.pipeline.to(self.device)
        self.network.eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        options = {"height": self.image_size, "width": self.image_size, "num_inference_steps": 25, "output_type": "pt"}
        if self.config.guidance_scale is not None:
            options["guidance_scale"] = kinds.kind_of(self.pipeline).stock_guidance(self.config.guidance_scale)
        drawn = self.pipeline(list(self.prompts), generator=generator, **options).images
        self.network.train()
        return drawn.float()


def pipeline_of(config: TeacherConfig) -> str:
    """What is trained further; ValueError where the configuration names a new network instead."""
    if config.pipeline is None:
        raise ValueError("pipeline: a teacher that is trained further needs one")
    return config.pipeline
