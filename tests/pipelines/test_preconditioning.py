"""The four preconditioners against Table 1 of Karras et al. 2022, computed with other tools, and as parts of a denoiser."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pipelines.denoiser import Denoiser
from pipelines.edm import EDMScheduler
from pipelines.noise import EDMSchedule, RectifiedFlowSchedule
from pipelines.preconditioning import EDM, IDDPM, PRECONDITIONERS, VE, VP, Prediction, make_preconditioner

SIGMAS = torch.tensor([0.0021, 0.3, 2.5, 77.0], dtype=torch.float64)
SIGMA_DATA = 0.7


def coefficients(known, sigma):
    """(c_in, c_noise, c_skip, c_out) as probed from outside."""
    level = EDMSchedule().level(sigma)
    one, zero = torch.ones(len(sigma), 2, 3, 5, dtype=sigma.dtype), torch.zeros(len(sigma), 2, 3, 5, dtype=sigma.dtype)
    scaled, time = known.inputs(one, level)
    full = torch.cat([one, 7 * one], 1) if isinstance(known, IDDPM) else one  # its second half says nothing of x0
    skip, out = known.x0(0 * full, one, level), known.x0(full, zero, level)
    assert skip.shape == out.shape == one.shape
    return [v[:, 0, 0, 0] if v.ndim == 4 else v for v in (scaled, time, skip, out)]


def test_edm():
    c_in, time, skip, out = coefficients(EDM(SIGMA_DATA), SIGMAS)
    s = SIGMAS
    assert_close(c_in, 1 / (s**2 + SIGMA_DATA**2).sqrt())
    assert_close(time, s.log() / 4)
    assert_close(skip, SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2))
    assert_close(out, s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt())
    flow = RectifiedFlowSchedule().level(torch.tensor([0.3], dtype=torch.float64))  # any alpha
    assert_close(
        EDM(SIGMA_DATA).inputs(torch.ones(1, 1, 1, 1), flow)[1], torch.tensor([math.log(3 / 7) / 4], dtype=torch.float64)
    )


def test_vp():
    """t(sigma) inverts sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
    t = torch.tensor([0.03, 0.2, 0.7, 1.0], dtype=torch.float64)
    sigma = ((19.9 / 2 * t**2 + 0.1 * t).exp() - 1).sqrt()
    c_in, time, skip, out = coefficients(VP(), sigma)
    assert_close(time, 999 * t, rtol=1e-9, atol=1e-9)
    assert_close(c_in, 1 / (1 + sigma**2).sqrt())
    assert_close(skip, torch.ones_like(sigma))
    assert_close(out, -sigma)
    low, high = VP().sigma_range
    assert (low, round(high, 2)) == (2**-10, 152.17)
    wider = VP(beta_d=10.0, beta_min=0.2, M=500)
    assert_close(coefficients(wider, ((5 * t**2 + 0.2 * t).exp() - 1).sqrt())[1], 499 * t, rtol=1e-9, atol=1e-9)


def test_ve():
    c_in, time, skip, out = coefficients(VE(), SIGMAS)
    assert_close(c_in, torch.ones_like(SIGMAS))
    assert_close(time, (SIGMAS / 2).log())
    assert_close(skip, torch.ones_like(SIGMAS))
    assert_close(out, SIGMAS)
    assert VE().sigma_range == (0.02, 100.0)


def test_iddpm():
    """The table falls from 20291 to 0; times are whole, and those of the nearest level."""
    known = IDDPM()
    u = known.levels.double().numpy()
    assert u.shape == (1001,)
    assert np.all(np.diff(u) < 0)
    bar = np.sin(0.5 * np.pi * np.arange(1001) / 1000 / 1.008) ** 2
    # where no ratio is clipped at C_1, the recursion telescopes: sigma_j^2 = bar_1000 / bar_j - 1
    assert_close(torch.tensor(u[60:990]), torch.tensor(np.sqrt(bar[1000] / bar[60:990] - 1)), rtol=1e-3, atol=0)
    assert (round(known.sigma_range[0], 5), round(known.sigma_range[1])) == (0.00642, 20291)
    c_in, time, skip, out = coefficients(known, SIGMAS)
    nearest = np.abs(SIGMAS.numpy()[:, None] - u).argmin(1)
    assert_close(time, torch.tensor(999.0 - nearest, dtype=torch.float64))
    assert_close(known.nearest(SIGMAS), torch.tensor(u[nearest]))
    assert_close(known.nearest(known.nearest(SIGMAS)), known.nearest(SIGMAS))
    assert_close(c_in, 1 / (1 + SIGMAS**2).sqrt())
    assert_close(skip, torch.ones_like(SIGMAS))
    assert_close(out, -SIGMAS)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_denoiser_and_scheduler(name, randn):
    """A network that knows x0 and puts out what its preconditioning asks for is denoised to x0, at levels of the scheduler."""
    scheduler = EDMScheduler(preconditioning=name, sigma_data=SIGMA_DATA, sigma_min=0.03, sigma_max=60.0)
    known, x0, eps = scheduler.preconditioner(), randn(5, 2, 3, 7), randn(5, 2, 3, 7)
    sigmas = scheduler.sigmas(5)
    assert_close(known.nearest(sigmas), sigmas)
    assert sigmas.dtype == torch.float64
    level = EDMSchedule().level(sigmas)
    x_t = x0 + level.sigma * eps

    def network(x, time):
        free, unit = known.x0(torch.zeros_like(x_t), x_t, level), known.x0(torch.ones_like(x_t), x_t, level)
        return (x0 - free) / (unit - free)

    denoiser = Denoiser(torch.nn.Identity(), EDMSchedule(), known, SIGMA_DATA)
    denoiser.network = Wrapped(network)
    assert_close(denoiser(x_t, level), x0, rtol=1e-9, atol=1e-9)


class Wrapped(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, time):
        return self.function(x, time)


def test_names():
    assert make_preconditioner("edm", 0.3) == EDM(0.3)
    assert make_preconditioner("epsilon", 0.3) == Prediction("epsilon")
    assert make_preconditioner(VE(), 0.3) == VE()


def test_scheduler_settings_reach_the_preconditioner():
    assert EDMScheduler(preconditioning="vp", beta_d=10.0, M=7).preconditioner() == VP(beta_d=10.0, M=7)
    assert EDMScheduler(preconditioning="iddpm", C_1=0.01, C_2=0.02, M=7).preconditioner() == IDDPM(0.01, 0.02, 7)
    with pytest.raises(ValueError, match=r"scheduler.preconditioning is 'ddpm'; expected one of edm, sample, vp, ve, iddpm"):
        EDMScheduler(preconditioning="ddpm")


@pytest.mark.parametrize(("low", "high"), [(0.01, 80.0), (0.02, 101.0), (3.0, 2.0)])
def test_levels_outside_what_the_network_knows(low, high):
    with pytest.raises(ValueError, match=r"must be in order and within what ve knows, 0\.02 to 100"):
        EDMScheduler(preconditioning="ve").sigmas(5, low, high)
