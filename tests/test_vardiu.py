"""VarDiU in a linear-Gaussian world, where the KL, the student's score and the posterior are all known.

Expectations are taken without sampling wherever they are of polynomials (`cubature`); the rest is Monte Carlo with stated
standard errors.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pipelines.noise import RectifiedFlowSchedule, add_noise, score, widen
from trainers.objectives.importance import (
    bound_loss,
    calibrated_mean,
    effective_sample_size,
    log_importance,
    log_standard_normal,
    multi_sample_loss,
)
from trainers.objectives.vardiu import VarDiU

ESTIMATORS = ("bound", "multi_sample", "resampled_score")
K = 5


def objective_of(world, estimator: str = "bound", posterior: nn.Module | None = None, num_samples: int = K, **options) -> VarDiU:
    posterior = world.exact if posterior is None else posterior
    options = {"weighting": "sigma2", "antithetic": False, "control_variate": False} | options
    return VarDiU(world.student, world.teacher, posterior, world.levels, estimator=estimator, num_samples=num_samples, **options)


def joint_loss(objective: VarDiU):
    return objective.phases[-1].loss


def proposals_of(objective: VarDiU) -> int:
    """Latents a draw needs for each sample: an even number of proposals of the resampled score comes in pairs +-noise."""
    k = 0 if objective.estimator == "bound" else objective.num_samples
    paired = objective.estimator == "resampled_score" and k % 2 == 0
    return (k // 2 if paired else k) * (2 if objective.antithetic else 1)


def gradients(loss: Tensor, *networks: nn.Module) -> list[Tensor]:
    parameters = [p for network in networks for p in network.parameters()]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True))


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert max(float(g.abs().max()) for g in expected) > 1e-3  # else agreement would say nothing
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, rtol=tolerance, atol=tolerance)


def by_cell(world, value: Tensor) -> list[Tensor]:
    return list(value.chunk(len(world.cells)))


# Losses and weights by hand ----------------------------------------------------------------------------------------------


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


# The bound ---------------------------------------------------------------------------------------------------------------


def weights_at(world, draw, posterior: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """(log v of the draw's own z and K proposals (n, K+1), x_t, log p_theta,t(x_t) (n,)) at a draw."""
    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition)
    x_t = add_noise(x0, draw.eps, level)
    q = posterior(x_t, level, draw.condition, z=draw.z[:, None], noise=draw.normals["proposals"])
    labels = None if draw.condition is None else {"class_labels": draw.condition["class_labels"].repeat_interleave(q.z.shape[1])}
    x0_k = world.student(q.z.flatten(0, 1), labels).unflatten(0, q.z.shape[:2])
    log_v = log_importance(
        x_t, torch.cat([x0[:, None], x0_k], 1), torch.cat([draw.z[:, None], q.z], 1), torch.cat([q.log_q, q.log_q_z], 1), level
    )
    cells = zip(world.cells, by_cell(world, x_t.flatten(1)), strict=True)
    log_p = torch.cat([MultivariateNormal(*world.student_moments(c, t)).log_prob(x) for (c, t), x in cells])
    return log_v.detach(), x_t.detach(), log_p.detach()


def test_exact_posterior_makes_every_weight_the_density(world):
    """v = N(x_t; alpha g(z), sigma^2) p(z) / p(z | x_t) = p_theta,t(x_t), whatever z: Bayes."""
    log_v, _, log_p = weights_at(world, world.random(17, proposals=K), world.exact)
    assert_close(log_v, log_p[:, None].expand(-1, K + 1), rtol=1e-10, atol=1e-10)


def test_bound_is_tight_for_the_exact_posterior(world):
    """E[log v - log p_d(x_t)] = KL(p_theta,t || p_d,t), cell by cell."""
    log_v, x_t, _ = weights_at(world, world.cubature(), world.exact)
    for (label, t), v, x in zip(world.cells, by_cell(world, log_v[:, 0]), by_cell(world, x_t.flatten(1)), strict=True):
        log_p_d = MultivariateNormal(*world.teacher.moments(label, t)).log_prob(x)
        assert (v - log_p_d).mean().item() == pytest.approx(world.kl(label, t).item(), rel=1e-9)


