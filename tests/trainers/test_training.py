"""Whole training runs on tiny networks: what they change, what they leave, and that neither micro-batches nor processes show.

Runs that are stopped, resumed, damaged or refused are in test_training_stops.py.
"""

import copy
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torchvision.utils import save_image

from eval.images.sampler import load_sampler
from pipelines.common.config import load_config
from pipelines.common.errors import UserError
from pipelines.data.images import load_folder, to_unit
from pipelines.denoiser import Denoiser
from pipelines.students import load_student, read_info
from trainers import distill, train_teacher
from trainers.config.networks import Optimizer
from trainers.config.run import DistillConfig, Run, TeacherConfig
from trainers.data.examples import Images
from trainers.engine import checkpoint
from trainers.engine.draws import DrawSource
from trainers.engine.ema import Ema, constant_decay, halflife_decay
from trainers.engine.loop import Trainer
from trainers.engine.optimizers import learning_rate
from trainers.families.edm import Family as EDMModels
from trainers.families.edm import NewTeacher
from trainers.objectives.base import LossTerms, Phase
from trainers.preview import preview

ROOT = Path(__file__).resolve().parents[2]
CPU_2 = ROOT / "configs" / "accelerate" / "cpu_2.yaml"

# Adam divides by the gradient's own size, so a gradient that is zero but for rounding (a bias before a normalisation) becomes
# a full step of random sign; a larger eps keeps comparisons between two orders of summation about the sums.
ADAM = {"lr": 1e-3, "betas": [0.0, 0.99], "eps": 1e-4}
LEVELS = {"name": "log_uniform", "low": 0.3, "high": 3.0}
B, STEPS, WARMUP, UPDATES, K, COPIES = 6, 3, 2, 2, 3, 2


TINY = {"channels": 8, "num_blocks": 1}


def vardiu(estimator: str, network: str | dict, **options) -> dict:
    posterior = {"network": network, "optimizer": ADAM, "updates": UPDATES, "warmup_updates": WARMUP}
    return {"name": "vardiu", "estimator": estimator, "levels": LEVELS, "posterior": posterior} | options


FAKE_SCORE = {"levels": LEVELS, "optimizer": ADAM, "updates": UPDATES, "warmup_updates": WARMUP}
OBJECTIVES = {
    "varflow": {"name": "varflow", "levels": LEVELS, "cross": "full"},
    "diff_instruct": {"name": "diff_instruct", "levels": LEVELS, "fake_score": FAKE_SCORE},
    "bound": vardiu("bound", "shared"),
    "multi_sample": vardiu("multi_sample", "copy", num_samples=K, antithetic=False),
    "resampled_score": vardiu("resampled_score", TINY, num_samples=K, ess_levels=True),
    "amortized_score": vardiu("amortized_score", "shared", noise_draws=COPIES),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)

# phase -> (networks it updates, what it logs beside loss and gradient norms), in the order of one step
RANGES = [f"{0.3 * 10 ** ((2 * i + 1) / 16):.3g}" for i in range(8)]  # of LEVELS
ESS = ["ess", *(f"ess_{what}@{name}" for what in ("share", "sum") for name in RANGES)]
AMORTIZED = ["information", "regression_error", *ESS]
PHASES = {
    "varflow": {"student": (["student"], ["x0_std"])},
    "diff_instruct": {"fake_score": (["fake_score"], []), "student": (["student"], ["x0_gap", "x0_std"])},
    "bound": {
        "posterior": (["posterior"], ["information"]),
        "joint": (["student", "posterior"], ["information", "x0_std"]),
    },
    "multi_sample": {
        "posterior": (["posterior"], ["information"]),
        "joint": (["student", "posterior"], ["information", "x0_std", *ESS]),
    },
    "resampled_score": {
        "posterior": (["posterior"], ["information"]),
        "joint": (["student", "posterior"], ["information", "x0_std", *ESS]),
    },
    "amortized_score": {
        "posterior": (["posterior"], AMORTIZED),
        "joint": (["student", "posterior"], [*AMORTIZED, "x0_std"]),
    },
}
EXTRA = WARMUP + UPDATES * STEPS  # updates of the posterior or the fake score
PAIRS = 2  # antithetic
CALLS = {  # samples sent through each network
    "varflow": {"student": B * STEPS},
    "diff_instruct": {"student": B * (EXTRA + STEPS), "fake_score": B * (EXTRA + STEPS), "teacher": B * STEPS},
    "bound": {  # the posterior reads the teacher's features, so the teacher is called with it
        "student": B * (EXTRA + STEPS),
        "posterior": PAIRS * B * (EXTRA + STEPS),
        "teacher": PAIRS * B * (EXTRA + STEPS),
    },
    "multi_sample": {
        "student": B * (EXTRA + STEPS + 2 * K * STEPS),  # once more in backward
        "posterior": B * (EXTRA + STEPS),
        "teacher": B * STEPS,
    },
    "resampled_score": {
        "student": B * (EXTRA + STEPS + PAIRS * K * STEPS),
        "posterior": PAIRS * B * (EXTRA + STEPS),
        "teacher": PAIRS * B * STEPS,
    },
    "amortized_score": {
        "student": B * (EXTRA + STEPS),
        "posterior": B * (EXTRA + COPIES * STEPS),
        "teacher": B * (EXTRA + COPIES * STEPS),
    },
}
# What is drawn once more, without a graph, when there is more than one micro-batch: the students of the whole batch.
REDRAWN = {"varflow": B * STEPS, "amortized_score": B * (EXTRA + STEPS)}


