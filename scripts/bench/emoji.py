"""The quickstart's students, longer: FD and CLIP score against seconds, three seeds, and LCM-LoRA in the same time beside them.

    python -m scripts.bench.emoji [--output outputs/bench] [--seconds 1200] [--seeds 3] [--objectives vardiu ...]
                                   [--lcm lcm_lora ...] [--num-images N]

Each run has one thread and trains on the embedded Stable Diffusion by configs/emoji_<objective>.yaml with as many steps as fit
into --seconds: their time is measured in a short run first, with nothing else on its core. So a snapshot's seconds are its share
of --seconds, whatever else slows the run itself (train_seconds). Eight snapshots of each are measured by protocol emoji-2k.
LCM-LoRA gets the same teacher, pictures, rank, batch and seconds, with the example's guidance range and rate and with ours, and
is measured with one and four steps. Writes <output>/emoji.json and emoji.png. Run again, it continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import LCMScheduler

from eval.images.sampler import Sampler, load_sampler
from eval.report.figures import benchmark_chart
from eval.studies.emoji.evaluate import Judge, load_student, make_judge, teacher_numbers
from eval.studies.emoji.teacher import SHIPPED, load_teacher, with_one_step
from eval.studies.protocols import EMOJI, PROTOCOLS
from eval.studies.runs import find_run
from pipelines.assets import EMOJI as PICTURES
from pipelines.assets import EMOJI_CLIP, EMOJI_SD, check_assets
from pipelines.common.options import finite, path, whole
from pipelines.common.provenance import git_commit, versions
from trainers.families import base_weights

from ..jobs import RUNNING, Job, cores, exit_cleanly, kept, run, run_all, stop
from ..quickstart import OBJECTIVES, TEACHER

SNAPSHOTS = 8
TRIAL = 30  # steps whose time is measured
LCM = {"lcm_lora": (), "lcm_lora_our_rates": ("--lr", "1e-3", "--w", "2", "2")}  # w is guidance_scale - 1
LABELS = {"vardiu": "VarDiU", "varflow": "VarFlow", "diff_instruct": "Diff-Instruct"}


def config_of(objective: str) -> Path:
    return Path(f"configs/emoji_{objective}.yaml")


def steps_in(seconds: float, trial: Job) -> int:
    """How many steps take that long, warm-up included, by the times of a short run: a multiple of SNAPSHOTS."""
    lines = [json.loads(line) for line in (trial.folder / "timings.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    a_step = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    before = max(0.0, first["seconds"] - a_step * first["step"])  # the warm-up
    return max(1, int((seconds - before) / a_step) // SNAPSHOTS) * SNAPSHOTS


def train(objectives: list[str], seeds: int, seconds: float, runs: Path) -> list[tuple[str, int, int, Path]]:
    """(objective, seed, steps, folder of the run) of each."""
    trials = {name: Job(f"{name}, trial", config_of(name), runs / f"{name}_trial", trial_options()) for name in objectives}
    run_all(list(trials.values()), cores(), threads=1)
    jobs = {}
    for name, trial in trials.items():
        steps = kept(runs / f"{name}_steps.json", {"seconds": seconds}, lambda trial=trial: steps_in(seconds, trial))
        for seed in range(seeds):
            given = [f"seed={seed}", f"steps={steps}", f"snapshot_every={steps // SNAPSHOTS}", "sample_every=null"]
            jobs[name, seed, steps] = Job(f"{name} {seed}", config_of(name), runs / f"{name}_{seed}", given)
    run_all(list(jobs.values()), cores(), threads=1)
    return [(*key, job.folder) for key, job in jobs.items()]


def trial_options() -> list[str]:
    return [f"steps={TRIAL}", "log_every=10", "sample_every=null", "checkpoint_every=null", "resume=no"]


def train_one_lcm(folder: Path, *given: str) -> dict[str, Any]:
    """One run of the rival in `folder`, kept; what it says of itself. One that was stopped begins again."""
    recipe = yaml.safe_load(config_of("vardiu").read_text())
    shape = ("--rank", str(recipe["student"]["lora"]["rank"]), "--batch-size", str(recipe["batch_size"]))
    given = ("--teacher", TEACHER, *given, *shape)
    command = [sys.executable, "-m", "scripts.bench.parts.lcm_lora", "--output", str(folder), *given]
    identity = {"given": given, "base_weights": base_weights(TEACHER, torch.float32, None)}
    kept(folder.with_suffix(".json"), identity, lambda: run(command, 1))
    return json.loads((folder / "lcm.json").read_text())


def train_lcm(names: list[str], steps: int, seeds: int, runs: Path) -> list[tuple[str, int, Path]]:
    """(name, seed, folder) of each, as many trained at a time as there are cores."""
    wanted = [(name, seed, runs / f"{name}_{seed}") for name in names for seed in range(seeds)]

    def one(run_of: tuple[str, int, Path]) -> None:
        name, seed, folder = run_of
        train_one_lcm(folder, "--steps", str(steps), "--seed", str(seed), *LCM[name])

    with ThreadPoolExecutor(cores()) as pool:
        try:
            list(pool.map(one, wanted))
        except BaseException:
            stop(RUNNING)  # which the pool would wait for
            raise
    return wanted


def lcm_sampler(folder: Path, steps: int) -> Sampler:
    sampler = load_sampler(TEACHER, str(folder), steps=steps, guidance_scale=1.0)
    sampler.pipe.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    return replace(sampler, call=sampler.call | {"num_inference_steps": steps})


def numbers(judge: Judge, sampler: Sampler, label: str, file: Path) -> dict[str, float]:
    """fd and clip_score, kept beside the weights."""
    found = {"reference": judge.real.sha256, "clip": judge.clip.describe()} | sampler.identity(judge.captions)
    return kept(file, found, lambda: judge.measure(sampler, label)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    parser.add_argument("--seconds", type=finite, default=1200.0, help="of updates, each run")
    parser.add_argument("--seeds", type=whole(1), default=3)
    parser.add_argument("--objectives", nargs="*", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--lcm", nargs="*", choices=tuple(LCM), default=list(LCM), help="the rival's runs (default: both rates)")
    parser.add_argument("--num-images", type=whole(2), help="that are measured (default: the protocol's)")
    args = parser.parse_args()
    check_assets(PICTURES, EMOJI_SD, EMOJI_CLIP)
    protocol = PROTOCOLS[EMOJI].adjusted(args.num_images, None, args.num_images is not None)
    runs, start = args.output / "emoji", time.perf_counter()
    runs.mkdir(parents=True, exist_ok=True)
    trial = train_one_lcm(runs / "lcm_trial", "--steps", str(TRIAL)) if args.lcm else {"seconds": 1, "steps": 1}
    trained = train(list(dict.fromkeys(args.objectives)), args.seeds, args.seconds, runs)
    lcm_steps = max(1, int(args.seconds / trial["seconds"] * trial["steps"]))
    others = train_lcm(list(dict.fromkeys(args.lcm)), lcm_steps, args.seeds, runs)

    many, one = load_teacher(TEACHER)
    judge = make_judge(protocol, many)
    kept_in = runs / "teacher.json"
    teacher = teacher_numbers(many, judge, (SHIPPED, kept_in), print).numbers
    single = teacher_numbers(one, judge, (with_one_step(SHIPPED), with_one_step(kept_in)), print).numbers
    curves: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, seed, steps, folder in trained:
        points = curves.setdefault(name, {}).setdefault(str(seed), [])
        for snapshot in find_run(name, folder, "student").snapshots:
            found = numbers(judge, load_student(snapshot, TEACHER), snapshot.model.name, snapshot.model / "measured.json")
            step, info = snapshot.info["steps"], snapshot.info
            when = {"step": step, "seconds": args.seconds * step / steps, "train_seconds": info["train_seconds"]}
            points.append(when | {"calls": sum(info["calls"].values())} | found)
    lcm: dict[str, dict[str, dict[str, Any]]] = {}
    for name, seed, folder in others:
        by_steps = {
            str(steps): numbers(judge, lcm_sampler(folder, steps), f"{name}, {steps}", folder / f"measured_{steps}.json")
            for steps in (1, 4)
        }
        lcm.setdefault(name, {})[str(seed)] = json.loads((folder / "lcm.json").read_text()) | {"measured": by_steps}

    facts = {"teacher": teacher, "teacher_one_step": single, "real": judge.real.facts, "images": protocol.num_images}
    facts |= {"git_commit": git_commit(), "versions": versions(("torch", "diffusers", "peft")), "cores": cores()}
    facts |= {"seconds_in_all": round(time.perf_counter() - start)}
    (args.output / "emoji.json").write_text(json.dumps({"methods": curves, "lcm_lora": lcm} | facts, indent=1) + "\n")
    titles = {"fd": "FD-CLIP-mini", "clip_score": "CLIP score"}
    floor = {key: teacher[key] for key in titles}
    benchmark_chart({LABELS[n]: by_seed for n, by_seed in curves.items()}, titles, floor).savefig(
        args.output / "emoji.png", dpi=130
    )
    print(
        f"{'':24}{'FD':>9} {'/ teacher':>9} {'CLIP':>7} {'/ teacher':>9}   medians of {args.seeds} seeds, {args.seconds:g} s each"
    )
    last = {name: [points[-1] for points in by_seed.values()] for name, by_seed in curves.items()}
    for name, by_seed in lcm.items():
        for steps in ("1", "4"):
            last[f"{name}, {steps} step(s)"] = [found["measured"][steps] for found in by_seed.values()]
    for name, found in {"teacher, 50 steps": [teacher], "teacher, 1 step": [single], **last}.items():
        fd, score = (statistics.median(row[key] for row in found) for key in ("fd", "clip_score"))
        print(f"{name:24}{fd:9.4f} {fd / teacher['fd']:9.2f} {score:7.3f} {score / teacher['clip_score']:9.2f}")


if __name__ == "__main__":
    exit_cleanly(main)
