"""Stock pipelines that draw from text, or from classes (kinds.Kind): loading them with checks, and what is made of one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .common.errors import UserError, shown
from .common.reading import BY_FILES, damaged_weights, loading, read_json, reason_of, refuse_single_file
from .data.walk import examples
from .denoiser import Condition, Denoiser
from .kinds import KINDS, Kind, family_of, kind_named, kind_of
from .noise import add_noise, from_x0, widen
from .preconditioning import Prediction
from .stock import StockPipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD = re.compile(r"-\d{5}-of-\d{5}")
MOST_LEVELS = 1_000_000  # a thousand times what published models have
# never needed to distil; a safety checker would blacken images of an untrained student
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TEXT_AND_IMAGES = ("vae", *TEXT_ENCODERS, *TOKENIZERS)


# Loading ---------------------------------------------------------------------------------------------------------------


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


def family_in(index: Mapping[str, Any], source: str) -> str:
    """The name in KINDS of what a model_index.json tells of; UserError for another pipeline."""
    family = family_of(str(index.get("_class_name")))
    if family is None:
        known = ", ".join(entry.pipeline for entry in KINDS.values())
        raise UserError(f"{source!r} holds a {index.get('_class_name')}; expected one of {known} (or an EDMPipeline)")
    return family


def absent_text(index: Mapping[str, Any]) -> dict[str, None]:
    """Text encoders and tokenizers that a model_index.json says are not there (T5 of SD3, often): diffusers wants to be told."""
    return {k: None for k in (*TEXT_ENCODERS, *TOKENIZERS) if isinstance(index.get(k), list) and index[k][0] is None}


def load_pipeline(
    source: str,
    dtype: torch.dtype = torch.float32,
    without: Iterable[str] = (),
    variant: str | None = None,
    **components: Any,
) -> StockPipeline:
    """The stock pipeline of a folder or hub id, safetensors only, in eval mode and without gradients.

    without: components to leave out (None in the pipeline), e.g. "vae"; components: to use in place of its own. ValueError names
    a family or configuration that cannot be a teacher, a damaged file, or a tokenizer whose files are missing.
    """
    index = read_index(source)
    kind = kind_named(family_in(index, source))
    left_out = {k: None for k in without if k in index} | components
    if Path(source).is_dir():
        check_schedule_file(Path(source))
        kind.check_folder(Path(source), index, left_out)
        parts = [k for k, v in index.items() if isinstance(v, list) and k not in (*left_out, *UNUSED)]
        check_weights(Path(source), parts)
        variant = variant or only_variant(Path(source), parts)
    options: dict[str, Any] = {k: None for k in UNUSED if k in index} | absent_text(index) | left_out
    if "requires_safety_checker" in index:
        options["requires_safety_checker"] = False
    how = {"dtype": dtype, "use_safetensors": True, "variant": variant}
    with loading(f"{source!r} cannot be loaded"):
        for name, network in {kind.component: kind.network, "vae": AutoencoderKL}.items():
            if name in index and name not in options:
                options[name] = load_whole(network, source, name, **how | {"variant": variant_of(source, name, variant)})
        pipe: StockPipeline = DiffusionPipeline.from_pretrained(source, **how, **options)  # type: ignore[assignment]  # see stock.py
    for name in TOKENIZERS:
        tokenizer, encoder = getattr(pipe, name, None), getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        if tokenizer is not None and encoder is not None and not 3 <= len(tokenizer) <= encoder.config.vocab_size:
            raise UserError(
                f"{source!r}: {name} knows {len(tokenizer)} tokens, its text encoder {encoder.config.vocab_size}; "
                f"files of {name}/ are missing or of another model; copy that folder again"
            )
    kind.check_scheduler(pipe.scheduler, source)
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


def network_config(source: str, kind: Kind) -> dict[str, Any]:
    """A network's settings without its weights, those that its file leaves out as diffusers would take them."""
    with loading(f"{source!r}: the settings of {kind.component}/ cannot be read"):
        load_config = kind.network.load_config  # type: ignore[attr-defined]  # of ConfigMixin, which they all are too
        return with_defaults(kind.network, load_config(source, subfolder=kind.component))


def vae_factor(source: str) -> int:
    """Pixels a latent, on a side."""
    if read_index(source).get("vae", [None])[0] is None:
        return 1
    with loading(f"{source!r}: the settings of vae/ cannot be read"):
        config = with_defaults(AutoencoderKL, AutoencoderKL.load_config(source, subfolder="vae"))
        return 2 ** (len(config["block_out_channels"]) - 1)


def with_defaults(kind: type[ModelMixin], config: dict[str, Any]) -> dict[str, Any]:
    """A network's settings, those that its file leaves out as diffusers would take them."""
    return {name: config.get(name, p.default) for name, p in inspect.signature(kind).parameters.items()}


def load_scheduler(source: str) -> Any:
    """Of a pipeline of which nothing else is loaded."""
    parts = [k for k, v in read_index(source).items() if isinstance(v, list) and k != "scheduler"]
    return load_pipeline(source, without=parts).scheduler