# Tools ----------------------------------------------------------------------------------------------------------------


class Lab:
    """A class-conditional teacher of 3x5x5 images, trained once, and configurations that distil it."""

    def __init__(self, root: Path) -> None:
        rng = np.random.default_rng(0)
        for i in range(11):
            folder = root / "images" / ("ant" if i < 7 else "bee")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        self.data = {"name": "folder", "path": str(root / "images"), "image_size": 5, "channels": 3, "labels": True}
        self.teacher = root / "teacher"
        config = {
            "output_dir": str(self.teacher),
            "data": self.data,
            "network": {"channels": 8, "num_blocks": 1},
            "levels": {"name": "log_normal"},
            "optimizer": {"lr": 5e-3},
            "steps": 30,
            "batch_size": 7,
        }
        (root / "teacher.yaml").write_text(yaml.safe_dump(config))
        train_teacher.main(["--config", str(root / "teacher.yaml")])

    def config(self, objective: str, output: Path, **changes) -> str:
        """The path of a configuration that writes to `output`."""
        config = {
            "output_dir": str(output),
            "teacher": {"path": str(self.teacher)},
            "student": {"sigma_init": 2.0, "optimizer": ADAM},
            "objective": copy.deepcopy(OBJECTIVES[objective]),
            "steps": STEPS,
            "batch_size": B,
            "ema_decay": 0.9,
            "log_every": 1,
            "checkpoint_every": 2,
            "num_samples": 4,
        }
        config |= {"data": self.data} if objective == "varflow" else {}
        file = output.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config | changes))
        return str(file)

    def distil(self, objective: str, output: Path, *overrides: str, **changes) -> Path:
        distill.main(["--config", self.config(objective, output, **changes), *overrides])
        return output


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, one_thread):
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def watched(monkeypatch):
    """The trainers that distill makes; each lists its updates as (phase, roles that changed, logged values)."""

    made = []

    class Watched(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.updates, self.keys = [], []
            made.append(self)

        def _update(self, phase, key):
            roles = self.networks | self.objective.frozen
            before = {role: copy.deepcopy(net.state_dict()) for role, net in roles.items()}
            values = super()._update(phase, key)
            changed = {
                r for r, net in roles.items() if any(not torch.equal(v, before[r][n]) for n, v in net.state_dict().items())
            }
            self.updates.append((phase, changed, values))
            self.keys.append(key)
            return values

    monkeypatch.setattr(distill, "Trainer", Watched)
    return made


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def last_checkpoint(output: Path) -> Path:
    return checkpoint.list_checkpoints(output / "checkpoints")[-1]


def weights_gap(a: Path, b: Path) -> float:
    """The largest difference between the trained networks and averages of two runs."""
    gap = 0.0
    for name in ("networks", "ema"):
        mine, other = (load_file(last_checkpoint(run) / f"{name}.safetensors") for run in (a, b))
        assert mine.keys() == other.keys()
        gap = max(gap, *((mine[n] - other[n]).abs().max().item() for n in mine))
    return gap


# What a run does ------------------------------------------------------------------------------------------------------


@every_objective
def test_only_the_networks_of_a_phase_change(objective, lab, watched, tmp_path):
    lab.distil(objective, tmp_path / "run")
    (trainer,) = watched
    extra, *final = PHASES[objective].items()
    order = [extra] * WARMUP + ([extra] * UPDATES + final) * STEPS if final else [extra] * STEPS
    assert [(phase.name, changed) for phase, changed, _ in trainer.updates] == [(n, set(roles)) for n, (roles, _) in order]
    assert trainer.ema.updates == STEPS  # the student's updates and no others
    assert len(set(trainer.keys)) == len(order)  # no two updates draw the same numbers

    # the frozen teacher in memory and its file are what they were
    file = load_file(lab.teacher / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    for denoiser in trainer.objective.frozen.values():
        network = denoiser.network.shared.network
        memory = network.state_dict()
        assert memory.keys() == file.keys()
        assert all(torch.equal(memory[n], file[n]) for n in file)
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
        assert not list(denoiser.parameters())
    assert bool(trainer.objective.frozen) == (objective != "varflow")


def test_a_network_that_a_phase_only_passes_through_keeps_its_gradients(tmp_path):
    """Two scalars a, b and the loss a b x: a phase of a alone must not leave a gradient behind for b's next step."""

    class Product:
        networks = {role: torch.nn.Linear(1, 1, bias=False) for role in ("a", "b")}  # noqa: RUF012
        frozen, warmup, health, needs_data, state = {}, (), (), False, {}

        def loss(self, draw, context=None):
            return LossTerms(self.networks["b"](self.networks["a"](draw.z.flatten(1))).flatten(), {})

        @property
        def phases(self):
            return (Phase("first", ("a",), self.loss, repeats=2), Phase("second", ("b",), self.loss))

    objective = Product()
    run = Run(output_dir=str(tmp_path), steps=1, batch_size=3)
    optimizer = Optimizer(lr=0.1, clip=None)
    draws = DrawSource(0, 3, (1, 1, 1), torch.device("cpu"))
    trainer = Trainer(run, Accelerator(cpu=True), objective, "a", {"a": optimizer, "b": optimizer}, draws, print, print, print)
    for phase in objective.phases:
        for repeat in range(phase.repeats):
            values = trainer._update(phase, ("step", 0, phase.name, repeat))
    x = draws.batch(("step", 0, "second", 0), 0.0)[0].z.mean()
    expected = (objective.networks["a"].weight * x).abs().item()
    assert values["second/b_grad_norm"] == pytest.approx(expected, rel=1e-5)


@every_objective
def test_what_a_run_leaves(objective, lab, watched, tmp_path, monkeypatch):
    output = lab.distil(objective, tmp_path / "run", sample_every=STEPS, log_every=2, snapshot_every=2)
    (trainer,) = watched

    assert load_config(DistillConfig, str(output / "config.yaml"), []) == trainer.run
    assert json.loads((output / "environment.json").read_text())["processes"] == 1
    assert [f.name for f in checkpoint.list_checkpoints(output / "checkpoints")] == ["step_00000002", "step_00000003"]

    # metrics.jsonl: means over the steps since the line before; warm-up is not among them
    logged = lines(output / "metrics.jsonl")
    assert [line["step"] for line in logged] == [2, 3] == [line["step"] for line in lines(output / "timings.jsonl")]
    expected = {"step", *(f"{role}/lr" for role in trainer.networks)}
    for phase, (roles, metrics) in PHASES[objective].items():
        expected |= {f"{phase}/{name}" for name in ["loss", *metrics, *(f"{role}_grad_norm" for role in roles)]}
    assert all(line.keys() == expected for line in logged)
    a_step = len(trainer.updates[WARMUP if len(PHASES[objective]) > 1 else 0 :]) // STEPS
    for line, updates in zip(logged, [trainer.updates[-3 * a_step : -a_step], trainer.updates[-a_step:]], strict=True):
        for name in expected - {"step"} - {f"{role}/lr" for role in trainer.networks}:
            values = [v[name] for _, _, v in updates if name in v]
            assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-12)

    # student/ is the average in memory: the same weights and, through stock loading, exactly the same images
    info = read_info(output / "student", "student")
    assert info["calls"] == CALLS[objective]
    assert (info["steps"], info["readout_sigma"], info["base_model"]) == (STEPS, 2.0, str(lab.teacher / "teacher"))
    pipeline, labels = load_student(output), torch.tensor([0, 1, 1, 0, 2])  # 2: no label
    z = torch.randn(5, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    with trainer.ema.swapped() as student, torch.no_grad():
        x0 = (student(z, {"class_labels": labels}) / 2 + 0.5).clamp(0, 1)
    assert (pipeline(5, class_labels=labels, latents=z, output_type="pt").images - x0).abs().max() < 1e-6
    pipeline.unet.to(memory_format=torch.channels_last)  # the trainer's; convolutions then add in the same order
    assert torch.equal(pipeline(5, class_labels=labels, latents=z, output_type="pt").images, x0)
    save_image(preview(pipeline, 4, trainer.run.seed), tmp_path / "again.png", nrow=2)
    assert (tmp_path / "again.png").read_bytes() == (output / "samples" / "step_00000003.png").read_bytes()
    snapshot = read_info(output / "snapshots" / "step_00000002", "student")
    assert snapshot["steps"] == 2
    assert load_student(output / "snapshots" / "step_00000002").unet.config.num_classes == 2

    # the model card's three lines run as they stand
    card = (output / "student" / "README.md").read_text()
    monkeypatch.chdir(output)
    names = {}
    exec(re.search("```python\n(.*?)```", card, re.DOTALL)[1], names)
    assert [i.size for i in names["images"]] == [(5, 5)] * 16


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("digits_*.yaml")), ids=lambda f: f.stem)
def test_recipes_run_when_shrunk(recipe, tmp_path):
    small = [f"output_dir={tmp_path / 'run'}", "steps=2", "batch_size=5", "num_samples=3", "sample_every=1"]
    tiny = ["network.channels=8", "network.num_blocks=1"]
    teacher = ["--config", str(ROOT / "configs" / "digits_teacher.yaml"), *small, *tiny, f"output_dir={tmp_path / 'teacher'}"]
    train_teacher.main(teacher)
    if recipe.stem == "digits_teacher":
        assert (tmp_path / "teacher" / "teacher" / "README.md").is_file()
        return
    config = yaml.safe_load(recipe.read_text())
    if "teacher" in config:  # else from scratch: its network is new
        small.append(f"teacher.path={tmp_path / 'teacher'}")
    else:
        small += [f"student.{setting}" for setting in tiny]
    if "posterior" in config["objective"]:
        small.append("objective.posterior.warmup_updates=1")
    distill.main(["--config", str(recipe), *small])
    assert load_student(tmp_path / "run")(2, output_type="np").images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize("objective", ["diff_instruct", "amortized_score"])
