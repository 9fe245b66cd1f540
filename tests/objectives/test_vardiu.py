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

from pipelines.noise import RectifiedFlowSchedule, add_noise, score
from trainers.objectives.importance import bound_loss, log_importance, multi_sample_loss

ANTITHETIC = ("bound", "multi_sample", "resampled_score")
ESTIMATORS = (*ANTITHETIC, "amortized_score")
K = 5
SWITCHES = [{"antithetic": a, "control_variate": c} for a in (False, True) for c in (False, True)]
OPTIONS = [
    *({"estimator": estimator} | switches for estimator in ("bound", "multi_sample") for switches in SWITCHES),
    *({"estimator": "resampled_score", "antithetic": antithetic} for antithetic in (False, True)),
    {"estimator": "amortized_score"},
    {"estimator": "amortized_score", "num_samples": K},
]


# The bound ---------------------------------------------------------------------------------------------------------------


def test_exact_posterior_makes_every_weight_the_density(world):
    """v = N(x_t; alpha g(z), sigma^2) p(z) / p(z | x_t) = p_theta,t(x_t), whatever z: Bayes."""
    log_v, _, log_p = world.importance(world.random(17, proposals=K), world.exact)
    assert_close(log_v, log_p[:, None].expand(-1, K + 1), rtol=1e-10, atol=1e-10)


def test_bound_is_tight_for_the_exact_posterior(world):
    """E[log v - log p_d(x_t)] = KL(p_theta,t || p_d,t), cell by cell."""
    log_v, x_t, _ = world.importance(world.cubature(), world.exact)
    for (label, t), v, x in zip(world.cells, world.by_cell(log_v[:, 0]), world.by_cell(x_t.flatten(1)), strict=True):
        log_p_d = MultivariateNormal(*world.teacher.moments(label, t)).log_prob(x)
        assert (v - log_p_d).mean().item() == pytest.approx(world.kl(label, t).item(), rel=1e-9)


def test_slack_of_the_bound(world):
    """Above the KL by E KL(p_theta(z | x_t) || q(z | x_t)), a KL of Gaussians averaged over x_t."""
    log_v, x_t, log_p = world.importance(world.cubature(), world.wrong)
    cells = zip(world.cells, world.by_cell(log_v[:, 0]), world.by_cell(log_p), world.by_cell(x_t.flatten(1)), strict=True)
    for (label, t), v, p, x in cells:
        (slope, offset, cov), (slope_q, offset_q, cov_q) = world.exact.moments(label, t), world.wrong.moments(label, t)
        shift = x @ (slope - slope_q).T + offset - offset_q
        quadratic = torch.einsum("ni,ij,nj->n", shift, torch.linalg.inv(cov_q), shift)
        trace = torch.linalg.solve(cov_q, cov).trace() - world.d + torch.logdet(cov_q) - torch.logdet(cov)
        slack = ((quadratic.mean() + trace) / 2).item()
        assert slack > 0.1
        assert float((v - p).mean()) == pytest.approx(slack, rel=1e-9)