def test_slack_of_the_bound(world):
    """Above the KL by E KL(p_theta(z | x_t) || q(z | x_t)), a KL of Gaussians averaged over x_t."""
    log_v, x_t, log_p = weights_at(world, world.cubature(), world.wrong)
    cells = zip(world.cells, by_cell(world, log_v[:, 0]), by_cell(world, log_p), by_cell(world, x_t.flatten(1)), strict=True)
    for (label, t), v, p, x in cells:
        (slope, offset, cov), (slope_q, offset_q, cov_q) = world.exact.moments(label, t), world.wrong.moments(label, t)
        shift = x @ (slope - slope_q).T + offset - offset_q
        quadratic = torch.einsum("ni,ij,nj->n", shift, torch.linalg.inv(cov_q), shift)
        trace = torch.linalg.solve(cov_q, cov).trace() - world.d + torch.logdet(cov_q) - torch.logdet(cov)
        slack = ((quadratic.mean() + trace) / 2).item()
        assert slack > 0.1
        assert float((v - p).mean()) == pytest.approx(slack, rel=1e-9)


# Gradients ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_of_the_student_is_that_of_the_kl(estimator, antithetic, control_variate, world):
    """With the exact posterior, all of them, without error: each is a polynomial of degree two in the draw's numbers."""
    objective = objective_of(world, estimator, antithetic=antithetic, control_variate=control_variate)
    terms = joint_loss(objective)(world.cubature(proposals_of(objective)))
    assert_all_close(gradients(terms.loss.mean(), world.student), world.gradient(world.cell_mean(world.kl)), 1e-9)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_without_a_condition(estimator, antithetic, unconditional_world):
    world = unconditional_world
    objective = objective_of(world, estimator, antithetic=antithetic)
    terms = joint_loss(objective)(world.cubature(proposals_of(objective)))
    assert_all_close(gradients(terms.loss.mean(), world.student), world.gradient(world.cell_mean(world.kl)), 1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_exact_posterior_is_stationary(estimator, world):
    """It minimises the bound, so its gradient is zero on average; the wrong one's is not."""
    for posterior in (world.exact, world.wrong):
        objective = objective_of(world, estimator, posterior)
        losses = [joint_loss(objective)(world.cubature(proposals_of(objective))).loss]
        losses.append(objective.posterior_loss(world.cubature()).loss)
        for loss in losses:
            for gradient in gradients(loss.mean(), posterior):
                assert (float(gradient.abs().max()) < 1e-10) == (posterior is world.exact)


def entropy_term(world, label: int, t: float, posterior) -> Tensor:
    """-E log q(z | x_t) for q = N(M x + c, Q), x_t = alpha A z + alpha b + sigma eps, by Gaussian algebra."""
    slope, offset, cov = posterior.moments(label, t)
    precision, a, b = torch.linalg.inv(cov), (1 - t) * world.student.matrix, (1 - t) * world.student.bias[label]
    left = torch.eye(world.d, dtype=a.dtype) - slope @ a
    spread = left @ left.T + t**2 * slope @ slope.T
    shift = slope @ b + offset
    return 0.5 * ((precision @ spread).trace() + shift @ precision @ shift + torch.logdet(2 * math.pi * cov))


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
def test_gradient_of_the_bound_for_any_posterior(antithetic, control_variate, world):
    """theta: -E log p_d(x_t) - E log q(z | x_t), where x_t carries the gradient of both; phi: the second term."""
    objective = objective_of(world, "bound", world.wrong, antithetic=antithetic, control_variate=control_variate)

    def cross_entropy(label: int, t: float) -> Tensor:
        (mean, cov), (mean_d, cov_d) = world.student_moments(label, t), world.teacher.moments(label, t)
        shift, precision = mean - mean_d, torch.linalg.inv(cov_d)
        return 0.5 * ((precision @ cov).trace() + shift @ precision @ shift)

    entropy = world.cell_mean(lambda label, t: entropy_term(world, label, t, world.wrong))
    loss = joint_loss(objective)(world.cubature()).loss.mean()
    assert_all_close(gradients(loss, world.student), world.gradient(world.cell_mean(cross_entropy) + entropy), 1e-9)
    assert_all_close(gradients(loss, world.wrong), world.gradient(entropy, world.wrong), 1e-9)


@pytest.mark.parametrize("antithetic", [False, True])
def test_posterior_alone(antithetic, world):
    """-E log q, unweighted: its value and gradient; beside the resampled score it has the same gradient."""
    objective = objective_of(world, "resampled_score", world.wrong, antithetic=antithetic)
    terms = objective.posterior_loss(world.cubature())
    entropy = world.cell_mean(lambda label, t: entropy_term(world, label, t, world.wrong), weighted=False)
    assert terms.loss.mean().item() == pytest.approx(entropy.item(), rel=1e-9)
    expected = world.gradient(entropy, world.wrong)
    assert_all_close(gradients(terms.loss.mean(), world.wrong), expected, 1e-9)
    joint = joint_loss(objective)(world.cubature(proposals_of(objective))).loss.mean()
    assert_all_close(gradients(joint, world.wrong), expected, 1e-9)


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
def test_gradient_of_the_multi_sample_bound(antithetic, control_variate, world):
    """Draw by draw against log mean v - log p_d(x_t) written out anew, differentiated in theta and phi."""
    objective = objective_of(world, "multi_sample", world.wrong, antithetic=antithetic, control_variate=control_variate)
    draw = world.random(7, proposals=proposals_of(objective))
    signs, halves = ((1, -1), draw.normals["proposals"].chunk(2, 1)) if antithetic else ((1,), [draw.normals["proposals"]])
    prior = MultivariateNormal(torch.zeros(world.d).double(), torch.eye(world.d).double())
    per_sample = []
    for i in range(len(draw.z)):
        t = float(draw.u[i])
        label = int(draw.condition["class_labels"][i])
        a, b, (slope, offset, cov) = world.student.matrix, world.student.bias[label], world.wrong.moments(label, t)
        value = 0
        for sign, noise in zip(signs, halves, strict=True):
            z, eps = draw.z[i].flatten(), sign * draw.eps[i].flatten()
            x_t = (1 - t) * (a @ z + b) + t * eps
            q = MultivariateNormal(slope @ x_t + offset, cov)
            latents = [z] + [q.mean + torch.linalg.cholesky(cov) @ n for n in noise[i].flatten(1)]
            log_v = [
                MultivariateNormal((1 - t) * (a @ z_k + b), t**2 * torch.eye(world.d).double()).log_prob(x_t)
                + prior.log_prob(z_k)
                - q.log_prob(z_k)
                for z_k in latents
            ]
            log_p_d = MultivariateNormal(*world.teacher.moments(label, t)).log_prob(x_t)
            value = value + t**2 * (torch.stack(log_v).logsumexp(0) - math.log(K + 1) - log_p_d) / len(signs)
            if control_variate:
                value = value - t**2 * (eps / t) @ x_t / len(signs)
        per_sample.append(value)
    expected = torch.stack(per_sample).mean()
    loss = joint_loss(objective)(draw).loss.mean()
    assert_all_close(gradients(loss, world.student), gradients(expected, world.student), 1e-9)
    assert_all_close(gradients(loss, world.wrong), gradients(expected, world.wrong), 1e-9)


@pytest.mark.parametrize("antithetic", [False, True])
def test_multi_sample_without_samples_is_the_bound(antithetic, world):
    """The loss of log v_0 alone has the bound's gradient: N(x_t; alpha g(z), sigma^2) and p(z) do not depend on theta."""
    draw = world.random(7)
    none, bound = (
        joint_loss(objective_of(world, name, world.wrong, 0, antithetic=antithetic))(draw).loss
        for name in ("multi_sample", "bound")
    )
    assert_close(none, bound, rtol=0, atol=0)
    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition)
    x_t = add_noise(x0, draw.eps, level)
    score_d = score(world.teacher(x_t, level, draw.condition), x_t, level)
    log_q, w = world.wrong(x_t, level, draw.condition, z=draw.z[:, None]).log_q, level.sigma**2
    log_v = log_importance(x_t, x0[:, None], draw.z[:, None], log_q, level)
    expected = gradients(bound_loss(x_t, score_d, log_q[:, 0], w).mean(), world.student, world.wrong)
    assert_all_close(gradients(multi_sample_loss(x_t, score_d, log_v, w).mean(), world.student, world.wrong), expected, 1e-9)