def test_calls_of_a_guided_teacher(objective, lab, watched, tmp_path):
    """Guidance evaluates the teacher twice for each sample: what student.json reports is what its network was given."""
    output = tmp_path / "run"
    trainer = distill.make_trainer(load_config(DistillConfig, lab.config(objective, output), ["teacher.guidance_scale=1.5"]))
    rows = [0]
    trainer.objective.teacher.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    trainer.fit()
    calls = read_info(output / "student", "student")["calls"]
    assert calls == CALLS[objective] | {"teacher": 2 * CALLS[objective]["teacher"]}
    assert calls["teacher"] == sum(rows)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("network", ["shared", "copy", TINY], ids=str)
def test_where_a_posterior_starts(network, guidance_scale, lab, tmp_path):
    """q is the prior; on the teacher's network or a copy of it x0_mean is what the teacher says without guidance."""
    overrides = [f"objective.posterior.network={network}", "objective.posterior.covariance=diag"]
    overrides.append(f"teacher.guidance_scale={guidance_scale}")
    config = load_config(DistillConfig, lab.config("amortized_score", tmp_path / "run"), overrides)
    models = EDMModels(config)
    teacher = models.teacher.requires_grad_(False)
    posterior, again = (models.posterior(config.objective.posterior, with_mean=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(posterior.parameters(), again.parameters(), strict=True))
    assert posterior.on_teacher_features == (network == "shared")

    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    level, condition = teacher.schedule.level(torch.tensor([0.3, 1.0, 3.0, 0.5])), {"class_labels": torch.tensor([0, 1, 2, 1])}
    x_t, z = randn(4, 3, 5, 5), randn(4, 2, 3, 5, 5)
    features = teacher(x_t, level, condition, return_features=True)[1] if network == "shared" else None
    with torch.no_grad():
        out = posterior(x_t, level, condition, features, z=z, noise=z)
        unguided = Denoiser(teacher.network, teacher.schedule, "edm", teacher.sigma_data)(x_t, level, condition)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(2).sum(2)
    torch.testing.assert_close(out.log_q, prior, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.z, z, rtol=1e-5, atol=1e-5)
    assert torch.allclose(out.x0_mean, unguided, rtol=1e-4, atol=1e-4) == (network in ("shared", "copy"))
    trained = [p for p in posterior.parameters() if p.requires_grad]
    assert {p.data_ptr() for p in trained}.isdisjoint(p.data_ptr() for p in teacher.parameters())
    assert len(trained) == len(list(posterior.parameters()))


# Splitting the batch --------------------------------------------------------------------------------------------------


def test_every_process_and_micro_batch_takes_its_rows_of_one_draw(lab):
    data, null = load_folder(str(lab.teacher.parent / "images"), 5, 3), {"class_labels": torch.tensor(2)}

    def source(seed: int, *split: int | None) -> DrawSource:
        return DrawSource(seed, 12, (3, 5, 5), torch.device("cpu"), Images(data), null, 0.5, *split)

    def draws(world_size: int, micro: int | None, seed: int = 1, step: int = 3) -> dict[str, torch.Tensor]:
        parts = [
            draw
            for rank in range(world_size)
            for draw in DrawSource(
                seed, 12, (3, 5, 5), torch.device("cpu"), Images(data), null, 0.5, rank, world_size, micro
            ).batch(("step", step, "student", 0), 0.5)
        ]
        assert len(parts) == (12 // micro if micro else world_size)
        names = {"z": "z", "eps": "eps", "u": "u", "x0": "x0"}
        joined = {name: torch.cat([getattr(d, name) for d in parts]) for name in names}
        joined |= {"labels": torch.cat([d.condition["class_labels"] for d in parts])}
        joined |= {
            "more": torch.cat([d.normal("more", 2, 3) for d in parts]),
            "data": torch.cat([d.normal("z", 3, 5, 5) for d in parts]),
        }
        assert {float(d.shared_u) for d in parts} == {float(joined["u"][0])}
        return joined

    whole = draws(1, None)
    assert torch.equal(whole["data"], whole["z"])  # a name is a stream of its own
    assert not torch.equal(whole["z"], whole["eps"])
    assert set(whole["labels"].tolist()) == {0, 1, 2}  # half of them dropped
    assert set(whole["x0"].flatten(1).sum(1).tolist()) <= set(to_unit(data.pixels).flatten(1).sum(1).tolist())
    for world_size, micro in ((1, 4), (2, None), (2, 3), (3, 2), (12, 1)):
        assert all(torch.equal(v, whole[n]) for n, v in draws(world_size, micro).items())
    for other in (draws(1, None, seed=2), draws(1, None, step=4)):
        assert not any(torch.equal(v, whole[n]) for n, v in other.items())


@every_objective
def test_accumulating_micro_batches_is_one_pass(objective, lab, tmp_path):
    whole = lab.distil(objective, tmp_path / "whole")
    first = lines(whole / "metrics.jsonl")[0]
    for micro in (B // 2, B // 3):
        split = lab.distil(objective, tmp_path / f"micro_{micro}", micro_batch_size=micro)
        assert weights_gap(split, whole) < 1e-5
        for name, value in lines(split / "metrics.jsonl")[0].items():
            if not name.endswith(("x0_std", "x0_gap")):  # a standard deviation over fewer samples is another number
                assert value == pytest.approx(first[name], rel=1e-4, abs=1e-5), name
    assert weights_gap(whole, lab.distil(objective, tmp_path / "other", seed=1)) > 1e-4  # what a difference looks like


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch
from accelerate.state import AcceleratorState
from trainers import distill
from trainers.config.run import DistillConfig
from pipelines.common.config import load_config
from pipelines.common.errors import UserError
from trainers.engine import draws
from trainers.engine.loop import NonFiniteError

torch.distributed.destroy_process_group = lambda group=None: None  # one group serves all the runs below
rank, folder = os.environ["RANK"], Path(sys.argv[1])
config = ["--config", str(folder / "diff_instruct.yaml")]

def status(*overrides):
    try:
        distill.main([*config, *overrides])
    except SystemExit as stopped:
        return str(stopped.code)
    return "0"

make = draws.DrawSource.batch
def one_bad_number(self, key, progress):
    batch = make(self, key, progress)
    if rank == "1" and key[:3] == ("step", 1, "student"):
        batch[0].z[0, 0, 0, 0] = float("nan")
    return batch

draws.DrawSource.batch = one_bad_number
try:
    distill.run(load_config(DistillConfig, config[1], [f"output_dir={folder / 'nan'}", "checkpoint_every=1"]))
except NonFiniteError as error:
    (folder / f"nan_{rank}").write_text(str(error))
draws.DrawSource.batch = make

(folder / f"odd_{rank}").write_text(status(f"output_dir={folder / 'odd'}", "batch_size=7"))
(folder / f"pair_{rank}").write_text(status(f"output_dir={folder / 'pair'}"))

AcceleratorState._reset_state(reset_partial_state=True)
os.environ["ACCELERATE_USE_CPU"] = "false"
(folder / f"strangers_{rank}").write_text(status(f"output_dir={folder / 'strangers'}"))
"""


def launch(*command: str) -> None:
    """Two processes on this CPU; accelerate looks for GPUs in both unless ACCELERATE_USE_CPU says otherwise."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]


TORCHRUN = ("torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
ACCELERATE = ("accelerate.commands.launch", f"--config_file={CPU_2}")


def assert_two_processes_equal_one(pair: Path, one: Path, objective: str) -> None:
    assert json.loads((pair / "environment.json").read_text())["processes"] == 2
    assert weights_gap(pair, one) < 1e-5
    for mine, other in zip(lines(pair / "metrics.jsonl"), lines(one / "metrics.jsonl"), strict=True):
        for name, value in mine.items():
            if not name.endswith(("x0_std", "x0_gap")):
                assert value == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
    calls, expected = (read_info(run / "student", "student")["calls"] for run in (pair, one))
    assert calls == expected | {"student": expected["student"] + REDRAWN.get(objective, 0)}


# Several steps ------------------------------------------------------------------------------------------------------------

FEW = {"steps": [2.0, 0.8, 0.3], "optimizer": ADAM}
FEW_STEPS = [("varflow", {}), ("varflow", {"inputs": "simulated"}), ("diff_instruct", {}), ("amortized_score", {})]


@pytest.mark.parametrize(("objective", "more"), FEW_STEPS, ids=lambda v: v if isinstance(v, str) else "-".join(v.values()))
def test_a_student_of_several_steps(objective, more, lab, tmp_path):
    """Stored with its levels; its pipeline draws them by itself, one image at a time or together; micro-batches do not show."""
    run = lab.distil(objective, tmp_path / "run", student=FEW | more)
    info = read_info(run / "student", "student")
    assert (info["readout_sigma"], info["levels"]) == (2.0, [2.0, 0.8, 0.3])
    assert "Student of 3 steps" in (run / "student" / "README.md").read_text()
    pipe = load_student(run)
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        drawn = pipe(2, [0, 1], latents=z, generator=[torch.Generator().manual_seed(s) for s in (5, 6)], output_type="latent")
        # x0 at each level from the one before and fresh noise, by hand
        generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
        eps = [z, *(torch.stack([torch.randn(3, 5, 5, generator=g) for g in generators]) for _ in range(2))]
        x0, denoiser = None, pipe.denoiser()
        for sigma, e in zip((2.0, 0.8, 0.3), eps, strict=True):
            level = denoiser.schedule.level(torch.full((2,), sigma))
            x0 = denoiser((0 if x0 is None else x0) + sigma * e, level, {"class_labels": torch.tensor([0, 1])})
    torch.testing.assert_close(drawn.images, x0, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="makes 3 steps"):
        pipe(2, [0, 1], num_inference_steps=2)
    with pytest.raises(UserError, match=r"--steps: this student makes 3 steps \(at 2, 0.8, 0.3\), not 2"):
        load_sampler(str(run), steps=2)
    assert "tags: [few-step, distillation]" in (run / "student" / "README.md").read_text()
    with pytest.raises(UserError, match="levels of its own"):
        pipe(2, [0, 1], sigma_max=1.0)
    micro = lab.distil(objective, tmp_path / "micro", student=FEW | more, micro_batch_size=2)
    assert weights_gap(run, micro) < 1e-5


def test_pictures_of_an_evaluation_are_the_pipelines(lab, tmp_path):
    """All steps of image i come from the seed and i alone."""
    models = EDMModels(load_config(DistillConfig, lab.config("diff_instruct", tmp_path / "run", student=FEW), []))
    whole = models.images(range(5))
    torch.testing.assert_close(models.images(range(3, 5)), whole[3:], rtol=0, atol=1e-6)  # the batch shows in rounding alone
    assert float((whole[0] - whole[2]).abs().max()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "more"), FEW_STEPS[1:])
def test_several_steps_stopped_and_on_two_processes(objective, more, lab, tmp_path):
    one = lab.distil(objective, tmp_path / "one", student=FEW | more)
    lab.distil(objective, tmp_path / "stopped", "steps=2", student=FEW | more)
    lab.distil(objective, tmp_path / "stopped", "resume=latest", student=FEW | more)
    assert weights_gap(one, tmp_path / "stopped") == 0
    launch(*TORCHRUN, "-m", "trainers.distill", "--config", lab.config(objective, tmp_path / "pair", student=FEW | more))
    assert weights_gap(one, tmp_path / "pair") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "launcher"), [("resampled_score", ACCELERATE), ("varflow", TORCHRUN), ("amortized_score", TORCHRUN)]
)
def test_two_processes_are_one_with_the_same_batch(objective, launcher, lab, tmp_path):
    one = lab.distil(objective, tmp_path / "one")
    launch(*launcher, "-m", "trainers.distill", "--config", lab.config(objective, tmp_path / "pair"))
    assert_two_processes_equal_one(tmp_path / "pair", one, objective)


@pytest.fixture(scope="module")
def two_processes(lab, tmp_path_factory):
    """The folder in which TWO_PROCESSES has run, and what each of the two wrote there under a name."""
    folder = tmp_path_factory.mktemp("two")
    lab.config("diff_instruct", folder / "diff_instruct")
    (folder / "script.py").write_text(TWO_PROCESSES)
    launch(*TORCHRUN, str(folder / "script.py"), str(folder))
    return folder, lambda name: [(folder / f"{name}_{rank}").read_text() for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_of_diff_instruct(two_processes, lab, tmp_path):
    folder, read = two_processes
    assert read("pair") == ["0", "0"]
    assert_two_processes_equal_one(folder / "pair", lab.distil("diff_instruct", tmp_path / "one"), "diff_instruct")


@pytest.mark.slow
def test_a_nan_that_one_process_sees_stops_both(two_processes):
    folder, read = two_processes
    first, second = read("nan")
    assert first.startswith("phase 'student' at step 1: loss = nan")
    assert first == second
    assert f"the last checkpoint is '{folder / 'nan' / 'checkpoints' / 'step_00000001'}'" in first


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_refused_by_both(two_processes):
    folder, read = two_processes
    assert read("odd") == ["2", "2"]
    assert not (folder / "odd" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="without ACCELERATE_USE_CPU two processes on a machine with GPUs take those"
)
def test_processes_that_would_not_know_of_each_other_are_refused(two_processes):
    """Without ACCELERATE_USE_CPU, accelerate takes each of several processes on a CPU for the only one."""
    folder, read = two_processes
    assert read("strangers") == ["2", "2"]
    assert not (folder / "strangers" / "metrics.jsonl").exists()


@every_objective
def test_gradient_checkpointing_gives_the_same_weights(objective, lab, watched, tmp_path):
    """Every trained network recomputes its blocks, and nothing else changes."""
    plain = lab.distil(objective, tmp_path / "plain", steps=2)
    checkpointed = lab.distil(objective, tmp_path / "checkpointed", steps=2, gradient_checkpointing=True)
    assert weights_gap(plain, checkpointed) < 1e-6
    for trainer, switch in zip(watched, (False, True), strict=True):
        for network in trainer.networks.values():
            switches = [m.gradient_checkpointing for m in network.modules() if hasattr(m, "gradient_checkpointing")]
            assert switches
            assert set(switches) == {switch}


# Numbers --------------------------------------------------------------------------------------------------------------


@every_objective
def test_bf16_autocast_stays_close_to_fp32(objective, lab, tmp_path, monkeypatch):
    full = lines(lab.distil(objective, tmp_path / "fp32", steps=2) / "metrics.jsonl")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    output = lab.distil(objective, tmp_path / "bf16", steps=2)
    assert json.loads((output / "environment.json").read_text())["mixed_precision"] == "bf16"
    half = lines(output / "metrics.jsonl")
    assert len(half) == 2
    assert all(np.isfinite(v) for line in half for v in line.values())
    assert half[0] != full[0]  # autocast was on
    for name, value in half[0].items():
        if "loss" in name:
            assert value == pytest.approx(full[0][name], rel=0.02, abs=0.02), name
    weights = load_file(last_checkpoint(output) / "networks.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_ema_is_its_closed_form_and_swaps_exactly():
    module = torch.nn.Linear(3, 2, dtype=torch.float64)
    module.bias.requires_grad_(False)
    values = [torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(14)]
    module.weight.data = values[0].clone()
    ema = Ema(module, constant_decay(0.5))
    expected = values[0]
    for n, value in enumerate(values[1:]):
        module.weight.data.copy_(value)
        ema.update()
        d = min(0.5, (1 + n) / (10 + n))  # 0.1, 2/11, ... until 0.5 at n = 8
        expected = d * expected + (1 - d) * value
    assert ema.updates == 13
    assert list(ema.average) == ["weight"]  # what is not trained is not averaged
    torch.testing.assert_close(ema.average["weight"], expected, rtol=1e-14, atol=1e-14)
    average = ema.average["weight"].clone()

    def fail_inside():
        with ema.swapped() as swapped:
            assert torch.equal(swapped.weight, average)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert torch.equal(module.weight, values[-1])
    assert torch.equal(ema.average["weight"], average)


def test_an_ema_without_decay_holds_no_copy():
    """d = 0: the average is the parameter."""
    module = torch.nn.Linear(3, 2)
    ema = Ema(module, constant_decay(0.0))
    module.weight.data.fill_(7.0)
    ema.update()
    assert (ema.average, ema.updates) == ({}, 1)
    with ema.swapped() as swapped:
        assert torch.equal(swapped.weight, torch.full((2, 3), 7.0))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_at_its_ends(schedule):
    config = Optimizer(lr=0.6, warmup_steps=4, schedule=schedule, final_ratio=0.0 if schedule == "constant" else 0.25)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    at_half = {"constant": 1.0, "linear": 0.625, "cosine": 0.625}[schedule]
    assert rates[50] == pytest.approx(0.6 * at_half)
    assert rates[100] == pytest.approx(0.6 * (1.0 if schedule == "constant" else 0.25))
    full = [learning_rate(config.model_copy(update={"warmup_steps": 0}), step, 100) for step in range(101)]
    assert full[0] == 0.6
    assert rates[:4] == pytest.approx([f * w for f, w in zip(full, (0.25, 0.5, 0.75, 1.0), strict=False)])
    assert rates[3:] == full[3:]
    assert full == sorted(full, reverse=True)
    if schedule == "cosine":
        assert full[25] == pytest.approx(0.6 * (0.25 + 0.75 * (1 + 2**-0.5) / 2))


def test_half_life_of_an_ema():
    """EDM's: the last `halflife` images weigh half; early on, the last 5 % of all images seen; the first update forgets all."""
    decay = halflife_decay(halflife=1000, batch_size=25)
    assert decay(0) == 0.0
    late = math.prod(decay(n) for n in range(5000, 5040))  # 40 batches of 25
    assert late == pytest.approx(0.5, rel=1e-12)
    assert decay(200) == pytest.approx(0.5 ** (25 / (200 * 25 * 0.05)), rel=1e-12)
    module = torch.nn.Linear(1, 1)
    ema = Ema(module, decay)
    module.weight.data.fill_(3.0)
    ema.update()
    assert ema.average["weight"].item() == 3.0


def test_what_is_dropped_for_guidance_is_no_class(tmp_path):
    """Digits are the classes 0 to 9; label_dropout puts the label after the last in their place, which guidance asks for."""
    overrides = ["data.labels=true", f"output_dir={tmp_path}", "network={channels: 8, num_blocks: 1}"]
    teacher = NewTeacher(load_config(TeacherConfig, "configs/digits_teacher.yaml", overrides))
    assert {key: value.item() for key, value in teacher.null_condition.items()} == {"class_labels": 10}
