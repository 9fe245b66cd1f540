"""VarDiU's per-sample losses and importance weights, by hand and by their laws."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pipelines.noise import RectifiedFlowSchedule, widen
from trainers.objectives.importance import (
    bound_loss,
    effective_sample_size,
    log_importance,
    log_standard_normal,
    multi_sample_loss,
    resampling_move,
    tempered,
    weighted_mean,
)


def test_standard_normal(randn):
    x = randn(3, 5, 7)
    expected = MultivariateNormal(torch.zeros(7).double(), torch.eye(7).double()).log_prob(x)
    assert_close(log_standard_normal(x), expected, rtol=1e-12, atol=1e-12)


def test_log_importance_by_hand(randn, shape):
    """One sample and one latent at a time, in scalars."""
    level = RectifiedFlowSchedule().level(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    x_t, x0_k, z_k, log_q = randn(*shape), randn(3, 11, *shape[1:]), randn(3, 11, *shape[1:]), randn(3, 11)
    log_v = log_importance(x_t, x0_k, z_k, log_q, level)
    assert log_v.shape == (3, 11)

    def log_normal(x: Tensor, mean: Tensor, std: float) -> float:
        terms = -0.5 * ((x - mean) / std).square() - math.log(std) - 0.5 * math.log(2 * math.pi)
        return math.fsum(terms.flatten().tolist())

    for b, t in enumerate((0.2, 0.5, 0.9)):
        for k in range(11):
            expected = log_normal(x_t[b], (1 - t) * x0_k[b, k], t) + log_normal(z_k[b, k], torch.zeros(()), 1.0)
            assert float(log_v[b, k]) == pytest.approx(expected - float(log_q[b, k]), rel=1e-12)


def test_effective_sample_size(randn):
    log_v = 2 * randn(3, 11)
    v = log_v.exp()
    expected = v.sum(1).square() / v.square().sum(1)
    assert_close(effective_sample_size(log_v), expected, rtol=1e-12, atol=0)
    # weights e^-5000 are no trouble; equal ones count all, a single one counts for one
    assert_close(effective_sample_size(log_v - 5000), expected, rtol=1e-9, atol=0)
    assert_close(effective_sample_size(torch.zeros(3, 11)), torch.full((3,), 11.0), rtol=1e-6, atol=0)
    assert_close(effective_sample_size(torch.tensor([[0.0, -800, -900]])), torch.ones(1), rtol=1e-6, atol=0)


def test_losses_by_hand(randn, shape):
    x_t, score_d, log_q, log_v, w = randn(*shape), randn(*shape), randn(3), randn(3, 11), randn(3).abs()
    bound, multi = bound_loss(x_t, score_d, log_q, widen(w)), multi_sample_loss(x_t, score_d, log_v, widen(w))
    for i in range(3):
        product = math.fsum((x_t[i] * score_d[i]).flatten().tolist())
        assert float(bound[i]) == pytest.approx(-float(w[i]) * (product + float(log_q[i])), rel=1e-12)
        mean_v = math.fsum(log_v[i].exp().tolist()) / 11
        assert float(multi[i]) == pytest.approx(float(w[i]) * (math.log(mean_v) - product), rel=1e-12)


@pytest.mark.parametrize("loss", [bound_loss, multi_sample_loss])
def test_the_data_score_is_a_constant(loss, randn, shape):
    x_t, score_d, other = randn(*shape).requires_grad_(), randn(*shape).requires_grad_(), randn(3, 1)[:, 0]
    value = loss(x_t, score_d, other if loss is bound_loss else other[:, None], torch.ones(3, 1, 1, 1))
    x_gradient, score_gradient = torch.autograd.grad(value.sum(), [x_t, score_d], allow_unused=True)
    assert_close(x_gradient, -score_d, rtol=1e-12, atol=0)
    assert score_gradient is None


def test_weighted_mean_by_hand(randn, shape):
    log_v, x0_k = 3 * randn(3, 11), randn(3, 11, *shape[1:])
    mean = weighted_mean(log_v - 5000, x0_k)
    for b in range(3):
        v = log_v[b].exp()
        assert_close(mean[b], sum(v[k] * x0_k[b, k] for k in range(11)) / v.sum(), rtol=1e-9, atol=1e-9)


# Tempering ---------------------------------------------------------------------------------------------------------------


def test_tempering_reaches_its_target(randn):
    """To 1e-3 where the weights alone have fewer effective samples; rows that have more are left bit for bit."""
    spread = torch.tensor([0.01, 0.3, 1, 10, 1000]).double()[:, None, None]
    log_v = (spread * randn(5, 101, 11) - 300).flatten(0, 1)
    before = effective_sample_size(log_v)
    for target in (1.5, 4.0, 9.0):
        out = tempered(log_v, target)
        above = before >= target
        assert 50 < int(above.sum()) < len(log_v) - 50
        assert torch.equal(out[above], log_v[above])
        assert_close(effective_sample_size(out[~above]), torch.full_like(before[~above], target), rtol=0, atol=1e-3)
        tau = out / log_v
        assert_close(tau, tau[:, :1].expand_as(tau), rtol=1e-9, atol=1e-12)
        assert float(tau.min()) > 0
        assert float(tau.max()) <= 1


def test_tempering_is_monotone_and_ends_in_the_plain_mean(randn, shape):
    log_v, x0_k = 3 * randn(3, 11), randn(3, 11, *shape[1:])
    taus = [(tempered(log_v, target) / log_v)[:, 0] for target in (1.0, 2.0, 5.0, 10.0, 10.999)]
    assert torch.equal(taus[0], torch.ones(3).double())  # any weights are worth one sample
    assert all(bool((b < a).all()) for a, b in pairwise(taus[1:]))
    assert_close(weighted_mean(tempered(log_v, 11.0), x0_k), x0_k.mean(1), rtol=0, atol=1e-6)
    assert torch.equal(tempered(torch.zeros(3, 11), 11.0), torch.zeros(3, 11))


def test_tempering_in_float32_of_weights_that_have_collapsed(randn):
    """At low noise log v differ by 10^5 and more."""
    log_v = (1e5 * randn(13, 11) - 1e6).float()
    assert_close(effective_sample_size(tempered(log_v, 4.0)), torch.full((13,), 4.0), rtol=0, atol=1e-2)


# Moves -------------------------------------------------------------------------------------------------------------------


def test_move_picks_by_the_cumulated_weights(randn, shape):
    log_v = torch.tensor([1.0, 2.0, 5.0]).double().log().repeat(5, 1) - 3000  # shares 1/8, 2/8, 5/8
    x0_k = randn(5, 3, *shape[1:])
    u = torch.tensor([1e-9, 0.124, 0.126, 0.376, 1.0]).double()
    picked_v, picked = resampling_move(log_v, x0_k, u)
    for i, k in enumerate((0, 0, 1, 2, 2)):
        assert torch.equal(picked[i], x0_k[i, k])
        assert picked_v[i] == log_v[i, k]


def test_move_leaves_the_posterior_as_it_is(generator):
    """A discrete posterior and another proposal, two moves: exact whatever the proposal, but only from the posterior."""
    n, K = 40_000, 2
    posterior, proposal = torch.tensor([0.1, 0.5, 0.2, 0.05, 0.15]).double(), torch.tensor([0.5, 0.1, 0.1, 0.25, 0.05]).double()
    log_ratio = (posterior / proposal).log() - 700  # known up to a factor, as p(z, x_t) / q(z) is

    def draw(p: Tensor, *size: int) -> Tensor:
        return torch.multinomial(p, math.prod(size), replacement=True, generator=generator).reshape(size)

    def after_two_moves(start: Tensor, weighted: bool = True) -> float:
        """The largest deviation of the shares from the posterior's, in standard errors."""
        log_w = log_ratio if weighted else torch.zeros(5).double()
        z = draw(start, n)
        for _ in range(2):
            pool = torch.cat([z[:, None], draw(proposal, n, K)], 1)
            u = torch.rand(n, generator=generator, dtype=torch.float64)
            log_v, x0 = resampling_move(log_w[pool], pool[..., None, None, None].double(), u)
            z = x0.flatten().long()
            assert torch.equal(log_v, log_w[z])
        share = torch.bincount(z, minlength=5) / n
        return float(((share - posterior).abs() / (posterior * (1 - posterior) / n).sqrt()).max())

    assert after_two_moves(posterior) < 4
    assert after_two_moves(proposal) > 10
    assert after_two_moves(posterior, weighted=False) > 10
