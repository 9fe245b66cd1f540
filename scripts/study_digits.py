"""Train a teacher on the 8x8 digits, distil it four ways, measure, draw: the objectives where everything can be followed.

    python -m scripts.study_digits [--output outputs/study_digits] [--workers N]

Every part is the command a user would run (they are printed); this script only runs the four distillations side by side, since
one thread each is the fastest use of a CPU for networks this small. Run again, it continues where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from pipelines.common.options import path, whole

from .jobs import LAUNCH, Job, cores, exit_cleanly, run, run_all

STUDENTS = ("varflow", "vardiu", "diff_instruct", "vardiu_bound")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path, default=Path("outputs/study_digits"))
    parser.add_argument("--workers", type=whole(1), default=None, help="distillations at a time (default: one a core, at most 4)")
    args = parser.parse_args()
    workers = args.workers or min(len(STUDENTS), cores())
    output, runs = args.output, args.output / "runs"
    start = time.perf_counter()

    train = [*LAUNCH, "trainers.train_teacher", "--config", "configs/digits_teacher.yaml"]
    run([*train, f"output_dir={runs}/teacher", "resume=latest"], cores())
    teacher = [f"teacher.path={runs}/teacher"]
    jobs = [Job(name, Path(f"configs/digits_{name}.yaml"), runs / name, teacher) for name in STUDENTS]
    run_all(jobs, workers, threads=max(1, cores() // workers))
    measure = [sys.executable, "-m", "eval", "run", "--protocol", "digits-10k", "--teacher", f"{runs}/teacher"]
    students = [f"{name}={runs}/{name}" for name in STUDENTS]
    run([*measure, "--student", *students, "--output", str(output)], cores())
    print(f"\n{time.perf_counter() - start:.0f} s in all. Open {output}/report.html, or look at {output}/samples.png.")


if __name__ == "__main__":
    exit_cleanly(main)