# Gradients ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_of_the_student_is_that_of_the_kl(options, world, assert_all_close):
    """With the exact posterior, all of them, without error: each is a polynomial of degree two in the draw's numbers."""
    objective = world.objective(**options)
    terms = world.joint(objective, world.cubature(**world.extra_of(objective)))
    assert_all_close(world.gradients(terms.loss.mean(), world.student), world.gradient(world.cell_mean(world.kl)), 1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_without_a_condition(options, unconditional_world, assert_all_close):
    world = unconditional_world
    objective = world.objective(**options)
    terms = world.joint(objective, world.cubature(**world.extra_of(objective)))
    assert_all_close(world.gradients(terms.loss.mean(), world.student), world.gradient(world.cell_mean(world.kl)), 1e-9)


@pytest.mark.parametrize("estimator", ANTITHETIC)
def test_exact_posterior_is_stationary(estimator, world):
    """It minimises the bound, so its gradient is zero on average; the wrong one's is not."""
    for posterior in (world.exact, world.wrong):
        objective = world.objective(estimator, posterior)
        losses = [world.joint(objective, world.cubature(**world.extra_of(objective))).loss]
        losses.append(objective.posterior_loss(world.cubature()).loss)
        for loss in losses:
            for gradient in world.gradients(loss.mean(), posterior):
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
def test_gradient_of_the_bound_for_any_posterior(antithetic, control_variate, world, assert_all_close):
    """theta: -E log p_d(x_t) - E log q(z | x_t), where x_t carries the gradient of both; phi: the second term."""
    objective = world.objective("bound", world.wrong, antithetic=antithetic, control_variate=control_variate)

    def cross_entropy(label: int, t: float) -> Tensor:
        (mean, cov), (mean_d, cov_d) = world.student_moments(label, t), world.teacher.moments(label, t)
        shift, precision = mean - mean_d, torch.linalg.inv(cov_d)
        return 0.5 * ((precision @ cov).trace() + shift @ precision @ shift)

    entropy = world.cell_mean(lambda label, t: entropy_term(world, label, t, world.wrong))
    loss = world.joint(objective, world.cubature()).loss.mean()
    assert_all_close(world.gradients(loss, world.student), world.gradient(world.cell_mean(cross_entropy) + entropy), 1e-9)
    assert_all_close(world.gradients(loss, world.wrong), world.gradient(entropy, world.wrong), 1e-9)


@pytest.mark.parametrize("antithetic", [False, True])
def test_posterior_alone(antithetic, world, assert_all_close):
    """-E log q, unweighted: its value and gradient; beside the resampled score it has the same gradient."""
    objective = world.objective("resampled_score", world.wrong, antithetic=antithetic)
    terms = objective.posterior_loss(world.cubature())
    entropy = world.cell_mean(lambda label, t: entropy_term(world, label, t, world.wrong), weighted=False)
    assert terms.loss.mean().item() == pytest.approx(entropy.item(), rel=1e-9)
    expected = world.gradient(entropy, world.wrong)
    assert_all_close(world.gradients(terms.loss.mean(), world.wrong), expected, 1e-9)
    joint = world.joint(objective, world.cubature(**world.extra_of(objective))).loss.mean()
    assert_all_close(world.gradients(joint, world.wrong), expected, 1e-9)


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
def test_gradient_of_the_multi_sample_bound(antithetic, control_variate, world, assert_all_close):
    """Draw by draw against log mean v - log p_d(x_t) written out anew, differentiated in theta and phi."""
    objective = world.objective("multi_sample", world.wrong, antithetic=antithetic, control_variate=control_variate)
    draw = world.random(7, **world.extra_of(objective))
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
    loss = world.joint(objective, draw).loss.mean()
    assert_all_close(world.gradients(loss, world.student), world.gradients(expected, world.student), 1e-9)
    assert_all_close(world.gradients(loss, world.wrong), world.gradients(expected, world.wrong), 1e-9)


def test_multi_sample_loss_of_z_alone_is_the_bound(world, assert_all_close):
    """log v_0 has the bound's gradient: N(x_t; alpha g(z), sigma^2) and p(z) do not depend on theta."""
    draw = world.random(7)
    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition)
    x_t = add_noise(x0, draw.eps, level)
    score_d = score(world.teacher(x_t, level, draw.condition), x_t, level)
    log_q, w = world.wrong(x_t, level, draw.condition, z=draw.z[:, None]).log_q, level.sigma**2
    log_v = log_importance(x_t, x0[:, None], draw.z[:, None], log_q, level)
    expected = world.gradients(bound_loss(x_t, score_d, log_q[:, 0], w).mean(), world.student, world.wrong)
    actual = world.gradients(multi_sample_loss(x_t, score_d, log_v, w).mean(), world.student, world.wrong)
    assert_all_close(actual, expected, 1e-9)


def test_more_samples_tighten_the_bound(world):
    """K = 0, 1, 4, 16, 64 with a wrong posterior: down towards E log p_theta,t(x_t), never below."""
    log_v, _, log_p = world.importance(world.random(3000, proposals=64), world.wrong)
    bounds = [log_v[:, : k + 1].logsumexp(1) - math.log(k + 1) for k in (0, 1, 4, 16, 64)]

    def mean_and_error(x: Tensor) -> tuple[float, float]:
        return float(x.mean()), float(x.std()) / math.sqrt(len(x))

    for looser, tighter in pairwise(bounds):
        mean, error = mean_and_error(looser - tighter)
        assert mean > 4 * error
    slack = [mean_and_error(b - log_p) for b in bounds]
    assert all(mean > -4 * error for mean, error in slack)
    assert slack[-1][0] < 0.1 * slack[0][0]


