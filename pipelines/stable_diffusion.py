"""Stable Diffusion teachers (SD1.x, SD2.x, SDXL): loaded with checks, their text and images as tensors, their one-step scheduler.

Conditions are dicts of tensors with the batch first, as everywhere: `encoder_hidden_states` (b, l, d), and for SDXL `text_embeds`
(b, d') and `time_ids` (b, 6) = (original height, width, crop top, left, target height, width).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler, ModelMixin, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .common.errors import UserError, shown
from .common.reading import BY_FILES, damaged_weights, loading, read_json, reason_of, refuse_single_file
from .data.walk import examples
from .denoiser import Condition, Denoiser
from .noise import PredictionType, VPSchedule, add_noise, from_x0, widen
from .preconditioning import Prediction
from .stock import StockPipeline

FAMILIES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NETWORKS: dict[str, type[ModelMixin]] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
SHARD = re.compile(r"-\d{5}-of-\d{5}")
MOST_LEVELS = 1_000_000  # a thousand times what published models have
PREDICTION_TYPES = ("epsilon", "v_prediction")
# never needed to distil; a safety checker would blacken images of an untrained student
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def read_index(source: str) -> dict[str, Any]:
    """model_index.json of a pipeline folder or hub id. ValueError or FileNotFoundError say what is wrong with the source."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{source!r} is not a diffusers pipeline folder: it has no model_index.json")
        return read_json(folder / "model_index.json", "copy it again")
    refuse_single_file(folder, "the model")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"no such folder {source!r}, and a hub id looks like owner/name")
    try:
        return DiffusionPipeline.load_config(source)  # type: ignore[return-value]  # a pair only where that is asked for
    except BY_FILES as error:
        raise FileNotFoundError(
            f"{source!r} is no folder here, and the hub could not be asked for it: {reason_of(error)} "
            "Check the name and the connection (HF_HUB_OFFLINE must be unset), or give the path of a downloaded pipeline folder"
        ) from error


def load_pipeline(
    source: str,
    dtype: torch.dtype = torch.float32,
    without: Iterable[str] = (),
    variant: str | None = None,
    **components: nn.Module,
) -> StockPipeline:
    """The stock pipeline of a folder or hub id, safetensors only, in eval mode and without gradients.

    without: components to leave out (None in the pipeline), e.g. "vae"; components: to use in place of its own. ValueError names
    a family or configuration that cannot be a teacher, a damaged file, or a tokenizer whose files are missing.
    """
    index = read_index(source)
    if index.get("_class_name") not in FAMILIES:
        raise UserError(
            f"{source!r} holds a {index.get('_class_name')}; expected one of {', '.join(FAMILIES)} (or an EDMPipeline)"
        )
    left_out = {k: None for k in without if k in index} | components
    if Path(source).is_dir():
        check_schedule_file(Path(source))
        parts = [k for k, v in index.items() if isinstance(v, list) and k not in (*left_out, *UNUSED)]
        check_weights(Path(source), parts)
        variant = variant or only_variant(Path(source), parts)
    options: dict[str, Any] = {k: None for k in UNUSED if k in index} | left_out
    if "requires_safety_checker" in index:
        options["requires_safety_checker"] = False
    how = {"dtype": dtype, "use_safetensors": True, "variant": variant}
    with loading(f"{source!r} cannot be loaded"):
        for name, kind in NETWORKS.items():
            if name in index and name not in options:
                options[name] = load_whole(kind, source, name, **how | {"variant": variant_of(source, name, variant)})
        pipe: StockPipeline = DiffusionPipeline.from_pretrained(source, **how, **options)  # type: ignore[assignment]  # see stock.py
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer, encoder = getattr(pipe, name, None), getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        if tokenizer is not None and encoder is not None and not 3 <= len(tokenizer) <= encoder.config.vocab_size:
            raise UserError(
                f"{source!r}: {name} knows {len(tokenizer)} tokens, its text encoder {encoder.config.vocab_size}; "
                f"files of {name}/ are missing or of another model; copy that folder again"
            )
    check_scheduler_config(pipe.scheduler, source)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_whole(kind: type[ModelMixin], source: str, subfolder: str, **how: Any) -> ModelMixin:
    """A network of a pipeline. ValueError if its file lacks tensors, which diffusers would fill with random numbers."""
    how |= {"subfolder": subfolder, "output_loading_info": True}
    network, report = kind.from_pretrained(source, **how)  # type: ignore[attr-defined]  # a pair, with that information
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{source!r}: the weights of {subfolder}/ lack {len(missing)} tensors of its config.json, the first {missing[0]!r}; "
            "copy or download it again"
        )
    return network


