"""VarFlow: the energy loss against loops and closed forms, its memory, and batches cut into micro-batches."""

import math
from itertools import pairwise, product

import pytest
import torch
from pydantic import ValidationError
from scipy.special import gamma, hyp1f1
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.data.images import ImageSet
from pipelines.denoiser import Denoiser, FeatureMaps
from pipelines.noise import EDMSchedule, RectifiedFlowSchedule
from trainers.data.examples import Images
from trainers.engine.draws import DrawSource
from trainers.objectives.energy import condition_vector, energy_loss, energy_score, pairwise_power, spread
from trainers.objectives.varflow import Config, VarFlow

BETAS = (0.5, 1.0, 1.5, 1.9)
SHAPE = (5, 2, 3, 7)  # K = 5 samples


def distance(a: Tensor, b: Tensor) -> float:
    return math.dist(a.double().flatten().tolist(), b.double().flatten().tolist())


def partners(i: int, k: int, cross: str, same_condition: bool) -> list[int]:
    """The data samples that student sample i is compared with: never its own where they share a condition."""
    if cross == "full":
        return [j for j in range(k) if not (same_condition and j == i)]
    return [(i + 1) % k if same_condition else i]


def naive(x: Tensor, y: Tensor, beta: float, cross: str, same_condition: bool = False) -> list[float]:
    """Each sample's share, pair by pair in float64; 0^beta = 0."""
    k = len(x)
    shares = []
    for i in range(k):
        between = [distance(x[i], y[j]) ** beta for j in partners(i, k, cross, same_condition)]
        within = math.fsum(distance(x[i], x[j]) ** beta for j in range(k) if j != i) / (k - 1)
        shares.append(math.fsum(between) / len(between) - within / 2)
    return shares


def naive_gradient(x: Tensor, y: Tensor, beta: float, cross: str, same_condition: bool = False) -> Tensor:
    """Of the sum of all shares: beta |d|^(beta-2) d for every pair, nothing for pairs that coincide."""

    def pull(a: Tensor, b: Tensor) -> Tensor:
        r = distance(a, b)
        return torch.zeros_like(a) if r == 0 else beta * r ** (beta - 2) * (a - b)

    k, gradient = len(x), torch.zeros_like(x)
    for i in range(k):
        mine = partners(i, k, cross, same_condition)
        for j in range(k):
            if j in mine:
                gradient[i] += pull(x[i], y[j]) / len(mine)
            gradient[i] -= pull(x[i], x[j]) / (k - 1)  # 1/2 for x_i in its own share, 1/2 in x_j's
    return gradient


def gradient_of(x: Tensor, y: Tensor, beta: float, cross: str, same_condition: bool = False) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(energy_loss(x, y, beta, cross, same_condition).sum(), x)[0]


