"""VarDiU's resampled score in the linear-Gaussian world: the student's score that proposals make, with all its options."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipelines.noise import RectifiedFlowSchedule
from trainers.objectives.ess import BINS

K = 5


def exact_scores(world, x_t: Tensor) -> Tensor:
    """(mean - x) / covariance of the student's noised Gaussian."""
    scores = []
    for cell, x in zip(world.cells, world.by_cell(x_t), strict=True):
        mean, cov = world.student_moments(*cell)
        scores.append((mean - x) @ torch.linalg.inv(cov))
    return torch.cat(scores).detach()


def with_noise(draw, noise: Tensor):
    """The draw with the proposals' noise (n, K, d) in every cell."""
    draw.normals["proposals"] = noise.repeat(len(draw.z) // len(noise), 1, 1)[..., None, None]
    return draw


def mean_and_error(world, value: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, its standard error), both (cells, d)."""
    cells = torch.stack(world.by_cell(value))
    return cells.mean(1), cells.std(1) / math.sqrt(cells.shape[1])


# The score ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 3, 7])
def test_unbiased_for_the_exact_posterior(num_samples, world, randn):
    """At fixed x_t the mean over the proposals is the student's score for any K: all weights are equal."""
    n = num_samples * world.d
    basis = math.sqrt(n) * torch.linalg.qr(randn(n, n)).Q
    noise = torch.cat([basis, -basis]).unflatten(1, (num_samples, world.d))
    draw = with_noise(world.at_one_x_t(len(noise))[0], noise)
    objective = world.objective("resampled_score", num_samples=num_samples)
    estimates, x_t = world.student_score_seen(objective, draw)
    for estimate, expected in zip(world.by_cell(estimates), world.by_cell(exact_scores(world, x_t)), strict=True):
        assert_close(expected, expected[:1].expand_as(expected), rtol=1e-8, atol=1e-8)
        assert float((estimate - expected).abs().max()) > 1e-2  # single estimates are not
        assert_close(estimate.mean(0), expected[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("num_samples", [2, 6])
def test_paired_proposals_are_exact_for_a_linear_student(num_samples, antithetic, world, assert_all_close):
    """An even number comes as +-noise: with equal weights all that is linear in the noise cancels, draw by draw."""
    objective = world.objective("resampled_score", num_samples=num_samples)
    estimates, x_t = world.student_score_seen(objective, world.random(7, **world.extra_of(objective)))
    assert_close(estimates, exact_scores(world, x_t), rtol=1e-8, atol=1e-8)
    for estimator in ("multi_sample", "resampled_score"):
        objective = world.objective(estimator, num_samples=num_samples, antithetic=antithetic)
        terms = world.joint(objective, world.cubature(**world.extra_of(objective)))
        assert_all_close(world.gradients(terms.loss.mean(), world.student), world.gradient(world.cell_mean(world.kl)), 1e-9)


def test_converges_for_a_wrong_posterior(world, randn):
    """Biased at K = 1, where it is the score under q; the bias falls as 1/K."""
    bias = []
    for num_samples, repeats in ((1, 4096), (17, 4096), (257, 1024)):
        draw = with_noise(world.at_one_x_t(repeats)[0], randn(repeats, num_samples, world.d))
        objective = world.objective("resampled_score", world.wrong, num_samples=num_samples)
        estimates, x_t = world.student_score_seen(objective, draw)
        mean, error = mean_and_error(world, estimates - exact_scores(world, x_t))
        bias.append((float(mean.norm()), float(error.norm())))
    assert bias[0][0] > 15 * bias[0][1]
    assert all(b < a / 4 for (a, _), (b, _) in pairwise(bias))
    assert bias[-1][0] < 4 * bias[-1][1]
    assert bias[-1][0] < 0.02 * bias[0][0]


def proposals_by_hand(world, draw, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """(log importance weights (n, K + 1), that of z first; g of the K proposals (n, K, d)) of the wrong posterior."""
    x0 = []
    for i, noise in enumerate(draw.normals["proposals"].flatten(2)):
        label = int(draw.condition["class_labels"][i])
        slope, offset, cov = world.wrong.moments(label, float(draw.u[i]))
        z = slope @ x_t[i] + offset + noise @ torch.linalg.cholesky(cov).T
        x0.append(z @ world.student.matrix.T + world.student.bias[label])
    return world.importance(draw, world.wrong)[0], torch.stack(x0).detach()


def assert_means_are(world, objective, draw, expected) -> None:
    """The m seen in the loss is expected(log_v (K+1,), g (K, d), i) at every sample i."""
    estimates, x_t = world.student_score_seen(objective, draw)
    log_v, x0 = proposals_by_hand(world, draw, x_t)
    for i in range(len(x_t)):
        t = float(draw.u[i])
        m = (t**2 * estimates[i] + x_t[i]) / (1 - t)
        assert_close(m, expected(log_v[i], x0[i], i), rtol=1e-8, atol=1e-8)


def weighted(log_v: Tensor, x0: Tensor) -> Tensor:
    v = (log_v - log_v.max()).exp()
    return sum(v[k] * x0[k] for k in range(len(v))) / v.sum()


def test_by_hand(world):
    """The latent that made x_t is left out."""
    objective = world.objective("resampled_score", world.wrong)
    assert_means_are(world, objective, world.random(7, K), lambda log_v, x0, i: weighted(log_v[1:], x0))


# Tempering ---------------------------------------------------------------------------------------------------------------


def test_tempered_by_hand(world):
    """The same power of every weight, found here by trying many, that leaves 3 of 5 effective; none where more are left."""
    objective = world.objective("resampled_score", world.wrong, target_ess=3.0)
    kinds = set()

    def expected(log_v: Tensor, x0: Tensor, i: int) -> Tensor:
        log_v = log_v[1:] - log_v[1:].max()
        taus = torch.linspace(1, 0, 200_001, dtype=torch.float64)
        v = (taus[:, None] * log_v).exp()
        tau = taus[int((v.sum(1).square() / v.square().sum(1) >= 3.0).long().argmax())]
        kinds.add(float(tau) == 1.0)
        return weighted(tau * log_v, x0)

    draw = world.random(7, K)
    estimates, x_t = world.student_score_seen(objective, draw)
    log_v, x0 = proposals_by_hand(world, draw, x_t)
    t = draw.u[:, None]
    m = (t**2 * estimates + x_t) / (1 - t)
    for i in range(len(m)):
        assert_close(m[i], expected(log_v[i], x0[i], i), rtol=0, atol=1e-4)
    assert kinds == {True, False}


def test_tempering_to_all_samples_is_the_posterior_mean(world):
    """E_q[g], which is what the proposals would say with no weights at all."""
    objective = world.objective("resampled_score", world.wrong, target_ess=float(K))
    draw = world.random(7, K)
    estimates, x_t = world.student_score_seen(objective, draw)
    t = draw.u[:, None]
    assert_close((t**2 * estimates + x_t) / (1 - t), proposals_by_hand(world, draw, x_t)[1].mean(1), rtol=0, atol=1e-6)


# Moves -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [False, True])
def test_moves_by_hand(antithetic, world, randn):
    """Two moves of z_0 among K proposals each, then the mean over the third K and what z_0 has become."""
    k, moves = 2, 2
    objective = world.objective("resampled_score", world.wrong, num_samples=k, moves=moves, antithetic=antithetic)
    draw = world.random(7, **world.extra_of(objective))
    n, signs = len(draw.z), (1, -1) if antithetic else (1,)
    draw.normals["moves"] = randn(n, moves * len(signs))
    single = world.objective("resampled_score", world.wrong, num_samples=k, moves=moves)
    loss, changed = 0, 0
    for sign, normal, noise in zip(
        signs, draw.normals["moves"].chunk(len(signs), 1), draw.normals["proposals"].chunk(len(signs), 1), strict=True
    ):
        half = type(draw)(draw.z, sign * draw.eps, draw.u, draw.condition, normals={"proposals": noise, "moves": normal})
        x0_own = world.student(draw.z, draw.condition).detach().flatten(1)

        def expected(log_v: Tensor, x0: Tensor, i: int, normal=normal, x0_own=x0_own) -> Tensor:
            nonlocal changed
            own_v, own_x0 = log_v[0], x0_own[i]
            for move in range(moves):
                pool_v = torch.stack([own_v, *log_v[1 + move * k : 1 + (move + 1) * k]])
                pool_x0 = torch.stack([own_x0, *x0[move * k : (move + 1) * k]])
                u = 0.5 * math.erfc(-float(normal[i, move]) / math.sqrt(2))
                picked = int((pool_v.softmax(0).cumsum(0) < u).sum())
                changed += picked > 0
                own_v, own_x0 = pool_v[picked], pool_x0[picked]
            return weighted(torch.stack([own_v, *log_v[-k:]]), torch.stack([own_x0, *x0[-k:]]))

        assert_means_are(world, single, half, expected)
        loss = loss + world.joint(single, half).loss / len(signs)
    assert 0 < changed < n * moves * len(signs)
    assert_close(world.joint(objective, draw).loss, loss, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("moves", [1, 3])
def test_moves_are_unbiased_for_a_wrong_posterior(moves, world, randn):
    """At fixed x_t, with z_0 of the posterior, as any draw has it: no bias from K = 2, where the plain average is biased."""
    n, k = 20_000, 2
    objective = world.objective("resampled_score", world.wrong, num_samples=k, moves=moves)
    draw, x_t = world.at_one_x_t(n, proposals=(moves + 1) * k)
    draw.normals["moves"] = randn(len(draw.z), moves)
    t = draw.u[:, None]

    def deviation(objective, draw) -> Tensor:
        """|mean of m - E[g(z) | x_t]| in standard errors, (cells, d)."""
        estimates, seen = world.student_score_seen(objective, draw)
        mean, error = mean_and_error(world, (t**2 * estimates + seen) / (1 - t))
        return (mean - world.posterior_mean(x_t)).abs() / error

    assert float(deviation(objective, draw).max()) < 4
    plain = type(draw)(draw.z, draw.eps, draw.u, draw.condition, normals={"proposals": randn(len(draw.z), 1, world.d, 1, 1)})
    biased = deviation(world.objective("resampled_score", world.wrong, num_samples=k), plain)
    assert float(biased.max()) > 10


def test_proposals_with_moves_are_not_paired(world):
    """Moves are exact for independent proposals only."""
    for moves, options in ((0, {}), (1, {"moves": 1})):
        objective = world.objective("resampled_score", num_samples=4, **options)
        draw = world.random(7, **world.extra_of(objective))
        noise = objective.proposal_noise(draw, objective.noised(draw)).flatten(2)
        assert noise.shape[1] == 4 * (moves + 1)
        first, second = noise.chunk(2, 1)
        assert torch.equal(first, -second) == (moves == 0)


def test_effective_size_with_moves_is_that_of_one_round(world, randn):
    objective = world.objective("resampled_score", num_samples=3, moves=2)
    draw = world.random(7, **world.extra_of(objective))
    draw.normals["moves"] = randn(len(draw.z), 2)
    assert float(world.joint(objective, draw).metrics["ess"]) == pytest.approx(3, rel=1e-9)


# Levels by effective size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ess_levels", [False, True])
def test_levels_are_drawn_by_effective_size(ess_levels, world):
    """In both phases, once ranges differ, and only where asked for."""
    objective = world.objective("resampled_score", world.wrong, ess_levels=ess_levels)
    objective.statistics.mean.copy_(torch.linspace(1, K, BINS))
    draw, seen = world.random(7, K), []
    draw.u = torch.linspace(0.05, 0.95, len(draw.u), dtype=torch.float64)
    world.wrong.register_forward_pre_hook(lambda module, args: seen.append(args[1].t))
    world.joint(objective, draw)
    objective.posterior_loss(draw)
    expected = objective.statistics.by_effective_size(draw.u, draw.progress) if ess_levels else draw.u
    assert [torch.equal(t, expected) for t in seen] == [True, True]
    assert torch.equal(expected, draw.u) != ess_levels


def test_what_an_update_measures_is_taken_up(world):
    """observe() of the joint phase, given the metrics of its own loss; the mean of a range moves towards what was seen in it."""
    objective = world.objective("resampled_score", world.wrong)
    metrics = world.joint(objective, world.random(7, K)).metrics
    objective.phases[-1].observe({name: float(v) for name, v in metrics.items()})
    hit = {int(t * BINS) for _, t in world.cells}  # levels are u itself here
    for i, (mean, name) in enumerate(zip(objective.state["ess_by_level"].tolist(), objective.statistics.names, strict=True)):
        if i in hit:
            seen = float(metrics[f"ess_sum@{name}"] / metrics[f"ess_share@{name}"])
            assert 1 < seen < K
            assert mean == pytest.approx(0.95 * K + 0.05 * seen, rel=1e-6)
        else:
            assert mean == K


def test_student_sees_the_level_that_was_drawn(world, assert_all_close):
    """Its gradient at the moved levels is that of the KL there: w, x_t and both scores take one and the same level."""
    objective = world.objective("resampled_score", ess_levels=True)
    objective.statistics.mean.copy_(torch.linspace(1, K, BINS))
    t = torch.tensor([t for _, t in world.cells], dtype=torch.float64)
    moved = objective.statistics.by_effective_size(t, 0.0).tolist()
    draw = world.cubature(K)
    loss = world.joint(objective, draw).loss.mean()
    world.cells = tuple((label, t) for (label, _), t in zip(world.cells, moved, strict=True))
    assert RectifiedFlowSchedule().level(t).t.tolist() != moved
    assert_all_close(world.gradients(loss, world.student), world.gradient(world.cell_mean(world.kl)), 1e-9)
