"""The ablations: one key a row, conclusions computed from the numbers, the picture, and the command itself."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest

from eval.report.figures import ablations_chart
from pipelines.common.config import load_config
from scripts.bench import ablations
from scripts.bench.ablations import ABLATIONS, BASES, Cell, cell, cells, job, results
from scripts.bench.parts.claims import Claim, chance, judge, page, shown
from trainers.config.run import DistillConfig

RUNS = Path("runs")


def settings(one: Cell) -> DistillConfig:
    """What a run of it trains."""
    made = job(one, 0, RUNS, None)
    return load_config(DistillConfig, str(made.config), made.overrides)


def leaves(value, key: str = "") -> dict:
    """key.sub -> value."""
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, part in value.items() for k, v in leaves(part, f"{key}.{name}".lstrip(".")).items()}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_row_changes_its_key_and_nothing_else(name):
    """The label of the recipe's own value is what the recipe has; all others differ from it below that key alone."""
    ablation = ABLATIONS[name]
    base = settings(Cell(ablation.recipe))
    assert cell(ablation, ablation.own) == Cell(ablation.recipe)
    assert settings(Cell(ablation.recipe, f"{ablation.key}={ablation.values[ablation.own]}")) == base
    for label in ablation.values:
        if label != ablation.own:
            before, after = leaves(base.model_dump()), leaves(settings(cell(ablation, label)).model_dump())
            changed = {k for k in before.keys() | after.keys() if before.get(k, "none") != after.get(k, "none")}
            assert changed
            assert all(k == ablation.key or k.startswith(f"{ablation.key}.") for k in changed)


@pytest.mark.parametrize("name", ABLATIONS)
def test_claims_are_of_values_that_are_run(name):
    ablation = ABLATIONS[name]
    assert {v for claim in ablation.claims for pair in claim.pairs for v in pair} <= set(ablation.values)
    assert set(ablation.paper or {}) <= set(ablation.values)


def test_a_recipes_own_run_is_shared_and_folders_differ():
    of_varflow = {n: a for n, a in ABLATIONS.items() if a.recipe == "digits_varflow"}
    made = cells(of_varflow)
    assert len(made) == 1 + sum(len(a.values) - 1 for a in of_varflow.values())
    folders = {job(one, seed, RUNS, None).folder for one in cells(ABLATIONS) for seed in range(3)}
    assert len(folders) == 3 * len(cells(ABLATIONS))
    assert {a.recipe for a in ABLATIONS.values()} == set(BASES)


def test_verdicts():
    """Of three seeds each: all pairs apart, one reversed, medians only, nothing; a claim that two are alike; one seed."""
    low, middle, high = [1.0, 2.0, 3.0], [2.5, 3.5, 4.5], [5.0, 6.0, 7.0]
    seeds = {"low": low, "middle": middle, "high": high, "failed": [1.0, math.inf, math.inf]}

    def verdict(*pairs, alike=False):
        return judge(Claim("", "", pairs, alike), seeds)

    assert verdict(("low", "high"), ("middle", "high")) == "held"
    assert verdict(("low", "high"), ("low", "middle")) == "in the medians only"
    assert verdict(("low", "high"), ("middle", "low")) == "not told apart"
    assert verdict(("low", "high"), ("high", "middle")) == "did not hold"
    assert verdict(("low", "failed")) == "in the medians only"
    assert verdict(("low", "middle"), alike=True) == "held"
    assert verdict(("low", "high"), alike=True) == verdict(("high", "low"), alike=True) == "did not hold"
    assert judge(Claim("", "", (("a", "b"),)), {"a": [1.0], "b": [2.0]}) == "no error bars"
    assert (shown(low), shown([2.0]), shown(seeds["failed"])) == ("2 (1 to 3)", "2", "failed (1 to failed)")


def test_how_often_equal_laws_are_apart():
    """Counted: of all ways to deal 2 n ranks to two sets, those where one set has the n lowest."""
    for n in (1, 2, 3, 4):
        ways = list(itertools.combinations(range(2 * n), n))
        apart = sum(set(w) in ({*range(n)}, {*range(n, 2 * n)}) for w in ways)
        assert chance(n) == pytest.approx(apart / len(ways))


def numbers(*fd: float) -> dict:
    return {"seeds": [{"fd": v, "energy_distance": v / 100, "seconds": 40.0} for v in fd], "failed": []}


@pytest.fixture
def content() -> dict:
    """Of two ablations, one without a claim; one run has failed."""
    chosen = {name: ABLATIONS[name] for name in ("cross", "rank")}
    rows = {one: numbers(0.5, 0.6, 0.7) for one in cells(chosen)}
    rows[cell(ABLATIONS["cross"], "paired")] = numbers(0.9, 1.0, 1.1)
    rows[cell(ABLATIONS["rank"], "4")] = numbers(2.0, 2.1) | {"failed": [{"seed": 2, "error": "diverged"}]}
    return {
        "ablations": results(chosen, rows),
        "setting": {"seeds": 3, "images": 10_000, "bases": {"configs/x.yaml": ["steps=5"]}},
        "teacher": {"fd": 0.1},
        "floor": {"fd": 0.2},
        "git_commit": "abc",
        "cores": 2,
    }


def test_the_page_says_what_the_numbers_say(content):
    text = page(content)
    assert "Of 1 conclusions of the papers: 1 did not hold." in text
    assert "(VarFlow, Table 3): **did not hold**. paired: 1 (0.9 to 1.1) above full: 0.6 (0.5 to 0.7)." in text
    assert "| **full** (all others' value) | 0.6 (0.5 to 0.7) | 0.006 (0.005 to 0.007) | 40 | 5.1 |" in text
    assert "| 4 | 2.1 (2 to failed) |" in text
    assert "Neither paper has a conclusion on this." in text
    assert json.loads(json.dumps(content)) == content  # what is written says no more and no less


def test_the_chart_has_a_panel_each(content):
    figure = ablations_chart(content["ablations"], "fd", "FD", 0.1)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [a["title"] for a in content["ablations"].values()]
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [float(p.get_ydata()[0]) for p in points] == [1.0, 0.6]
    assert [p.get_markerfacecolor() == "white" for p in points] == [True, False]


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    """Whole, but for its length: trains, measures, draws, and has nothing to do the second time."""

    def run(*more: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["ablations", "--quick", "--steps", "1", "--output", str(tmp_path), *more])
        ablations.main()
        return json.loads((tmp_path / "ablations_quick.json").read_text())

    first = run("--only", "cross", "antithetic")
    assert list(first["ablations"]) == ["cross", "antithetic"]
    for ablation in first["ablations"].values():
        for row in ablation["values"].values():
            assert len(row["seeds"]) == 1
            assert math.isfinite(row["seeds"][0]["fd"])
            assert row["failed"] == []
        assert {c["verdict"] for c in ablation["claims"]} == {"no error bars"}
    assert (tmp_path / "ablations_quick.png").is_file()
    assert "ablations_quick.png" in (tmp_path / "ablations_quick.md").read_text()
    students = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("student.json")}
    assert len(students) == 4
    capsys.readouterr()
    again = run("--only", "cross")
    assert again["ablations"] == first["ablations"]  # the other one is kept
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("student.json")} == students