def check_parts(source: str) -> None:
    """All weights of a pipeline folder can be read: asked before hours of work with some. Of a hub id nothing is known."""
    if Path(source).is_dir():
        check_weights(Path(source), [k for k, v in read_index(source).items() if isinstance(v, list) and k not in UNUSED])


def variants_in(folder: Path) -> set[str | None]:
    """Those of the weight files of a component, as diffusers names them: model.fp16.safetensors,
    model.fp16-00001-of-00002.safetensors (older: model-00001-of-00002.fp16.safetensors); None: files without one.
    """
    stems = [SHARD.sub("", file.name.removesuffix(".safetensors")) for file in folder.glob("*.safetensors")]
    return {stem.partition(".")[2] or None for stem in stems}


def only_variant(folder: Path, components: Iterable[str]) -> str | None:
    """The one variant in which some component has weights only, None where each has plain ones. UserError for several."""
    found = [(c, variants_in(folder / c)) for c in components]
    needed = {c: {n for n in names if n} for c, names in found if names and None not in names}
    common = set.intersection(*needed.values()) if needed else set()
    if len(common) == 1:
        return common.pop()
    if needed:
        names = "; ".join(f"{c}: {', '.join(sorted(v))}" for c, v in needed.items())
        raise UserError(f"{str(folder)!r} has its weights in variants only ({names}); name the one to use, as teacher.variant")
    return None


def variant_of(source: str, component: str, variant: str | None) -> str | None:
    """What to ask of one component: as in diffusers, the plain weights where it has no such variant."""
    folder = Path(source, component)
    return None if folder.is_dir() and variant not in variants_in(folder) else variant


def check_weights(folder: Path, components: Iterable[str]) -> None:
    """Every component's safetensors can be read; those that should have weights have some in safetensors, all of their shards."""
    for component in components:
        files = sorted((folder / component).glob("*.safetensors"))
        pickles = [f for f in (folder / component).glob("*") if f.suffix in (".bin", ".pt", ".ckpt", ".pth")]
        if pickles and not files:
            raise FileNotFoundError(
                f"{str(folder / component)!r} has its weights as a pickle only ({pickles[0].name}), which could run any code; "
                "load and save the pipeline once with safetensors"
            )
        for file in files:
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                raise damaged_weights(file, error) from error
        for listed in (folder / component).glob("*.safetensors.index*.json"):
            named = read_json(listed, "copy or download it again").get("weight_map")
            names = set(map(str, named.values())) if isinstance(named, dict) else set()
            if lost := sorted(name for name in names if not (folder / component / name).is_file()):
                raise FileNotFoundError(
                    f"{str(folder / component)!r} lacks {len(lost)} of the {len(names)} files that {listed.name} lists "
                    f"({examples(lost)}); copy or download them"
                )


def check_schedule_file(folder: Path) -> None:
    """Its number of levels can be held: a scheduler makes tables of as many when it is loaded, before it can be asked."""
    file = folder / "scheduler" / "scheduler_config.json"
    steps = read_json(file, "copy it again").get("num_train_timesteps", 1000) if file.is_file() else 1000
    if not (type(steps) is int and 1 <= steps <= MOST_LEVELS):
        raise UserError(f"{str(file)!r}: num_train_timesteps is {shown(steps)}, expected 1 to {MOST_LEVELS:,}; mend it")


