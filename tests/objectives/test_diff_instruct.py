"""Diff-Instruct in the linear-Gaussian world, and the denoising loss that its fake score and every teacher share."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines.noise import EDMSchedule, Level, RectifiedFlowSchedule, add_noise, weight, widen
from trainers.objectives.base import denoising_loss, score_difference_loss
from trainers.objectives.denoising import Denoising
from trainers.objectives.diff_instruct import DiffInstruct


@pytest.fixture
def fake_score(world):
    """The student's exact denoiser: N(b_c, A A^T) is what it makes. Its numbers are its own."""
    matrix = world.student.matrix.detach()
    return type(world.teacher)(world.student.bias.detach().clone(), matrix @ matrix.T)


def objective_of(world, fake: nn.Module, **options) -> DiffInstruct:
    options = {"weighting": "sigma2", "fake_weighting": "uniform"} | options
    return DiffInstruct(world.student, world.teacher, fake, world.levels, options.pop("fake_levels", world.levels), **options)


def distorted(fake: nn.Module, randn) -> nn.Module:
    with torch.no_grad():
        fake.mean.add_(0.3 * randn(*fake.mean.shape))
        fake.cov.add_(0.3 * torch.eye(len(fake.cov)))
    return fake


def gaussian_scores(world, denoiser: nn.Module, x_t: Tensor) -> list[Tensor]:
    """(mean - x) / covariance for each cell's share of x_t (n, d)."""
    scores = []
    for cell, x in zip(world.cells, x_t.chunk(len(world.cells)), strict=True):
        mean, cov = denoiser.moments(*cell)
        scores.append((mean - x) @ torch.linalg.inv(cov))
    return scores


# The student -------------------------------------------------------------------------------------------------------------


def test_gradient_is_the_difference_of_scores(world, fake_score, randn):
    """Per draw w alpha (s_fake - s_teacher) for the bias, times z^T for the matrix, from the Gaussians' own scores."""
    fake, draw = distorted(fake_score, randn), world.random(7)
    objective = objective_of(world, fake)
    terms = objective.student_loss(draw)
    assert terms.loss.shape == (7 * len(world.cells),)
    (matrix, bias) = torch.autograd.grad(terms.loss.mean(), [world.student.matrix, world.student.bias])

    level = RectifiedFlowSchedule().level(draw.u)
    x_t = add_noise(world.student(draw.z, draw.condition), draw.eps, level).flatten(1).detach()
    expected_matrix, expected_bias = torch.zeros_like(matrix), torch.zeros_like(bias)
    difference = torch.cat(gaussian_scores(world, fake, x_t)) - torch.cat(gaussian_scores(world, world.teacher, x_t))
    for i in range(len(x_t)):
        t, label = float(draw.u[i]), int(draw.condition["class_labels"][i])
        pull = t**2 * (1 - t) * difference[i].detach() / len(x_t)
        expected_matrix += torch.outer(pull, draw.z[i].flatten())
        expected_bias[label] += pull
    assert float(expected_bias.abs().min()) > 1e-3
    assert_close(matrix, expected_matrix, rtol=1e-8, atol=1e-8)
    assert_close(bias, expected_bias, rtol=1e-8, atol=1e-8)


def test_exact_fake_score_gives_the_gradient_of_the_kl(world, fake_score):
    """Without sampling error: the integrand is a polynomial of degree two."""
    loss = objective_of(world, fake_score).student_loss(world.cubature()).loss.mean()
    actual, expected = world.gradient(loss), world.gradient(world.cell_mean(world.kl))
    for a, b in zip(actual, expected, strict=True):
        assert float(b.abs().max()) > 1e-2
        assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_equal_scores_leave_the_student_alone(world):
    """At the fixed point, fake = teacher, the gradient of every draw is zero, not its mean alone."""
    gradients = world.gradient(objective_of(world, world.teacher).student_loss(world.random(7)).loss.sum())
    assert all(float(g.abs().max()) == 0 for g in gradients)


def test_student_phase_differentiates_the_student_alone(world, fake_score):
    objective_of(world, fake_score).student_loss(world.random(7)).loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in world.student.parameters())
    assert all(p.requires_grad and p.grad is None for net in (world.teacher, fake_score) for p in net.parameters())