# The loss ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_condition", [False, True])
@pytest.mark.parametrize("cross", ["full", "paired"])
@pytest.mark.parametrize("beta", BETAS)
def test_energy_loss_against_loops(beta, cross, same_condition, randn):
    for k in (2, 3, 5):
        x, y = randn(k, *SHAPE[1:]), 0.7 * randn(k, *SHAPE[1:]) + 0.5
        loss = energy_loss(x, y, beta, cross, same_condition)
        assert loss.shape == (k,)
        expected = naive(x, y, beta, cross, same_condition)
        assert loss.tolist() == pytest.approx(expected, rel=1e-11)
        assert float(loss.mean()) == pytest.approx(math.fsum(expected) / k, rel=1e-11)
        gradient = gradient_of(x, y, beta, cross, same_condition)
        assert_close(gradient, naive_gradient(x, y, beta, cross, same_condition), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("same_condition", [False, True])
def test_more_data_than_students(same_condition, randn):
    """Seven data for three students, of which the first three share their conditions: a mean over six or seven distances."""
    x, y = randn(3, 2, 5), randn(7, 2, 5)
    within = [math.fsum(distance(x[i], x[j]) for j in range(3) if j != i) / 2 for i in range(3)]
    others = [[j for j in range(7) if not (same_condition and j == i)] for i in range(3)]
    between = [math.fsum(distance(x[i], y[j]) for j in mine) / len(mine) for i, mine in enumerate(others)]
    expected = [b - w / 2 for b, w in zip(between, within, strict=True)]
    assert energy_loss(x, y, 1.0, "full", same_condition).tolist() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("cross", ["full", "paired"])
@pytest.mark.parametrize("beta", BETAS)
def test_gradient_against_finite_differences(beta, cross, randn):
    """Of each share in both arguments."""
    x, y = randn(3, 1, 2, 1).requires_grad_(), randn(3, 1, 2, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: energy_loss(x, y, beta, cross), (x, y), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("cross", ["full", "paired"])
@pytest.mark.parametrize("beta", BETAS)
def test_coincident_samples(beta, cross, offset, dtype, randn):
    """Twins among the students, and students that equal data: no distance, no force, no NaN, at any distance from zero."""
    x, y = (randn(*SHAPE) + offset).to(dtype), (randn(*SHAPE) + offset).to(dtype)
    x[3] = x[1]
    y[4], y[2] = x[4], x[0]
    loss, gradient = energy_loss(x, y, beta, cross), gradient_of(x, y, beta, cross)
    assert loss.tolist() == pytest.approx(naive(x, y, beta, cross), rel=1e-9)
    assert gradient.dtype == dtype
    # gradients come back in the input's precision
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    expected = naive_gradient(x.double(), y.double(), beta, cross)
    assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cross", ["full", "paired"])
@pytest.mark.parametrize("beta", BETAS)
def test_autocast_does_not_reach_the_loss(beta, cross, randn):
    x, y = randn(*SHAPE).float(), randn(*SHAPE).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = energy_loss(x, y, beta, cross)
    assert_close(loss, energy_loss(x, y, beta, cross), rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, 3.5, 3.7])  # centring is exact for the first two, rounds for the third
@pytest.mark.parametrize("cross", ["full", "paired"])
@pytest.mark.parametrize("beta", BETAS)
def test_one_point_is_no_loss(beta, cross, value):
    x = torch.full(SHAPE, value)
    assert not energy_loss(x, x, beta, cross).any()
    assert not gradient_of(x, x, beta, cross).any()


@pytest.mark.parametrize("offset", [1e3, -3e4])
@pytest.mark.parametrize("beta", BETAS)
def test_float32_far_from_the_origin(beta, offset, randn):
    """The loss is as exact as its inputs: they are rounded by adding the offset, nothing is rounded after that."""
    x, y = (randn(*SHAPE) + offset).float(), (randn(*SHAPE) + offset).float()
    for cross in ("full", "paired"):
        loss = energy_loss(x, y, beta, cross)
        assert loss.dtype == torch.float64
        assert loss.tolist() == pytest.approx(naive(x, y, beta, cross), rel=1e-9)
    power = pairwise_power(x, y, beta)
    assert power.shape == (5, 5)
    for i in range(5):
        for j in range(5):
            assert float(power[i, j]) == pytest.approx(distance(x[i], y[j]) ** beta, rel=1e-10)


def test_close_pairs_are_not_lost(randn):
    """Samples that differ by a hundred-thousandth of their size still push each other by the right amount."""
    x, step = randn(*SHAPE), 1e-5 * randn(*SHAPE)
    power = pairwise_power(x, x + step, 1.0)
    for i in range(5):
        assert float(power[i, i]) == pytest.approx(distance(x[i], x[i] + step[i]), rel=1e-4)


@pytest.mark.parametrize(
    ("k", "m", "cross"), [(1, 1, "full"), (1, 3, "full"), (5, 3, "full"), (0, 0, "full"), (5, 3, "paired"), (3, 5, "paired")]
)
def test_too_few_samples(k, m, cross):
    with pytest.raises(ValueError, match=f"at least 2; got {m}, {k}$"):
        energy_loss(torch.zeros(k, 2, 3, 7), torch.zeros(m, 2, 3, 7), 1.0, cross)


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor made under it keeps in memory, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize(("k", "d"), [(127, 1009), (211, 53), (512, 20011)])
@pytest.mark.slow
def test_memory_is_quadratic_in_samples_or_linear_in_pixels(k, d, generator):
    """No (K, K, D) tensor is ever made: for the last pair it would take 21 GB."""
    x = torch.randn(k, 1, d, 1, generator=generator).requires_grad_()
    y = torch.randn(k, 1, d, 1, generator=generator)
    with LargestTensor() as largest:
        energy_loss(x, y, 1.0, "full").mean().backward()
    assert largest.elements == max(k * k, k * d)
    assert bool(torch.isfinite(x.grad).all())
    assert float(x.grad.abs().max()) > 0


def mean_power_of_normal(shift: float, std: float, beta: float) -> float:
    """E|N(shift, std^2)|^beta."""
    moment = std**beta * 2 ** (beta / 2) * gamma((1 + beta) / 2) / math.sqrt(math.pi)
    return moment * hyp1f1(-beta / 2, 0.5, -((shift / std) ** 2) / 2)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.slow
def test_unbiased_for_two_gaussians(beta, randn):
    """E loss = E|S - T|^beta - 1/2 E|S - S'|^beta already for K = 2, where counting i = j would halve the second term."""
    mean_s, std_s, mean_t, std_t, n, k = 0.4, 0.7, -0.3, 1.1, 3000, 2
    expected = mean_power_of_normal(mean_s - mean_t, math.hypot(std_s, std_t), beta)
    within = mean_power_of_normal(0, math.sqrt(2) * std_s, beta)
    expected -= within / 2
    assert mean_power_of_normal(0.4, 0.7, 2.0) == pytest.approx(0.4**2 + 0.7**2)  # the closed form itself
    students, data = mean_s + std_s * randn(n, k, 1, 1, 1), mean_t + std_t * randn(n, k, 1, 1, 1)
    for cross in ("full", "paired"):
        losses = torch.stack([energy_loss(x, y, beta, cross).mean() for x, y in zip(students, data, strict=True)])
        error = float(losses.std()) / math.sqrt(n)
        assert within / 4 > 6 * error  # half of the second term would show
        assert float(losses.mean()) == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.7])
