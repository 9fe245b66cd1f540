"""The papers' ablations on the digits, one key of a recipe changed at a time: what of their conclusions holds here?

    python -m scripts.bench.ablations [--output outputs/bench] [--seeds 3] [--only beta rank ...] [--quick] [--steps N]

Writes <output>/ablations.json, ablations.png (one panel an ablation) and ablations.md, whose verdicts are computed from the
numbers (parts/claims.py). At most an hour of two cores: runs are shorter than the recipes', one thread each, side by side.
--quick: runs of three steps, one seed, to see that all of it works: ablations_quick.*. Run again, it continues.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report.figures import ablations_chart
from pipelines.common.atomic import new_file, write_text
from pipelines.common.options import path, whole
from pipelines.common.provenance import git_commit, versions

from ..jobs import LAUNCH, Job, cores, exit_cleanly, run, run_all
from .digits import IMAGES, measure, reference
from .parts.claims import Claim, evidence, judge, page, with_failures

# recipe -> what all of its runs have: so few steps that the whole takes less than an hour
BASES = {
    "digits_varflow": ("steps=200", "batch_size=256"),
    "digits_vardiu": ("steps=100",),
    "digits_vardiu_bound": ("steps=150",),
}
QUICK_STEPS, QUICK_TEACHER_STEPS, QUICK_IMAGES = 3, 20, 500
TABLE_2, TABLE_3 = "VarFlow, Table 2, SD1.5", "VarFlow, Table 3"


@dataclass(frozen=True)
class Ablation:
    """values: label -> value of `key`; own: the label of the recipe's own; paper: label -> FID there."""

    title: str
    recipe: str
    key: str
    values: dict[str, str]
    own: str
    claims: tuple[Claim, ...] = ()
    paper: dict[str, float] | None = None


def beats(better: str, *worse: str) -> tuple[tuple[str, str], ...]:
    """`better` is better than each of `worse`."""
    return tuple((better, other) for other in worse)


def same(*labels: str) -> dict[str, str]:
    """Values that are called what they are."""
    return {label: label for label in labels}