def test_scores_are_read_without_a_graph(world, fake_score):
    """Neither the teacher nor, in the student's phase, the fake score keeps activations for a backward pass."""
    seen = []
    for network in (world.teacher, fake_score):
        network.register_forward_pre_hook(lambda module, args: seen.append(torch.is_grad_enabled()))
    objective_of(world, fake_score).student_loss(world.random(7))
    assert seen == [False, False]


def test_student_metrics(world, fake_score, randn):
    fake, draw = distorted(fake_score, randn), world.random(7)
    metrics = objective_of(world, fake).student_loss(draw).metrics
    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition).detach()
    x_t = add_noise(x0, draw.eps, level)
    gap = fake(x_t, level, draw.condition) - world.teacher(x_t, level, draw.condition)
    assert metrics["x0_gap"].item() == pytest.approx(gap.square().mean().sqrt().item(), rel=1e-10)
    assert metrics["x0_std"].item() == pytest.approx(x0.std().item(), rel=1e-10)


@pytest.mark.parametrize("weighting", ["uniform", "snr", "dmd"])
def test_student_weighting(weighting, world, fake_score, randn):
    fake, draw = distorted(fake_score, randn), world.random(7)
    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition)
    gap = (x0 - world.teacher(add_noise(x0, draw.eps, level), level, draw.condition)).abs().flatten(1).mean(1)
    nsr = (level.sigma / level.alpha).flatten()
    w = {"uniform": torch.ones_like(nsr), "snr": nsr**-2, "dmd": nsr**2 / gap}[weighting].detach()
    weighted, plain = (objective_of(world, fake, weighting=name).student_loss(draw).loss for name in (weighting, "uniform"))
    assert_close(weighted, w * plain, rtol=1e-9, atol=1e-9)


def test_score_difference_loss(randn, shape):
    x_t, student, teacher, w = randn(*shape).requires_grad_(), randn(*shape), randn(*shape), widen(randn(3).abs())
    student.requires_grad_(), teacher.requires_grad_()
    loss = score_difference_loss(x_t, student, teacher, w)
    for i in range(3):
        expected = float(w[i]) * math.fsum(((student - teacher) * x_t)[i].flatten().tolist())
        assert loss[i].item() == pytest.approx(expected, rel=1e-12)
    gradients = torch.autograd.grad(loss.sum(), [x_t, student, teacher], allow_unused=True)
    assert_close(gradients[0], w * (student - teacher).detach(), rtol=1e-12, atol=0)
    assert gradients[1:] == (None, None)


# The fake score ----------------------------------------------------------------------------------------------------------


def test_denoising_loss_by_hand(randn, shape):
    x0_hat, x0, w = randn(*shape), randn(*shape), randn(3).abs()
    loss = denoising_loss(x0_hat, x0, widen(w))
    for i in range(3):
        terms = [(a - b) ** 2 for a, b in zip(x0_hat[i].flatten().tolist(), x0[i].flatten().tolist(), strict=True)]
        assert float(loss[i]) == pytest.approx(float(w[i]) * math.fsum(terms) / x0[i].numel(), rel=1e-12)


def edm_weight(level: Level, sigma_data: float) -> Tensor:
    nsr = (level.sigma / level.alpha).flatten()
    return (nsr**2 + sigma_data**2) / (nsr * sigma_data) ** 2


def test_fake_score_learns_at_its_own_levels_and_weights(world, fake_score, randn):
    """w mean (D_fake(x_t) - g(z))^2 with fake_levels and fake_weighting, at samples of the student."""
    fake, draw = distorted(fake_score, randn), world.random(7)
    draw.progress = 0.25
    objective = objective_of(world, fake, fake_levels=lambda u, progress: u / 2 + progress, fake_weighting="edm")
    level = RectifiedFlowSchedule().level(draw.u / 2 + 0.25)
    x0 = world.student(draw.z, draw.condition).detach()
    error = fake(add_noise(x0, draw.eps, level), level, draw.condition) - x0
    expected = edm_weight(level, world.teacher.sigma_data) * error.flatten(1).square().mean(1)
    assert_close(objective.fake_score_loss(draw).loss, expected, rtol=1e-10, atol=1e-10)


