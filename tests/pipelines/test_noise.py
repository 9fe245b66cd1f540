"""Noise levels: the 2x2 solve, the schedules against diffusers' own schedulers, quantile functions, weightings."""

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from pydantic import TypeAdapter
from torch.testing import assert_close

from pipelines import noise
from pipelines.denoiser import Denoiser
from pipelines.edm import EDMScheduler
from pipelines.noise import EDMSchedule, Level, RectifiedFlowSchedule, VPSchedule, add_noise, from_x0, score, to_eps, to_x0, widen
from pipelines.preconditioning import IDDPM
from trainers.config.levels import Levels
from trainers.objectives.base import dot, sample_level, score_difference_loss

TYPES = ("sample", "epsilon", "v_prediction", "flow")
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP_SCHEDULERS = {
    "linear": DDPMScheduler(),
    "scaled_linear": DDIMScheduler(**STABLE_DIFFUSION),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "zero_snr": DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True),
    "euler": EulerDiscreteScheduler(**STABLE_DIFFUSION),
    "dpm": DPMSolverMultistepScheduler(**STABLE_DIFFUSION, num_train_timesteps=37),
}


def vp(name: str) -> VPSchedule:
    return VPSchedule(VP_SCHEDULERS[name].alphas_cumprod.double())  # diffusers' own numbers are float32


SCHEDULES = {f"vp_{name}": vp(name) for name in VP_SCHEDULERS} | {"edm": EDMSchedule(), "flow": RectifiedFlowSchedule()}


def levels_of(schedule, low: float = 0.0) -> Level:
    """Both ends and something between; `low` as a share of the range."""
    first, last = schedule.t_range
    t = torch.tensor([first + low * (last - first), first + 0.37 * (last - first), last], dtype=torch.float64)
    return schedule.level(t)


@pytest.fixture
def x0(randn, shape):
    return randn(*shape)


@pytest.fixture
def eps(randn, shape, x0):
    return randn(*shape)


