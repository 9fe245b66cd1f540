"""Whether a teacher knows the noise levels of a configuration; what lies outside is refused, by its key, before the run."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import TypeAdapter
from torch.testing import assert_close

from pipelines.common.errors import UserError
from pipelines.noise import EDMSchedule, RectifiedFlowSchedule, VPSchedule
from pipelines.preconditioning import IDDPM, VE, VP
from trainers.config.level_range import check_levels, sampler
from trainers.config.levels import Levels
from trainers.config.run import DistillConfig, TeacherConfig

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TIMESTEPS = VPSchedule.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION))
NO_SIGNAL = VPSchedule.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True))
ANY_SIGMA = EDMSchedule(0.0, math.inf)
ADAM = {"lr": 1e-3}
GOOD = {"name": "uniform", "low": 20, "high": 980}


def distillation(levels: dict, fake: dict | None = None, **more) -> DistillConfig:
    objective = {"name": "varflow", "levels": levels} | more
    data = {"name": "digits"}
    if fake is not None:
        objective |= {"name": "diff_instruct", "fake_score": {"levels": fake, "optimizer": ADAM}}
    student = {"optimizer": ADAM}
    raw = {"output_dir": "x", "steps": 7, "batch_size": 2, "teacher": {"path": "x"}, "student": student, "data": data}
    return DistillConfig.model_validate(raw | {"objective": objective})


def refusal(*args) -> str:
    with pytest.raises(UserError) as caught:
        check_levels(*args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({"name": "uniform", "low": 20, "high": 1500}, "objective.levels.high: 1500 is outside the teacher's levels, 0 to 999"),
        ({"name": "power", "low": 20, "high": 1000}, "objective.levels.high: 1000 is outside the teacher's levels, 0 to 999"),
        ({"name": "log_normal"}, "objective.levels.name: 'log_normal' draws noise levels sigma, for EDM teachers"),
        ({"name": "karras", "low": 0.002, "high": 80}, "objective.levels.name: 'karras' draws noise levels sigma"),
        ({"name": "log_uniform", "low": 0.03, "high": 0.5}, "objective.levels.low: 0.03 is no timestep but looks like a noise"),
        ({"name": "power", "low": 0.3, "high": 20}, "objective.levels.low: 0.3 is no timestep"),
    ],
)
def test_levels_of_stable_diffusion_are_timesteps(levels, message):
    said = refusal(distillation(levels), TIMESTEPS)
    assert said.startswith(message)
    assert "low: 20, high: 980" in said or "set it within them" in said
    check_levels(distillation(GOOD), TIMESTEPS)
    assert refusal(distillation(GOOD, fake=levels), TIMESTEPS).startswith(message.replace("levels", "fake_score.levels", 1))


# Karras et al. 2022, Table 1: the noise levels that each preconditioning knows
RANGES = {"vp": (VP(), 9.77e-4, 152.16), "ve": (VE(), 0.02, 100.0), "iddpm": (IDDPM(), 0.00643, 20290)}


@pytest.mark.parametrize("name", RANGES)
def test_bounds_lie_within_what_a_network_knows(name):
    known, low, high = RANGES[name]
    schedule = EDMSchedule(*known.sigma_range, known.nearest)
    check_levels(distillation({"name": "log_uniform", "low": low, "high": high}), schedule)
    for key, bounds in (("low", {"low": low / 1.01, "high": 1.0}), ("high", {"low": 1.0, "high": high * 1.01})):
        said = refusal(distillation({"name": "log_uniform"} | bounds), schedule)
        assert said.startswith(f"objective.levels.{key}: ")
        assert "is outside the teacher's levels" in said
    check_levels(distillation({"name": "log_uniform", "low": 1e-4, "high": 1e5}), ANY_SIGMA)  # EDM's own networks


def test_flow_matching_has_no_level_above_one():
    said = refusal(distillation({"name": "uniform", "low": 0.02, "high": 980}), RectifiedFlowSchedule())
    assert said.startswith("objective.levels.high: 980 is outside the teacher's levels, 0 to 1")
    assert "of what log_normal draws is outside" in refusal(distillation({"name": "log_normal"}), RectifiedFlowSchedule())


def phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def test_log_normal_is_cut_off_where_a_network_knows_no_more():
    """The same density inside: P(t < x) = (F(x) - F(low)) / (F(high) - F(low)). EDM's own levels for VE: 1.2 % lie below .02."""
    levels, t_range = TypeAdapter(Levels).validate_python({"name": "log_normal"}), (0.02, 100.0)
    low, high = ((math.log(t) + 1.2) / 1.2 for t in t_range)
    u = (torch.arange(1001, dtype=torch.float64) + 0.5) / 1001
    t = sampler(levels, 7, t_range)(u, 0.0)
    assert_close(
        torch.tensor([(phi((math.log(x) + 1.2) / 1.2) - phi(low)) / (phi(high) - phi(low)) for x in t.tolist()]).double(),
        u,
        rtol=0,
        atol=1e-7,
    )
    ends = sampler(levels, 7, t_range)(torch.tensor([torch.finfo(torch.float32).tiny, 1 - 2**-24]), 0.0)
    assert_close(ends, torch.tensor(t_range), rtol=0.03, atol=0)
    assert t_range[0] <= float(ends[0].double()) + 1e-9
    assert float(ends[1]) <= t_range[1]
    free = sampler(levels, 7, (0.0, math.inf))
    assert torch.equal(free(u, 0.0), levels.sampler(7)(u, 0.0))
    assert phi(low) == pytest.approx(0.012, abs=5e-4)
    with pytest.warns(
        UserWarning, match=r"objective.levels: 1\.2% of what log_normal draws is outside the teacher's levels, 0\.02 to 100"
    ):
        check_levels(distillation({"name": "log_normal"}), EDMSchedule(*t_range))
    assert "16.6% of what log_normal draws" in refusal(
        distillation({"name": "log_normal", "mean": -3.0, "std": 0.94}), EDMSchedule(*t_range)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_levels(distillation({"name": "log_normal"}), EDMSchedule(*VP().sigma_range))  # one in a million


def test_timesteps_are_no_sigmas():
    """An EDM network takes any sigma, but none is sampled mostly above the highest."""
    said = refusal(distillation(GOOD), ANY_SIGMA, (0.002, 80.0))
    assert said.startswith("objective.levels: 94% of what uniform draws is outside 0.002 to 80, where this teacher is sampled")
    assert "not timesteps" in said
    for levels in (
        {"name": "log_normal"},
        {"name": "karras", "low": 0.0032, "high": 71.7},
        {"name": "log_uniform", "low": 0.03, "high": 0.5},
    ):
        check_levels(distillation(levels), ANY_SIGMA, (0.002, 80.0))
    raw = {
        "output_dir": "x",
        "steps": 7,
        "batch_size": 2,
        "data": {"name": "digits"},
        "network": {"channels": 8},
        "optimizer": ADAM,
    }
    said = refusal(TeacherConfig.model_validate(raw | {"levels": GOOD}), ANY_SIGMA, (0.002, 80.0))
    assert said.startswith("levels: 94% of what uniform draws")


@pytest.mark.parametrize("name", ["dmd"])
def test_weights_that_are_not_finite(name):
    """Where a schedule of zero SNR leaves no signal, alpha = 0, DMD's weight (sigma / alpha)^2 is infinite."""
    levels = GOOD | {"high": 999}
    said = refusal(distillation(levels, weighting=name), NO_SIGNAL)
    assert said.startswith(f"objective.weighting: {name!r} is not finite at t=999, which objective.levels draws")
    check_levels(distillation(levels, weighting=name), TIMESTEPS)
    check_levels(distillation(GOOD, weighting=name), NO_SIGNAL)
    for other in ("uniform", "sigma", "sigma2", "sigma4", "inv_sigma", "snr", "edm"):
        check_levels(distillation(levels, weighting=other), NO_SIGNAL)


def test_a_new_teacher_is_not_trained_on_timesteps(tmp_path, capsys):
    from trainers import train_teacher

    config = Path(__file__).parents[2] / "configs" / "digits_teacher.yaml"
    overrides = [f"output_dir={tmp_path / 'run'}", "steps=1", "levels={name: uniform, low: 20, high: 980}"]
    with pytest.raises(SystemExit, match="2"):
        train_teacher.main(["--config", str(config), *overrides])
    assert "error: levels: 100% of what uniform draws is outside 0.02 to 10" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_weight_is_looked_at_where_it_is_computed():
    """A fake score's at the objective's levels too, where both learn from one batch; a regression's beside the objective's."""
    last = GOOD | {"high": 999}
    fake = {"levels": GOOD, "optimizer": ADAM, "weighting": "dmd", "warmup_updates": 1}
    said = refusal(distillation(last, name="diff_instruct", joint=True, fake_score=fake), NO_SIGNAL)
    assert said.startswith("objective.fake_score.weighting: 'dmd' is not finite at t=999, which objective.levels draws")
    check_levels(distillation(last, name="diff_instruct", joint=False, fake_score=fake), NO_SIGNAL)
    said = refusal(distillation(last, name="diff_instruct", fake_score=fake | {"levels": last}), NO_SIGNAL)
    assert said.startswith(
        "objective.fake_score.weighting: 'dmd' is not finite at t=999, which objective.fake_score.levels draws"
    )
    vardiu = {"name": "vardiu", "posterior": {"optimizer": ADAM}}
    said = refusal(distillation(last, **vardiu, regression_weighting="dmd"), NO_SIGNAL)
    assert said.startswith("objective.regression_weighting: 'dmd' is not finite at t=999, which objective.levels draws")
    check_levels(distillation(last, **vardiu), NO_SIGNAL)


def test_annealed_levels_are_looked_at_where_they_end():
    """t = u^p: the least u of float32, 2^-24, is t = .19 for the first p, .1, and 2e-22 for the last, 3; SNR there is 4e43."""
    levels = {"name": "power", "low": 1e-30, "high": 1.0, "start": 0.1, "end": 3.0}
    said = refusal(distillation(levels, weighting="snr"), RectifiedFlowSchedule())
    assert said.startswith("objective.weighting: 'snr' is not finite at t=2.1")
    check_levels(distillation(levels | {"end": 0.1}, weighting="snr"), RectifiedFlowSchedule())


def test_a_readout_level_is_one_that_the_network_knows():
    from pipelines.denoiser import check_readout

    for schedule, t, wrong in ((TIMESTEPS, 999, 1000), (TIMESTEPS, 0, -1), (TIMESTEPS, 500.0, 500.5), (ANY_SIGMA, 2.5, -1)):
        check_readout(schedule, t)
        with pytest.raises(UserError, match="the readout level t="):
            check_readout(schedule, wrong)
    known = IDDPM()
    iddpm = EDMSchedule(*known.sigma_range, known.nearest)
    check_readout(iddpm, float(known.nearest(torch.tensor(2.5))))
    with pytest.raises(UserError, match=r"the readout level t=2.5 is none that the network knows; the nearest is 2\.\d+"):
        check_readout(iddpm, 2.5)