def test_exact_fake_score_is_stationary(world, fake_score, randn):
    """The student's own denoiser minimises the fake score's loss; the cubature makes its mean gradient vanish."""
    objective = objective_of(world, fake_score)
    for exact in (True, False):
        loss = objective.fake_score_loss(world.cubature()).loss.mean()
        largest = max(float(g.abs().max()) for g in world.gradient(loss, fake_score))
        assert (largest < 1e-10) == exact
        distorted(fake_score, randn)


def test_fake_score_phase_leaves_the_others_alone(world, fake_score, randn):
    distorted(fake_score, randn)
    objective_of(world, fake_score).fake_score_loss(world.random(7)).loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in fake_score.parameters())
    assert all(p.grad is None for net in (world.teacher, world.student) for p in net.parameters())


# Both in one phase ---------------------------------------------------------------------------------------------------------


def test_joint_phase_has_the_gradients_of_both_phases(world, fake_score, randn, assert_all_close):
    """At one draw and the levels of the student, whatever those of the fake score alone; no part reaches the other network."""
    fake, draw = distorted(fake_score, randn), world.random(7)
    other = {"fake_levels": lambda u, progress: u / 2}
    objective = objective_of(world, fake, joint=True, weighting="snr", fake_weighting="edm", **other)
    apart = objective_of(world, fake, weighting="snr", fake_weighting="edm")
    first, second = objective.joint_loss(draw)
    for part, whole, mine, others in (
        (first, apart.fake_score_loss(draw), fake, world.student),
        (second, apart.student_loss(draw), world.student, fake),
    ):
        assert_close(part.loss, whole.loss, rtol=1e-12, atol=1e-12)
        assert part.metrics.keys() == whole.metrics.keys()
        assert all(float(part.metrics[k]) == pytest.approx(float(whole.metrics[k]), rel=1e-12) for k in whole.metrics)
        gradient = world.gradients(part.loss.mean(), mine)
        assert_all_close(gradient, world.gradients(whole.loss.mean(), mine), 1e-10)
        assert all(g is None for g in world.gradients(part.loss.mean(), others, world.teacher))


def test_joint_phase_follows_the_fake_score_of_before_its_update(world, fake_score, randn):
    fake, draw = distorted(fake_score, randn), world.random(7)
    objective = objective_of(world, fake, joint=True)
    expected = objective.student_loss(draw).loss
    parts = objective.joint_loss(draw)
    next(parts)
    distorted(fake, randn)
    assert_close(next(parts).loss, expected, rtol=1e-12, atol=1e-12)
    assert float((objective.student_loss(draw).loss - expected).detach().abs().max()) > 1e-3


@pytest.mark.parametrize(("joint", "calls"), [(True, (1, 1, 1)), (False, (2, 2, 1))])
def test_calls_a_step(joint, calls, world, fake_score):
    """Of student, fake score and teacher for each sample of the batch."""
    objective, draw, seen = objective_of(world, fake_score, joint=joint), world.random(7), []
    for i, network in enumerate((world.student, fake_score, world.teacher)):
        network.register_forward_pre_hook(lambda module, args, i=i: seen.extend([i] * len(args[0])))
    for phase in objective.phases:
        for _ in range(phase.repeats):
            terms = phase.loss(draw)
            list(terms) if joint else None
    assert tuple(seen.count(i) / len(draw.z) for i in range(3)) == calls


@pytest.mark.parametrize("fake_updates", [1, 3])
def test_joint_phases(fake_updates, world, fake_score):
    """The joint phase is one of the fake score's updates; the others come before it, at levels of their own."""
    objective = objective_of(world, fake_score, joint=True, fake_updates=fake_updates, warmup_updates=11)
    *alone, joint = objective.phases
    assert (joint.name, joint.updates, joint.loss, joint.repeats) == ("joint", ("student", "fake_score"), objective.joint_loss, 1)
    assert [(p.name, p.updates, p.loss, p.repeats) for p in alone] == (
        [("fake_score", ("fake_score",), objective.fake_score_loss, 2)] if fake_updates == 3 else []
    )
    (warmup,) = objective.warmup
    assert (warmup.updates, warmup.loss, warmup.repeats) == (("fake_score",), objective.fake_score_loss, 11)