def test_energy_score_by_hand(beta, randn):
    """Three student samples for each of five data samples, in a row; the pairs k != l are 6."""
    x, y = randn(15, *SHAPE[1:]), randn(*SHAPE)
    expected = []
    for i in range(5):
        mine = x[3 * i : 3 * i + 3]
        between = math.fsum(distance(a, y[i]) ** beta for a in mine) / 3
        within = math.fsum(distance(mine[k], mine[j]) ** beta for k in range(3) for j in range(3) if j != k) / 6
        expected.append(between - within / 2)
    assert energy_score(x, y, beta).tolist() == pytest.approx(expected, rel=1e-10)


def test_energy_score_where_samples_coincide(randn):
    """Value and gradient stay finite: |x|^beta has none at 0."""
    y = randn(2, 3)
    x = y.repeat_interleave(2, 0).requires_grad_()
    score = energy_score(x, y, 0.5)
    assert score.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(score.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize(("students", "data"), [(5, 5), (7, 3), (0, 2)])
def test_energy_score_needs_two_samples_for_each(students, data):
    with pytest.raises(ValueError, match=f"got {students}, {data}"):
        energy_score(torch.zeros(students, 2), torch.zeros(data, 2), 1.0)


# The objective -----------------------------------------------------------------------------------------------------------


def test_several_samples_for_each_condition_match_its_own_law(make_draw):
    """Class 0 is +1 or +3, class 1 is -1 or -3, each as often. Exact means over all draws, by the energy distance of two points:

    with D(P, Q) = E|X - Y| - E|X - X'| / 2 - E|Y - Y'| / 2 >= 0, the loss is D + E|Y - Y'| / 2, and E|Y - Y'| / 2 = 1/2.
    The right student: 1/2. Classes swapped (the same marginal): E|X - Y| = 4, so 4 - 1/2. Collapsed to the means +-2: 1.
    """
    centre = torch.tensor([2.0, -2.0], dtype=torch.float64)

    def mean_loss(sign: float, width: float) -> float:
        student = nn.Module()
        student.forward = lambda z, condition: sign * centre[condition["class_labels"]].view(-1, 1, 1, 1) + width * z.sign()
        objective = VarFlow(student, RectifiedFlowSchedule(), lambda u, p: u, "uniform", 1.0, samples_per_condition=2)
        losses = []
        for label, z, other, side in product((0, 1), (-1.0, 1.0), (-1.0, 1.0), (-1.0, 1.0)):
            value = torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64)
            normals = {"z_1": other * value, "eps_1": 0 * value, "data_eps": 0 * value}
            condition = {"class_labels": torch.tensor([label])}
            x0 = centre[label] + side * value
            draw = make_draw(z * value, 0 * value, torch.zeros(1, dtype=torch.float64), condition, x0, normals)
            losses.append(float(objective.loss(draw).loss.mean()))
        return math.fsum(losses) / len(losses)

    assert mean_loss(1.0, 1.0) == pytest.approx(0.5)
    assert mean_loss(-1.0, 1.0) == pytest.approx(3.5)
    assert mean_loss(1.0, 0.0) == pytest.approx(1.0)


