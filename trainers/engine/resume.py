"""What `resume` means: which checkpoint a run goes on from, what may change on the way, and what is then set aside.

A checkpoint holds the configuration that wrote it. A run that goes on says which values are new; those that would make it another
experiment are refused by name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipelines.common import atomic
from pipelines.common.errors import UserError

from ..config.run import Run
from . import checkpoint
from .checkpoint import CheckpointError

# What may change: where a run lies, how long it is, what it tells and how it uses the machine; ...
FREE = {"output_dir", "resume", "steps", "log_every", "checkpoint_every", "snapshot_every", "keep_checkpoints", "trackers"}
FREE |= {"sample_every", "num_samples", "sampling_steps", "guidance_scale"}
FREE |= {"gradient_checkpointing", "compile", "micro_batch_size", "data.cache"}
# ... and how it approaches the same goal: a rate is lowered when a run has diverged. So is all of an optimiser but its bits.
FREE |= {"batch_size", "ema_decay", "ema_halflife"}
FREE_LAST = {"updates", "warmup_updates", "min_information"}
PATHS = {"path", "paths", "file", "files", "pipeline"}
SHOWN = 8
NOTHING = "nothing"


@dataclass(frozen=True)
class Start:
    """Where a run starts: at `checkpoint`, or at step 0; changed: key -> [before, now]; again: in the remains of a run;
    compared: whether the configuration that it goes on from is known.
    """

    checkpoint: Path | None = None
    step: int = 0
    changed: dict[str, list[Any]] = field(default_factory=dict)
    again: bool = False
    compared: bool = True


def plan(run: Run, primary: str) -> Start:
    """Where `run` starts. UserError if that would overwrite a run, or go on from what is no checkpoint of this configuration.

    primary: the name of the folder that the model goes to. Nothing is written.
    """
    output = Path(run.output_dir)
    if (output / "config.yaml").exists() and not (output / "environment.json").exists():
        raise UserError(
            f"output_dir {run.output_dir!r}: {str(output / 'config.yaml')!r} is of no run, and this run would overwrite it; name "
            "another folder"
        )
    saved = checkpoint.list_checkpoints(output / "checkpoints")
    if run.resume not in ("no", "latest"):
        return _go_on(run, checkpoint.named(run.resume, "resume"), explicit=True)
    if run.resume == "latest" and saved:
        return _go_on(run, saved[-1], explicit=False)
    _check_unused(run, primary, saved)
    before = read_config(output / "config.yaml")
    if before is None:
        return Start()
    changed = changes(before, run)
    if _has_logged(output):
        _refuse(changed, output)
    return Start(changed=changed, again=True)


def _go_on(run: Run, path: Path, explicit: bool) -> Start:
    output = Path(run.output_dir)
    step, before = checkpoint.describe(path, explicit)
    if before is None:  # written before checkpoints held their configuration
        before = read_config(path.parent.parent / "config.yaml")
    changed = {} if before is None else changes(before, run)
    _refuse(changed, path)
    if path.resolve().parent != (output / "checkpoints").resolve():
        other = read_config(output / "config.yaml")
        if other is not None and any(not may_change(key) for key in changes(other, run)):
            raise UserError(
                f"output_dir {run.output_dir!r} holds another run than the one of {str(path)!r}; to go on from there name a new "
                "output_dir"
            )
    if run.steps < step:
        raise UserError(f"steps: {run.steps}, but {str(path)!r} is at step {step}; give more, or resume an earlier checkpoint")
    return Start(path, step, changed, compared=before is not None)


def _check_unused(run: Run, primary: str, saved: list[Path]) -> None:
    """UserError if to start at step 0 would overwrite anything that could be missed."""
    output, folder = Path(run.output_dir), f"output_dir {run.output_dir!r}"
    if saved:
        raise UserError(f"{folder} already holds a run; continue it with resume=latest or name another folder")
    if (output / primary).exists():
        raise UserError(
            f"{folder} already holds a run, with its {primary} in {str(output / primary)!r} and without checkpoints, so that it "
            "cannot be continued; name another folder (checkpoint_every keeps checkpoints)"
        )
    if _has_logged(output) and run.resume == "no":
        raise UserError(
            f"{folder} already holds a run that ended before its first checkpoint; resume=latest starts it again, or name "
            "another folder"
        )


def _has_logged(output: Path) -> bool:
    log = output / "metrics.jsonl"
    return log.is_file() and log.stat().st_size > 0


# Configurations -------------------------------------------------------------------------------------------------------------


def read_config(file: Path) -> dict[str, Any] | None:
    """What a run has written into `file`; None if there is nothing that could be read as such."""
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def changes(before: dict[str, Any], run: Run) -> dict[str, list[Any]]:
    """Dotted key -> [value before, value now], where they differ; `resume` is no change, nor another spelling of a path."""
    try:  # keys that are newer than the file have their defaults
        before = type(run).model_validate(before).model_dump(mode="json")
    except ValidationError:
        pass  # what is not valid any more differs in some key
    found = differences(before, run.model_dump(mode="json"))
    found = {k: pair for k, pair in found.items() if k != "resume" and not _same_place(k, *pair)}
    renamed = {k.removesuffix("name") for k in found if k.endswith(".name")}  # another kind of section: its keys say no more
    return {k: pair for k, pair in found.items() if k.endswith(".name") or not any(k.startswith(r) for r in renamed)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Dotted key -> [value before, value now]."""
    old, new = _flat(before), _flat(now)
    pairs = {k: [old.get(k, NOTHING), new.get(k, NOTHING)] for k in (*new, *(k for k in old if k not in new))}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def may_change(key: str) -> bool:
    """Whether a setting may differ between the starts of one run."""
    *sections, last = key.split(".")
    of_optimizer = "optimizer" in sections and last != "bits"
    return key in FREE or last in FREE_LAST or of_optimizer or key.partition(".")[0] == "evaluation"


