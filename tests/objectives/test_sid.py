"""SiD in the linear-Gaussian world: both of its estimates are the Fisher divergence, and its gradient by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines.noise import RectifiedFlowSchedule, add_noise, widen
from trainers.objectives.sid import SiD, sid_loss


@pytest.fixture
def fake_score(world):
    """The student's exact denoiser. Its numbers are its own."""
    matrix = world.student.matrix.detach()
    return type(world.teacher)(world.student.bias.detach().clone(), matrix @ matrix.T)


@pytest.fixture
def distorted(fake_score, randn):
    with torch.no_grad():
        fake_score.mean.add_(0.3 * randn(*fake_score.mean.shape))
        fake_score.cov.add_(0.3 * torch.eye(len(fake_score.cov)))
    return fake_score


def objective_of(world, fake: nn.Module, **options) -> SiD:
    options = {"weighting": "sigma2", "fake_weighting": "uniform"} | options
    return SiD(world.student, world.teacher, fake, world.levels, world.levels, **options)


def fisher_divergence(world, label: int, t: float) -> Tensor:
    """E |s_teacher - s_student|^2 under the student's N(m, C): s_i = P_i (m_i - x)."""
    (m, c), (m_d, c_d) = world.student_moments(label, t), world.teacher.moments(label, t)
    p, p_d = torch.linalg.inv(c), torch.linalg.inv(c_d)
    shift = p_d @ (m_d - m)
    return shift @ shift + ((p - p_d) @ c @ (p - p_d).T).trace()


@pytest.mark.parametrize("alpha", [1e-9, 0.5, 1.0, 1.2])
def test_with_an_exact_fake_score_it_is_the_fisher_divergence(alpha, world, fake_score):
    """E L2 = E L1 = E sigma^2 w |s_teacher - s_student|^2, so that E L is 1 - alpha times it. The integrand is a polynomial of
    degree two.
    """
    loss = objective_of(world, fake_score, alpha=alpha).student_loss(world.cubature()).loss.mean()
    expected = world.cell_mean(lambda label, t: t**2 * fisher_divergence(world, label, t))  # with w = sigma^2 by cell_mean
    assert float(expected) > 1e-2
    assert_close(loss, (1 - alpha) * expected, rtol=1e-8, atol=1e-10)


def jacobian(denoiser: nn.Module, t: float) -> Tensor:
    """d D(x_t) / d x_t of E[x0 | x_t] for N(m, S): alpha S (alpha^2 S + sigma^2)^-1."""
    cov = denoiser.cov.detach()
    return (1 - t) * cov @ torch.linalg.inv((1 - t) ** 2 * cov + t**2 * torch.eye(len(cov), dtype=cov.dtype))


@pytest.mark.parametrize("alpha", [0.5, 1.2])
def test_gradient_by_hand(alpha, world, distorted):
    """Through x0 and, by x_t, through teacher and fake score:

    lambda [ ((1 - t) J_delta)^T (D_teacher - x0 - a delta) + ((1 - t) J_teacher - 1 - a (1 - t) J_delta)^T delta ]
    """
    draw = world.random(7)
    terms = objective_of(world, distorted, alpha=alpha).student_loss(draw)
    assert terms.loss.shape == (7 * len(world.cells),)
    matrix, bias = world.gradients(terms.loss.mean(), world.student)

    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition).detach()
    x_t = add_noise(x0, draw.eps, level)
    real, fake = (net(x_t, level, draw.condition).detach().flatten(1) for net in (world.teacher, distorted))
    expected_matrix, expected_bias = torch.zeros_like(matrix), torch.zeros_like(bias)
    for i in range(len(x_t)):
        t, delta = float(draw.u[i]), real[i] - fake[i]
        j_real, one = jacobian(world.teacher, t), torch.eye(len(delta), dtype=delta.dtype)
        j_delta = j_real - jacobian(distorted, t)
        pull = (1 - t) * j_delta.T @ (real[i] - x0[i].flatten() - alpha * delta)
        pull = pull + ((1 - t) * j_real - one - alpha * (1 - t) * j_delta).T @ delta
        pull = t**2 * ((1 - t) / t) ** 2 * pull / len(x_t)
        expected_matrix += torch.outer(pull, draw.z[i].flatten())
        expected_bias[int(draw.condition["class_labels"][i])] += pull
    assert float(expected_bias.abs().min()) > 1e-3
    assert_close(matrix, expected_matrix, rtol=1e-8, atol=1e-9)
    assert_close(bias, expected_bias, rtol=1e-8, atol=1e-9)


