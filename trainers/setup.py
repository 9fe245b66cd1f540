"""What both training commands do before and after the loop: read the configuration, check the ground, build parts."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration
from torch import Tensor

from pipelines import atomic, images
from pipelines.analytic import make_mixture
from pipelines.edm import EDMPipeline, EDMUNet, PatchUNet, PointNet
from pipelines.errors import UserError
from pipelines.images import ImageSet
from pipelines.launch import check_processes, on_main
from pipelines.launch_options import TRAINING, check_launch
from pipelines.paths import path_option
from pipelines.provenance import git_commit, versions

from . import resume
from .config import Run, TeacherConfig
from .config_data import Data
from .config_file import load_config
from .config_networks import EDMNetwork, Network, PointNetwork
from .data import Images, Points
from .draws import derive_seed, split
from .lock import check_unlocked
from .log import LOGS
from .objectives.base import HealthCheck
from .pictures import enlarged
from .resume import Start

PACKAGES = ("one-step-distill", "torch", "diffusers", "accelerate", "peft", "safetensors", "numpy")

PREVIEW_POINTS = 10_000

R = TypeVar("R", bound=Run)


def parse(model: type[R], description: str, argv: list[str] | None) -> R:
    """--config FILE [a.b=value ...] -> a validated configuration."""
    file, overrides = arguments(description, argv)
    return load_config(model, file, overrides)


def arguments(description: str, argv: list[str] | None) -> tuple[str, list[str]]:
    """--config FILE [a.b=value ...] -> (FILE, the overrides)."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", required=True, action="append", type=path_option, help="a YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="replace single values of it")
    args = parser.parse_args(argv)
    if len(args.config) > 1:
        raise UserError(f"--config takes one file; {len(args.config)} were given: {', '.join(args.config)}")
    return args.config[0], args.overrides