def test_more_samples_tighten_the_bound(world):
    """K = 0, 1, 4, 16, 64 with a wrong posterior: down towards E log p_theta,t(x_t), never below."""
    log_v, _, log_p = weights_at(world, world.random(3000, proposals=64), world.wrong)
    bounds = [log_v[:, : k + 1].logsumexp(1) - math.log(k + 1) for k in (0, 1, 4, 16, 64)]

    def mean_and_error(x: Tensor) -> tuple[float, float]:
        return float(x.mean()), float(x.std()) / math.sqrt(len(x))

    for looser, tighter in pairwise(bounds):
        mean, error = mean_and_error(looser - tighter)
        assert mean > 4 * error
    slack = [mean_and_error(b - log_p) for b in bounds]
    assert all(mean > -4 * error for mean, error in slack)
    assert slack[-1][0] < 0.1 * slack[0][0]


# The resampled score -----------------------------------------------------------------------------------------------------


def student_score_seen(world, objective: VarDiU, draw) -> tuple[Tensor, Tensor]:
    """(The student's score in the loss, x_t) at every x_t (n, d), read off its gradient in x0: w alpha (s_theta - s_d)."""
    outputs = []
    handle = world.student.register_forward_hook(lambda m, args, out: outputs.append(out))
    loss = joint_loss(objective)(draw).loss.sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, outputs[0])
    level = RectifiedFlowSchedule().level(draw.u)
    x_t = add_noise(outputs[0].detach(), draw.eps, level)
    score_d = score(world.teacher(x_t, level, draw.condition), x_t, level)
    return (gradient / (level.sigma**2 * level.alpha) + score_d).detach().flatten(1), x_t.detach().flatten(1)