# Variance ----------------------------------------------------------------------------------------------------------------


def gradient_variance(world, n: int, **options) -> float:
    """Summed over the bias's entries, for one draw of the bound with the exact posterior."""
    draw = world.random(n)
    outputs = []
    handle = world.student.register_forward_hook(lambda m, args, out: outputs.append(out))
    loss = world.joint(world.objective("bound", **options), draw).loss.sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, outputs[0])  # the bias adds to x0 with slope one
    return float(sum(g.flatten(1).var(0).sum() for g in world.by_cell(gradient)))


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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_who_is_differentiated(options, world):
    """Theta and phi, and no backward pass through the teacher."""
    objective = world.objective(**options, posterior=world.wrong)
    world.joint(objective, world.random(7, **world.extra_of(objective))).loss.mean().backward()
    assert all(p.requires_grad and p.grad is None for p in world.teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for net in (world.student, world.wrong) for p in net.parameters())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_teacher_is_read_without_a_graph(estimator, world):
    seen = []
    world.teacher.register_forward_pre_hook(lambda module, args: seen.append(torch.is_grad_enabled()))
    objective = world.objective(estimator)
    world.joint(objective, world.random(7, **world.extra_of(objective)))
    assert set(seen) == {False}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_posterior_phase_leaves_the_others_alone(options, world):
    objective = world.objective(**options, posterior=world.wrong)
    world.whole(objective.posterior_loss(world.random(7, **world.extra_of(objective)))).loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in world.wrong.parameters())
    assert all(p.grad is None for net in (world.student, world.teacher) for p in net.parameters())


def test_density_of_the_latent_reaches_the_student_through_x_t(world, assert_all_close):
    """A teacher without a score leaves log q alone to move the student, and only because x_t is not detached."""
    world.teacher.forward = lambda x_t, level, condition=None: x_t / level.alpha  # score 0
    objective, draw = world.objective("bound", world.wrong), world.random(7)
    level = RectifiedFlowSchedule().level(draw.u)
    x_t = add_noise(world.student(draw.z, draw.condition), draw.eps, level)
    entropy = -(level.sigma.flatten() ** 2 * world.wrong(x_t, level, draw.condition, z=draw.z[:, None]).log_q[:, 0]).mean()
    loss = world.joint(objective, draw).loss.mean()
    assert_all_close(world.gradients(loss, world.student), world.gradients(entropy, world.student), 1e-9)


@pytest.mark.parametrize("estimator", ANTITHETIC)
def test_antithetic_pairs_average_to_one_number_each(estimator, world):
    """The loss of each z is the mean of the losses with +eps and -eps, which have proposals of their own."""
    pair, single = (world.objective(estimator, world.wrong, antithetic=a) for a in (True, False))
    draw = world.random(7, **world.extra_of(pair))
    loss = world.joint(pair, draw).loss
    assert loss.shape == (7 * len(world.cells),)
    losses, alone = [], []
    for i, sign in enumerate((1, -1)):
        normals = {name: v.chunk(2, 1)[i] for name, v in draw.normals.items()}
        other = type(draw)(draw.z, sign * draw.eps, draw.u, draw.condition, normals=normals)
        losses.append(world.joint(single, other).loss)
        alone.append(single.posterior_loss(other).loss)
    assert_close(loss, (losses[0] + losses[1]) / 2, rtol=1e-10, atol=1e-10)
    assert_close(pair.posterior_loss(draw).loss, (alone[0] + alone[1]) / 2, rtol=1e-10, atol=1e-10)
    world.student.calls = 0
    world.joint(pair, draw)
    assert world.student.calls == (1 if estimator == "bound" else 1 + K)  # z's images are made once for both signs


