"""VarDiU's amortised score in the linear-Gaussian world: an exactly unbiased target, and who learns what from it."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines.noise import EDMSchedule, Level, RectifiedFlowSchedule, add_noise
from trainers.objectives.amortized import Pool, batch_mean
from trainers.objectives.base import denoising_loss
from trainers.objectives.diff_instruct import DiffInstruct
from trainers.objectives.importance import log_standard_normal

K = 2
every_pool = pytest.mark.parametrize("num_samples", [0, K], ids=["batch", "proposals"])


class Silent(nn.Module):
    """The posterior with x0_means of zero that it remembers: from their gradients the target of the regression is read."""

    on_teacher_features = False

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.x0_means = inner, []

    def forward(self, x_t: Tensor, *args, **kwargs):
        out = self.inner(x_t, *args, **kwargs)
        out.x0_mean = torch.zeros_like(x_t).requires_grad_()
        self.x0_means.append(out.x0_mean)
        return out


def target_seen(objective, draw, pool: Pool | None = None) -> Tensor:
    """The target of the regression on one noised copy (b, d): d error / d x0_mean = -2 w target / d at x0_mean = 0."""
    silent, gradients = Silent(objective.posterior), []
    objective.posterior = silent
    for part in objective.posterior_loss(draw, pool):
        (gradient,) = torch.autograd.grad(part.loss.mean(), silent.x0_means[-1])
        gradients.append(gradient * len(draw.z))
    level = RectifiedFlowSchedule().level(draw.u)
    w = edm_weight(level, objective.teacher.sigma_data)
    return -(torch.cat(gradients) / (2 * objective.regression_weight * w)).flatten(1)


def edm_weight(level: Level, sigma_data: float) -> Tensor:
    nsr = level.sigma / level.alpha
    return (nsr**2 + sigma_data**2) / (nsr * sigma_data) ** 2


def mean_by_hand(x_t: Tensor, level: Level, labels: Tensor | None, x0: Tensor, pool_labels: Tensor | None) -> Tensor:
    """Sample by sample and latent by latent, in scalars."""
    means = []
    for i in range(len(x_t)):
        alpha, sigma = float(level.alpha[i]), float(level.sigma[i])
        log_v = []
        for j in range(len(x0)):
            squares = ((x_t[i] - alpha * x0[j]) / sigma).square().flatten().tolist()
            log_v.append(-0.5 * math.fsum(squares) if labels is None or labels[i] == pool_labels[j] else -math.inf)
        v = [math.exp(w - max(log_v)) for w in log_v]
        means.append(sum(w * x for w, x in zip(v, x0, strict=True)) / math.fsum(v))
    return torch.stack(means)


# The target --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [RectifiedFlowSchedule(), EDMSchedule()])
@pytest.mark.parametrize("conditional", [False, True])
def test_batch_mean_by_hand(schedule, conditional, randn, shape):
    """alpha counts: a pool of 11 images for 3 noised ones of pairwise different levels."""
    level = schedule.level(torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64))
    x0, x_t = randn(11, *shape[1:]), randn(*shape)
    labels, pool_labels = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1, 0, 2, 1, 0, 2, 2, 1, 0])
    condition, pool = ({"class_labels": labels}, {"class_labels": pool_labels}) if conditional else (None, None)
    mean, ess = batch_mean(x_t, level, condition, Pool(x0, pool))
    expected = mean_by_hand(x_t, level, labels if conditional else None, x0, pool_labels)
    assert_close(mean, expected, rtol=1e-10, atol=1e-10)
    assert ess.shape == (3,)
    assert 1 <= float(ess.min()) <= float(ess.max()) < (4 if conditional else 11) + 1e-9


def test_batch_mean_needs_every_part_of_the_condition_to_agree(randn):
    """Vectors and numbers: only samples that agree in all of them are of one pool."""
    x0, level = randn(5, 2, 3, 7), RectifiedFlowSchedule().level(torch.full((5,), 0.9, dtype=torch.float64))
    condition = {
        "class_labels": torch.tensor([0, 0, 0, 1, 0]),
        "prompt": torch.tensor([[1.0, 2], [1, 2], [1, 3], [1, 2], [1, 2]]),
    }
    mean, ess = batch_mean(x0, level, condition, Pool(x0, condition))
    group = mean_by_hand(x0, level, torch.tensor([0, 0, 1, 2, 0]), x0, torch.tensor([0, 0, 1, 2, 0]))
    assert_close(mean, group, rtol=1e-10, atol=1e-10)
    for alone in (2, 3):  # nobody shares its condition: its own sample is the mean
        assert_close(mean[alone], x0[alone], rtol=1e-12, atol=0)
        assert float(ess[alone]) == pytest.approx(1.0)


@pytest.mark.parametrize("sigma", [1e-3, 0.03])
def test_batch_mean_at_low_noise_in_float32(sigma, randn):
    """Two images closer together than the noise, others far away: finite weights, right to float32's digits in x_t."""
    near = randn(1, 2, 5, 7)
    x0 = torch.cat([near, near + sigma / 10 * randn(1, 2, 5, 7), randn(9, 2, 5, 7)])
    level = EDMSchedule().level(torch.full((3,), sigma, dtype=torch.float64))
    x_t = near + sigma * randn(3, 2, 5, 7)
    expected, size = batch_mean(x_t, level, None, Pool(x0, None))
    mean, ess = batch_mean(x_t.float(), Level(*(v.float() for v in vars(level).values())), None, Pool(x0.float(), None))
    assert mean.dtype == torch.float32
    assert bool((size > 1.05).any())
    assert_close(ess.double(), size, rtol=0.01, atol=0)
    gap = (x0[1] - x0[0]).norm()
    assert float((mean.double() - expected).flatten(1).norm(dim=1).max() / gap) < 0.01