def exact_scores(world, x_t: Tensor) -> Tensor:
    """(mean - x) / covariance of the student's noised Gaussian."""
    scores = []
    for cell, x in zip(world.cells, by_cell(world, x_t), strict=True):
        mean, cov = world.student_moments(*cell)
        scores.append((mean - x) @ torch.linalg.inv(cov))
    return torch.cat(scores).detach()


def at_fixed_points(world, noise: Tensor):
    """Every cell's draw with one (z, eps), for each of the proposals noise (n, K, d)."""
    draw = world.random(1)
    n, cells = len(noise), len(world.cells)

    def repeat(v: Tensor) -> Tensor:
        return v.repeat_interleave(n, 0)

    condition = {"class_labels": repeat(draw.condition["class_labels"])}
    normals = {"proposals": noise.repeat(cells, 1, 1)[..., None, None]}
    return type(draw)(repeat(draw.z), repeat(draw.eps), repeat(draw.u), condition, normals=normals)


@pytest.mark.parametrize("num_samples", [1, 3, 7])
def test_resampled_score_is_unbiased_for_the_exact_posterior(num_samples, world, randn):
    """At fixed x_t the mean over the proposals is the student's score for any K: all weights are equal."""
    n = num_samples * world.d
    basis = math.sqrt(n) * torch.linalg.qr(randn(n, n)).Q
    draw = at_fixed_points(world, torch.cat([basis, -basis]).unflatten(1, (num_samples, world.d)))
    objective = objective_of(world, "resampled_score", num_samples=num_samples)
    estimates, x_t = student_score_seen(world, objective, draw)
    truth = exact_scores(world, x_t)
    for estimate, expected in zip(by_cell(world, estimates), by_cell(world, truth), strict=True):
        assert_close(expected, expected[:1].expand_as(expected), rtol=1e-9, atol=1e-9)
        assert float((estimate - expected).abs().max()) > 1e-2  # single estimates are not
        assert_close(estimate.mean(0), expected[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("num_samples", [2, 6])
def test_paired_proposals_are_exact_for_a_linear_student(num_samples, antithetic, world):
    """An even number comes as +-noise: with equal weights all that is linear in the noise cancels, draw by draw."""
    objective = objective_of(world, "resampled_score", num_samples=num_samples)
    estimates, x_t = student_score_seen(world, objective, world.random(7, proposals_of(objective)))
    assert_close(estimates, exact_scores(world, x_t), rtol=1e-8, atol=1e-8)
    for estimator in ("multi_sample", "resampled_score"):
        objective = objective_of(world, estimator, num_samples=num_samples, antithetic=antithetic)
        terms = joint_loss(objective)(world.cubature(proposals_of(objective)))
        assert_all_close(gradients(terms.loss.mean(), world.student), world.gradient(world.cell_mean(world.kl)), 1e-9)


def test_resampled_score_converges_for_a_wrong_posterior(world, randn):
    """Biased at K = 1, where it is the score under q; the bias falls as 1/K."""
    bias = []
    for num_samples, repeats in ((1, 4096), (17, 4096), (257, 1024)):
        draw = at_fixed_points(world, randn(repeats, num_samples, world.d))
        objective = objective_of(world, "resampled_score", world.wrong, num_samples)
        estimates, x_t = student_score_seen(world, objective, draw)
        cells = zip(by_cell(world, estimates), by_cell(world, exact_scores(world, x_t)), strict=True)
        errors = [(e.mean(0) - truth[0], e.std(0) / math.sqrt(repeats)) for e, truth in cells]
        bias.append((float(torch.cat([e for e, _ in errors]).norm()), float(torch.cat([s for _, s in errors]).norm())))
    assert bias[0][0] > 15 * bias[0][1]
    assert all(b < a / 4 for (a, _), (b, _) in pairwise(bias))
    assert bias[-1][0] < 4 * bias[-1][1]
    assert bias[-1][0] < 0.02 * bias[0][0]


def proposals_by_hand(world, draw, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """(self-normalised weights (n, K), g of the proposals (n, K, d)) of the wrong posterior, from its moments."""
    log_v = weights_at(world, draw, world.wrong)[0][:, 1:]  # the latent that made x_t is left out
    v = (log_v - log_v.amax(1, keepdim=True)).exp()
    x0 = []
    for i, noise in enumerate(draw.normals["proposals"].flatten(2)):
        label = int(draw.condition["class_labels"][i])
        slope, offset, cov = world.wrong.moments(label, float(draw.u[i]))
        z = slope @ x_t[i] + offset + noise @ torch.linalg.cholesky(cov).T
        x0.append(z @ world.student.matrix.T + world.student.bias[label])
    return v / v.sum(1, keepdim=True), torch.stack(x0).detach()


def test_resampled_score_by_hand(world):
    objective = objective_of(world, "resampled_score", world.wrong)
    draw = world.random(7, proposals=K)
    estimates, x_t = student_score_seen(world, objective, draw)
    weights, x0 = proposals_by_hand(world, draw, x_t)
    for i in range(len(x_t)):
        t = float(draw.u[i])
        expected = sum(weights[i, k] * ((1 - t) * x0[i, k] - x_t[i]) / t**2 for k in range(K))
        assert_close(estimates[i], expected, rtol=1e-8, atol=1e-8)


# Calibration -------------------------------------------------------------------------------------------------------------


def test_calibrated_mean_by_hand(randn, shape):
    """D + (1 + gate) (m - D) + c_out residual; nothing changes at zero, and gate -1 leaves a denoiser of the EDM kind."""
    level, sigma_data = RectifiedFlowSchedule().level(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)), 0.7
    m, d, gate, residual = (randn(*shape) for _ in range(4))
    out = calibrated_mean(m, d, torch.cat([gate, residual], 1), level, sigma_data)
    for i, t in enumerate((0.2, 0.5, 0.9)):
        sigma = t / (1 - t)
        c_out = sigma * sigma_data / math.hypot(sigma, sigma_data)
        assert_close(out[i], d[i] + (1 + gate[i]) * (m[i] - d[i]) + c_out * residual[i], rtol=1e-12, atol=1e-12)
    zero = torch.zeros(shape[0], 2 * shape[1], *shape[2:], dtype=torch.float64)
    assert_close(calibrated_mean(m, d, zero, level, sigma_data), m, rtol=1e-12, atol=1e-12)


class Calibrated(nn.Module):
    """A posterior with one gate and one residual for each coordinate."""

    def __init__(self, inner: nn.Module, gate: Tensor, residual: Tensor) -> None:
        super().__init__()
        self.inner, self.gate, self.residual = inner, nn.Parameter(gate), nn.Parameter(residual)

    def forward(self, x_t: Tensor, *args, **kwargs):
        out = self.inner(x_t, *args, **kwargs)
        # d coordinates are channels here, so gate and residual are d channels each
        out.calibration = torch.cat([self.gate, self.residual])[:, None, None].expand(len(x_t), -1, 1, 1)
        return out


@pytest.mark.parametrize("calibration_weight", [1.0, 0.3])
def test_calibration_is_a_regression_beside_the_student(calibration_weight, world, randn):
    """theta follows the calibrated score and nothing else; gate and residual regress g(z_0) and nothing else."""
    posterior = Calibrated(world.wrong, 0.3 * randn(world.d), 0.3 * randn(world.d))
    objective = objective_of(world, "resampled_score", posterior, calibration_weight=calibration_weight)
    draw = world.random(7, proposals=K)
    estimates, x_t = student_score_seen(world, objective, draw)
    weights, x0_k = proposals_by_hand(world, draw, x_t)
    level = RectifiedFlowSchedule().level(draw.u)
    x0_hat = world.teacher(x_t[..., None, None], level, draw.condition).flatten(1).detach()
    m = torch.einsum("bk,bkd->bd", weights, x0_k)
    nsr = draw.u / (1 - draw.u)
    sigma_data = world.teacher.sigma_data
    c_out = (nsr * sigma_data / (nsr**2 + sigma_data**2).sqrt())[:, None]
    mean = x0_hat + (1 + posterior.gate) * (m - x0_hat) + c_out * posterior.residual
    alpha, sigma = (1 - draw.u)[:, None], draw.u[:, None]
    assert_close(estimates, ((alpha * mean - x_t) / sigma**2).detach(), rtol=1e-8, atol=1e-8)

    x0 = world.student(draw.z, draw.condition).flatten(1).detach()
    error = (mean - x0).square() / c_out**2  # EDM's weight of the denoising loss is 1 / c_out^2
    terms = joint_loss(objective)(draw)
    own = [posterior.gate, posterior.residual]
    expected = torch.autograd.grad(calibration_weight * error.sum(1).mean(), own)
    assert_all_close(list(torch.autograd.grad(terms.loss.mean(), own, retain_graph=True)), list(expected), 1e-8)
    # log q's own gradient is what it is without a calibration
    plain = joint_loss(objective_of(world, "resampled_score", world.wrong))(draw).loss.mean()
    assert_all_close(gradients(terms.loss.mean(), world.wrong), gradients(plain, world.wrong), 1e-9)
    assert terms.metrics["calibration_error"].item() == pytest.approx(error.mean().item(), rel=1e-8)
    assert terms.metrics["gate"].item() == pytest.approx(1 + posterior.gate.mean().item(), rel=1e-8)


def test_calibration_of_an_exact_mean_stays_at_zero(world):
    """m is E[g(z) | x_t] for the exact posterior and paired proposals, so the regression has nothing to add."""
    zero = torch.zeros(world.d, dtype=torch.float64)
    for posterior, settled in ((world.exact, True), (world.wrong, False)):
        calibrated = Calibrated(posterior, zero.clone(), zero.clone())
        objective = objective_of(world, "resampled_score", calibrated, num_samples=2)
        loss = joint_loss(objective)(world.cubature(proposals_of(objective))).loss.mean()
        largest = [float(g.abs().max()) for g in torch.autograd.grad(loss, [calibrated.gate, calibrated.residual])]
        assert [v < 1e-9 for v in largest] == [settled, settled]


# Variance ----------------------------------------------------------------------------------------------------------------


def gradient_variance(world, n: int, **options) -> float:
    """Summed over the bias's entries, for one draw of the bound with the exact posterior."""
    draw = world.random(n)
    outputs = []
    handle = world.student.register_forward_hook(lambda m, args, out: outputs.append(out))
    loss = joint_loss(objective_of(world, "bound", **options))(draw).loss.sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, outputs[0])  # the bias adds to x0 with slope one
    return float(sum(g.flatten(1).var(0).sum() for g in by_cell(world, gradient)))


def test_variance_falls_at_high_noise(world):
    """By far more than the half that twice the samples would give: what is left is the noise in log q and s_d together."""
    world.cells = ((0, 0.9), (1, 0.9))
    plain = gradient_variance(world, 5000)
    antithetic = gradient_variance(world, 5000, antithetic=True)
    control = gradient_variance(world, 5000, control_variate=True)
    both = gradient_variance(world, 5000, antithetic=True, control_variate=True)
    assert plain > 0.01
    assert antithetic < plain / 1000
    assert control < plain / 1000
    assert both < plain / 1000


# What flows where --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_who_is_differentiated(estimator, antithetic, world):
    """Theta and phi, and no backward pass through the teacher."""
    objective = objective_of(world, estimator, world.wrong, antithetic=antithetic)
    joint_loss(objective)(world.random(7, proposals_of(objective))).loss.mean().backward()
    assert all(p.requires_grad and p.grad is None for p in world.teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for net in (world.student, world.wrong) for p in net.parameters())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_teacher_is_read_without_a_graph(estimator, world):
    seen = []
    world.teacher.register_forward_pre_hook(lambda module, args: seen.append(torch.is_grad_enabled()))
    objective = objective_of(world, estimator)
    joint_loss(objective)(world.random(7, proposals_of(objective)))
    assert seen == [False]


@pytest.mark.parametrize("antithetic", [False, True])
def test_posterior_phase_leaves_the_others_alone(antithetic, world):
    objective = objective_of(world, "resampled_score", world.wrong, antithetic=antithetic)
    objective.posterior_loss(world.random(7)).loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in world.wrong.parameters())
    assert all(p.grad is None for net in (world.student, world.teacher) for p in net.parameters())