def test_noised_at_one_level(make_draw, randn):
    """alpha x0 + sigma eps for students and data, at the level of the shared number, with its weight."""
    schedule, t = RectifiedFlowSchedule(), 0.3
    shift = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    student = nn.Module()
    student.forward = lambda z, condition: z * 2 + shift
    draw = make_draw(randn(*SHAPE), randn(*SHAPE), torch.tensor([t, 0.9, 0.8, 0.7, 0.6], dtype=torch.float64), x0=randn(*SHAPE))
    draw.normals["data_eps"] = randn(*SHAPE)
    objective = VarFlow(student, schedule, lambda u, progress: u, "sigma2", 1.5, "paired")
    terms = objective.loss(draw)
    x = (1 - t) * (2 * draw.z + 0.5) + t * draw.eps
    y = (1 - t) * draw.x0 + t * draw.normals["data_eps"]
    assert terms.loss.tolist() == pytest.approx([t**2 * share for share in naive(x, y, 1.5, "paired")], rel=1e-10)
    assert float(terms.metrics["x0_std"]) == pytest.approx(float((2 * draw.z).std()), rel=1e-10)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), shift)
    assert float(gradient) == pytest.approx(t**2 * (1 - t) * float(naive_gradient(x, y, 1.5, "paired").sum()), rel=1e-8)


def test_matching_samples_are_a_minimum(make_draw, generator):
    """A one-parameter student of Gaussian data: over many samples the loss falls to its least value at the right scale."""
    losses = []
    z, eps, x0, eps_data = (torch.randn(401, 1, 1, 1, generator=generator, dtype=torch.float64) for _ in range(4))
    for scale in (0.4, 0.7, 1.0, 1.4, 2.0):
        student = nn.Module()
        student.forward = lambda z, condition, scale=scale: scale * z
        objective = VarFlow(student, EDMSchedule(), lambda u, progress: u, cross="full")
        draw = make_draw(z, eps, torch.full((401,), 0.3, dtype=torch.float64), x0=x0, normals={"data_eps": eps_data})
        losses.append(float(objective.loss(draw).loss.mean()))
    assert all(a > b for a, b in pairwise(losses[:3]))
    assert all(a < b for a, b in pairwise(losses[2:]))


