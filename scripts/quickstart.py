"""The whole job once, small but real: train a teacher on the 8x8 digits, distil it four ways, measure, draw.

    python -m scripts.quickstart [--output outputs/quickstart] [--workers N]

Every part is the command a user would run (they are printed); this script only runs the four distillations side by side, since
one thread each is the fastest use of a CPU for networks this small. Run again, it continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tqdm import tqdm

# `accelerate launch` with its defaults spelled out, so that it has nothing to warn about
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
STUDENTS = ("varflow", "vardiu", "diff_instruct", "vardiu_bound")


@dataclass
class Job:
    """One distillation in the background, its log in a file, its progress read off timings.jsonl."""

    name: str
    command: list[str]
    folder: Path
    steps: int
    bar: tqdm
    process: subprocess.Popen | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder.with_suffix(".log")

    def start(self, threads: int) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(self.command, stdout=stream, stderr=stream, env=environment(threads))
        self.bar.set_postfix_str("warming up")

    def refresh(self) -> bool:
        """Move the bar; True once the process has ended well. RuntimeError with the log's tail if it failed."""
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
            raise RuntimeError(f"{self.name} failed with exit status {code}; the end of {self.log}:\n{tail}")
        return True


def environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def show(command: list[str]) -> None:
    text = shlex.join(["python", *command[1:]]).replace("python -m accelerate.commands.launch", "accelerate launch")
    print(f"\n$ {text}", flush=True)


def run(command: list[str], threads: int) -> None:
    show(command)
    subprocess.run(command, check=True, env=environment(threads))


def distil_all(runs: Path, workers: int, threads: int) -> None:
    """The distillations, at most `workers` at a time."""
    jobs = []
    for name in STUDENTS:
        config = Path(f"configs/digits_{name}.yaml")
        places = [f"teacher.path={runs}/teacher", f"output_dir={runs}/{name}", "resume=latest"]
        command = [*LAUNCH, "trainers.distill", "--config", str(config), *places]
        show(command)
        steps = yaml.safe_load(config.read_text())["steps"]
        look = "{desc} {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} {postfix}"
        bar = tqdm(total=steps, desc=f"{name:14}", position=len(jobs), bar_format=look)
        jobs.append(Job(name, command, runs / name, steps, bar))
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(waiting.pop(0))
                running[-1].start(threads)
            running = [job for job in running if not job.refresh()]
            time.sleep(0.5)
    finally:
        for job in running:  # an error or Ctrl-C here must not leave the others running; they save and can be resumed
            if job.process.poll() is None:
                job.process.terminate()
        for job in jobs:
            job.bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--workers", type=int, default=None, help="distillations at a time (default: one a core, at most 4)")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.workers or min(len(STUDENTS), cores)
    output, runs = args.output, args.output / "runs"
    start = time.perf_counter()

    train = [*LAUNCH, "trainers.train_teacher", "--config", "configs/digits_teacher.yaml"]
    run([*train, f"output_dir={runs}/teacher", "resume=latest"], cores)
    distil_all(runs, workers, threads=max(1, cores // workers))
    measure = [sys.executable, "-m", "eval", "run", "--protocol", "digits-10k", "--teacher", f"{runs}/teacher"]
    students = [f"{name}={runs}/{name}" for name in STUDENTS]
    run([*measure, "--student", *students, "--output", str(output)], cores)
    print(f"\n{time.perf_counter() - start:.0f} s in all. Open {output}/report.html, or look at {output}/samples.png.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last checkpoints.")
    except (subprocess.CalledProcessError, RuntimeError) as error:
        sys.exit(f"\nerror: {error}")
