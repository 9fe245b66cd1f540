"""Evaluations while a student trains: in the log, in a curve, of the averaged weights, and without a trace in the training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from eval.images.files import ImageFiles
from eval.metrics import reference as references
from eval.metrics.frechet import GaussianStats, frechet_from_moments
from eval.metrics.one_pass import one_pass
from eval.networks.extractors import Inception
from eval.networks.weights import Found, sha256
from eval.protocols import PROTOCOLS
from pipelines.students import load_student
from trainers import distill
from trainers.engine.draws import derive_seed

ROOT = Path(__file__).parents[2]
N = 13
ADAM, LEVELS = {"lr": 0.02}, {"name": "log_uniform", "low": 0.01, "high": 50.0}


@pytest.fixture
def config(edm, networks, sets, tmp_path, fresh_accelerator):
    """config(name, evaluation or None, **more): the arguments of a command of four steps."""

    def make(name: str, evaluation: dict | None = None, **more) -> list[str]:
        given = {"every": 2, "num_images": N, "reference": str(sets.b), "inception": str(networks.inception), "batch_size": 5}
        content = {
            "output_dir": str(tmp_path / name),
            "teacher": {"path": str(edm)},
            "student": {"lora": {"rank": 3}, "optimizer": ADAM},
            "objective": {"name": "diff_instruct", "levels": LEVELS, "fake_score": {"optimizer": ADAM, "levels": LEVELS}},
            "steps": 4,
            "batch_size": 3,
            "log_every": 1,
            "ema_decay": 0.5,
            "checkpoint_every": 2,
        }
        content |= {"evaluation": given | evaluation} if evaluation is not None else {}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content | more))
        return ["--config", str(file)]

    return make


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_numbers_are_those_of_the_finished_student(config, networks, sets, tmp_path, one_thread):
    """The last line's FID is that of the stored student's images from the same seeds, by hand."""
    distill.main(config("run", {}))
    logged = rows(tmp_path / "run")
    assert ["evaluation/fid" in row for row in logged] == [False, True, False, True]
    pipe = load_student(tmp_path / "run")
    z = [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(derive_seed(0, "evaluation", i))) for i in range(N)]
    images = torch.cat([pipe(class_labels=[i % 5], latents=z[i][None], output_type="pt").images for i in range(N)])
    extractor = Inception(Found(networks.inception, "", False), "clean")
    mine = GaussianStats.of(extractor((images * 255).round().to(torch.uint8))["features"])
    real = GaussianStats.of(extractor(sets.b_pixels)["features"])
    expected = frechet_from_moments(mine.mean, mine.cov, real.mean, real.cov)
    assert logged[-1]["evaluation/fid"] == pytest.approx(expected, rel=1e-4)
    assert logged[1]["evaluation/fid"] != logged[-1]["evaluation/fid"]
    assert (tmp_path / "run" / "evaluation.svg").stat().st_size > 1000


@pytest.mark.slow
def test_training_does_not_notice(config, tmp_path):
    distill.main(config("with", {"metrics": ["fid", "inception_score", "precision_recall"]}))
    distill.main(config("without"))
    a, b = (load_file(tmp_path / name / "student" / "pytorch_lora_weights.safetensors") for name in ("with", "without"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    stripped = [{k: v for k, v in row.items() if not k.startswith("evaluation/")} for row in rows(tmp_path / "with")]
    assert stripped == rows(tmp_path / "without")
    assert {"evaluation/precision", "evaluation/inception_score"} <= rows(tmp_path / "with")[-1].keys()


@pytest.mark.slow
def test_resumed_run_has_the_same_numbers(config, tmp_path):
    distill.main(config("whole", {}))
    distill.main([*config("parts", {}), "steps=2"])
    distill.main([*config("parts", {}), "resume=latest"])
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_statistics_as_reference(config, networks, sets, tmp_path):
    distill.main(config("images", {}))
    extractor = Inception(Found(networks.inception, sha256(networks.inception), False), "clean")
    files = ImageFiles(str(sets.b), PROTOCOLS["custom"])
    gathered = one_pass(files, {"inception": extractor}, batch_size=5)
    stored = references.of_images(gathered, PROTOCOLS["custom"], files.identity(), {"inception": extractor.describe()})
    references.save(stored, tmp_path / "ref")
    distill.main(config("statistics", {"reference": str(tmp_path / "ref")}))
    assert rows(tmp_path / "statistics") == rows(tmp_path / "images")


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"every": 3}, r"evaluation.every \(3\) must be a multiple of log_every \(2\)"),
        ({"metrics": ["clip_score"]}, "clip_score needs prompts"),
        ({"metric": ["fid"]}, "unknown key 'evaluation.metric'; did you mean 'metrics'"),
        ({"num_images": 1}, "greater than or equal to 2"),
    ],
)
def test_impossible_settings(evaluation, message, config, capsys):
    with pytest.raises(SystemExit):
        distill.main([*config("run", evaluation), "log_every=2"])
    assert_said(message, capsys)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"metrics": ["fido"]}, "unknown 'fido'; did you mean 'fid'"),
        ({"reference": None}, "evaluation.reference is needed for fid"),
        ({"inception": "absent.pt"}, "no such file or folder 'absent.pt'"),
        ({"reference": "absent"}, "no such folder, .zip or .parquet: 'absent'"),
        ({"protocol": "cifar"}, "unknown protocol 'cifar'; did you mean 'cifar10-50k'"),
        ({"protocol": "cifar10-50k", "inception_mode": "clean"}, "inception_mode is fixed by protocol cifar10-50k"),
        ({"metrics": ["inception_score"], "num_images": 9}, "takes 10 parts"),
    ],
)
def test_nothing_is_trained_before_a_fault_is_found(evaluation, message, config, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distill.main(config("run", evaluation))
    assert_said(message, capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def assert_said(message: str, capsys) -> None:
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(config, tmp_path):
    """13 images over two processes: each draws its share, what is too many is cut off, and one set of numbers is logged."""
    more = {"batch_size": 4, "steps": 2, "checkpoint_every": None}
    distill.main(config("one", {}, **more))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    two = ("torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
    command = [sys.executable, "-m", *two, "-m", "trainers.distill", *config("two", {}, **more)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one, both = (rows(tmp_path / name)[-1]["evaluation/fid"] for name in ("one", "two"))
    assert both == pytest.approx(one, rel=1e-3)
    assert len(rows(tmp_path / "two")) == 2
