"""Students of 1, 2, 4 and 8 steps of the embedded Stable Diffusion: FD and CLIP score of each, three seeds.

    python -m scripts.bench.steps [--output outputs/bench] [--numbers 1 2 4 8] [--seeds 3] [--objective vardiu]
                                   [--training-steps 160] [--guidance-scale 1.2] [--num-images N]

Each is trained by configs/emoji_<objective>.yaml with student.steps, and with less guidance than there: every step is guided
anew, and students of four steps come out too vivid with the quickstart's 1.5. Writes <output>/steps.json, medians of the seeds,
and <output>/steps.png: the same prompts and noise in a row for each number of steps. Run again, it continues.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from eval.report import figures
from eval.studies.emoji.evaluate import load_student, make_judge, teacher_numbers
from eval.studies.emoji.teacher import SHIPPED, load_teacher, with_one_step
from eval.studies.protocols import EMOJI, PROTOCOLS
from eval.studies.runs import find_run
from pipelines.assets import EMOJI as PICTURES
from pipelines.assets import EMOJI_CLIP, EMOJI_SD, check_assets
from pipelines.common.atomic import new_file
from pipelines.common.options import finite, path, whole
from pipelines.common.provenance import git_commit, versions

from ..jobs import Job, cores, exit_cleanly, run_all
from ..quickstart import OBJECTIVES, TEACHER
from .emoji import config_of, numbers

SHOWN = 12  # prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    parser.add_argument("--numbers", nargs="+", type=whole(1), default=[1, 2, 4, 8], help="of the students' steps")
    parser.add_argument("--seeds", type=whole(1), default=3)
    parser.add_argument("--objective", choices=OBJECTIVES, default="vardiu")
    parser.add_argument("--training-steps", type=whole(1), default=160, help="updates of each")
    parser.add_argument("--guidance-scale", type=finite, default=1.2, help="the teacher's in training; VarFlow has none")
    parser.add_argument("--num-images", type=whole(2), help="that are measured (default: the protocol's)")
    args = parser.parse_args()
    check_assets(PICTURES, EMOJI_SD, EMOJI_CLIP)
    protocol = PROTOCOLS[EMOJI].adjusted(args.num_images, None, args.num_images is not None)
    runs, start = args.output / "steps", time.perf_counter()
    runs.mkdir(parents=True, exist_ok=True)
    recipe = config_of(args.objective)
    guidance = [] if args.objective == "varflow" else [f"teacher.guidance_scale={args.guidance_scale:g}"]
    jobs = {}
    for n in dict.fromkeys(args.numbers):
        for seed in range(args.seeds):
            given = [f"student.steps={n}", f"seed={seed}", f"steps={args.training_steps}", "sample_every=null", *guidance]
            folder = runs / f"{args.objective}_{n}_{seed}"
            jobs[n, seed] = Job(f"{n} steps, seed {seed}", recipe, folder, given)
    run_all(list(jobs.values()), cores(), threads=1)

    many, one = load_teacher(TEACHER)
    judge = make_judge(protocol, many)
    kept_in = runs / "teacher.json"
    teacher = teacher_numbers(many, judge, (SHIPPED, kept_in), print).numbers
    single = teacher_numbers(one, judge, (with_one_step(SHIPPED), with_one_step(kept_in)), print).numbers
    captions = judge.captions[:SHOWN]
    rows = [("teacher", "50 steps", many(range(len(captions)), protocol.seed, captions))]
    measured: dict[int, list[dict[str, float]]] = {}
    for (n, seed), job in jobs.items():
        run = find_run(f"{n} steps", job.folder, "student")
        sampler = load_student(run, TEACHER)
        found = numbers(judge, sampler, f"{n} steps, seed {seed}", job.folder / "measured.json")
        measured.setdefault(n, []).append({"train_seconds": run.info["train_seconds"]} | found)
        if seed == 0:
            rows.append(("student", f"{n} step{'s' * (n > 1)}", sampler(range(len(captions)), protocol.seed, captions)))
    keys = ("fd", "clip_score", "train_seconds")
    students = {
        str(n): {key: statistics.median(row[key] for row in found) for key in keys} | {"seeds": found}
        for n, found in measured.items()
    }
    facts = {"objective": args.objective, "updates": args.training_steps, "images": protocol.num_images, "cores": cores()}
    facts |= {"guidance_scale": args.guidance_scale if guidance else 1.0}
    facts |= {"git_commit": git_commit(), "versions": versions(("torch", "diffusers", "peft"))}
    facts |= {"seconds_in_all": round(time.perf_counter() - start)}
    content = {"teacher": teacher, "teacher_one_step": single, "students": students} | facts
    (args.output / "steps.json").write_text(json.dumps(content, indent=1) + "\n")
    with new_file(args.output / "steps.png") as partial:
        figures.captioned_rows(rows, captions).save(partial)
    print(f"{'':20}{'FD':>8} {'/ teacher':>9} {'CLIP':>6} {'training, s':>11}   medians of {args.seeds} seeds")
    for name, row in {"teacher, 50 steps": teacher, "teacher, 1 step": single, **students}.items():
        seconds = f"{row['train_seconds']:11.0f}" if "train_seconds" in row else ""
        print(f"{name:20}{row['fd']:8.4f} {row['fd'] / teacher['fd']:9.2f} {row['clip_score']:6.3f} {seconds}")


if __name__ == "__main__":
    exit_cleanly(main)