@pytest.mark.parametrize("weighting", ["uniform", "snr", "dmd"])
@pytest.mark.parametrize("estimator", ANTITHETIC)
def test_weight_is_taken_at_each_sample(estimator, weighting, world):
    """Any named weight multiplies theta's gradient in x_t, and the bounds' phi as well; beside a score phi has no weight."""
    draw = world.random(7, K)
    level = RectifiedFlowSchedule().level(draw.u)
    x0 = world.student(draw.z, draw.condition)
    x_t = add_noise(x0, draw.eps, level)
    gap = (x0 - world.teacher(x_t, level, draw.condition)).abs().flatten(1).mean(1)
    nsr = (level.sigma / level.alpha).flatten()
    w = {"uniform": torch.ones_like(nsr), "snr": nsr**-2, "dmd": nsr**2 / gap}[weighting].detach()
    weighted, plain = (world.joint(world.objective(estimator, weighting=name), draw).loss for name in (weighting, "uniform"))
    own = 0 if estimator != "resampled_score" else world.objective(estimator).posterior_loss(draw).loss
    assert_close(weighted - own, w * (plain - own), rtol=1e-9, atol=1e-9)


def mutual_information(world, label: int, t: float) -> Tensor:
    a = world.student.matrix * (1 - t) / t
    return 0.5 * torch.logdet(torch.eye(world.d, dtype=a.dtype) + a @ a.T)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"estimator": "bound", "antithetic": True}, None),
        ({"estimator": "multi_sample", "antithetic": True}, K + 1),
        ({"estimator": "resampled_score", "antithetic": True}, K),
        ({"estimator": "amortized_score", "num_samples": K}, K + 1),
    ],
)
def test_metrics(options, count, world):
    """Information is the mutual information of z and x_t for the exact posterior; then all weights are equal, too."""
    expected = world.cell_mean(lambda label, t: mutual_information(world, label, t), weighted=False).item()
    objective = world.objective(**options)
    draw = world.cubature(**world.extra_of(objective))
    metrics = world.joint(objective, draw).metrics
    assert not any(v.requires_grad for v in metrics.values())
    for seen in (metrics, world.whole(objective.posterior_loss(draw)).metrics):
        assert float(seen["information"]) == pytest.approx(expected, rel=1e-9)
    assert ("ess" in metrics) == (count is not None)
    if count:
        assert float(metrics["ess"]) == pytest.approx(count, rel=1e-9)
    x0 = world.student(draw.z, draw.condition).detach()
    x0 = torch.cat([x0, x0]) if objective.antithetic else x0
    assert float(metrics["x0_std"]) == pytest.approx(float(x0.std()), rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_phases(estimator, world):
    objective = world.objective(estimator, posterior_updates=3, warmup_updates=11)
    alone, joint = objective.phases
    assert (alone.name, alone.updates, alone.repeats) == ("posterior", ("posterior",), 3)
    assert (joint.name, joint.updates, joint.repeats) == ("joint", ("student", "posterior"), 1)
    assert alone.loss == objective.posterior_loss
    (warmup,) = objective.warmup
    assert (warmup.name, warmup.updates, warmup.loss, warmup.repeats) == ("posterior", alone.updates, alone.loss, 11)
    # the pool of the amortised score is the whole batch, in every phase
    pooled = objective.prepare if estimator == "amortized_score" else None
    assert [phase.prepare for phase in (alone, joint, warmup)] == [pooled] * 3
    assert joint.observe == (objective.statistics.observe if estimator == "resampled_score" else None)
    assert alone.observe is warmup.observe is None
    assert [phase.name for phase in world.objective(estimator, posterior_updates=0).phases] == ["joint"]
    assert objective.networks == {"student": world.student, "posterior": world.exact}
    assert objective.frozen == {"teacher": world.teacher}
    assert not objective.needs_data
    (health,) = world.objective(estimator, min_information=0.3).health
    assert (health.metric, health.minimum) == ("information", 0.3)
    assert health.needed == (estimator != "amortized_score")  # whose student learns from the regression


class InFloat32(nn.Module):
    """Computes in float64 and answers in float32, so that autocast finds nothing to round inside."""

    sigma_data, schedule, on_teacher_features = 0.7, RectifiedFlowSchedule(), False

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args, **kwargs):
        out = self.inner(x.double(), *args, **{k: None if v is None else v.double() for k, v in kwargs.items()})
        if isinstance(out, Tensor):
            return out.float()
        return type(out)(**{k: None if v is None else v.float() for k, v in vars(out).items()})