def check_scheduler_config(scheduler: Any, source: str) -> None:
    """The noise schedule must be one of the VP family whose last level can be read out."""
    config = scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"{source!r}: its scheduler is {type(scheduler).__name__}, which has no alphas_cumprod")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"{source!r}: prediction_type {prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}")
    with loading(f"{source!r}: its noise schedule, beta_schedule {config.get('beta_schedule')!r}, has no one-step scheduler"):
        alphas = one_step_scheduler(scheduler).alphas_cumprod
        VPSchedule(alphas)  # which refuses what is none
        last = alphas[-1]  # Euler and DPM would put 2^-24 there for 0
    if float(last) == 0 and prediction_type == "epsilon":
        raise UserError(
            f"{source!r}: rescale_betas_zero_snr leaves no signal at the last timestep, where noise prediction says nothing of "
            "x0; a one-step student needs a v_prediction teacher there, or a schedule without that rescaling"
        )


def denoiser(pipe: StockPipeline, network: nn.Module, guidance_scale: float = 1.0, null: Condition = None) -> Denoiser:
    """`network` (the pipeline's, or a role of it) read out by the pipeline's schedule. Latents are scaled to variance 1."""
    return Denoiser(network, schedule_of(pipe.scheduler), prediction_type_of(pipe.scheduler), 1.0, guidance_scale, null)


def schedule_of(scheduler: Any) -> VPSchedule:
    """The noise levels of its training, which are those of the one-step sampler."""
    return VPSchedule(one_step_scheduler(scheduler).alphas_cumprod)


def load_schedule(source: str) -> VPSchedule:
    """Of a pipeline of which nothing else is loaded."""
    parts = [k for k, v in read_index(source).items() if isinstance(v, list) and k != "scheduler"]
    return schedule_of(load_pipeline(source, without=parts).scheduler)


def prediction_type_of(scheduler: Any) -> PredictionType:
    return scheduler.config.get("prediction_type", "epsilon")


# Text ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_prompts(pipe: StockPipeline, prompts: Sequence[str], size: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """The condition of each prompt, without guidance; SDXL's time_ids are those of an uncropped image of `size` (h, w)."""
    if FAMILIES[type(pipe).__name__] == "sd":
        embeds, _ = pipe.encode_prompt(list(prompts), device, 1, False)
        return {"encoder_hidden_states": embeds}
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), None, device, 1, False)
    ids = time_ids([(*size, 0, 0)] * len(prompts), size).to(device)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": ids}


@torch.no_grad()
def null_condition(pipe: StockPipeline, negative_prompt: str | None, device: torch.device) -> dict[str, Tensor]:
    """What guidance leads away from, unbatched. None means what stock pipelines take it to mean: the empty prompt, or zeros where
    an SDXL pipeline says force_zeros_for_empty_prompt. It has no time_ids: those are the condition's own.
    """
    condition = encode_prompts(pipe, [negative_prompt or ""], (0, 0), device)
    condition.pop("time_ids", None)
    if negative_prompt is None and pipe.config.get("force_zeros_for_empty_prompt", False):
        condition = {k: torch.zeros_like(v) for k, v in condition.items()}
    return {k: v[0] for k, v in condition.items()}


def time_ids(original_and_crop: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> Tensor:
    """(height, width, top, left) of each image before it became one of `size` -> SDXL's micro-conditioning (b, 6)."""
    return torch.tensor([(*row, *size) for row in original_and_crop], dtype=torch.float32)


def overlong(pipe: StockPipeline, prompts: Sequence[str]) -> list[int]:
    """Rows of prompts with more tokens than the tokenizer keeps (77 with both ends)."""
    tokens = pipe.tokenizer(list(prompts), truncation=False, padding=False, verbose=False).input_ids
    return [i for i, ids in enumerate(tokens) if len(ids) > pipe.tokenizer.model_max_length]


# Images ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, noise: Tensor) -> Tensor:
    """images (b, 3, H, W) in [-1, 1], noise (b, c, h, w) -> latents (b, c, h, w): a draw of its Gaussian, variance 1."""
    gaussian = vae.encode(images.to(vae.dtype)).latent_dist
    latents = gaussian.mean.float() + gaussian.std.float() * noise
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config["scaling_factor"]


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """latents (b, c, h, w) -> images (b, 3, H, W) in [-1, 1], float32."""
    unscaled = latents / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)
    return vae.decode(unscaled.to(vae.dtype)).sample.float().clamp(-1, 1)