def test_what_matches_across_conditions_is_refused_within_one():
    section = {"name": "varflow", "levels": {"name": "uniform", "low": 0.1, "high": 1.0}}
    for key, value in (("cross", "full"), ("condition_scale", 1.0)):
        with pytest.raises(ValidationError, match=f"{key} has no effect without samples_per_condition=1"):
            Config.model_validate(section | {"samples_per_condition": 3, key: value})
    # a run's config.yaml, which has every key, starts it again
    alone = Config.model_validate(section | {"samples_per_condition": 3})
    assert Config.model_validate(alone.model_dump()) == alone
    Config.model_validate(section | {"samples_per_condition": 1, "cross": "full", "condition_scale": 1.0})


def test_phases():
    student = nn.Linear(2, 2)
    objective = VarFlow(student, EDMSchedule(), lambda u, progress: u)
    (phase,) = objective.phases
    assert (phase.name, phase.updates, phase.loss, phase.repeats) == ("student", ("student",), objective.loss, 1)
    assert phase.prepare == objective.prepare
    assert (objective.warmup, objective.health, objective.needs_data) == ((), (), True)
    assert objective.networks == {"student": student}
    assert objective.frozen == {}


class TinyStudent(nn.Module):
    """A network over (z, class) in its own precision, so that a whole run can be in float64."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 2, 3, padding=1))
        self.label = nn.Embedding(3, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.to(dtype)

    def forward(self, z: Tensor, condition) -> Tensor:
        dtype = self.label.weight.dtype
        return self.net(z.to(dtype)) + self.label(condition["class_labels"])[:, :, None, None]


@pytest.fixture
def image_set(generator):
    pixels = torch.randint(0, 256, (17, 2, 5, 7), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(3, (17,), generator=generator), ("a", "b", "c"))


def update(objective: VarFlow, source: DrawSource, gather) -> tuple[list[Tensor], Tensor]:
    """The mean loss's gradient and every sample's loss, accumulated over one process's micro-batches as the loop does."""
    draws = source.batch(("step", 3, "student", 0), 0.25)
    contexts = objective.prepare(draws, gather) if gather else [None] * len(draws)
    objective.student.zero_grad()
    losses = []
    for draw, context in zip(draws, contexts, strict=True):
        loss = objective.loss(draw, context).loss
        (loss.mean() / len(draws)).backward()
        losses.append(loss.detach())
    return [p.grad.clone() for p in objective.student.parameters()], torch.cat(losses)


PRECISIONS = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-10, 1e-10)}