@pytest.mark.parametrize("alpha", [0.0, 1e-30, 1e-3])
def test_batch_mean_where_little_or_no_signal_is_left(alpha, randn):
    """At alpha = 0, the last level of a schedule of zero SNR, x_t says nothing: the mean of all that share the condition."""
    x0, x_t, labels = randn(5, 2, 3, 7).float(), randn(5, 2, 3, 7).float(), torch.tensor([0, 1, 0, 0, 1])
    level = Level(torch.full((5, 1, 1, 1), alpha), torch.full((5, 1, 1, 1), (1 - alpha**2) ** 0.5), torch.full((5,), 999.0))
    mean, ess = batch_mean(x_t, level, {"class_labels": labels}, Pool(x0, {"class_labels": labels}))
    expected = mean_by_hand(x_t.double(), level, labels, x0.double(), labels)
    assert_close(mean.double(), expected, rtol=0, atol=1e-5)
    if alpha < 1e-3:
        alike = torch.tensor([3.0, 2, 3, 3, 2])
        assert_close(ess, alike, rtol=1e-6, atol=0)
        assert_close(mean[0], x0[labels == 0].mean(0), rtol=0, atol=1e-6)


def test_batch_mean_is_not_rounded_by_autocast(randn):
    x0, level = randn(7, 2, 3, 5).float(), RectifiedFlowSchedule().level(torch.full((7,), 0.6))
    plain = batch_mean(x0, level, None, Pool(x0, None))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(batch_mean(x0, level, None, Pool(x0, None)), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("condition", [None, {"class_labels": torch.tensor([1])}])
def test_alone_in_its_pool_a_sample_is_its_own_target(condition, world):
    """Diff-Instruct's fake score, then: denoising score matching on the student's samples."""
    draw = world.random(1)
    draw = type(draw)(draw.z[:1], draw.eps[:1], draw.u[:1], condition)
    own = world.student(draw.z, condition).detach().flatten(1)
    assert_close(target_seen(world.objective("amortized_score", world.wrong), draw), own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("others", [0, 3])
def test_target_of_a_batch_is_unbiased(others, world, randn):
    """Mean over z_0 ~ p(z | x_t) and the others ~ p(z): E[g(z) | x_t], within four standard errors; less variance than g(z_0).

    Each pool of 1 + others is a group of its own in one large batch, of which it sees nothing else.
    """
    n = 700
    draw, x_t = world.at_one_x_t(n)
    rows = len(draw.z)
    prior = type(draw)(
        torch.cat([draw.z, *(randn(rows, world.d, 1, 1) for _ in range(others))]),
        torch.cat([draw.eps, *(randn(rows, world.d, 1, 1) for _ in range(others))]),
        draw.u.repeat(1 + others),
        {name: v.repeat(1 + others) for name, v in draw.condition.items()},
    )
    group = {"group": torch.arange(rows).repeat(1 + others)}
    prior.condition |= group
    expected, own = world.posterior_mean(x_t), world.student(draw.z, draw.condition).detach().flatten(1)
    x0 = world.student(prior.z, prior.condition).detach()

    def seen(first: int) -> tuple[Tensor, Tensor]:
        """(bias in standard errors, variance) of the target, (cells, d), with a pool that begins at its `first` member."""
        objective = world.objective("amortized_score", world.wrong)
        draws = type(draw)(draw.z, draw.eps, draw.u, draw.condition | {"group": torch.arange(rows)})
        pool = Pool(x0[first * rows :], {name: v[first * rows :] for name, v in prior.condition.items()})
        target = torch.stack(world.by_cell(target_seen(objective, draws, pool)))
        return (target.mean(1) - expected).abs() / target.std(1) * math.sqrt(n), target.var(1)

    bias, variance = seen(0)
    assert float(bias.max()) < 4
    own_variance = torch.stack(world.by_cell(own)).var(1)
    if others:
        assert bool((variance < own_variance).all())
        assert float(seen(1)[0].max()) > 6  # z_0 left out
    else:
        assert_close(variance, own_variance, rtol=1e-9, atol=0)


def test_target_of_proposals_is_unbiased_for_a_wrong_posterior(world):
    n = 20_000
    draw, x_t = world.at_one_x_t(n, proposals_0=K)
    target = torch.stack(world.by_cell(target_seen(world.objective("amortized_score", world.wrong, num_samples=K), draw)))
    bias = (target.mean(1) - world.posterior_mean(x_t)).abs() / target.std(1) * math.sqrt(n)
    assert float(bias.max()) < 4
    own = torch.stack(world.by_cell(world.student(draw.z, draw.condition).detach().flatten(1)))
    assert bool((target.var(1) < 0.8 * own.var(1)).all())
    plain = type(draw)(draw.z, draw.eps, draw.u, draw.condition, normals={"proposals": draw.normals["proposals_0"]})
    log_v, seen, _ = world.importance(plain, world.wrong)  # z_0 left out: biased
    q = world.wrong(seen, RectifiedFlowSchedule().level(draw.u), draw.condition, noise=draw.normals["proposals_0"])
    x0_k = torch.stack([world.student(z, draw.condition).flatten(1) for z in q.z.unbind(1)], 1).detach()
    without = torch.stack(world.by_cell((log_v[:, 1:].softmax(1)[..., None] * x0_k).sum(1)))
    assert float(((without.mean(1) - world.posterior_mean(x_t)).abs() / without.std(1) * math.sqrt(n)).max()) > 10


# Gradients ---------------------------------------------------------------------------------------------------------------


@every_pool
def test_student_with_two_noised_copies(num_samples, world, assert_all_close):
    """Half the KL's gradient at u and half at u + 1/2: with the exact x0_mean, without error, whatever the target."""
    objective = world.objective("amortized_score", num_samples=num_samples, noise_draws=2)
    loss = world.joint(objective, world.cubature(**world.extra_of(objective))).loss.mean()
    expected, cells = world.cell_mean(world.kl) / 2, world.cells
    world.cells = tuple((label, (t + 0.5) % 1) for label, t in cells)
    expected = expected + world.cell_mean(world.kl) / 2
    assert_all_close(world.gradients(loss, world.student), world.gradient(expected), 1e-9)


@pytest.mark.parametrize("noise_draws", [1, 2, 3])
def test_noised_copies_are_stratified(noise_draws, world):
    """u, u + 1/n, ... modulo one, each with noise of its own, the first with the draw's; z and x0 are made once."""
    objective = world.objective("amortized_score", noise_draws=noise_draws)
    draw, seen = world.random(7, **world.extra_of(objective)), []
    world.exact.register_forward_pre_hook(lambda module, args: seen.append(args))
    world.student.calls = 0
    world.joint(objective, draw)
    assert world.student.calls == 1
    x0 = world.student(draw.z, draw.condition).detach()
    assert all(features is None and not x_t.requires_grad for x_t, _, _, features in seen)
    x_t = torch.cat([args[0] for args in seen]).chunk(noise_draws)
    t = torch.cat([args[1].t for args in seen]).chunk(noise_draws)
    labels = torch.cat([args[2]["class_labels"] for args in seen]).chunk(noise_draws)
    for i in range(noise_draws):
        u = (draw.u + i / noise_draws) % 1
        assert_close(t[i], u, rtol=1e-12, atol=0)
        eps = draw.normals[f"eps_{i}"] if i else draw.eps
        assert_close(x_t[i], add_noise(x0, eps, RectifiedFlowSchedule().level(u)), rtol=1e-12, atol=1e-12)
        assert torch.equal(labels[i], draw.condition["class_labels"])


@every_pool
def test_gradient_of_the_posterior(num_samples, world, assert_all_close):
    """phi: regression_weight |x0_mean - target|^2 / c_out^2 - log q, by hand; the student's part adds nothing to it."""
    objective = world.objective("amortized_score", world.wrong, num_samples=num_samples, regression_weight=7.0)
    draw = world.random(5, **world.extra_of(objective))
    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition).detach()
    x_t, labels = add_noise(x0, draw.eps, level), draw.condition["class_labels"]
    if num_samples:
        plain = type(draw)(draw.z, draw.eps, draw.u, draw.condition, normals={"proposals": draw.normals["proposals_0"]})
        q = world.wrong(x_t, level, draw.condition, noise=draw.normals["proposals_0"])
        x0_k = torch.stack([x0, *(world.student(z, draw.condition) for z in q.z.unbind(1))], 1).detach()
        v = world.importance(plain, world.wrong)[0].exp()
        target = torch.einsum("bk,bkchw->bchw", v / v.sum(1, keepdim=True), x0_k)
    else:
        target = mean_by_hand(x_t, level, labels, x0, labels)
    q = world.wrong(x_t, level, draw.condition, z=draw.z[:, None])
    error = (edm_weight(level, world.teacher.sigma_data) * (q.x0_mean - target).square()).flatten(1).sum(1)
    expected = world.gradients((7.0 * error - q.log_q[:, 0]).mean(), world.wrong)

    alone = world.whole(objective.posterior_loss(draw)).loss
    assert alone.item() == pytest.approx((7.0 * error - q.log_q[:, 0]).mean().item(), rel=1e-9)
    assert_all_close(world.gradients(alone, world.wrong), expected, 1e-9)
    *posterior, student = objective.joint_loss(draw)
    loss = world.whole(iter(posterior)).loss
    assert_all_close(world.gradients(loss, world.wrong), expected, 1e-9)
    assert all(g is None for g in world.gradients(loss, world.student))
    assert all(g is None for g in world.gradients(student.loss.mean(), world.wrong))
    wrong_score = world.gradients(student.loss.mean(), world.student)  # theta follows x0_mean, and not the target
    c = level.sigma**2 * (level.alpha / level.sigma) ** 2
    direction = c * (q.x0_mean - world.teacher(x_t, level, draw.condition)).detach()
    by_hand = (direction * world.student(draw.z, draw.condition)).flatten(1).sum(1).mean()
    assert_all_close(wrong_score, world.gradients(by_hand, world.student), 1e-9)


@pytest.mark.slow
def test_exact_posterior_is_stationary(world):
    """For q and x0_mean exact, phi's gradient is zero on average, whatever the pool; for a wrong q it is not."""
    for posterior in (world.exact, world.wrong):
        gradients = []
        for _ in range(200):
            objective = world.objective("amortized_score", posterior)
            parts = world.gradients(world.whole(objective.posterior_loss(world.random(11))).loss, posterior)
            gradients.append(torch.cat([g.flatten() for g in parts]))
        stacked = torch.stack(gradients)
        deviation = stacked.mean(0).abs() / stacked.std(0) * math.sqrt(len(stacked))
        assert (float(deviation.max()) < 4) == (posterior is world.exact)


# Pools over micro-batches ------------------------------------------------------------------------------------------------


def rows_of(draw, rows: slice):
    condition = None if draw.condition is None else {name: v[rows] for name, v in draw.condition.items()}
    normals = {name: v[rows] for name, v in draw.normals.items()}
    return type(draw)(draw.z[rows], draw.eps[rows], draw.u[rows], condition, normals=normals)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("phase", [0, 1])
def test_the_pool_is_the_whole_batch(phase, conditional, world, unconditional_world, assert_all_close):
    """Two processes of two micro-batches each, gathered by prepare, are one batch; without prepare they are not."""
    world = world if conditional else unconditional_world
    objective = world.objective("amortized_score", world.wrong, noise_draws=2, posterior_updates=1)
    draw = world.random(4, **world.extra_of(objective))

    def gradients(draws: list, contexts: list) -> list[Tensor]:
        losses = [world.whole(objective.phases[phase].loss(d, c)).loss for d, c in zip(draws, contexts, strict=True)]
        networks = (world.wrong, world.student) if phase else (world.wrong,)
        return world.gradients(sum(losses) / len(losses), *networks)

    whole = gradients([draw], [None])
    parts = [rows_of(draw, slice(i, i + 3)) for i in range(0, 12, 3)]
    sent: list[list[Tensor]] = []
    for process in (parts[:2], parts[2:]):
        sent.append([])
        objective.phases[phase].prepare(process, lambda t: sent[-1].append(t) or t)
    contexts = []
    for process in (parts[:2], parts[2:]):
        gathered = iter([torch.cat(both) for both in zip(*sent, strict=True)])
        contexts += objective.phases[phase].prepare(process, lambda t, gathered=gathered: next(gathered))
    assert [len(c.x0) for c in contexts] == [12] * 4
    assert not any(c.x0.requires_grad for c in contexts)
    assert_all_close(gradients(parts, contexts), whole, 1e-9)
    assert max(float((a - b).abs().max()) for a, b in zip(gradients(parts, [None] * 4), whole, strict=True)) > 1e-3


@pytest.mark.parametrize("weighting", ["edm", "snr"])
def test_a_pool_of_its_own_is_denoising(weighting, world, assert_all_close):
    """The target is x0 itself, in a batch of any size: no pool is made, and no effective sample size counted. With the same
    denoiser the student's gradient is Diff-Instruct's.
    """
    options = {"pool": "own", "regression_weight": 7.0, "regression_weighting": weighting}
    objective = world.objective("amortized_score", world.wrong, posterior_updates=2, warmup_updates=1, **options)
    assert [phase.prepare for phase in (*objective.warmup, *objective.phases)] == [None] * 3
    draw = world.random(5)
    level, x0 = RectifiedFlowSchedule().level(draw.u), world.student(draw.z, draw.condition)
    x_t = add_noise(x0.detach(), draw.eps, level)
    q = world.wrong(x_t, level, draw.condition, z=draw.z[:, None])
    w = edm_weight(level, world.teacher.sigma_data) if weighting == "edm" else (level.alpha / level.sigma) ** 2
    error = denoising_loss(q.x0_mean, x0.detach(), w)
    expected = (7.0 * x0[0].numel() * error - q.log_q[:, 0]).mean()
    alone = world.whole(objective.posterior_loss(draw))
    assert alone.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert alone.metrics.keys() == {"information", "regression_error"}
    assert float(alone.metrics["regression_error"]) == pytest.approx(float(error.mean()), rel=1e-10)
    *posterior, student = objective.joint_loss(draw)
    for loss in (alone.loss, world.whole(iter(posterior)).loss):
        assert_all_close(world.gradients(loss, world.wrong), world.gradients(expected, world.wrong), 1e-9)

    class Fake(nn.Module):
        """The posterior's mean as a score network."""

        def forward(self, x_t, level, condition=None):
            return world.wrong(x_t, level, condition).x0_mean

    score = DiffInstruct(world.student, world.teacher, Fake(), world.levels, world.levels, "sigma2", joint=True)
    *_, follow = score.joint_loss(draw)
    same = world.gradients(follow.loss.mean(), world.student)
    assert_all_close(world.gradients(student.loss.mean(), world.student), same, 1e-9)


def test_proposals_need_no_pool_of_the_batch(world):
    objective = world.objective("amortized_score", num_samples=K, warmup_updates=1, posterior_updates=1)
    assert [phase.prepare for phase in (*objective.warmup, *objective.phases)] == [None] * 3


# Metrics -----------------------------------------------------------------------------------------------------------------


def test_metrics_by_hand(world):
    """Means over the first noised copy, from which the posterior learns; x0_std of the batch."""
    objective = world.objective("amortized_score", world.wrong, noise_draws=2)
    draw = world.random(5, **world.extra_of(objective))
    x0, labels = world.student(draw.z, draw.condition).detach(), draw.condition["class_labels"]
    expected = {"x0_std": float(x0.std())}
    level = RectifiedFlowSchedule().level(draw.u)
    x_t = add_noise(x0, draw.eps, level)
    q = world.wrong(x_t, level, draw.condition, z=draw.z[:, None])
    expected["information"] = float((q.log_q[:, 0] - log_standard_normal(draw.z.flatten(1))).detach().mean())
    target = mean_by_hand(x_t, level, labels, x0, labels)
    error = edm_weight(level, world.teacher.sigma_data) * (q.x0_mean - target).square()
    expected["regression_error"] = float(error.detach().mean())
    log_v = torch.tensor(
        [
            [-0.5 * float(((x_t[i] - level.alpha[i] * x0[j]) / level.sigma[i]).square().sum()) for j in range(len(x0))]
            for i in range(len(x0))
        ],
        dtype=torch.float64,
    ).masked_fill(labels[:, None] != labels, -math.inf)
    ess = 1 / log_v.softmax(1).square().sum(1)
    expected["ess"] = float(ess.mean())
    for i, name in enumerate(objective.statistics.names):
        inside = (level.t > i / 8) & (level.t <= (i + 1) / 8)
        expected |= {f"ess_share@{name}": float(inside.double().mean()), f"ess_sum@{name}": float((inside * ess).mean())}
    metrics = world.joint(objective, draw).metrics
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert not value.requires_grad
        assert float(value) == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("weighting", ["uniform", "snr", "dmd"])
def test_weight_is_taken_at_each_sample(weighting, world):
    """Any named weight multiplies the student's part; the posterior's have none."""
    draw = world.random(7)
    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition)
    gap = (x0 - world.teacher(add_noise(x0, draw.eps, level), level, draw.condition)).abs().flatten(1).mean(1)
    nsr = (level.sigma / level.alpha).flatten()
    w = {"uniform": torch.ones_like(nsr), "snr": nsr**-2, "dmd": nsr**2 / gap}[weighting].detach()
    *weighted, student = world.objective("amortized_score", world.wrong, weighting=weighting).joint_loss(draw)
    *plain, unweighted = world.objective("amortized_score", world.wrong, weighting="uniform").joint_loss(draw)
    assert_close(student.loss, w * unweighted.loss, rtol=1e-9, atol=1e-9)
    for a, b in zip(weighted, plain, strict=True):
        assert_close(a.loss, b.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_of_any_batch_add_up(count, world):
    """An odd number of samples, or one: the parts' means are those of the samples that they hold."""
    objective = world.objective("amortized_score", world.wrong)
    draw = rows_of(world.random(7), slice(0, count))
    total = world.whole(objective.posterior_loss(draw))
    x0 = world.student(draw.z, draw.condition).detach()
    alone = [
        world.whole(objective.posterior_loss(rows_of(draw, slice(i, i + 1)), Pool(x0, draw.condition))) for i in range(count)
    ]
    assert total.loss.item() == pytest.approx(sum(one.loss.item() for one in alone) / count, rel=1e-10)
    for name, value in total.metrics.items():
        assert float(value) == pytest.approx(sum(float(one.metrics[name]) for one in alone) / count, rel=1e-6), name