# One step in a stock pipeline --------------------------------------------------------------------------------------------


def one_step_scheduler(scheduler: Any) -> LCMScheduler:
    """The teacher's noise schedule behind the stock scheduler whose single step returns x0 itself, at t = T - 1 by default."""
    config = dict(scheduler.config) | {"clip_sample": False, "thresholding": False, "timestep_spacing": "leading"}
    config["original_inference_steps"] = config["num_train_timesteps"]  # any other that does not divide T skips t = T - 1
    config["timestep_scaling"] = 1e6  # its skip connection, sigma_data^2 / ((t scaling)^2 + sigma_data^2), is then 0 in float32
    known = inspect.signature(LCMScheduler.__init__).parameters  # an unknown key would be complained of at every loading
    return LCMScheduler.from_config({k: v for k, v in config.items() if k in known})


def student_levels(num_train_timesteps: int, steps: int) -> list[int]:
    """The timesteps at which a stock pipeline with that scheduler calls its network for num_inference_steps=steps. UserError for
    more steps than timesteps.

    >>> student_levels(1000, 1), student_levels(1000, 4)
    ([999], [999, 749, 499, 249])
    """
    if steps > num_train_timesteps:
        raise UserError(f"{steps} steps are more than the {num_train_timesteps} timesteps of the teacher")
    return [num_train_timesteps - 1 - i * num_train_timesteps // steps for i in range(steps)]


def student_call(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """The arguments of a stock pipeline's call that make the steps of a student, by the facts in its student.json."""
    levels = levels_of(info)
    if levels == student_levels(scheduler.config["num_train_timesteps"], len(levels)):
        return {"num_inference_steps": len(levels)}
    return {"timesteps": levels}


def levels_of(info: dict[str, Any]) -> list[int]:
    """The timesteps of a student's steps, by the facts in its student.json."""
    return info.get("levels") or [info["readout_t"]]


def steps_error(scheduler: Any, denoiser: Denoiser, levels: Sequence[int]) -> float:
    """How far the steps of a scheduler are from a student's (denoiser.FewStepGenerator), relative to x0; 0 for a fitting one.

    Runs the scheduler as a stock pipeline does (student_call) on random numbers: z, and what a network puts out whose x0 has
    variance 1, as latents have.
    """
    if not isinstance(denoiser.preconditioner, Prediction):
        raise ValueError(f"a scheduler's step is that of a prediction type, not of {denoiser.preconditioner}")
    generator = torch.Generator().manual_seed(0)
    z, *x0 = torch.randn(1 + len(levels), 1, 4, 8, 8, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    probe, off = type(scheduler).from_config(scheduler.config), 0.0
    drawn = {"generator": theirs} if "generator" in inspect.signature(probe.step).parameters else {}
    try:
        call = student_call({"levels": list(levels)}, scheduler)
        probe.set_timesteps(call.get("num_inference_steps"), **{k: v for k, v in call.items() if k == "timesteps"})
        if [int(t) for t in probe.timesteps] != list(levels):
            return float("inf")
        x_t, sample = z, z * probe.init_noise_sigma
        for i, t in enumerate(probe.timesteps):
            level = denoiser.schedule.level(torch.tensor([levels[i]]))
            level = type(level)(widen(level.alpha.double().flatten()), widen(level.sigma.double().flatten()), level.t)
            if i:
                eps = torch.randn(z.shape, generator=ours, dtype=torch.float64)
                x_t = add_noise(x0[i - 1], eps, level)
            seen = probe.scale_model_input(sample, t)
            off = max(off, float((seen - x_t).abs().max()))
            out = from_x0(x0[i], x_t, level, denoiser.preconditioner.prediction_type)
            sample = probe.step(out, t, sample, return_dict=False, **drawn)[0]
    except (ValueError, TypeError, IndexError):
        return float("inf")
    return max(off, float((sample - x0[-1]).abs().max() / x0[-1].abs().max()))