def test_equal_scores_leave_the_student_alone(world):
    """At fake = teacher, as functions, the gradient of every draw is zero, not its mean alone."""
    gradients = world.gradient(objective_of(world, world.teacher).student_loss(world.random(7)).loss.sum())
    assert all(float(g.abs().max()) == 0 for g in gradients)


def test_published_weight(world, distorted):
    """C / |x0 - D_teacher|_1 of each sample, a number, times the inner product over its C values."""
    draw = world.random(7)
    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition)
    x_t = add_noise(x0, draw.eps, level)
    real, fake = world.teacher(x_t, level, draw.condition), distorted(x_t, level, draw.condition)
    w = (3 / (x0 - real).abs().flatten(1).sum(1)).detach()
    expected = w * ((real - fake) * (real - x0 - 1.2 * (real - fake))).flatten(1).sum(1)
    loss = objective_of(world, distorted, weighting="dmd").student_loss(draw).loss
    assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for gradients in zip(*(world.gradients(value.sum(), world.student) for value in (loss, expected)), strict=True):
        assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_loss_by_hand():
    """w = 2, alpha_t / sigma = 3, x0 = 1, D_teacher = 4, D_fake = 2: delta = 2, 2 * 9 * 2 * (4 - 1 - 1.5 * 2)."""
    level = RectifiedFlowSchedule().level(torch.tensor([0.25], dtype=torch.float64))
    x0, real, fake, w = (widen(torch.tensor([v], dtype=torch.float64)) for v in (1.0, 4.0, 2.0, 2.0))
    for alpha, expected in ((1.5, 0.0), (1.0, 36.0), (0.5, 72.0)):
        assert_close(sid_loss(x0, real, fake, level, w, alpha), torch.tensor([expected], dtype=torch.float64))


def test_descent_closes_the_gap(world):
    """With means that are exact, so without noise, and a fake score that learns three times for each update of the student."""
    fake = type(world.teacher)(world.teacher.mean.detach().clone(), world.teacher.cov.detach().clone())
    objective = objective_of(world, fake, fake_updates=3, warmup_updates=100)
    draw, rates = world.cubature(), {"fake_score": 0.05, "student": 0.01}
    optimizers = {role: torch.optim.Adam(objective.networks[role].parameters(), rate) for role, rate in rates.items()}
    start = world.cell_mean(world.kl).item()
    for phase in (*objective.warmup, *objective.phases * 250):
        (role,) = phase.updates
        for _ in range(phase.repeats):
            phase.loss(draw).loss.mean().backward(inputs=list(objective.networks[role].parameters()))
            optimizers[role].step()
            optimizers[role].zero_grad()
    assert world.cell_mean(world.kl).item() < 0.1 * start


def test_phases(world, fake_score):
    objective = objective_of(world, fake_score, fake_updates=3, warmup_updates=11)
    fake, student = objective.phases
    assert (fake.name, fake.updates, fake.loss, fake.repeats) == ("fake_score", ("fake_score",), objective.fake_score_loss, 3)
    assert (student.name, student.updates, student.loss) == ("student", ("student",), objective.student_loss)
    assert [(p.loss, p.repeats) for p in objective.warmup] == [(objective.fake_score_loss, 11)]
    assert not objective.needs_data
