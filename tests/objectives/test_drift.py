"""The drift kernel: against loops and by hand, exactly 0 in the mean for equal laws, and the objective that follows it."""

import math
from itertools import product

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines.denoiser import Denoiser, FeatureMaps
from pipelines.noise import EDMSchedule, RectifiedFlowSchedule
from trainers.objectives.drift import drift, drift_loss, pair_distance
from trainers.objectives.energy import energy_loss, spread, unit_channels
from trainers.objectives.varflow import Config, VarFlow

SHAPE = (5, 2, 3, 7)  # K = 5 samples
SECTION = {"name": "varflow", "levels": {"name": "uniform", "low": 0.1, "high": 1.0}}


def naive(x: Tensor, sets: list[Tensor], temperatures: list[float]) -> tuple[Tensor, float]:
    """V and s, pair by pair; x (K, d), each set (K, d)."""
    everything = [*x, *(row for one in sets for row in one)]
    n = len(everything)
    size = math.sqrt(sum(math.dist(a, b) ** 2 for a in everything for b in everything) / (n * (n - 1)))

    def mean_near(i: int, side: Tensor, width: float) -> Tensor:
        weights = [math.exp(-math.dist(x[i], row) / width) if j != i else 0.0 for j, row in enumerate(side)]
        return sum(w * row for w, row in zip(weights, side, strict=True)) / math.fsum(weights)

    v = torch.zeros_like(x)
    for i, temperature in product(range(len(x)), temperatures):
        width = temperature * size
        v[i] += sum(mean_near(i, one, width) for one in sets) / len(sets) - mean_near(i, x, width)
    return v, size