# What is made of one ---------------------------------------------------------------------------------------------------


def denoiser(
    pipe: StockPipeline,
    network: nn.Module,
    guidance_scale: float = 1.0,
    null: Condition = None,
    keep_norm: int | None = None,
) -> Denoiser:
    """`network` (the pipeline's, or a role of it) read out by the pipeline's schedule. Latents are scaled to variance 1."""
    kind = kind_of(pipe)
    guidance = (guidance_scale, null, keep_norm)
    return Denoiser(network, kind.schedule(pipe.scheduler), kind.prediction(pipe.scheduler), 1.0, *guidance)


def overlong(pipe: StockPipeline, prompts: Sequence[str]) -> list[int]:
    """Rows of prompts with more tokens than the tokenizer keeps, both ends counted (CLIP's 77)."""
    tokenizer, most = kind_of(pipe).most_tokens(pipe)
    tokens = tokenizer(list(prompts), truncation=False, padding=False, verbose=False).input_ids
    return [i for i, ids in enumerate(tokens) if len(ids) > most]


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


def student_call(kind: Kind, config: Mapping[str, Any], scheduler: Any, info: Mapping[str, Any]) -> dict[str, Any]:
    """How the student that student.json (`info`) tells of is called in its stock pipeline. guidance_scale is that of none, since
    guidance is distilled into it, but for a network that is told its guidance: then it is what it was trained with. config: the
    network's.
    """
    told = kind.guidance(config) == "input"
    return kind.call(levels_of(info), scheduler) | {"guidance_scale": info["guidance_scale"] if told else kind.unguided}


@contextmanager
def own_noise(pipe: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """Inside, noise between steps comes from these generators, one an image, where the stock pipeline would not say so."""
    family, scheduler = family_of(type(pipe).__name__), pipe.scheduler
    forgets = family is not None and kind_named(family).forgets_generator
    if not forgets or "generator" not in inspect.signature(scheduler.step).parameters:
        yield
        return
    stock = scheduler.step

    def step(out: Tensor, t: Any, sample: Tensor, **options: Any) -> Any:
        # guided pipelines of classes step both halves of a doubled batch, and keep the first
        return stock(out, t, sample, **options, generator=generators * (len(sample) // len(generators)))

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def levels_of(info: Mapping[str, Any]) -> list[Any]:
    """The levels of a student's steps, by the facts in its student.json: timesteps, times in [0, 1], or sigmas of EDM's.

    UserError where it names none.
    """
    first = info.get("readout_t", info.get("readout_sigma"))
    if first is None:
        raise UserError("student.json does not say at which level the student reads out; save or copy the student again")
    return info.get("levels") or [first]


def steps_text(count: int) -> str:
    """
    >>> steps_text(1), steps_text(4)
    ('one step', '4 steps')
    """
    return "one step" if count == 1 else f"{count} steps"


def steps_error(kind: Kind, scheduler: Any, denoiser: Denoiser, levels: Sequence[float]) -> float:
    """How far the steps of a scheduler are from a student's (denoiser.FewStepGenerator), relative to x0; 0 for a fitting one.

    Runs the scheduler as a stock pipeline does (`Kind.start`) on random numbers: z, and what a network puts out whose x0 has
    variance 1, as latents have.
    """
    if not isinstance(denoiser.preconditioner, Prediction):
        raise ValueError(f"a scheduler's step is that of a prediction type, not of {denoiser.preconditioner}")
    generator = torch.Generator().manual_seed(0)
    z, *x0 = torch.randn(1 + len(levels), 1, 4, 8, 8, generator=generator, dtype=kind.step_dtype)
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    probe, off = type(scheduler).from_config(scheduler.config), [torch.zeros(())]
    drawn = {"generator": theirs} if "generator" in inspect.signature(probe.step).parameters else {}
    try:
        if not kind.start(probe, levels):
            return float("inf")
        x_t, sample = z, z * getattr(probe, "init_noise_sigma", 1.0)
        for i, t in enumerate(probe.timesteps):
            level = denoiser.schedule.level(torch.tensor([levels[i]]))
            alpha, sigma = (widen(v.to(kind.step_dtype).flatten()) for v in (level.alpha, level.sigma))
            level = type(level)(alpha, sigma, level.t)
            if i:
                eps = torch.randn(z.shape, generator=ours, dtype=kind.step_dtype)
                x_t = add_noise(x0[i - 1], eps, level)
            seen = probe.scale_model_input(sample, t) if hasattr(probe, "scale_model_input") else sample
            off.append((seen - x_t).abs().max())
            out = from_x0(x0[i], x_t, level, denoiser.preconditioner.prediction_type)
            sample = probe.step(out, t, sample, return_dict=False, **drawn)[0]
    except (ValueError, TypeError, IndexError):
        return float("inf")
    off.append((sample - x0[-1]).abs().max() / x0[-1].abs().max())
    return float(max(off)) if all(bool(o.isfinite()) for o in off) else float("inf")