# One convention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise_sample_by_sample(name, x0, eps):
    level = levels_of(SCHEDULES[name])
    x_t = add_noise(x0, eps, level)
    for i in range(len(x0)):
        alpha, sigma = float(level.alpha[i]), float(level.sigma[i])
        assert_close(x_t[i], alpha * x0[i] + sigma * eps[i], rtol=1e-12, atol=1e-12)
        if name.startswith("vp"):
            assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)
        else:
            assert (alpha, sigma) == (1 - float(level.t[i]) if name == "flow" else 1, float(level.t[i]))


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_prediction_types(name, prediction_type, x0, eps):
    """The output by its definition, and back again; singular for epsilon at alpha = 0 and nowhere else."""
    level = levels_of(SCHEDULES[name], low=0.01)
    x_t = add_noise(x0, eps, level)
    out = from_x0(x0, x_t, level, prediction_type)
    alpha, sigma = level.alpha, level.sigma
    truth = {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[prediction_type]
    assert_close(out, truth, rtol=1e-10, atol=1e-10)
    back = to_x0(truth, x_t, level, prediction_type)
    singular = (alpha.flatten() == 0) & (prediction_type == "epsilon")
    # the cosine schedule ends at alpha = 5e-5: epsilon loses that much precision there
    assert_close(back[~singular], x0[~singular], rtol=1e-9, atol=1e-9)
    assert not torch.isfinite(back[singular]).any()
    assert bool(singular.any()) == (prediction_type == "epsilon" and name in ("flow", "vp_zero_snr"))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_outputs_round_trip(prediction_type, randn, shape, x0):
    """out -> x0 -> out for a network's output that is consistent with nothing."""
    out, x_t = randn(*shape), randn(*shape)
    level = Level(widen(torch.tensor([0.9, 0.2, 1.7])), widen(torch.tensor([0.3, 1.1, 0.4])), torch.zeros(3))
    level = Level(level.alpha.double(), level.sigma.double(), level.t)
    back = from_x0(to_x0(out, x_t, level, prediction_type), x_t, level, prediction_type)
    assert_close(back, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_without_noise(prediction_type, x0, randn, shape):
    """At sigma = 0 x_t is the image whatever the network says; the way back has no answer."""
    level = RectifiedFlowSchedule().level(torch.zeros(shape[0], dtype=torch.float64))
    out = x0 if prediction_type == "sample" else randn(*shape)
    assert_close(to_x0(out, x0, level, prediction_type), x0, rtol=1e-12, atol=1e-12)
    assert bool(torch.isfinite(from_x0(x0, x0, level, prediction_type)).any()) == (prediction_type == "sample")
    assert not torch.isfinite(score(x0, x0, level)).any()


@pytest.mark.parametrize("name", SCHEDULES)
def test_score_is_minus_noise_over_sigma(name, x0, eps):
    level = levels_of(SCHEDULES[name], low=0.01)
    x_t = add_noise(x0, eps, level)
    # (alpha x0 - x_t) / sigma^2 loses digits as sigma falls below x0: 1e-16 / sigma^2 with sigma >= 0.01
    assert_close(score(x0, x_t, level), -eps / level.sigma, rtol=1e-9, atol=1e-9)
    assert_close(to_eps(x0, x_t, level), eps, rtol=1e-9, atol=1e-9)


def test_score_is_the_gradient_of_the_log_density(x0, eps):
    """Tweedie for Gaussian data: alpha E[x0|x_t] gives the gradient of log N(x_t; alpha m, alpha^2 s^2 + sigma^2)."""
    level, mean, std = levels_of(vp("scaled_linear")), 0.3, 0.8
    x_t = add_noise(x0, eps, level).requires_grad_()
    variance = level.alpha**2 * std**2 + level.sigma**2
    (gradient,) = torch.autograd.grad((-0.5 * (x_t - level.alpha * mean) ** 2 / variance).sum(), x_t)
    x0_hat = mean + level.alpha * std**2 / variance * (x_t - level.alpha * mean)
    assert_close(score(x0_hat, x_t, level), gradient, rtol=1e-9, atol=1e-9)


def test_unknown_prediction_type(x0):
    level = levels_of(EDMSchedule())
    for call in (to_x0, from_x0):
        with pytest.raises(ValueError, match=r"'eps' is unknown; expected sample, epsilon, v_prediction or flow"):
            call(x0, x0, level, "eps")


# Levels and schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [(3,), (3, 1), (3, 1, 1), (1, 1, 1, 1), (5, 1, 1, 1), (3, 2, 1, 1), (3, 1, 1, 7)])
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_level_refuses_shapes(name, wrong):
    good = {"alpha": torch.ones(3, 1, 1, 1), "sigma": torch.ones(3, 1, 1, 1), "t": torch.ones(3)}
    assert len(Level(**good)) == 3
    with pytest.raises(ValueError, match=rf"Level\.{name} must have shape"):
        Level(**good | {name: torch.ones(wrong)})


@pytest.mark.parametrize("t", [torch.ones(()), torch.ones(3, 1), torch.ones(3, 1, 1, 1)])
def test_level_refuses_time(t):
    with pytest.raises(ValueError, match="must have shape"):
        Level(torch.ones(3, 1, 1, 1), torch.ones(3, 1, 1, 1), t)
    for schedule in (EDMSchedule(), RectifiedFlowSchedule(), vp("linear")):
        with pytest.raises(ValueError, match=r"\(b,\)"):
            schedule.level(t)


def test_widen():
    assert widen(torch.tensor([1.0, 2.0, 3.0]))[:, 0, 0, 0].tolist() == [1, 2, 3]
    for wrong in (torch.ones(()), torch.ones(3, 1), torch.ones(3, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"a per-sample quantity must have shape \(b,\), got"):
            widen(wrong)


def test_level_repeats():
    level = levels_of(RectifiedFlowSchedule())
    assert level.t.tolist() == [0, 0.37, 1]
    assert level.repeat(2).t.tolist() == [0, 0.37, 1, 0, 0.37, 1]
    assert level.repeat_interleave(2).t.tolist() == [0, 0, 0.37, 0.37, 1, 1]
    for repeated in (level.repeat(2), level.repeat_interleave(2)):
        assert_close(repeated.sigma.flatten(), repeated.t, rtol=0, atol=0)
        assert_close(repeated.alpha.flatten(), 1 - repeated.t, rtol=0, atol=0)


@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_vp_takes_any_scheduler_with_alphas_cumprod(name):
    scheduler = VP_SCHEDULERS[name]
    schedule = VPSchedule.from_scheduler(scheduler)
    assert schedule.t_range == (0, scheduler.config.num_train_timesteps - 1)
    t = torch.arange(scheduler.config.num_train_timesteps).flip(0)
    level = schedule.level(t.float())
    assert_close(level.alpha.flatten() ** 2, scheduler.alphas_cumprod.flip(0), rtol=1e-6, atol=0)
    assert_close(level.sigma.flatten() ** 2, 1 - scheduler.alphas_cumprod.flip(0), rtol=1e-6, atol=0)
    assert (float(level.alpha[0]) == 0) == (name == "zero_snr")


@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_vp_tells_the_network_the_time_whose_alpha_it_takes(name):
    """A t between two timesteps is the nearest of them, in all that a level says."""
    scheduler = VP_SCHEDULERS[name]
    last = scheduler.config.num_train_timesteps - 1
    level = vp(name).level(torch.tensor([3.4, 3.6, 17.0, last - 0.6, last + 0.4], dtype=torch.float64))
    assert level.t.tolist() == [3, 4, 17, last - 1, last]
    assert_close(level.alpha.flatten() ** 2, scheduler.alphas_cumprod[[3, 4, 17, last - 1, last]].double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [1500.0, -1.0, float("nan"), float("inf")])
def test_vp_refuses_times_it_does_not_have(t):
    """-1 would be the last level, 1500 an IndexError in the middle of a run."""
    with pytest.raises(ValueError, match=r"t must be in \[0, 999\], the timesteps of this schedule; got"):
        vp("linear").level(torch.tensor([3.0, t]))


def test_levels_are_drawn_where_the_network_knows_them():
    """alpha, sigma and what the network is told are those of one level, for every family."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    on_vp = sample_level(u, lambda u, progress: noise.uniform_t(u, 20, 980), 0.0, vp("linear"))
    assert set(on_vp.t.tolist()) == set(range(20, 981))
    known = IDDPM()
    on_iddpm = sample_level(u, lambda u, progress: noise.log_normal_t(u, -1.2, 1.2), 0.0, EDMSchedule(0, 100, known.nearest))
    told = known.inputs(torch.zeros(1000, 1, 1, 1), on_iddpm)[1]
    assert_close(on_iddpm.sigma.flatten(), known.levels.double()[(999 - told).long()], rtol=1e-7, atol=0)
    free = noise.log_normal_t(u, -1.2, 1.2)
    assert torch.equal(sample_level(u, lambda u, progress: free, 0.0, EDMSchedule()).t, free)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler(), EDMEulerScheduler()])
def test_vp_refuses_other_families(scheduler):
    with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} has no alphas_cumprod: it is not variance preserving"):
        VPSchedule.from_scheduler(scheduler)


@pytest.mark.parametrize("values", [[0.9, 1.1], [0.9, -0.1], [0.9, float("nan")], [[0.9, 0.8]]])
def test_vp_refuses_what_is_no_product_of_alphas(values):
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        VPSchedule(torch.tensor(values))


def test_initial_noise(randn, shape):
    """EDM scales unit noise to sigma; VP and flow hand it to the network as it is."""
    z = randn(*shape)
    level = levels_of(EDMSchedule())
    for i in range(len(z)):
        assert_close(EDMSchedule().initial_noise(z, level)[i], level.t[i] * z[i], rtol=0, atol=0)
    for schedule in (vp("linear"), RectifiedFlowSchedule()):
        assert_close(schedule.initial_noise(z, levels_of(schedule)), z, rtol=0, atol=0)


# diffusers' own schedulers -----------------------------------------------------------------------------------------------


def in_float64(cls, **config):
    """The scheduler with its table in float64, so that agreement can be asked to 1e-10."""
    scheduler = cls(**STABLE_DIFFUSION, **config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_add_noise_and_velocity_of_diffusers(cls, x0, eps):
    scheduler = in_float64(cls)
    t = torch.tensor([0, 371, 999])
    level = VPSchedule.from_scheduler(scheduler).level(t.double())
    x_t = add_noise(x0, eps, level)
    assert_close(x_t, scheduler.add_noise(x0, eps, t), rtol=1e-12, atol=1e-12)
    velocity = scheduler.get_velocity(x0, eps, t)
    assert_close(from_x0(x0, x_t, level, "v_prediction"), velocity, rtol=1e-10, atol=1e-10)
    assert_close(to_x0(velocity, x_t, level, "v_prediction"), x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_pred_original_sample_of_diffusers(cls, prediction_type, randn, shape):
    """For any output of the network and any x_t."""
    scheduler = in_float64(cls, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    out, x_t, t = randn(*shape), randn(*shape), torch.tensor([1, 371, 999])
    ours = to_x0(out, x_t, VPSchedule.from_scheduler(scheduler).level(t.double()), prediction_type)
    for i in range(len(t)):
        theirs = scheduler.step(out[i : i + 1], int(t[i]), x_t[i : i + 1]).pred_original_sample
        assert_close(ours[i : i + 1], theirs, rtol=1e-10, atol=1e-10)


def test_flow_matching_of_diffusers(x0, eps):
    """Noising, and the velocity: with eps - x0 one Euler step lands on the next level, and on x0 in the end."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(11)
    schedule, at = RectifiedFlowSchedule(), [0, 3, 10]
    level = schedule.level(scheduler.sigmas[at].double())
    x_t = add_noise(x0, eps, level)
    assert_close(x_t, scheduler.scale_noise(x0, scheduler.timesteps[at], eps), rtol=1e-12, atol=1e-12)
    velocity = eps - x0
    for i, k in enumerate(at):
        scheduler.set_timesteps(11)
        stepped = scheduler.step(velocity[i : i + 1], scheduler.timesteps[k], x_t[i : i + 1]).prev_sample
        following = schedule.level(scheduler.sigmas[k + 1 : k + 2].double())
        # the scheduler steps in float32
        assert_close(stepped.double(), add_noise(x0[i : i + 1], eps[i : i + 1], following), rtol=1e-6, atol=1e-6)
    assert float(scheduler.sigmas[-1]) == 0
    assert_close(to_x0(velocity, x_t, level, "flow"), x0, rtol=1e-12, atol=1e-12)
    assert_close(from_x0(x0, x_t, level, "flow"), velocity, rtol=1e-12, atol=1e-12)


def test_preconditioning_of_diffusers(randn, shape):
    """What the network is given and what is made of its output, against EDMEulerScheduler."""
    scheduler = EDMEulerScheduler(sigma_data=0.7)
    given, out, x_t = [], randn(*shape), 5 * randn(*shape)

    def network(x, time):
        given.extend([x, time])
        return SimpleNamespace(sample=out)

    level = levels_of(EDMSchedule())
    denoiser = Denoiser(network, EDMSchedule(), "edm", sigma_data=0.7)
    x0_hat = denoiser(x_t, level)
    assert given[0].shape == shape
    assert given[1].shape == shape[:1]
    for i in range(len(x_t)):
        sigma = level.t[i]
        assert_close(given[0][i], scheduler.precondition_inputs(x_t[i], sigma), rtol=1e-12, atol=1e-12)
        assert_close(given[1][i], scheduler.precondition_noise(sigma), rtol=1e-12, atol=1e-12)
        assert_close(x0_hat[i], scheduler.precondition_outputs(x_t[i], out[i], sigma), rtol=1e-12, atol=1e-12)


# Quantile functions ------------------------------------------------------------------------------------------------------

LOW, HIGH = 0.3, 4.7


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def share(t: torch.Tensor, f) -> torch.Tensor:
    low, high = f(torch.tensor([LOW, HIGH], dtype=torch.float64))
    return (f(t) - low) / (high - low)


# name: (configuration, distribution function at progress 0.4); "power" is annealed there from 3 half-way to 0.5: p = 1.75
SAMPLERS = {
    "uniform": ({"low": LOW, "high": HIGH}, lambda t: share(t, lambda v: v)),
    "log_uniform": ({"low": LOW, "high": HIGH}, lambda t: share(t, torch.log)),
    "log_normal": ({"mean": -0.4, "std": 1.6}, lambda t: normal_cdf((t.log() + 0.4) / 1.6)),
    "logit_normal": ({"mean": 0.3, "std": 1.7}, lambda t: normal_cdf((torch.logit(t) - 0.3) / 1.7)),
    "karras": ({"low": LOW, "high": HIGH, "rho": 5.0}, lambda t: share(t, lambda v: v ** (1 / 5))),
    "power": (
        {"low": LOW, "high": HIGH, "start": 3.0, "end": 0.5, "until": 0.8},
        lambda t: share(t, lambda v: v) ** (1 / 1.75),
    ),
}


def sampler_of(name: str, **config):
    return TypeAdapter(Levels).validate_python({"name": name} | (config or SAMPLERS[name][0])).sampler()


def midpoints(n: int) -> torch.Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def test_every_sampler_is_tried():
    union = get_args(get_args(Levels)[0])
    assert {get_args(model.model_fields["name"].annotation)[0] for model in union} == set(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_inverts_its_distribution_function(name):
    u = midpoints(1009)
    t = sampler_of(name)(u, 0.4)
    assert t.shape == u.shape
    assert t.dtype == u.dtype
    assert bool((t.diff() > 0).all())
    assert_close(SAMPLERS[name][1](t), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("log_normal", "logit_normal")])
def test_sampler_ends(name):
    ends = sampler_of(name)(torch.tensor([0.0, 1.0], dtype=torch.float64), 0.4)
    assert_close(ends, torch.tensor([LOW, HIGH], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_survives_the_edges_of_float32(name):
    u = torch.tensor([torch.finfo(torch.float32).tiny, 1 - 2**-24])
    t = sampler_of(name)(u, 0.4)
    assert t.dtype == torch.float32
    assert bool(torch.isfinite(t).all())
    assert bool((t > 0).all())


def test_log_normal_has_edms_moments():
    """Table 1 of Karras et al. 2022 is the default: ln sigma ~ N(-1.2, 1.2^2)."""
    log_sigma = TypeAdapter(Levels).validate_python({"name": "log_normal"}).sampler()(midpoints(100_003), 0.0).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=1e-9)
    assert float(log_sigma.std()) == pytest.approx(1.2, rel=1e-4)


def test_karras_is_the_grid_of_the_sampler():
    grid = EDMScheduler(sigma_min=LOW, sigma_max=HIGH, rho=5.0).sigmas(13)
    u = torch.linspace(1, 0, 13, dtype=torch.float64)
    assert_close(sampler_of("karras")(u, 0.0), grid, rtol=1e-12, atol=0)


def test_power_is_annealed():
    u, flat = midpoints(101), {"low": LOW, "high": HIGH, "start": 1.0, "end": 1.0}
    assert_close(sampler_of("power", **flat)(u, 0.7), sampler_of("uniform")(u, 0.7), rtol=1e-14, atol=0)
    expected = {0.0: 3.0, 0.2: 2.375, 0.4: 1.75, 0.8: 0.5, 0.9: 0.5, 1.0: 0.5}
    for progress, power in expected.items():
        assert noise.annealed_power(progress, 3.0, 0.5, 0.8) == pytest.approx(power, rel=1e-12)
        assert_close(sampler_of("power")(u, progress), LOW + u**power * (HIGH - LOW), rtol=1e-12, atol=0)
    paper = TypeAdapter(Levels).validate_python({"name": "power", "low": LOW, "high": HIGH})
    assert (paper.start, paper.end) == (0.1, 2.0)


def test_power_is_annealed_by_steps_too():
    """VarDiU's code raises p by .01 every 1,000 steps, however long a run is: after 2,842 it stands at .13."""
    levels = TypeAdapter(Levels).validate_python({"name": "power", "low": LOW, "high": HIGH, "until_steps": 190_000})
    u = midpoints(11)
    for steps in (2842, 400_000):
        for done in (0, 2842, min(steps, 190_000), steps):
            p = 0.1 + 1.9 * min(done / 190_000, 1)
            assert_close(levels.sampler(steps)(u, done / steps), LOW + u**p * (HIGH - LOW), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="until, until_steps: give one of them"):
        TypeAdapter(Levels).validate_python({"name": "power", "low": LOW, "high": HIGH, "until": 0.5, "until_steps": 7})


# Weightings --------------------------------------------------------------------------------------------------------------

# by hand for one sample: (alpha, sigma, mean |x0 - x0_hat|, sigma_data) -> w
HAND = {
    "uniform": lambda a, s, gap, sd: 1.0,
    "sigma": lambda a, s, gap, sd: s,
    "sigma2": lambda a, s, gap, sd: s * s,
    "sigma4": lambda a, s, gap, sd: s**4,
    "inv_sigma": lambda a, s, gap, sd: 1 / s,
    "snr": lambda a, s, gap, sd: a * a / (s * s),
    "edm": lambda a, s, gap, sd: ((s / a) ** 2 + sd * sd) / ((s / a) * sd) ** 2,
    "dmd": lambda a, s, gap, sd: s * s / (a * a * gap),
}


def test_every_weighting_is_tried():
    assert set(noise.WEIGHTINGS) == set(HAND)


@pytest.mark.parametrize("name", HAND)
@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "flow"])
def test_weighting_by_hand(schedule, name, x0, eps):
    schedule = SCHEDULES[schedule]
    first, last = schedule.t_range
    t = torch.tensor([first + share * (last - first) for share in (0.1, 0.37, 0.8)], dtype=torch.float64, requires_grad=True)
    level = schedule.level(t)
    x0_hat = eps.clone().requires_grad_()
    w = noise.weight(name, level, x0.requires_grad_(), x0_hat, 0.7)
    assert w.shape == (len(x0), 1, 1, 1)
    assert not w.requires_grad
    for i in range(len(x0)):
        gap = math.fsum((x0 - x0_hat)[i].abs().flatten().tolist()) / x0[i].numel()
        expected = HAND[name](level.alpha[i].item(), level.sigma[i].item(), gap, 0.7)
        assert float(w[i]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "flow"])
def test_dmd_weighting_normalises_the_gradient(schedule, x0, randn, shape):
    """DMD, Eq. 8: the gradient in x0 is (x0_fake - x0_real) / mean |x0 - x0_real| whatever the level."""
    schedule = SCHEDULES[schedule]
    first, last = schedule.t_range
    level = schedule.level(torch.tensor([first + s * (last - first) for s in (0.1, 0.37, 0.8)], dtype=torch.float64))
    real, fake, x0 = randn(*shape), randn(*shape), x0.requires_grad_()
    x_t = add_noise(x0, randn(*shape), level)
    w = noise.weight("dmd", level, x0, real, 0.7)
    loss = score_difference_loss(x_t, score(fake, x_t, level), score(real, x_t, level), w)
    (gradient,) = torch.autograd.grad(loss.sum(), x0)
    gap = (x0 - real).detach().abs().flatten(1).mean(1)
    assert_close(gradient, (fake - real) / widen(gap), rtol=1e-8, atol=1e-8)


def test_edm_weighting_where_no_signal_is_left(x0, eps):
    """At alpha = 0, the last level of a schedule rescaled to zero SNR: the limit of (sigma^2 + sd^2) / (sigma sd)^2."""
    level = vp("zero_snr").level(torch.tensor([999.0, 999.0, 999.0], dtype=torch.float64))
    assert not level.alpha.any()
    assert_close(
        noise.weight("edm", level, x0, eps, 0.5).flatten(), torch.full((3,), 4.0, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_unknown_weighting():
    level = levels_of(EDMSchedule())
    with pytest.raises(ValueError, match=f"weighting 'sigma3' is unknown; expected one of {', '.join(HAND)}$"):
        noise.weight("sigma3", level, torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1), 0.5)


def test_dot_is_the_inner_product_of_each_sample(x0, eps):
    for i in range(len(x0)):
        expected = math.fsum((x0[i] * eps[i]).flatten().tolist())
        assert float(dot(x0, eps)[i]) == pytest.approx(expected, rel=1e-12)