# The field ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperatures", [[0.05], [0.3], [0.1, 0.5, 3.0]])
@pytest.mark.parametrize("sets", [1, 3])
def test_against_loops(sets, temperatures, randn):
    """Field, loss and gradient: the target has none."""
    x, y = randn(*SHAPE).requires_grad_(), 0.7 * randn(5 * sets, *SHAPE[1:]) + 0.5
    flat = x.detach().flatten(1)
    expected, size = naive(flat, list(y.flatten(1).split(5)), temperatures)
    v, s = drift(x, y, temperatures)
    assert_close(v, expected, rtol=1e-10, atol=1e-10)
    assert float(s) == pytest.approx(size, rel=1e-12)
    assert not v.requires_grad
    loss = drift_loss(x, y, temperatures)
    assert loss.shape == (5,)
    assert_close(loss, expected.square().sum(1) / size, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert_close(gradient.flatten(1), -2 * expected / size, rtol=1e-10, atol=1e-10)


def test_a_case_worked_by_hand():
    """At width 1 / ln 2 the kernel is 2^-r. Student 0 at 0: data 2, 4 weigh 4:1, students 1, 3 as well; 2.4 - 1.4. And so on."""
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[5.0], [2.0], [4.0]], dtype=torch.float64)  # each student's own row left out
    size = math.sqrt(7)  # of 0, 1, 2, 3, 4, 5: twice the variance, 3.5
    v, s = drift(x, y, [1 / (math.log(2) * size)])
    assert float(s) == pytest.approx(size, rel=1e-12)
    assert v[:, 0].tolist() == pytest.approx([1, 10 / 3, 7 / 3], rel=1e-12)
    loss = drift_loss(x, y, [1 / (math.log(2) * size)])
    assert loss.tolist() == pytest.approx([1 / size, 100 / 9 / size, 49 / 9 / size], rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient[:, 0].tolist() == pytest.approx([-2 / size, -20 / 3 / size, -14 / 3 / size], rel=1e-12)


def test_swapping_the_sides_turns_it_round(randn):
    """With x_i where it is, the others' names exchanged: V(x_i) changes its sign."""
    x, y = randn(5, 11), randn(5, 11) + 0.3
    v, _ = drift(x, y, [0.1, 0.4])
    for i in range(5):
        swapped, data = y.clone(), x.clone()
        swapped[i], data[i] = x[i], y[i]
        assert_close(drift(swapped, data, [0.1, 0.4])[0][i], -v[i], rtol=1e-10, atol=1e-12)
    assert float(v.abs().min(1).values.max()) > 1e-3


def mean_at(places: list[float], worlds: list, build, temperatures: list[float]) -> list[float]:
    """The exact mean of V(x_0) given x_0, for each of the places where it can lie."""
    found: dict[float, list[float]] = {place: [] for place in places}
    for world in worlds:
        x, y = (torch.tensor(side, dtype=torch.float64)[:, None] for side in build(world))
        found[float(x[0])].append(float(drift(x, y, temperatures)[0][0]))
    assert all(found.values())
    return [math.fsum(values) / len(values) for values in found.values()]


@pytest.mark.parametrize("temperatures", [[0.05], [0.6]])
def test_zero_in_the_mean_for_equal_laws(temperatures):
    """Student and data of a row share a condition, and so depend on one another; given it they have one law: every batch of
    three rows. With another spread of the data: not 0.
    """
    rows = [(c + s, c + t) for c in (0.0, 1.0) for s in (0.0, 0.4) for t in (0.0, 0.4)]
    places = sorted({s for s, _ in rows})
    worlds = list(product(rows, repeat=3))
    mean = mean_at(places, worlds, lambda world: zip(*world, strict=True), temperatures)
    assert mean == pytest.approx([0.0] * 4, abs=1e-12)
    wider = mean_at(places, worlds, lambda world: ([s for s, _ in world], [1.5 * t for _, t in world]), temperatures)
    assert max(map(abs, wider)) > 0.05


@pytest.mark.parametrize("temperature", [0.05, 0.6])
def test_zero_in_the_mean_with_more_data(temperature):
    """Two sets of three against three students, independent; one softmax over all six would be off."""
    worlds = list(product((0.0, 1.0), repeat=9))
    mean = mean_at([0.0, 1.0], worlds, lambda world: (world[:3], world[3:]), [temperature])
    assert mean == pytest.approx([0.0, 0.0], abs=1e-12)


def test_at_large_temperature_it_is_the_difference_of_means(randn):
    x, y = randn(5, 11), randn(5, 11) + 0.3
    v, _ = drift(x, y, [1e9])
    expected = ((y.sum(0) - y) - (x.sum(0) - x)) / 4
    assert_close(v, expected, rtol=1e-6, atol=1e-6)


def test_at_small_temperature_it_is_the_nearest_neighbours(randn):
    x, y = randn(5, 11), randn(5, 11)
    v, _ = drift(x, y, [1e-4])
    for i in range(5):
        near = [min((j for j in range(5) if j != i), key=lambda j, side=side: math.dist(x[i], side[j])) for side in (y, x)]
        assert_close(v[i], y[near[0]] - x[near[1]], rtol=1e-6, atol=1e-9)


def test_the_spread_of_the_data_is_where_it_rests(generator):
    """A student z -> a z of Gaussian data in two dimensions: pushed out below a = 1, in above, and at 1 not, within 4 errors."""

    def pushes(a: float) -> tuple[float, float]:
        z, y = torch.randn(2, 300, 23, 2, generator=generator, dtype=torch.float64)
        each = torch.stack([(drift(a * z[i], y[i], [0.1, 0.5])[0] * z[i]).sum(1).mean() for i in range(300)])
        return float(each.mean()), float(each.std()) / math.sqrt(300)

    (inner, e0), (right, e1), (outer, e2) = map(pushes, (0.7, 1.0, 1.4))
    assert inner > 6 * e0
    assert abs(right) < 4 * e1
    assert outer < -6 * e2


def test_it_sees_what_lies_between_two_modes(generator):
    """Two clusters at +-1 in one of 7 dimensions; students of the same mean and spread, Gaussian, so that some lie between.

    Those that lie between are moved towards the cluster of their side; at a large temperature, as by means alone, they are not.
    """
    side = torch.randint(2, (400, 1), generator=generator).double() * 2 - 1
    x, y = torch.randn(2, 400, 7, generator=generator, dtype=torch.float64)
    y[:, :1] = side + 0.1 * y[:, :1]
    between = (x[:, 0].abs() > 0.2) & (x[:, 0].abs() < 0.6)
    outwards = [float((drift(x, y, [t])[0][:, 0] * x[:, 0].sign())[between].mean()) for t in (0.05, 30.0)]
    assert outwards[0] > 0.1
    assert abs(outwards[1]) < 0.05


@pytest.mark.parametrize("factor", [3.0, 1e-3])
def test_scale_and_origin(factor, randn):
    """V moves with the unit and not with the origin; the loss, as the energy distance at beta 1, with the unit."""
    x, y = randn(*SHAPE), randn(*SHAPE)
    v, size = drift(x, y, [0.1, 0.5])
    moved = [factor * side + 2.0 for side in (x, y)]
    assert_close(drift(*moved, [0.1, 0.5])[0], factor * v, rtol=1e-8, atol=1e-12)
    assert_close(drift_loss(*moved, [0.1, 0.5]), factor * drift_loss(x, y, [0.1, 0.5]), rtol=1e-8, atol=1e-12)
    assert float(size) == pytest.approx(float(pair_distance(torch.cat([x, y]).flatten(1))))


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_one_point_is_no_loss(value):
    x = torch.full(SHAPE, value, requires_grad=True)
    loss = drift_loss(x, x.detach(), [0.1])
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), x)[0].any()


