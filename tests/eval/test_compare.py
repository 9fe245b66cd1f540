"""Evaluations beside each other and beside published numbers: what may stand in one table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from eval.__main__ import main
from eval.protocols import PROTOCOLS, Protocol, get_protocol
from eval.report.baselines import read_baselines
from eval.report.evaluation import table, write_comparison, write_report
from eval.report.results import TITLES, comparable, results

ROOT = Path(__file__).parents[2]


def test_compare(command, sets, tmp_path, capsys):
    assert command() == 0
    assert command("--images", str(sets.b), output="other") == 0
    out = tmp_path / "comparison"
    assert main(["compare", str(tmp_path / "out"), f"second={tmp_path / 'other'}", "--output", str(out), "--force"]) == 0
    printed = capsys.readouterr().out
    assert "NOT COMPARABLE: n: 61 in out, 97 in second" in printed
    found = json.loads((out / "comparison.json").read_text())
    assert [row["name"] for row in found["runs"]] == ["out", "second"]
    assert found["runs"][1]["metrics"]["fid"] == pytest.approx(0, abs=1e-6)
    page = (out / "report.html").read_text()
    assert "Not comparable" in page
    assert page.count("data:image/png") == 3  # the bars and both runs' samples
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "other"), "--output", str(tmp_path / "refused")]) == 2
    assert not (tmp_path / "refused").exists()
    assert command(output="third") == 0
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "third"), "--output", str(out)]) == 0


def plan_of(protocol: Protocol, published: bool = True) -> dict:
    facts = {"reference": {"images": {"n": 50_000, "source": "x"}}, "model": {}, "seed": 0, "images": [{"source": "x"}]}
    extractor = {"network": "inception", "input": "x", "published": published}
    return results(protocol, {}, facts | {"extractors": {"inception": extractor}})


def test_published_rows_stand_beside(sets, networks, tmp_path):
    """Rows of docs/baselines.yaml for the protocol; with weights that nobody published they would mislead, and stay away."""
    rows = read_baselines(None, "cifar10-50k")
    assert {row["protocol"] for row in rows} == {"cifar10-50k"}
    assert {"fid"} <= rows[0]["metrics"].keys()
    plan = plan_of(get_protocol("cifar10-50k"))
    assert plan["beside_published"]
    assert plan_of(replace(get_protocol("cifar10-50k"), draws=1))["beside_published"]
    assert not plan_of(replace(get_protocol("cifar10-50k"), num_images=49_999))["beside_published"]
    assert not plan_of(get_protocol("cifar10-50k"), published=False)["beside_published"]
    found = table([{"name": "mine", "steps": 1, "metrics": {"fid": 2.5}, "std": {}}], rows)
    assert found["rows"][0] == ["mine", "1", "2.5", "–", "this evaluation"]
    assert any("Karras et al. 2022" in row[-1] for row in found["rows"][1:])
    assert not found["bold"]  # one run alone is not the best
    (tmp_path / "bad.yaml").write_text("- name: x\n")
    with pytest.raises(ValueError, match="must be a list of protocol, name, metrics, source"):
        read_baselines(str(tmp_path / "bad.yaml"), "cifar10-50k")


def test_no_text_of_an_evaluation_becomes_a_tag(command, tmp_path, measured, hostile):
    assert command() == 0
    content = measured(tmp_path / "out")
    speed = {"call": {"num_inference_steps": 4}, "seconds_per_image": 0.5, "images_per_s": 2.0, "device": "cpu"}
    content |= {"latency": {"model": speed, "teacher": speed, "speedup": 1.0}, "not_published_weights": ["x"]}
    content |= {"beside_published": True, "git_commit": "x"}
    content["protocol"] |= {"departures": ["x"], "name": "cifar10-50k"}
    images = [{"image": torch.zeros(3, 5, 7, dtype=torch.uint8)}]
    other = change(content, "protocol", "n", value=60)
    pages = []
    for alter in (lambda value: value, hostile.plant):
        rows = alter(read_baselines(None, "cifar10-50k")[:1])
        rows[0]["protocol"] = alter("cifar10-50k")
        (tmp_path / "rows.yaml").write_text(yaml.safe_dump(rows))
        folder = tmp_path / alter("page")
        write_report(alter(content), images, folder, str(tmp_path / "rows.yaml"))
        pages.append((folder / "report.html").read_text())
        both = [(alter("a"), alter(content)), (alter("b"), alter(other))]
        write_comparison(both, folder, {alter("a"): b"", alter("b"): b""}, str(tmp_path / "rows.yaml"))
        pages.append((folder / "report.html").read_text())
    for plain, bad in zip(pages[:2], pages[2:], strict=True):
        hostile.check(plain, bad)


def test_baselines_are_whole():
    rows = yaml.safe_load((ROOT / "docs" / "baselines.yaml").read_text())
    for row in rows:
        assert row["protocol"] in PROTOCOLS
        assert row["metrics"].keys() <= TITLES.keys()
        assert row["source"].strip()
        assert 0 <= row["metrics"].get("clip_score", 0.3) < 1  # raw cosine
    assert len({(r["protocol"], r["name"], r.get("steps"), r["source"]) for r in rows}) == len(rows)


def change(content: dict, *path: str, value: object) -> dict:
    """A copy with one entry replaced."""
    copied = json.loads(json.dumps(content))
    node = copied
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return copied


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("protocol", "name"), "coco-30k", "name: custom in a, coco-30k in b"),
        (("protocol", "n"), 60, "n: 61 in a, 60 in b"),
        (("protocol", "processing"), {}, "processing"),
        (("extractors", "inception", "sha256"), "x", "sha256 of inception differs"),
        (("extractors", "inception", "input"), "x", "input of inception differs"),
        (("extractors", "inception", "settings"), {"size": 1}, "settings of inception differ between"),
        (("extractors", "inception", "prefix"), "A photo depicts ", "prefix of inception differs"),
        (("extractors", "inception", "tokenizer"), "x", "tokenizer of inception differs"),
        (("reference", "images", "sha256"), "x", "the reference images differ"),
        (("captions",), {"sha256": "x"}, "the captions differ"),
    ],
)
def test_what_must_be_the_same_to_compare(path, value, message, command, tmp_path, measured):
    assert command() == 0
    content = measured(tmp_path / "out")
    assert comparable([("a", content), ("b", content)]) == []
    (fault,) = comparable([("a", content), ("b", change(content, *path, value=value))])
    assert message in fault
    moved = change(content, "extractors", "inception", "file", value="elsewhere.pt")
    assert comparable([("a", content), ("b", moved)]) == []
