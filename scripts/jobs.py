"""Training runs side by side, one process each: for networks this small one thread a run is the fastest use of a CPU."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from tqdm import tqdm

from pipelines.common.errors import USER_ERRORS, UserError
from pipelines.common.launch import fail

# `accelerate launch` with its defaults spelled out, so that it has nothing to warn about
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
SAVING = 60.0  # seconds that a run may take to save


class PartError(UserError):
    """A command that this one has started did not end well; its own words are in the message, or were printed."""


@dataclass
class Job:
    """One distillation in the background, its log in a file, its progress read off timings.jsonl."""

    name: str
    config: Path
    folder: Path
    overrides: list[str]
    command: list[str] = field(init=False)
    log: Path = field(init=False)
    process: subprocess.Popen | None = None
    bar: tqdm | None = None

    def __post_init__(self) -> None:
        self.log = self.folder.with_suffix(".log")
        places = [f"output_dir={self.folder}", "resume=latest", *self.overrides]
        self.command = [*LAUNCH, "trainers.distill", "--config", str(self.config), *places]

    @property
    def steps(self) -> int:
        given = [o.removeprefix("steps=") for o in self.overrides if o.startswith("steps=")]
        return int(given[-1]) if given else yaml.safe_load(self.config.read_text())["steps"]

    @property
    def is_done(self) -> bool:
        """Whether this very run has come to its end: all steps, with these settings."""
        info, made_with = self.folder / "student" / "student.json", self.folder / "config.yaml"
        if not (info.is_file() and made_with.is_file() and json.loads(info.read_text())["steps"] == self.steps):
            return False
        # seconds to import: only where there is a run that may be done
        from pipelines.common.config import load_config
        from pipelines.text_to_image import DTYPES
        from trainers.config.run import DistillConfig
        from trainers.families import base_weights

        wanted = load_config(DistillConfig, str(self.config), self.command[self.command.index("--config") + 2 :])
        if _settings(yaml.safe_load(made_with.read_text())) != _settings(wanted.model_dump(mode="json")):
            return False
        teacher = wanted.teacher
        if teacher.path is None or not Path(teacher.path).exists():  # no teacher, or none left to have changed
            return True
        return json.loads(info.read_text()).get("base_weights") == base_weights(
            teacher.path, DTYPES[teacher.dtype], teacher.variant
        )

    def start(self, threads: int) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(self.command, stdout=stream, stderr=stream, env=environment(threads))
        self.bar.set_postfix_str("warming up")

    def refresh(self) -> bool:
        """Move the bar; True once the process has ended well. PartError with the log's tail if it failed."""
        timings = self.folder / "timings.jsonl"
        lines = [line for line in timings.read_text().split("\n")[:-1] if line] if timings.exists() else []
        if lines:
            last = json.loads(lines[-1])
            self.bar.set_postfix_str(f"{last['seconds']:.0f} s training", refresh=False)
            self.bar.update(last["step"] - self.bar.n)
        code = self.process.poll()
        if code is None:
            return False
        if code:
            tail = "".join(self.log.read_text().splitlines(keepends=True)[-15:])
            raise PartError(f"{self.name} failed with exit status {code}; the end of {self.log}:\n{tail}")
        return True


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Of a run, but for where it lies and how it was started."""
    return {key: value for key, value in config.items() if key not in ("output_dir", "resume")}


def kept(file: Path, identity: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What `make` returns, a JSON value, kept in a file together with all that it depends on; made again where that differs."""
    identity = json.loads(json.dumps(identity))
    if file.is_file():
        stored = json.loads(file.read_text())
        if isinstance(stored, dict) and stored.get("identity") == identity:
            return stored["value"]
    value = make()
    file.write_text(json.dumps({"identity": identity, "value": value}))
    return value


def environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def show(command: list[str]) -> None:
    text = shlex.join(["python", *command[1:]]).replace("python -m accelerate.commands.launch", "accelerate launch")
    print(f"\n$ {text}", flush=True)


RUNNING: list[subprocess.Popen] = []  # what `run` waits for, in this thread or another


def run(command: list[str], threads: int) -> None:
    """Until it ends; CalledProcessError where it does not end well. Whatever ends the wait ends all that it has started."""
    show(command)
    process = subprocess.Popen(command, env=environment(threads))
    RUNNING.append(process)
    try:
        if code := process.wait():
            raise subprocess.CalledProcessError(code, command)
    finally:
        stop([process])
        RUNNING.remove(process)


def run_all(jobs: list[Job], workers: int, threads: int, keep_going: bool = False) -> dict[str, str]:
    """All jobs, at most `workers` at a time; those that are done already are left alone.

    PartError at the first that fails, or, with keep_going, the name and the error of each that did.
    """
    waiting, running, failed = [job for job in jobs if not job.is_done], [], {}

    def is_over(job: Job) -> bool:
        try:
            return job.refresh()
        except PartError as error:
            if not keep_going:
                raise
            failed[job.name] = str(error)
            return True

    for place, job in enumerate(waiting):
        show(job.command)
        look = "{desc} {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} {postfix}"
        job.bar = tqdm(total=job.steps, desc=f"{job.name:14}", position=place, bar_format=look)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(waiting.pop(0))
                running[-1].start(threads)
            running = [job for job in running if not is_over(job)]
            time.sleep(0.5)
        return failed
    finally:
        stop(job.process for job in running)  # an error or Ctrl-C here must not leave the others running
        for job in jobs:
            if job.bar:
                job.bar.close()


def stop(processes: Iterable[subprocess.Popen]) -> None:
    """SIGTERM to each that runs and to all that it has started, until they have saved, so that they can be resumed at once. A
    launcher that is stopped alone leaves behind what has not come to watch it yet.
    """
    parts: list[psutil.Process] = []
    for process in processes:
        if process.poll() is None:
            parent = psutil.Process(process.pid)
            parts += [parent, *parent.children(recursive=True)]
    for part in reversed(parts):
        with suppress(psutil.NoSuchProcess):
            part.terminate()
    psutil.wait_procs(parts, timeout=SAVING)


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run a script that can be continued: Ctrl-C, SIGTERM, a failed part and what a user can mend end it with one message."""
    # as Ctrl-C, or the parts that run would go on without anybody to look at them
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last checkpoints.")
    except subprocess.CalledProcessError as error:  # it has said why
        fail(PartError(f"{shlex.join(map(str, error.cmd))} ended with exit status {error.returncode}"), "\nerror")
    except USER_ERRORS as error:
        fail(error, "\nerror")