def test_nan_comes_through(randn):
    x = randn(*SHAPE)
    x[1, 0, 2, 3] = math.nan
    assert drift_loss(x, randn(*SHAPE), [0.1]).isnan().all()


def test_autocast_does_not_reach_it(randn):
    x, y = randn(*SHAPE).float(), randn(*SHAPE).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = drift_loss(x, y, [0.1])
    assert_close(loss, drift_loss(x, y, [0.1]), rtol=0, atol=0)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (0, 0), (3, 5), (3, 0), (5, 3)])
def test_what_does_not_fit(k, n):
    with pytest.raises(ValueError, match=f"multiple of them of data; got {k}, {n}$"):
        drift(torch.zeros(k, 7), torch.zeros(n, 7), [0.1])


# The objective -----------------------------------------------------------------------------------------------------------------


class Teacher(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 2, stride=3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor, time: Tensor, **more: Tensor) -> Tensor:
        return self.first(x + time[:, None, None, None])


def objective_of(x0: Tensor, **options) -> VarFlow:
    student = nn.Module()
    student.forward = lambda z, condition: x0
    return VarFlow(student, RectifiedFlowSchedule(), lambda u, p: u, "uniform", 1.0, "full", **options)


@pytest.mark.parametrize("kernel", ["energy", "drift"])
@pytest.mark.parametrize("conditional", [False, True])
def test_loss_by_hand(conditional, kernel, make_draw, randn, generator):
    """Of three data samples for each student: grids, feature maps in the data's units, and conditions, the data's their own."""
    t, scale, options = 0.3, 0.8, {"kernel": kernel, "temperatures": [0.1, 0.5], "grids": [1, 3], "data_per_sample": 3}
    x0, data, noise, text = randn(5, 2, 6, 9).requires_grad_(), randn(15, 2, 6, 9), randn(15, 2, 6, 9), randn(15, 7)
    net = Teacher(generator)
    features = FeatureMaps(Denoiser(net, RectifiedFlowSchedule(), "flow"), [net.first])
    x, y = 0.7 * x0 + 0.3, 0.7 * data + 0.3 * noise
    said = scale * spread(nn.functional.normalize(text, dim=1).float()).double()

    def share(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.flatten(1), b.flatten(1)
        if conditional:
            a, b = (torch.cat([v, said[: len(v)] * v.shape[1] ** 0.5], 1) for v in (a, b))
        return drift_loss(a, b, [0.1, 0.5]) if kernel == "drift" else energy_loss(a, b, 1.0, "full", conditional)

    expected = share(x, y)
    for row, column in product(range(3), repeat=2):
        cut = (..., slice(2 * row, 2 * row + 2), slice(3 * column, 3 * column + 3))
        expected = expected + share(x[cut], y[cut]) / 3
    theirs = net.first(y + t)
    mine, theirs = (unit_channels(maps, theirs) for maps in (net.first(x + t), theirs))
    for row, column in product(range(2), range(3)):
        expected = expected + share(mine[:, :, row, column], theirs[:, :, row, column]) / math.sqrt(6)

    conditions = [{"text_embeds": part} if conditional else None for part in text.split(5)]
    draw = make_draw(x0, torch.ones_like(x0), torch.full((5,), t, dtype=torch.float64), conditions[0], data[:5])
    draw.further = list(zip(data.split(5), conditions, strict=True))[1:]
    draw.normals = dict(zip(("data_eps", "data_eps_1", "data_eps_2"), noise.split(5), strict=True))
    loss = objective_of(x0, features=features, condition_scale=scale, **options).loss(draw).loss
    assert_close(loss, expected / 3, rtol=1e-6, atol=1e-9)
    (by_hand,) = torch.autograd.grad(expected.sum() / 3, x0)
    assert_close(torch.autograd.grad(loss.sum(), x0)[0], by_hand, rtol=1e-5, atol=1e-8)


def test_a_student_learns_a_law_of_two_modes(make_draw, generator):
    """150 updates of a small network bring points to two clusters, as many to each."""
    torch.manual_seed(0)
    student = nn.Module()
    net = student.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    student.forward = lambda z, condition: net(z.flatten(1)).view_as(z)
    objective = VarFlow(student, EDMSchedule(), lambda u, p: u, "uniform", kernel="drift", temperatures=[0.05, 0.2])
    adam = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        z, eps, eps_data, x0 = torch.randn(4, 61, 1, 1, 1, generator=generator, dtype=torch.float64)
        draw = make_draw(z, eps, torch.full((61,), 0.05, dtype=torch.float64), x0=x0.sign() + 0.1 * x0)
        draw.normals["data_eps"] = eps_data
        adam.zero_grad()
        objective.loss(draw).loss.mean().backward()
        adam.step()
    made = student(torch.randn(1000, 1, 1, 1, generator=generator, dtype=torch.float64), None).detach().flatten()
    assert 0.4 < float((made > 0).double().mean()) < 0.6
    assert float((made.abs() < 0.5).double().mean()) < 0.2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperatures": [0.3]}, "temperatures has no effect without kernel=drift"),
        ({"kernel": "drift", "beta": 1.5}, "beta has no effect without kernel=energy"),
        ({"kernel": "drift", "cross": "full"}, "cross has no effect without kernel=energy"),
        ({"kernel": "drift", "samples_per_condition": 2}, "kernel has no effect without samples_per_condition=1"),
        ({"cross": "full", "data_per_sample": 2, "samples_per_condition": 2}, "has no effect without samples_per_condition=1"),
        ({"data_per_sample": 2}, "data_per_sample has no effect without cross=full or kernel=drift"),
        ({"kernel": "drift", "temperatures": []}, "temperatures"),
        ({"kernel": "drift", "temperatures": [0.1, 0.0]}, "temperatures.1"),
        ({"kernel": "gaussian"}, "kernel"),
        ({"cross": "full", "data_per_sample": 0}, "data_per_sample"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(SECTION | given)


@pytest.mark.parametrize(
    "given",
    [
        {"kernel": "drift", "temperatures": [0.1], "data_per_sample": 3, "grids": [1, 2], "condition_scale": 1.0},
        {"cross": "full", "data_per_sample": 3},
        {"kernel": "drift"},
    ],
)
def test_a_written_section_starts_again(given):
    config = Config.model_validate(SECTION | given)
    assert Config.model_validate(config.model_dump()) == config