class TinyTeacher(nn.Module):
    """network(x, time, class_labels); `hidden` puts out feature maps of other channels and sides than x."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden, self.out = nn.Conv2d(2, 3, 3, stride=2), nn.ConvTranspose2d(3, 2, 3, stride=2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        shift = (time + class_labels)[:, None, None, None]
        return self.out(self.hidden((x + shift).tanh().to(self.out.weight.dtype)).tanh())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"condition_scale": 0.7},
        {"condition_scale": 0.7, "features": True},
        {"samples_per_condition": 3, "features": True},
        {"kernel": "drift", "temperatures": [0.1, 0.5], "condition_scale": 0.7, "features": True, "data_per_sample": 2},
    ],
)
@pytest.mark.parametrize("weighting", ["sigma2", "dmd"])
@pytest.mark.parametrize("cross", ["full", "paired"])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_micro_batches_give_the_gradient_of_the_batch(dtype, cross, weighting, options, image_set, generator):
    """Cut into micro-batches of 5, 3 and 1, and over three processes: the update of one pass over all 15."""
    student, levels = TinyStudent(generator, dtype), lambda u, progress: 0.1 + u + progress
    options = {"num_classes": 3} | options
    if "features" in options:
        teacher = TinyTeacher(generator, dtype)
        options["features"] = FeatureMaps(Denoiser(teacher, EDMSchedule()), [teacher.hidden])
    objective = VarFlow(student, EDMSchedule(), levels, weighting, 1.0, cross, **options)
    rtol, atol = PRECISIONS[dtype]

    def source(micro: int | None, rank: int = 0, world: int = 1) -> DrawSource:
        return DrawSource(5, 15, (2, 5, 7), torch.device("cpu"), Images(image_set), None, 0.0, rank, world, micro)

    (whole,) = source(None).batch(("step", 3, "student", 0), 0.25)
    assert len(whole.z) == 15
    expected, losses = update(objective, source(None), None)
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for micro in (5, 3, 1):
        gradient, values = update(objective, source(micro), lambda t: t)
        assert_close(values, losses, rtol=rtol, atol=atol)
        for a, b in zip(gradient, expected, strict=True):
            assert_close(a, b, rtol=rtol, atol=atol)

    # three processes: a first pass notes what each sends to `gather`, in order; a second gathers that, rank by rank
    sent = [[], [], []]
    for rank in range(3):
        update(objective, source(1, rank, 3), lambda t, mine=sent[rank]: (mine.append(t.clone()), torch.cat([t] * 3))[1])
    results = []
    for rank in range(3):
        calls = zip(*sent, strict=True)
        results.append(update(objective, source(1, rank, 3), lambda t, calls=calls: torch.cat(next(calls))))
    assert_close(torch.cat([values for _, values in results]), losses, rtol=rtol, atol=atol)
    for a, *parts in zip(expected, *[gradient for gradient, _ in results], strict=True):
        assert_close(sum(parts) / 3, a, rtol=rtol, atol=atol)


def test_further_data(image_set):
    """Each further set has pictures of its own with their labels, a function of seed, update and its number alone; processes
    and micro-batches take their rows.
    """

    def sets(world: int = 1, micro: int | None = None, seed: int = 5, step: int = 3) -> list[Tensor]:
        examples, device = Images(image_set), torch.device("cpu")
        sources = [DrawSource(seed, 12, (2, 5, 7), device, examples, None, 0.0, rank, world, micro) for rank in range(world)]
        draws = [draw for source in sources for draw in source.batch(("step", step, "student", 0), 0.25)]
        given = [[(draw.x0, draw.condition), draw.further_data(1), draw.further_data(2)] for draw in draws]
        for x0, condition in (one for of_draw in given for one in of_draw):
            same = (x0[:, None] == Images(image_set).rows(torch.arange(17))[0]).all((2, 3, 4))
            assert torch.equal(condition["class_labels"], image_set.labels[same.int().argmax(1)])
        return [torch.cat([x0 for x0, _ in one]) for one in zip(*given, strict=True)]

    whole = sets()
    assert len({tuple(x0.flatten(1).sum(1).tolist()) for x0 in whole}) == 3
    for split in ((1, 4), (3, 2), (12, 1)):
        assert all(torch.equal(a, b) for a, b in zip(sets(*split), whole, strict=True))
    for other in (sets(seed=6), sets(step=4)):
        assert not any(torch.equal(a, b) for a, b in zip(other, whole, strict=True))


@pytest.mark.parametrize("more", [{"dropout": 0.5}, {"augmentation": 0.5}, {"examples": None}])
def test_further_data_are_plain_examples(more, image_set):
    null = {"class_labels": torch.tensor(3)}
    options = {"examples": Images(image_set), "null_condition": null} | more
    (draw,) = DrawSource(0, 3, (2, 5, 7), torch.device("cpu"), **options).batch(("step", 1), 0.0)
    with pytest.raises(ValueError, match="further data are plain examples"):
        draw.further_data(1)


def test_nan_is_not_taken_for_coincidence(randn):
    """A network that has diverged must show in the loss, not as a distance of 0."""
    x = randn(5, 2, 3, 7)
    x[1, 0, 2, 3] = math.nan
    assert energy_loss(x, randn(5, 2, 3, 7), 1.0, "full").isnan().any()


# Conditions ----------------------------------------------------------------------------------------------------------------


def mean_of_rows(loss, rows: list, k: int) -> float:
    """The exact mean of `loss` over k independent rows (condition, student, data), each equally likely."""
    draws = list(product(rows, repeat=k))
    return math.fsum(loss(draw) for draw in draws) / len(draws)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.9])
def test_rows_that_share_a_condition_are_as_good_as_independent_ones(beta, k):
    """Student and data depend on each other through the condition of their row: x_i and y_i are no draw of the product of
    marginals, x_i and y_j are. Exact means over every batch of a small discrete world: Eq. 9, and without `same_condition` not.
    """
    rows = [(c, 3 * c + s, 2 * c - t) for c in (0.0, 1.0) for s in (0.0, 0.3) for t in (0.1, 0.7)]
    among = [abs(a[1] - b[1]) ** beta for a in rows for b in rows]
    across = [abs(a[1] - b[2]) ** beta for a in rows for b in rows]
    expected = math.fsum(across) / 64 - math.fsum(among) / 64 / 2

    def mean(cross: str, same_condition: bool) -> float:
        def loss(draw: tuple) -> float:
            x, y = (torch.tensor([row[i] for row in draw], dtype=torch.float64)[:, None] for i in (1, 2))
            return float(energy_loss(x, y, beta, cross, same_condition).mean())

        return mean_of_rows(loss, rows, k)

    for cross in ("full", "paired"):
        assert mean(cross, True) == pytest.approx(expected, rel=1e-12)
        assert abs(mean(cross, False) - expected) > 0.05


@pytest.mark.parametrize("beta", BETAS)
def test_pairs_averaged_over_all_shifts_are_all_pairs(beta, randn):
    """The paired term uses one of the k - 1 shifts that leave i, i out; their mean is the full term, sample by sample."""
    x, y = randn(*SHAPE), randn(*SHAPE) + 0.4
    shifts = [energy_loss(x, y.roll(-r, 0), beta, "paired", same_condition=True) for r in range(4)]
    assert_close(torch.stack(shifts).mean(0), energy_loss(x, y, beta, "full", same_condition=True), rtol=1e-12, atol=1e-12)


def test_condition_vector(randn):
    """SDXL's pooled text before the tokens', the mean over tokens else, a class as one-hot; all of length one, in float32."""
    tokens, pooled = randn(3, 7, 5).bfloat16(), randn(3, 11).bfloat16()
    both = condition_vector({"encoder_hidden_states": tokens, "text_embeds": pooled, "time_ids": randn(3, 6)}, 0)
    alone = condition_vector({"encoder_hidden_states": tokens}, 0)
    for vector, text in ((both, pooled.float()), (alone, tokens.mean(1).float())):
        assert vector.dtype == torch.float32
        for row, said in zip(vector, text, strict=True):
            length = math.sqrt(math.fsum(v * v for v in said.tolist()))
            assert row.tolist() == pytest.approx([v / length for v in said.tolist()], rel=1e-5)
    classes = condition_vector({"class_labels": torch.tensor([2, 0, 3])}, 5)
    assert classes.tolist() == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]


@pytest.mark.parametrize("cross", ["full", "paired"])
def test_joint_loss_by_hand(cross, make_draw, randn):
    """Noised images with scale sqrt(d) times the condition's vector beside them, which is not noised: d = 2 3 7."""
    scale, t, beta = 0.8, 0.3, 1.5
    draw = make_draw(randn(*SHAPE), randn(*SHAPE), torch.full((5,), t, dtype=torch.float64), x0=randn(*SHAPE))
    draw.normals["data_eps"] = randn(*SHAPE)
    draw.condition = {"encoder_hidden_states": randn(5, 3, 4), "text_embeds": randn(5, 6)}
    student = nn.Module()
    student.forward = lambda z, condition: 2 * z + 0.5
    objective = VarFlow(student, RectifiedFlowSchedule(), lambda u, p: u, "sigma2", beta, cross, condition_scale=scale)
    said = draw.condition["text_embeds"] / draw.condition["text_embeds"].norm(dim=1, keepdim=True)
    said = said - said.mean(0)
    said = said / math.sqrt(math.fsum(v * v for v in said.flatten().tolist()) / 5)
    x = (1 - t) * (2 * draw.z + 0.5) + t * draw.eps
    y = (1 - t) * draw.x0 + t * draw.normals["data_eps"]

    def apart(a: Tensor, b: Tensor, i: int, j: int) -> float:
        return (distance(a, b) ** 2 + scale**2 * 42 * distance(said[i], said[j]) ** 2) ** (beta / 2)

    expected = []
    for i in range(5):
        between = [apart(x[i], y[j], i, j) for j in partners(i, 5, cross, True)]
        within = [apart(x[i], x[j], i, j) for j in range(5) if j != i]
        expected.append(t**2 * (math.fsum(between) / len(between) - math.fsum(within) / 8))
    loss = objective.loss(draw).loss
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)  # the vectors are float32
    plain = VarFlow(student, RectifiedFlowSchedule(), lambda u, p: u, "sigma2", beta, cross).loss(draw).loss
    assert plain.tolist() == pytest.approx([t**2 * share for share in naive(x, y, beta, cross, True)], rel=1e-10)
    assert min(abs(a - b) for a, b in zip(plain.tolist(), loss.tolist(), strict=True)) > 1e-3