def test_density_of_the_latent_reaches_the_student_through_x_t(world):
    """A teacher without a score leaves log q alone to move the student, and only because x_t is not detached."""
    world.teacher.forward = lambda x_t, level, condition=None: x_t / level.alpha  # score 0
    objective, draw = objective_of(world, "bound", world.wrong), world.random(7)
    level = RectifiedFlowSchedule().level(draw.u)
    x_t = add_noise(world.student(draw.z, draw.condition), draw.eps, level)
    entropy = -(level.sigma.flatten() ** 2 * world.wrong(x_t, level, draw.condition, z=draw.z[:, None]).log_q[:, 0]).mean()
    loss = joint_loss(objective)(draw).loss.mean()
    assert_all_close(gradients(loss, world.student), gradients(entropy, world.student), 1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_antithetic_pairs_average_to_one_number_each(estimator, world):
    """The loss of each z is the mean of the losses with +eps and -eps, which have proposals of their own."""
    pair, single = (objective_of(world, estimator, world.wrong, antithetic=a) for a in (True, False))
    draw = world.random(7, proposals_of(pair))
    halves = draw.normals["proposals"].chunk(2, 1)
    loss = joint_loss(pair)(draw).loss
    assert loss.shape == (7 * len(world.cells),)
    losses = []
    for sign, noise in zip((1, -1), halves, strict=True):
        other = type(draw)(draw.z, sign * draw.eps, draw.u, draw.condition, normals={"proposals": noise})
        losses.append(joint_loss(single)(other).loss)
    assert_close(loss, (losses[0] + losses[1]) / 2, rtol=1e-10, atol=1e-10)
    posterior = pair.posterior_loss(draw).loss
    assert_close(
        posterior,
        (single.posterior_loss(draw).loss + single.posterior_loss(other).loss) / 2,
        rtol=1e-10,
        atol=1e-10,
    )
    world.student.calls = 0
    joint_loss(pair)(draw)
    assert world.student.calls == (1 if estimator == "bound" else 2)  # z's images are made once for both signs


@pytest.mark.parametrize("weighting", ["uniform", "snr", "dmd"])
def test_weight_is_taken_at_each_sample(weighting, world):
    """Any named weight multiplies the unweighted loss; the posterior's own share beside a resampled score has none."""
    draw = world.random(7, K)
    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition)
    x_t = add_noise(x0, draw.eps, level)
    gap = (x0 - world.teacher(x_t, level, draw.condition)).abs().flatten(1).mean(1)
    nsr = (level.sigma / level.alpha).flatten()
    w = {"uniform": torch.ones_like(nsr), "snr": nsr**-2, "dmd": nsr**2 / gap}[weighting].detach()
    for estimator in ESTIMATORS:
        weighted, plain = (
            joint_loss(objective_of(world, estimator, weighting=name))(draw).loss for name in (weighting, "uniform")
        )
        own = objective_of(world).posterior_loss(draw).loss if estimator == "resampled_score" else 0
        assert_close(weighted - own, w * (plain - own), rtol=1e-9, atol=1e-9)