ABLATIONS = {
    "beta": Ablation(
        "Exponent of the energy distance",
        "digits_varflow",
        "objective.beta",
        same("0.5", "1", "1.5", "1.9"),
        "1",
        (Claim("beta = 1 is best", TABLE_3, beats("1", "0.5", "1.5", "1.9")),),
        {"0.5": 5.15, "1": 5.08, "1.5": 5.12, "1.9": 5.18},
    ),
    "weighting": Ablation(
        "Weighting of noise levels",
        "digits_varflow",
        "objective.weighting",
        same("uniform", "sigma2", "inv_sigma", "snr"),
        "uniform",
        (
            Claim("sigma^2 is best", TABLE_3, beats("sigma2", "uniform", "inv_sigma", "snr")),
            Claim("uniform weights are worst", TABLE_3, tuple((w, "uniform") for w in ("sigma2", "inv_sigma", "snr"))),
        ),
        {"uniform": 5.25, "sigma2": 5.08, "inv_sigma": 5.18, "snr": 5.11},
    ),
    "batch": Ablation(
        "Samples in a batch, K, for as many steps",
        "digits_varflow",
        "batch_size",
        same("4", "8", "16", "32", "256"),
        "256",
        (
            Claim("K = 4 and 8 are worse than 16", TABLE_3, beats("16", "4", "8")),
            Claim("K = 32 improves on 16 a little", TABLE_3, beats("32", "16")),
        ),
        {"4": 5.28, "8": 5.16, "16": 5.08, "32": 5.05},
    ),
    "cross": Ablation(
        "Cross term of the energy distance",
        "digits_varflow",
        "objective.cross",
        same("paired", "full"),
        "full",
        (Claim("pairs do as well as all K^2 distances", TABLE_3, (("paired", "full"),), alike=True),),
        {"paired": 5.08, "full": 5.10},
    ),
    "steps": Ablation(
        "Steps of the student",
        "digits_varflow",
        "student.steps",
        same("1", "2", "4", "8"),
        "1",
        (Claim("each doubling of the steps lowers it", TABLE_2, (("2", "1"), ("4", "2"), ("8", "4"))),),
        {"1": 5.07, "2": 4.81, "4": 4.73, "8": 4.62},
    ),
    "rank": Ablation(
        "Rank of the student's LoRA",
        "digits_varflow",
        "student.lora",
        {"4": "{rank: 4}", "16": "{rank: 16}", "64": "{rank: 64}", "all weights": "null"},
        "all weights",
    ),
    "annealing": Ablation(
        "VarDiU's bound: annealed noise levels",
        "digits_vardiu_bound",
        "objective.levels",
        {
            "annealed": "{name: power, low: 0.3, high: 3.0, start: 0.1, end: 2.0}",
            "not": "{name: uniform, low: 0.3, high: 3.0}",
        },
        "annealed",
        (
            Claim(
                "annealing from much noise to little helps", "VarDiU, the schedule of its experiments", beats("annealed", "not")
            ),
        ),
    ),
    "antithetic": Ablation(
        "VarDiU's bound: pairs of opposite noise",
        "digits_vardiu_bound",
        "objective.antithetic",
        {"pairs": "true", "one noise": "false"},
        "pairs",
        (Claim("symmetric sampling helps", "VarDiU, variance reduction of its loss", beats("pairs", "one noise")),),
    ),
    "covariance": Ablation(
        "VarDiU's bound: family of the posterior",
        "digits_vardiu_bound",
        "objective.posterior.covariance",
        same("diag", "linear", "flow", "nsf"),
        "diag",
        (
            Claim(
                "a flow (neural splines) is better than a Gaussian", "VarDiU, forty Gaussians in the plane", beats("nsf", "diag")
            ),
        ),
    ),
    "vardiu_weighting": Ablation(
        "VarDiU, amortised score: weighting of noise levels",
        "digits_vardiu",
        "objective.weighting",
        same("uniform", "sigma2", "inv_sigma", "snr"),
        "sigma2",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One configuration; that of a recipe's own values is shared by all of its ablations."""

    recipe: str
    override: str | None = None

    @property
    def name(self) -> str:
        changed = "base" if self.override is None else "".join(c if c.isalnum() or c in "=." else "_" for c in self.override)
        return f"{self.recipe}/{changed}"


def cell(ablation: Ablation, label: str) -> Cell:
    return Cell(ablation.recipe, None if label == ablation.own else f"{ablation.key}={ablation.values[label]}")


def cells(chosen: dict[str, Ablation]) -> list[Cell]:
    """Of all values, each once."""
    return list(dict.fromkeys(cell(a, label) for a in chosen.values() for label in a.values))


def given(recipe: str, steps: int | None) -> list[str]:
    """What all runs of a recipe have; `steps` instead of their own."""
    return [f"steps={steps}" if steps and o.startswith("steps=") else o for o in BASES[recipe]]


def job(one: Cell, seed: int, runs: Path, steps: int | None) -> Job:
    short = ["sample_every=null", "snapshot_every=null", "checkpoint_every=null"]
    changed = [one.override] if one.override else []
    places = [f"teacher.path={runs}/teacher", f"seed={seed}"]
    folder = runs / f"{one.name}_{seed}"
    return Job(
        f"{one.name} {seed}", Path(f"configs/{one.recipe}.yaml"), folder, [*given(one.recipe, steps), *short, *places, *changed]
    )


def results(chosen: dict[str, Ablation], rows: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """ablation -> its values, each with the numbers of its seeds, and its claims with what became of them."""
    found = {}
    for name, a in chosen.items():
        values = {label: rows[cell(a, label)] for label in a.values}
        seeds = {label: with_failures(row, "fd") for label, row in values.items()}
        claims = [
            {"text": c.text, "source": c.source, "verdict": judge(c, seeds), "evidence": evidence(c, seeds)} for c in a.claims
        ]
        facts = {"title": a.title, "recipe": f"configs/{a.recipe}.yaml", "key": a.key, "own": a.own, "paper": a.paper}
        found[name] = facts | {"values": values, "claims": claims}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    parser.add_argument("--seeds", type=whole(1), help="of each value (default: 3)")
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), metavar="NAME")
    parser.add_argument("--steps", type=whole(1), help="of every run (default: what fits into an hour)")
    parser.add_argument("--quick", action="store_true", help="a few minutes: that it works, not what it says")
    args = parser.parse_args()
    start, workers = time.perf_counter(), cores()
    stem = "ablations_quick" if args.quick else "ablations"
    steps = args.steps or (QUICK_STEPS if args.quick else None)
    seeds = args.seeds or (1 if args.quick else 3)
    images = QUICK_IMAGES if args.quick else IMAGES
    chosen, runs = {name: a for name, a in ABLATIONS.items() if name in args.only}, args.output / stem

    shorter = [f"steps={QUICK_TEACHER_STEPS}"] if args.quick else []
    train = [*LAUNCH, "trainers.train_teacher", "--config", "configs/digits_teacher.yaml", f"output_dir={runs}/teacher"]
    run([*train, "resume=latest", "sample_every=null", *shorter], workers)
    jobs = {(one, seed): job(one, seed, runs, steps) for seed in range(seeds) for one in cells(chosen)}
    failed = run_all(list(jobs.values()), workers, threads=1, keep_going=True)

    rows: dict[Cell, dict[str, Any]] = {one: {"seeds": [], "failed": []} for one in cells(chosen)}
    with ProcessPoolExecutor(workers) as pool:
        teacher = pool.submit(measure, runs / "teacher" / "teacher", "teacher", "digits", images)
        measured = {
            key: pool.submit(measure, made.folder / "student", "student", "digits", images)
            for key, made in jobs.items()
            if made.name not in failed
        }
        for (one, seed), made in jobs.items():
            if made.name in failed:
                rows[one]["failed"].append({"seed": seed, "error": failed[made.name]})
            else:
                rows[one]["seeds"].append({"seed": seed} | measured[one, seed].result())
        teacher_numbers = teacher.result()

    setting = {"seeds": seeds, "images": images, "bases": {f"configs/{r}.yaml": given(r, steps) for r in BASES}}
    file = args.output / f"{stem}.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    kept = before["ablations"] if before.get("setting") == setting else {}
    found = kept | results(chosen, rows)
    content: dict[str, Any] = {"ablations": {name: found[name] for name in ABLATIONS if name in found}, "setting": setting}
    content |= {"teacher": teacher_numbers, "floor": reference("digits").floor, "git_commit": git_commit(), "cores": workers}
    content |= {"versions": versions(("torch", "numpy", "diffusers")), "seconds_in_all": round(time.perf_counter() - start)}
    write_text(file, json.dumps(content, indent=1) + "\n")
    text = page(content)
    write_text(args.output / f"{stem}.md", text.replace("ablations.png", f"{stem}.png"))
    with new_file(args.output / f"{stem}.png") as partial:
        ablations_chart(content["ablations"], "fd", "FD", content["teacher"]["fd"]).savefig(partial, format="png", dpi=110)
    print(f"\n{text}\n{content['seconds_in_all']} s in all: {file}")


if __name__ == "__main__":
    exit_cleanly(main)