def test_the_spread_of_conditions(randn):
    """Over all pairs of rows the mean square distance is 2, as of two vectors whose values have variance 1 / n, wherever they lay
    and however close together; rows that are all equal say nothing.
    """
    for said in (randn(5, 7), 1e-3 * randn(5, 7) + 40.0):
        vectors = spread(said)
        assert float(torch.cdist(vectors, vectors).square().mean()) == pytest.approx(2.0, rel=1e-9)
        ratio = torch.cdist(said, said) / torch.cdist(vectors, vectors)
        off = ~torch.eye(5, dtype=torch.bool)
        assert float(ratio[off].max() / ratio[off].min()) == pytest.approx(1.0, rel=1e-6)
    assert torch.equal(spread(torch.full((3, 2), 0.3)), torch.zeros(3, 2))


@pytest.mark.parametrize("cross", ["full", "paired"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_joint_matching_sees_what_was_asked_for(scale, cross, make_draw):
    """Data +1 for class 0 and -1 for class 1; a right student, and one that swaps them and so has the same marginal.

    Exact means over all batches of two. With D = sqrt(4 + 4 s^2), the distance of (1, class 0) and (-1, class 1):
    right D/2 - D/4, swapped (2 + 2 s)/2 - D/4. They are equal at s = 0 alone: marginal matching cannot tell.
    """
    truth = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def mean_loss(sign: float) -> float:
        student = nn.Module()
        student.forward = lambda z, condition: sign * truth[condition["class_labels"]].view(-1, 1, 1, 1)
        joint = {"condition_scale": scale, "num_classes": 2}
        objective = VarFlow(student, RectifiedFlowSchedule(), lambda u, progress: u, "uniform", 1.0, cross, **joint)

        def loss(labels: tuple[int, ...]) -> float:
            labels, zero = torch.tensor(labels), torch.zeros(2, 1, 1, 1, dtype=torch.float64)
            x0, condition = truth[labels].view(-1, 1, 1, 1), {"class_labels": labels}
            draw = make_draw(zero, zero, torch.zeros(2, dtype=torch.float64), condition, x0, {"data_eps": zero})
            return float(objective.loss(draw).loss.mean())

        return mean_of_rows(loss, [0, 1], 2)

    d = math.sqrt(4 + 4 * scale**2)
    assert mean_loss(1.0) == pytest.approx(d / 4, rel=1e-6)
    assert mean_loss(-1.0) == pytest.approx((2 + 2 * scale) / 2 - d / 4, rel=1e-6)
    assert (mean_loss(-1.0) - mean_loss(1.0) > 0.05) == (scale > 0)
