"""The learning rate of each network follows the updates that it has made itself, its warm-up before the first step among them."""

import json
import math
import signal
from collections import defaultdict

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from trainers.config.networks import Optimizer
from trainers.config.run import Run
from trainers.engine import checkpoint
from trainers.engine.draws import DrawSource
from trainers.engine.loop import Trainer
from trainers.objectives.base import LossTerms, Phase

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

WARMUP, STEPS, ALONE = 7, 6, 2  # updates of the second network before the first step; steps; its own updates in each
SECOND = WARMUP + STEPS * (ALONE + 1)  # all its updates: it takes part in the joint one too
RATE = {"lr": 0.02, "warmup_steps": 5}


def scheduled(schedule: str) -> dict:
    return RATE | {"schedule": schedule} | ({} if schedule == "constant" else {"final_ratio": 0.1})


class Two:
    """A student and a second network that is warmed up, updated alone and then jointly, as VarDiU's posterior is."""

    frozen, health, needs_data, state = {}, (), False, {}

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.networks = {"student": nn.Linear(6, 5), "second": nn.Linear(6, 5)}
        self.seen = []
        self.warmup = (Phase("alone", ("second",), self.alone, WARMUP),)
        self.phases = (Phase("alone", ("second",), self.alone, ALONE), Phase("joint", ("student", "second"), self.joint))

    def alone(self, draw, context=None) -> LossTerms:
        self.seen.append(draw.progress)
        return LossTerms((self.networks["second"](draw.z.flatten(1)) - draw.eps.flatten(1)[:, :5]).square().sum(1), {})

    def joint(self, draw, context=None) -> LossTerms:
        apart = self.networks["student"](draw.z.flatten(1)) - self.networks["second"](draw.z.flatten(1))
        return LossTerms(apart.square().sum(1) + self.alone(draw).loss, {})


def trainer(folder, optimizer: dict, resume: str = "no", stop_after: int | None = None) -> tuple[Trainer, dict[str, list[float]]]:
    """A run, and the rates at which each network's optimiser will have stepped; a signal comes after `stop_after` updates."""
    objective, rates, updates = Two(), defaultdict(list), []
    run = Run(
        output_dir=str(folder), steps=STEPS, batch_size=4, log_every=1, checkpoint_every=2, keep_checkpoints=9, resume=resume
    )
    optimizers = dict.fromkeys(objective.networks, Optimizer(**optimizer))
    made = Trainer(
        run,
        Accelerator(cpu=True),
        objective,
        "student",
        optimizers,
        DrawSource(0, 4, (1, 2, 3), torch.device("cpu")),
        preview=print,
        export=lambda folder, info: None,
        record=lambda start: folder.mkdir(exist_ok=True) or {},
    )
    for role, optimizer in made.optimizers.items():
        optimizer.register_step_pre_hook(lambda o, args, kwargs, role=role: rates[role].append(o.param_groups[0]["lr"]))

    def count(*_) -> None:
        updates.append(1)
        if len(updates) == stop_after:
            signal.raise_signal(signal.SIGTERM)

    made.optimizers["second"].register_step_post_hook(count)
    return made, rates


def by_hand(schedule: str, updates: int) -> list[float]:
    """0.02, up in five equal parts, and down to a tenth, which it would reach after the last of `updates`."""
    left = {
        "constant": lambda share: 1.0,
        "linear": lambda share: 1.0 - share,
        "cosine": lambda share: math.cos(math.pi * share / 2) ** 2,
    }[schedule]
    return [0.02 * min(1.0, (n + 1) / 5) * (0.1 + 0.9 * left(n / updates)) for n in range(updates)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_network_s_rate_follows_its_own_updates(schedule, tmp_path):
    """warmup_steps are its first updates; it decays over all that it makes. The student's schedule is that of the steps."""
    made, rates = trainer(tmp_path, scheduled(schedule))
    made.fit()
    assert rates["second"] == pytest.approx(by_hand(schedule, SECOND), rel=1e-12)
    assert rates["student"] == pytest.approx(by_hand(schedule, STEPS), rel=1e-12)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["student/lr"] for line in logged] == rates["student"]
    last_of_step = [WARMUP + (ALONE + 1) * (step + 1) - 1 for step in range(STEPS)]
    assert [line["second/lr"] for line in logged] == [rates["second"][n] for n in last_of_step]


def test_warm_up_says_its_rate_and_keeps_to_the_levels_of_the_first_step(tmp_path, capsys):
    """Levels that are annealed stay where step 0 begins: the second network learns what it is then asked for."""
    made, rates = trainer(tmp_path, RATE)
    made.fit()
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "warm-up of alone done" in line]
    assert "second/lr 0.02" in said
    assert rates["second"][WARMUP - 1] == 0.02
    assert made.objective.seen == [0.0] * WARMUP + [step / STEPS for step in range(STEPS) for _ in range(ALONE + 1)]
    assert made.ema.updates == STEPS


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("stop_after", [1, 3, WARMUP - 1, WARMUP, WARMUP + 1, WARMUP + 2 * (ALONE + 1)])
@pytest.mark.slow
def test_a_stopped_run_goes_on_at_the_rate_it_would_have_had(stop_after, schedule, tmp_path):
    """In the middle of the warm-up, at its end and between steps: the same rates and, to the bit, the same end."""
    optimizer = scheduled(schedule)
    whole, expected = trainer(tmp_path / "whole", optimizer)
    whole.fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    first, begun = trainer(tmp_path / "run", optimizer, stop_after=stop_after)
    assert not first.fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    second, rest = trainer(tmp_path / "run", optimizer, resume="latest")
    assert second.fit()
    for role in expected:
        assert begun[role] + rest[role] == expected[role]
    ends = [checkpoint.load(checkpoint.list_checkpoints(tmp_path / run / "checkpoints")[-1])[0] for run in ("whole", "run")]
    for name, group in ends[0].items():
        assert all(torch.equal(value, ends[1][name][key]) for key, value in group.items())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