def lines(changed: dict[str, list[Any]]) -> list[str]:
    """How a change is said, one line a key."""
    return [f"{key}: {_shown(before)} -> {_shown(now)}" for key, (before, now) in changed.items()]


def _refuse(changed: dict[str, list[Any]], path: Path) -> None:
    bound = {key: pair for key, pair in changed.items() if not may_change(key)}
    if not bound:
        return
    messages = lines(bound)
    more = [f"and {len(messages) - SHOWN} more"] if len(messages) > SHOWN else []
    moved = [key for key in bound if key.rpartition(".")[2] in PATHS]
    link = f" If {moved[0]} is the same in a new place, put a link to it where it was." if moved else ""
    raise CheckpointError(
        "\n".join(
            [
                f"{str(path)!r} was written by another configuration, and these values cannot change in a run:",
                *(f"  {line}" for line in (*messages[:SHOWN], *more)),
                f"Resume with the values of that run, or start a new output_dir.{link}",
            ]
        )
    )


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _same_place(key: str, before: Any, now: Any) -> bool:
    if key == "output_dir" or key.rpartition(".")[2] in PATHS:
        old, new = ([v] if isinstance(v, str) else v for v in (before, now))
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            return all(os.path.realpath(a) == os.path.realpath(b) for a, b in zip(old, new, strict=True))
    return False


def _shown(value: Any) -> str:
    text = repr(value) if value != NOTHING else NOTHING
    return text if len(text) <= 120 else f"{text[:120]}..."


# What an earlier run has left -----------------------------------------------------------------------------------------------


def recover(output: Path, primary: str) -> None:
    """Undo what a killed run was making when it was killed."""
    atomic.recover(output / primary)
    for folder in (output / "checkpoints", output / "snapshots"):
        for path in atomic.unfinished(folder):
            if checkpoint.number_of(path.name) is not None:
                atomic.recover(path)


def leaves_a_branch(output: Path, start: Start) -> bool:
    """Whether what the folder holds of later steps is not what this run will make of them."""
    newer = any(_is_later(c.name, start.step) for c in checkpoint.list_checkpoints(output / "checkpoints"))
    return newer or bool(start.changed)


def report(start: Start, run: Run, environment: list[str], moved: list[Path]) -> list[str]:
    """What a run says of its start; nothing of a new run in a new folder. environment: what is new in that."""
    messages = [f"changed: {line}" for line in (*lines(start.changed), *environment)] if run.resume != "no" else []
    if not start.compared:
        messages.append(f"WARNING: {start.checkpoint} does not hold the configuration that wrote it: nothing could be compared.")
    if moved:
        names = ", ".join(f"{p.parent.name}/{p.name}" for p in moved[:SHOWN]) + (", ..." if len(moved) > SHOWN else "")
        messages.append(f"Of the branch that is left here, later steps are set aside: {names}. Remove them when you like.")
    if start.checkpoint is not None:
        messages.append(f"Resumed from {start.checkpoint} at step {start.step}.")
    elif run.resume == "latest":
        what = "the run in it ended before its first" if start.again else "nothing to resume"
        messages.append(f"No checkpoint in {run.output_dir!r} ({what}): starting at step 0.")
    return messages


def set_aside(output: Path, step: int) -> list[Path]:
    """Rename the checkpoints, snapshots and samples of later steps to abandoned_...: `latest` must not find them, nor a
    measurement. Returns the new names.
    """
    made = [*checkpoint.list_checkpoints(output / "checkpoints"), *checkpoint.list_checkpoints(output / "snapshots")]
    pictures = sorted((output / "samples").glob(f"{checkpoint.PREFIX}*.png"))
    made += [p for p in pictures if p.is_file() and not p.is_symlink()]
    later = [path for path in made if _is_later(path.stem, step)]
    return [path.rename(_free(path.with_name(f"abandoned_{path.name}"))) for path in later]


def _is_later(name: str, step: int) -> bool:
    """Whether a name is that of a later step's checkpoint, snapshot or sample."""
    number = checkpoint.number_of(name)
    return number is not None and number > step


def _free(path: Path) -> Path:
    names = (path.with_stem(f"{path.stem}_{i}") for i in range(2, 1_000_000))
    return path if not os.path.lexists(path) else next(p for p in names if not os.path.lexists(p))
