"""The commands: what is wrong is reported before anything heavy is imported, loaded or generated; numbers are written last."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.common.errors import UserError, printable
from pipelines.common.reading import loading, read_json

from .content import Content, Facts, Latency, ReferenceFacts
from .images.captions import Captions, read_captions
from .metrics.measure import Plan, plan
from .networks.weights import weights_dir
from .protocols import AGAINST_REFERENCE, Protocol, get_protocol
from .report.baselines import read_baselines
from .settings import Generate, Metrics, Reference, Run

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from .images.sampler import Sampler

GIVEN = ("inception", "clip", "clip_336", "dinov2", "clip_aesthetic", "aesthetic")  # options that name weights
CUSTOM = ("size", "crop_to", "inception_mode", "clip_model", "clip_prefix", "grayscale")  # options of protocol custom alone
SIZE = ("num_images", "draws", "metrics")  # of any protocol


@dataclass(frozen=True)
class Job:
    """What the options mean, checked. captions: one an image of a draw, or None."""

    args: Run | Metrics
    protocol: Protocol
    plan: Plan
    captions: Captions | None


def check(args: Run | Metrics) -> Job:
    """All that can be known to be wrong from the options and small files. UserError or FileNotFoundError name the option."""
    protocol = chosen_protocol(args)
    if bool(args.model) == bool(args.images):
        raise UserError("give either --model (images are generated) or --images (they are there)")
    if args.images:
        protocol = replace(protocol, draws=1)
    elif not protocol.num_images:
        raise UserError("--num-images is needed: protocol custom has no number of its own")
    if any(metric in AGAINST_REFERENCE for metric in protocol.metrics) and not args.reference:
        raise UserError(f"--reference is needed for {', '.join(protocol.metrics)}: {protocol.reference}, or statistics of them")
    captions = read_captions(args.captions, args.caption_column) if args.captions else None
    if captions is not None and protocol.num_images:
        captions = captions.first(protocol.num_images)
    if captions is None and ("clip_score" in protocol.metrics or (protocol.captions and not args.images)):
        raise UserError(f"--captions is needed: {protocol.captions or 'one an image, for the CLIP score'}")
    if protocol.num_images:
        protocol.require_images(protocol.num_images, "--num-images")
    read_baselines(args.baselines, protocol.name)
    made = plan(protocol, {key: getattr(args, key) for key in GIVEN}, weights_dir(args.weights_dir))
    return Job(args, protocol, made, captions)


def chosen_protocol(args: Run | Metrics | Generate | Reference) -> Protocol:
    """The protocol that is named, with what the options change of it. UserError for an option that it fixes; see also
    Protocol.adjusted.
    """
    protocol = get_protocol(args.protocol)
    # a command without the option: what the protocol has
    told: dict[str, Any] = {key: getattr(args, key, None) for key in (*CUSTOM, *SIZE)}
    own = {key: told[key] for key in CUSTOM if told[key] not in (None, False)}
    if own and protocol.name != "custom":
        raise UserError(f"--{next(iter(own)).replace('_', '-')} is fixed by protocol {protocol.name}; use --protocol custom")
    if "inception_mode" in own:
        own["inception"] = own.pop("inception_mode")
    return replace(protocol, **own).adjusted(told["num_images"], told["draws"], told["metrics"], args.force)


def run(job: Job) -> Content | None:
    """Generate where there is a model, measure, write metrics.json and report.html.

    Returns metrics.json's content, on other processes than the main one None. UserError for images, captions, weights or a model
    that do not fit each other; ValueError for a job without a model and without images.
    """
    from .images.files import ImageFiles
    from .metrics import reference as references
    from .metrics.measure import build, compute, over_draws
    from .metrics.one_pass import one_pass
    from .report.evaluation import write_report
    from .report.results import results

    accelerator = start()
    args, protocol, output = job.args, job.protocol, Path(job.args.output)
    first, started = accelerator.is_main_process, time.perf_counter()
    images = None
    if args.images:
        images = ImageFiles(args.images, protocol, job.plan.views, args.image_column, args.num_images)
        if args.image_column and images.rows is None:
            raise UserError(f"--image-column has no effect: {args.images} has no columns; remove it")
        protocol = _sized(protocol, len(images), args)
        protocol.require_images(len(images), f"--images {args.images}")
        if job.captions is not None and len(job.captions) != len(images):
            raise UserError(f"{len(images):,} images and {len(job.captions):,} captions: one an image is needed, in their order")
    sampler = load_model(args, accelerator.device) if isinstance(args, Run) and args.model else None
    if sampler is not None and sampler.takes == "prompt" and job.captions is None:
        raise UserError("--captions is needed: this model draws images from text")
    if sampler is not None and sampler.takes != "prompt" and job.captions is not None and "clip_score" not in protocol.metrics:
        raise UserError("--captions has no effect: this model takes no text, and no metric reads them; remove it")
    extractors = build(job.plan, accelerator.device)
    described = {key: e.describe() for key, e in extractors.items()}
    reference = None
    if job.plan.reference_extractors and args.reference is not None:
        reference = references.load_or_measure(args.reference, job.plan, extractors, accelerator, "--reference", **reading(args))
    draws, generated, timings = [], [], dict[str, float]()
    measured: list[ImageFiles] = []
    for draw in range(protocol.draws):
        part = images
        if sampler is not None and isinstance(args, Run):
            folder, names = make_images(sampler, args, job.protocol.num_images, job.captions, draw, accelerator)
            part = ImageFiles(str(folder), protocol, job.plan.views, names=names)
        if part is None:
            raise ValueError("neither a model nor images to measure")
        measured.append(part)
        begin = time.perf_counter()
        texts = job.captions.texts if job.captions is not None else None
        gathered = one_pass(
            part, extractors, job.plan.raw, texts, args.feature_batch, args.workers, accelerator, "measuring", args.start_method
        )
        timings["measured_images_per_s"] = len(part) / (time.perf_counter() - begin)
        if first:
            draws.append(compute(protocol.metrics, gathered, reference))
            generated.append(part.identity())
    if not first:
        return None
    speeds = latencies(args, job.captions, sampler) if sampler is not None and isinstance(args, Run) else Latency()
    timings["seconds"] = time.perf_counter() - started
    facts = Facts(
        reference=reference.facts if reference else None,
        images=generated,
        extractors=described,
        captions=job.captions.describe() if job.captions else None,
        seed=args.seed,
        model=sampler.describe() if sampler else None,
        device=str(accelerator.device),
        latency=speeds,
        timings=timings,
    )
    content = results(protocol, over_draws(draws, protocol.report), facts)
    if reference is not None and args.reference is not None and not references.is_statistics(args.reference):
        references.save(reference, output / "reference")
    write_report(content, measured[0], output, args.baselines)
    return content


def start() -> Accelerator:
    """The accelerator of a command. UserError for a launch that it does not follow."""
    from accelerate import Accelerator

    from pipelines.common.launch import check_processes
    from pipelines.common.launch_options import EVALUATION, check_launch

    check_launch(EVALUATION)
    accelerator = Accelerator()
    check_processes(accelerator)
    return accelerator


def reading(args: Run | Metrics | Reference) -> dict[str, Any]:
    """How the images of a reference are read."""
    names = {"column": "reference_column", "force": "force", "batch_size": "feature_batch", "workers": "workers"}
    return {key: getattr(args, name) for key, name in (names | {"start_method": "start_method"}).items()}


def load_model(args: Run | Generate, device: torch.device) -> Sampler:
    """What --model and its options name, on `device`. ValueError without a --model; UserError, FileNotFoundError: see
    load_sampler.
    """
    from .images.sampler import load_sampler

    if args.model is None:
        raise ValueError("no --model to load")
    options = (args.lora, args.steps, args.guidance_scale, args.dtype, device, args.base_model, args.image_size)
    return load_sampler(args.model, *options)


def make_images(
    sampler: Sampler, args: Run | Generate, n: int, captions: Captions | None, draw: int, accelerator: Accelerator
) -> tuple[Path, list[str]]:
    """n images of one draw: indices draw n .. (draw + 1) n - 1, so that draws share no seed. Returns (folder, names in it). What
    else lies there is no image of this evaluation, and is listed. UserError: see generation.generate.
    """
    from .images.generation import generate, names_of, others_in

    folder = Path(args.output) / "images" / f"draw{draw}"
    texts = captions.texts if captions is not None else None
    exact = accelerator.device.type == "cpu" if args.exact is None else args.exact
    indices = range(draw * n, (draw + 1) * n)
    generate(sampler, folder, indices, args.seed, args.batch_size, texts, accelerator, f"draw {draw}", exact)
    others = others_in(folder, indices) if accelerator.is_main_process else []
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        print(f"{folder}: left out, not of this evaluation: {printable(shown)} ({len(others)} file(s))", file=sys.stderr)
    return folder, names_of(indices)


def latencies(args: Run, captions: Captions | None, sampler: Sampler) -> Latency:
    """Seconds an image of the model, and of --teacher at --teacher-steps; {} without --teacher."""
    from .images.sampler import latency, load_sampler

    if not args.teacher:
        return {}
    texts, device = captions.texts if captions is not None else None, sampler.pipe.device
    other = load_sampler(args.teacher, None, args.teacher_steps, None, args.dtype, device, image_size=args.image_size)
    model, teacher = latency([sampler, other], args.latency_batch, captions=texts)
    return {"model": model, "teacher": teacher, "speedup": teacher["seconds_per_image"] / model["seconds_per_image"]}


def make_reference(args: Reference) -> ReferenceFacts:
    """`python -m eval reference`: statistics of real images for a protocol, in args.output. Returns what reference.json holds.

    UserError where no metric compares with real images, or for images or weights that do not fit the protocol.
    """
    from .metrics import reference as references

    protocol = chosen_protocol(args)
    compared = tuple(metric for metric in protocol.metrics if metric in AGAINST_REFERENCE)  # others look at one set alone
    if not compared:
        raise UserError(f"--metrics: none of {', '.join(protocol.metrics)} compares with real images")
    protocol = replace(protocol, metrics=compared)
    job_plan = plan(protocol, {key: getattr(args, key) for key in GIVEN}, weights_dir(args.weights_dir))
    from .metrics.measure import build

    accelerator = start()
    extractors = build(job_plan, accelerator.device)
    reference = references.load_or_measure(args.reference, job_plan, extractors, accelerator, "--reference", **reading(args))
    if accelerator.is_main_process:
        references.save(reference, Path(args.output))
    return reference.facts


def make_only(args: Generate) -> Path:
    """`python -m eval generate`: the images of a protocol, and nothing measured. Returns the folder of all draws.

    UserError for captions that are missing, too few or without effect, and where no number of images is known.
    """
    protocol = chosen_protocol(args)
    captions = read_captions(args.captions, args.caption_column) if args.captions else None
    if protocol.captions and captions is None:
        raise UserError(f"--captions is needed: {protocol.captions}")
    if captions is not None:
        captions = captions.first(protocol.num_images)
    if not protocol.num_images:
        raise UserError("--num-images is needed: protocol custom has no number of its own")
    accelerator = start()
    sampler = load_model(args, accelerator.device)
    if sampler.takes != "prompt" and captions is not None:
        raise UserError("--captions has no effect: this model takes no text; remove it")
    for draw in range(protocol.draws):
        folder, _ = make_images(sampler, args, protocol.num_images, captions, draw, accelerator)
    return folder.parent


def _sized(protocol: Protocol, n: int, args: Run | Metrics) -> Protocol:
    """For images that are there. UserError where their number is not the one that was asked for."""
    if protocol.num_images and n != protocol.num_images:
        hint = "" if n > protocol.num_images else "; add --num-images and --force to measure fewer (every report will say so)"
        raise UserError(f"{args.images} holds {n:,} images, {protocol.num_images:,} are needed{hint}")
    return replace(protocol, num_images=n)


def load_results(path: str) -> Content:
    """metrics.json of a file or folder. UserError or FileNotFoundError name it."""
    file = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no such file {str(file)!r}; give the --output folder of an evaluation")
    remedy = "give the --output folder of an evaluation of this version"
    content = read_json(file, remedy)
    with loading(f"{file} is no metrics.json of an evaluation", remedy):
        for key in ("metrics", "extractors", "reference", "captions", "model", "latency", "beside_published"):
            content[key]
        content["protocol"]["name"], content["protocol"]["n"], content["protocol"]["processing"], content["protocol"]["computed"]
        [(n["value"], n["std"]) for n in content["metrics"].values()]
    return content
