"""LCM-LoRA's update, the rival of `make bench-emoji`, against the paper's formulas on a teacher whose trajectories are known."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from scripts.bench.parts.lcm_lora import HUBER, SOLVER_STEPS, Grid, lcm_loss, scalings, x0_of


@pytest.fixture
def grid() -> Grid:
    return Grid(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double())


def test_the_boundary_condition_leaves_a_clean_picture_as_it_is():
    """c_skip(0) = 1, c_out(0) = 0; far away the network's x0 is taken (LCM's time scale 10, sigma_data 1/2)."""
    skip, out = scalings(torch.tensor([0, 7, 999]))
    assert skip.shape == out.shape == (3, 1, 1, 1)
    assert (float(skip[0]), float(out[0])) == (1.0, 0.0)
    assert float(skip[1]) == pytest.approx(0.25 / (70**2 + 0.25))
    assert float(out[1]) == pytest.approx(70 / math.sqrt(70**2 + 0.25))
    assert float(skip[2]) < 1e-8


def test_the_grid_is_ddims_with_fifty_steps(grid):
    t, before, abar = grid.at(torch.arange(SOLVER_STEPS))
    assert t.tolist() == list(range(19, 1000, 20))
    assert before.tolist() == [0, *range(19, 980, 20)]
    assert torch.equal(abar, grid.abar[before])


def test_a_consistent_student_has_no_loss_and_a_wrong_one_its_distance(grid):
    """Data at one point mu: the exact noise is (x - alpha mu) / sigma, its trajectories end at mu, and so does every x0. Equal
    predictions with and without a caption make guidance do nothing.
    """
    generator = torch.Generator().manual_seed(3)
    mu = torch.randn(1, 2, 5, 7, generator=generator, dtype=torch.float64)
    x0, eps = mu.expand(3, -1, -1, -1), torch.randn(3, 2, 5, 7, generator=generator, dtype=torch.float64)
    text = torch.zeros(3, 11, 13)

    def exact(x, t, encoder_hidden_states):
        abar = grid.abar[t].view(-1, 1, 1, 1)
        return (x - abar.sqrt() * mu) / (1 - abar).sqrt()

    index, w = torch.tensor([20, 30, 49]), torch.tensor([2.0, 5.0, 15.0])
    assert float(lcm_loss(exact, exact, grid, x0, eps, index, w, text, text)) < 1e-6

    def biased(x, t, encoder_hidden_states):  # its x0 is off by exactly t / 1000
        abar = grid.abar[t].view(-1, 1, 1, 1)
        return exact(x, t, text) - abar.sqrt() / (1 - abar).sqrt() * t.view(-1, 1, 1, 1) / 1000

    t, before, _ = grid.at(index)
    gap = (t - before).double() / 1000  # of the two predictions, where c_out is one
    expected = ((gap.square() + HUBER**2).sqrt() - HUBER).mean()
    assert float(lcm_loss(biased, exact, grid, x0, eps, index, w, text, text)) == pytest.approx(float(expected), rel=1e-3)


def test_guidance_goes_beyond_the_caption(grid):
    """The teacher's step is from noise cond + w (cond - uncond), with x0 of that noise (LCM, Eq. 14)."""
    x0, eps = torch.zeros(1, 2, 3, 5, dtype=torch.float64), torch.ones(1, 2, 3, 5, dtype=torch.float64)
    index, w, text = torch.tensor([30]), torch.tensor([4.0]), torch.ones(1, 7, 11)
    t, before, abar_before = grid.at(index)
    seen = []

    def teacher(x, t, encoder_hidden_states):
        return torch.full_like(x, 0.3 if encoder_hidden_states.any() else 0.1)

    def student(x, t, encoder_hidden_states):
        seen.append((x, int(t)))
        return torch.zeros_like(x)

    lcm_loss(student, teacher, grid, x0, eps, index, w, text, torch.zeros(1, 7, 11))
    noise, abar = torch.full_like(x0, 0.3 + 4 * 0.2), grid.abar[t]
    x_t = (1 - abar).sqrt() * eps
    after = abar_before.sqrt() * (x_t - (1 - abar).sqrt() * noise) / abar.sqrt() + (1 - abar_before).sqrt() * noise
    assert [at for _, at in seen] == [int(t), int(before)]
    torch.testing.assert_close(seen[1][0], after)
    torch.testing.assert_close(x0_of(noise, x_t, abar.view(1, 1, 1, 1)), (x_t - (1 - abar).sqrt() * noise) / abar.sqrt())