AUTOCAST = [*({"estimator": e} for e in ESTIMATORS), {"estimator": "resampled_score", "moves": 1}]


@pytest.mark.parametrize("options", AUTOCAST, ids=str)
def test_autocast_does_not_reach_the_objective(options, world, assert_all_close):
    """Networks may compute in half precision; what is made of their answers may not."""
    objective = world.objective(**options)
    draw = world.random(7, **world.extra_of(objective))
    if objective.num_samples and options.get("moves"):
        draw.normals["moves"] = draw.z.new_zeros(len(draw.z), 1)
    for name in ("z", "eps", "u"):
        setattr(draw, name, getattr(draw, name).float())
    draw.normals = {k: v.float() for k, v in draw.normals.items()}
    objective.student, objective.teacher = InFloat32(world.student), InFloat32(world.teacher)
    objective.posterior = InFloat32(world.wrong)
    plain = world.joint(objective, draw).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = world.joint(objective, draw).loss
    assert loss.dtype == torch.float32
    assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    assert_all_close(world.gradients(loss.mean(), world.student), world.gradients(plain.mean(), world.student), 1e-5)


# Many latents ------------------------------------------------------------------------------------------------------------


class DeepStudent(nn.Module):
    """Layers that save activations for their backward pass, as a U-Net's do."""

    def __init__(self, randn, layers: int = 11, width: int = 13) -> None:
        super().__init__()
        sizes = [(width, 3), *[(width, width)] * layers, (3, width)]
        self.layers = nn.ParameterList([0.4 * randn(*size) for size in sizes])
        self.bias = nn.Parameter(randn(2))

    def forward(self, z: Tensor, condition=None) -> Tensor:
        h = z.flatten(1)
        for layer in self.layers:
            h = torch.tanh(h @ layer.T)
        return (h + self.bias[condition["class_labels"]][:, None])[..., None, None]


def test_students_one_at_a_time_are_one_call(world, randn, assert_all_close):
    """Value and gradients, those in the latents too, equal to those of one differentiable call on all latents."""
    student = DeepStudent(randn)
    objective, z_k = world.objective("multi_sample"), randn(7, K, 3, 1, 1).requires_grad_()
    objective.student = student
    condition = {"class_labels": torch.tensor([0, 1, 1, 0, 1, 0, 0])}
    repeated = {name: v.repeat_interleave(K, 0) for name, v in condition.items()}
    direction = randn(7, K, 3, 1, 1)
    results = []
    for x0_k in (objective.students(z_k, condition), student(z_k.flatten(0, 1), repeated).unflatten(0, (7, K))):
        results.append((x0_k, torch.autograd.grad((direction * x0_k).sum(), [z_k, *student.parameters()])))
    assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    assert_all_close(list(results[0][1]), list(results[1][1]), 1e-9)
    with torch.no_grad():
        assert_close(objective.students(z_k, condition), results[1][0], rtol=1e-12, atol=1e-12)


def saved_numbers(loss) -> int:
    """How many numbers the graph of loss() keeps for its backward pass, each tensor once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    assert value.requires_grad
    return sum(storages.values())


def test_memory_of_the_multi_sample_bound_is_that_of_one_call(world, randn):
    """Beyond the K latents, images and densities themselves: without recomputation it would be 11 layers more for each."""
    n, student = 101, DeepStudent(randn)
    saved = {}
    for num_samples in (2, 4, 8):
        objective = world.objective("multi_sample", num_samples=num_samples)
        objective.student = student
        draw = world.random(n, num_samples)
        saved[num_samples] = saved_numbers(lambda o=objective, d=draw: world.joint(o, d).loss.mean())
    batch = n * len(world.cells)
    slope = (saved[8] - saved[4]) / 4 / batch
    assert slope == pytest.approx((saved[4] - saved[2]) / 2 / batch, rel=0.02)
    activations = saved_numbers(lambda: student(draw.z, draw.condition).sum()) / batch
    assert activations > 100  # 12 layers of 13 and one of 3
    assert slope < 30  # z_k, g(z_k), the residual and what their densities are made of: 19
