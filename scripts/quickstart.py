"""The main job, small but real: distil the embedded Stable Diffusion by LoRA, run the students in a stock pipeline, measure.

    python -m scripts.quickstart [--output outputs/quickstart] [--objectives vardiu ...] [--seed N] [--workers N]
                                 [--steps N] [--num-images N]

Every part is the command a user would run (they are printed); this script only runs the distillations side by side, since one
thread each is the fastest use of a CPU for networks this small: two cores are shared by three, and their seconds of training are
longer by it. Run again, it continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from textwrap import indent

from eval.studies.emoji.page import NEXT
from pipelines.assets import EMOJI, EMOJI_CLIP, EMOJI_SD, check_assets
from pipelines.common import atomic
from pipelines.common.options import path, whole

from .jobs import Job, cores, exit_cleanly, run, run_all

TEACHER = "assets/emoji_sd"
OBJECTIVES = ("vardiu", "varflow", "diff_instruct")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path, default=Path("outputs/quickstart"))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seed", type=whole(0), default=0, help="of the distillations")
    parser.add_argument("--workers", type=whole(1), default=None, help="distillations at a time (default: all)")
    parser.add_argument("--steps", type=whole(1), help="of each distillation (default: its recipe's)")
    parser.add_argument("--num-images", type=whole(2), help="that are measured (default: the protocol's; the report says if not)")
    args = parser.parse_args()
    check_assets(EMOJI, EMOJI_SD, EMOJI_CLIP)
    objectives = list(dict.fromkeys(args.objectives))
    workers = args.workers or len(objectives)  # more than cores, so that none is idle while the last one trains
    output, runs, start = args.output, args.output / "runs", time.perf_counter()

    given = [f"seed={args.seed}", *([f"steps={args.steps}"] if args.steps else [])]
    run_all(
        [Job(name, Path(f"configs/emoji_{name}.yaml"), runs / name, given) for name in objectives],
        workers,
        threads=max(1, cores() // workers),
    )
    measure = [sys.executable, "-m", "eval", "run", "--protocol", "emoji-2k", "--teacher", TEACHER]
    measure += ["--num-images", str(args.num_images), "--force"] if args.num_images else []
    run([*measure, "--student", *(f"{name}={runs / name}" for name in objectives), "--output", str(output)], cores())

    seconds = time.perf_counter() - start
    report = output / "report.json"
    atomic.write_text(report, json.dumps(json.loads(report.read_text()) | {"seconds_total": round(seconds, 1)}, indent=1) + "\n")
    print(f"\n{seconds:.0f} s in all. Open {output}/report.html, or look at {output}/samples.png.")
    print(
        f"\nNext, with your own Stable Diffusion (docs/stable_diffusion.md says which objective when):\n\n{indent(NEXT, '    ')}"
    )
    print(f"\nTo play with a student: python -m scripts.demo {shlex.quote(str(runs / objectives[0]))}")


if __name__ == "__main__":
    exit_cleanly(main)