def test_joint_descent_closes_the_gap(world):
    """A fake score that starts as the teacher, with means that are exact, so without noise: once it has caught up, divergence
    and score difference fall together, all the way.
    """
    fake = type(world.teacher)(world.teacher.mean.detach().clone(), world.teacher.cov.detach().clone())
    objective = objective_of(world, fake, joint=True, fake_updates=2, warmup_updates=100)
    draw, rates = world.cubature(), {"fake_score": 0.05, "student": 0.01}
    optimizers = {role: torch.optim.Adam(objective.networks[role].parameters(), rate) for role, rate in rates.items()}

    def update(phase) -> None:
        terms = phase.loss(draw)
        for part in [terms] if isinstance(terms, tuple) else terms:
            part.loss.mean().backward(inputs=[p for role in phase.updates for p in objective.networks[role].parameters()])
        for role in phase.updates:
            optimizers[role].step()
            optimizers[role].zero_grad()

    def state() -> tuple[float, float]:
        return world.cell_mean(world.kl).item(), objective.student_loss(draw).metrics["x0_gap"].item()

    (phase,) = objective.warmup
    for _ in range(phase.repeats):
        update(phase)
    states = [state()]
    for _ in range(5):
        for phase in (*objective.phases,) * 50:
            for _ in range(phase.repeats):
                update(phase)
        states.append(state())
    for values in zip(*states, strict=True):
        assert all(a > b for a, b in pairwise(values))
    (kl, gap), (kl_end, gap_end) = states[0], states[-1]
    assert kl_end < 0.1 * kl
    assert gap_end < 0.4 * gap


def test_phases(world, fake_score):
    objective = objective_of(world, fake_score, fake_updates=3, warmup_updates=11)
    fake, student = objective.phases
    assert (fake.name, fake.updates, fake.repeats) == ("fake_score", ("fake_score",), 3)
    assert (student.name, student.updates, student.repeats) == ("student", ("student",), 1)
    assert (fake.loss, student.loss) == (objective.fake_score_loss, objective.student_loss)
    (warmup,) = objective.warmup
    assert (warmup.name, warmup.updates, warmup.loss, warmup.repeats) == ("fake_score", fake.updates, fake.loss, 11)
    assert objective.networks == {"student": world.student, "fake_score": fake_score}
    assert objective.frozen == {"teacher": world.teacher}
    assert not objective.needs_data


# Denoising, the teacher's own objective ----------------------------------------------------------------------------------


def test_denoising_objective_by_hand(world, randn):
    """At the data x0, with the teacher trained."""
    draw = world.random(7)
    draw.x0 = randn(*draw.z.shape)
    objective = Denoising(world.teacher, world.levels)
    level = RectifiedFlowSchedule().level(draw.u)
    error = world.teacher(add_noise(draw.x0, draw.eps, level), level, draw.condition) - draw.x0
    loss = objective.loss(draw).loss
    expected = edm_weight(level, world.teacher.sigma_data) * error.flatten(1).square().mean(1)
    assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    loss.mean().backward()
    assert all(p.grad.any() for p in world.teacher.parameters())
    (phase,) = objective.phases
    assert (phase.name, phase.updates, phase.loss, phase.repeats) == ("teacher", ("teacher",), objective.loss, 1)
    assert (objective.networks, objective.frozen, objective.warmup) == ({"teacher": world.teacher}, {}, ())
    assert objective.needs_data


def test_edm_weight_evens_out_the_levels(randn):
    """Karras et al. 2022: an untrained network (D = c_skip x) has the same expected loss, one, at every sigma."""
    sigma_data, n = 0.5, 200_000
    for sigma in (0.01, 0.5, 20.0):
        x0, eps = sigma_data * randn(n, 1, 1, 1), randn(n, 1, 1, 1)
        level = EDMSchedule().level(torch.full((n,), sigma, dtype=torch.float64))
        x0_hat = sigma_data**2 / (sigma_data**2 + sigma**2) * add_noise(x0, eps, level)
        loss = denoising_loss(x0_hat, x0, weight("edm", level, x0, x0_hat, sigma_data))
        assert float(loss.mean()) == pytest.approx(1, abs=4 * float(loss.std()) / math.sqrt(n))