def test_metrics(world):
    """Information is the mutual information of z and x_t for the exact posterior; then all weights are equal, too."""

    def information(label: int, t: float) -> Tensor:
        a = world.student.matrix * (1 - t) / t
        return 0.5 * torch.logdet(torch.eye(world.d, dtype=a.dtype) + a @ a.T)

    expected = world.cell_mean(information, weighted=False).item()
    for estimator, weights in (("bound", None), ("multi_sample", K + 1), ("resampled_score", K)):
        objective = objective_of(world, estimator, antithetic=True)
        draw = world.cubature(proposals_of(objective))
        metrics = joint_loss(objective)(draw).metrics
        assert not any(v.requires_grad for v in metrics.values())
        for seen in (metrics, objective.posterior_loss(draw).metrics):
            assert float(seen["information"]) == pytest.approx(expected, rel=1e-9)
        if weights:
            assert float(metrics["ess"]) == pytest.approx(weights, rel=1e-9)
        x0 = world.student(draw.z, draw.condition).detach()
        assert float(metrics["x0_std"]) == pytest.approx(float(torch.cat([x0, x0]).std()), rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_phases(estimator, world):
    objective = objective_of(world, estimator, posterior_updates=3, warmup_updates=11)
    alone, joint = objective.phases
    assert (alone.name, alone.updates, alone.repeats) == ("posterior", ("posterior",), 3)
    assert (joint.name, joint.updates, joint.repeats) == ("joint", ("student", "posterior"), 1)
    assert alone.loss == objective.posterior_loss
    (warmup,) = objective.warmup
    assert (warmup.name, warmup.updates, warmup.loss, warmup.repeats) == ("posterior", alone.updates, alone.loss, 11)
    assert all(phase.prepare is None for phase in (alone, joint, warmup))
    assert [phase.name for phase in objective_of(world, estimator, posterior_updates=0).phases] == ["joint"]
    assert objective.networks == {"student": world.student, "posterior": world.exact}
    assert objective.frozen == {"teacher": world.teacher}
    assert not objective.needs_data
    (health,) = objective_of(world, estimator, min_information=0.3).health
    assert (health.metric, health.minimum) == ("information", 0.3)


class InFloat32(nn.Module):
    """Computes in float64 and answers in float32, so that autocast finds nothing to round inside."""

    sigma_data, schedule = 0.7, RectifiedFlowSchedule()

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args, **kwargs):
        out = self.inner(x.double(), *args, **{k: None if v is None else v.double() for k, v in kwargs.items()})
        if isinstance(out, Tensor):
            return out.float()
        return type(out)(**{k: None if v is None else v.float() for k, v in vars(out).items()})


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast_does_not_reach_the_objective(estimator, world):
    """Networks may compute in half precision; what is made of their answers may not."""
    student, teacher, posterior = InFloat32(world.student), InFloat32(world.teacher), InFloat32(world.wrong)
    objective = VarDiU(student, teacher, posterior, world.levels, "sigma2", estimator, K, antithetic=False)
    draw = world.random(7, proposals_of(objective))
    for name in ("z", "eps", "u"):
        setattr(draw, name, getattr(draw, name).float())
    draw.normals = {k: v.float() for k, v in draw.normals.items()}
    plain = joint_loss(objective)(draw).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = joint_loss(objective)(draw).loss
    assert loss.dtype == torch.float32
    assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    assert_all_close(gradients(loss.mean(), world.student), gradients(plain.mean(), world.student), 1e-5)