def make_accelerator(run: Run) -> Accelerator:
    check_launch(TRAINING)
    check_trackers(run.trackers)
    project = ProjectConfiguration(project_dir=run.output_dir)
    accelerator = Accelerator(log_with=run.trackers or None, project_config=project)
    check_processes(accelerator)
    if sharded() and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("FSDP: only version 2 is supported; set fsdp_config.fsdp_version: 2 (configs/accelerate/fsdp2.yaml)")
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """UserError for trackers that accelerate does not know or, as it does in silence, would leave out: those not installed."""
    known, installed = LoggerType.list(), [str(t) for t in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(f"trackers: accelerate knows no {name!r}; expected some of {', '.join(known)}")
        if name != "all" and name not in installed:
            package = 'pip install -e ".[tensorboard]"' if name == "tensorboard" else "install its package"
            raise UserError(
                f"trackers: {name!r} is not installed; {package}, or leave it out of trackers "
                f"(installed: {', '.join(installed) or 'none'})"
            )


def sharded() -> bool:
    """Whether the launch asked for FSDP. accelerate itself forgets it on a CPU, where it works as well."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_output(run: Run, accelerator: Accelerator) -> None:
    """Refuse a batch that these processes cannot share, an output_dir that cannot be written, is in use or holds another run, and
    a checkpoint to resume from that does not fit, before anything is loaded. Writes nothing.
    """
    split(run.batch_size, accelerator.num_processes, run.micro_batch_size)
    folder = Path(run.output_dir)
    primary = "teacher" if isinstance(run, TeacherConfig) else "student"
    _check_writable(run, primary)
    check_unlocked(folder)
    resume.plan(run, primary)
    accelerator.wait_for_everyone()  # every process has looked before the first one writes


def _check_writable(run: Run, primary: str) -> None:
    folder, fault = Path(run.output_dir), f"output_dir {run.output_dir!r} cannot be written: {{}}; name another folder"
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        what = "is a link to nothing" if not existing.exists() else "is a file"
        raise UserError(fault.format(f"{str(existing)!r} {what}"))
    for part in (existing, *(folder / name for name in ("checkpoints", "samples", "snapshots", primary))):
        if os.path.lexists(part) and not part.is_dir():
            raise UserError(fault.format(f"{str(part)!r} is to be a folder, and is none"))
        if part.is_dir() and not os.access(part, os.W_OK | os.X_OK):
            raise UserError(fault.format(f"{str(part)!r} may not be written"))
    for file in (folder / name for name in (*LOGS, "history.jsonl")):
        if os.path.lexists(file) and not (file.is_file() and os.access(file, os.W_OK)):
            raise UserError(fault.format(f"{str(file)!r} is no file that may be written"))


def record(run: Run, accelerator: Accelerator, start: Start) -> list[str]:
    """Write config.yaml and environment.json as they are from now on and a line of history.jsonl, and start the trackers.

    Called once a run is known to be able to start. Returns what has changed in the environment of a run that goes on.
    """
    folder, about = Path(run.output_dir), environment(accelerator)
    before = resume.read_config(start.checkpoint.parent.parent / "environment.json") if start.checkpoint else None
    changed = resume.lines(resume.differences({"environment": before}, {"environment": about})) if before else []
    accelerator.wait_for_everyone()  # every process has read what is now written anew
    now = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": start.step}
    now |= {"checkpoint": str(start.checkpoint) if start.checkpoint else None, "changed": start.changed, "environment": about}

    def write() -> None:
        atomic.write_text(folder / "environment.json", json.dumps(about, indent=1) + "\n")
        atomic.write_text(folder / "config.yaml", yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
        atomic.append_line(folder / "history.jsonl", json.dumps(now))

    on_main(accelerator, write)
    if run.trackers:
        accelerator.init_trackers("one-step-distill", config={"config": json.dumps(run.model_dump(mode="json"))})
    return changed


def environment(accelerator: Accelerator) -> dict:
    """Library versions, git commit (None outside a checkout), device, processes and threads."""
    return {
        "versions": versions(PACKAGES),
        "git_commit": git_commit(),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "sharded": sharded(),
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }


def load_data(data: Data) -> Images | Points:
    """What a `data` section names, for teachers that are no text-to-image models."""
    if data.name == "mixture":
        return Points(make_mixture(data.means, data.std, data.weights), data.num_samples, data.seed)
    return Images(load_images(data))


def load_images(data: Data) -> ImageSet:
    """The image set a `data` section names; labels only where the section asks for them."""
    if data.name == "digits":
        digits = images.load_digits(data.image_size)
        return digits if data.labels else ImageSet(digits.pixels)
    if data.name == "folder":
        return images.load_folder(data.path, data.image_size, data.channels, data.labels, data.background)
    columns = (data.image_column, data.label_column, data.image_size, data.channels, data.background)
    if data.name == "parquet":
        return images.load_parquet(data.files, *columns)
    return images.load_hub(data.id, data.split, *columns)


def build_unet(
    network: Network | EDMNetwork | PointNetwork, seed: int, role: str, sample_size: int, **shape: int
) -> PatchUNet | EDMUNet | PointNet:
    """A network whose initial weights depend on the seed and its role alone."""
    if isinstance(network, PointNetwork) != (sample_size == 1):
        raise UserError(
            f"network: {type(network).__name__} does not fit data of {sample_size}x{sample_size} pixels; "
            "points take {width: 400, layers: 4}, images one of the others"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", role))
        if isinstance(network, EDMNetwork):
            _check_attention(network, sample_size)
            return EDMUNet(sample_size=sample_size, **shape, **network.options())
        if isinstance(network, PointNetwork):
            return PointNet(**shape, **network.options())
        return PatchUNet(sample_size=sample_size, **shape, **network.model_dump())


def _check_attention(network: EDMNetwork, sample_size: int) -> None:
    """UserError for a resolution that is asked for attention and that no level has."""
    sides = [sample_size >> level for level in range(len(network.options()["channel_mult"]))]
    for side in network.attention_resolutions or ():
        if side not in sides:
            raise UserError(
                f"network.attention_resolutions: no level has {side}x{side} positions; "
                f"those of images of {sample_size}x{sample_size} are {', '.join(map(str, sides))}"
            )


def page(run: Run, health: Sequence[HealthCheck]) -> Callable[[str, int], None] | None:
    """page(state, step) writes report.html, which eval/ draws from the files in output_dir; None for a run without pictures.

    Charts and pages are made in eval/ for all commands: this is one of the two lines that import against the arrows. They are
    loaded when the first page is drawn.
    """
    if not run.sample_every:
        return None

    def write(state: str, step: int) -> None:
        from eval.run_page import write_page

        write_page(Path(run.output_dir), state, step, [(check.metric, check.minimum, check.message) for check in health])

    return write


def preview(pipeline: EDMPipeline, count: int, seed: int) -> Tensor:
    """Images (count, c, h, w) in [0, 1] from fixed noise, so that pictures of one run can be compared; small ones enlarged.

    Of a model of points one picture of where many of them lie.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "preview"))
    if isinstance(pipeline.unet, PointNet):
        points = pipeline(PREVIEW_POINTS, generator=generator, output_type="latent").images.flatten(1)
        return scatter(points, pipeline.scheduler.config.sigma_data)
    num_classes = pipeline.unet.config.num_classes
    labels = torch.arange(count) % num_classes if num_classes else None
    return enlarged(pipeline(count, class_labels=labels, generator=generator, output_type="pt").images)


def scatter(points: Tensor, spread: float, side: int = 256) -> Tensor:
    """Where points (n, d) lie by their first two coordinates, each within 3 spreads of 0: (1, 1, side, side) in [0, 1].

    Black on white, y upwards, darker by the logarithm of how many there are; those outside are left out.
    """
    plane = points[:, [0, min(1, points.shape[1] - 1)]].double().cpu()
    counts = torch.histogramdd(plane, side, range=[-3 * spread, 3 * spread] * 2).hist.log1p()
    return (1 - counts / counts.max().clamp_min(1e-12)).T.flip(0)[None, None].float()
