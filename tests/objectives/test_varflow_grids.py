"""VarFlow on grids and feature maps: block by block what the whole-image loss is, and what it sees that the whole does not."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines.denoiser import Denoiser, FeatureMaps
from pipelines.noise import RectifiedFlowSchedule
from trainers.objectives.energy import energy_loss, grid_blocks, spread, unit_channels
from trainers.objectives.varflow import VarFlow


def student_of(x0: Tensor) -> nn.Module:
    student = nn.Module()
    student.forward = lambda z, condition: x0
    return student


def whole_loss(x0: Tensor, data: Tensor, make_draw, t: float = 0.0, condition=None, **options) -> Tensor:
    """(K,) at level t of x_t = (1 - t) x0 + t eps, without weight; eps = 1 for students, -1 for data."""
    draw = make_draw(x0, torch.ones_like(x0), torch.full((len(x0),), t, dtype=torch.float64), condition, data)
    draw.normals["data_eps"] = -torch.ones_like(data)
    return VarFlow(student_of(x0), RectifiedFlowSchedule(), lambda u, p: u, "uniform", 1.0, "full", **options).loss(draw).loss


def test_blocks_are_those_of_the_picture():
    """In reading order; all values of a block, of every channel."""
    x = torch.arange(5 * 2 * 6 * 9).view(5, 2, 6, 9)
    blocks = grid_blocks(x, 3)
    assert blocks.shape == (9, 5, 2 * 2 * 3)
    for i, block in enumerate(blocks):
        row, column = divmod(i, 3)
        picture = x[:, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert torch.equal(block, picture.flatten(1))
    assert torch.equal(grid_blocks(x, 1)[0], x.flatten(1))


@pytest.mark.parametrize("grids", [[1], [3], [1, 3]])
def test_loss_by_hand(grids, make_draw, randn):
    """Each grid's blocks, noised, with the condition's vector scaled to the size of a block, over n; then the mean over grids."""
    x0, data, text, t, scale = randn(5, 2, 6, 9), randn(5, 2, 6, 9), randn(5, 7), 0.3, 0.8
    x, y, said = 0.7 * x0 + 0.3, 0.7 * data - 0.3, scale * spread(nn.functional.normalize(text, dim=1))
    expected = torch.zeros(5, dtype=torch.float64)
    for n in grids:
        for row in range(n):
            for column in range(n):
                cut = (..., slice(row * 6 // n, (row + 1) * 6 // n), slice(column * 9 // n, (column + 1) * 9 // n))
                pair = [torch.cat([v[cut].flatten(1), said * math.sqrt(108 / n**2)], 1) for v in (x, y)]
                expected += energy_loss(*pair, 1.0, "full", same_condition=True) / n / len(grids)
    condition = {"encoder_hidden_states": text[:, None], "text_embeds": text}
    loss = whole_loss(x0, data, make_draw, t, condition, condition_scale=scale, grids=grids)
    assert_close(loss, expected, rtol=1e-6, atol=0)


def test_every_grid_pulls_a_pixel_as_hard(make_draw, randn):
    """All distances to far data are along the same unit vector: its part in one pixel is d^-1/2, in a block n d^-1/2."""
    sizes = []
    for n in (1, 2, 4):
        x0 = 1e-4 * randn(7, 3, 8, 8)
        x0.requires_grad_()
        loss = whole_loss(x0, torch.full((7, 3, 8, 8), 1e4, dtype=torch.float64), make_draw, grids=[n]).mean()
        (gradient,) = torch.autograd.grad(loss, x0)
        sizes.append(gradient.sum(0).abs().mean().item())
    assert sizes == pytest.approx([192**-0.5] * 3, rel=1e-6)


@pytest.mark.parametrize(("grids", "low", "high"), [([1], 0.0, 0.02), ([8], 0.15, 1.0), ([1, 8], 0.07, 0.5)])
@pytest.mark.slow
def test_grids_see_detail_that_the_whole_does_not(grids, low, high, make_draw, generator):
    """Data of variance 1.75 and 0.25 on a chequerboard, students of variance 1 everywhere: same mean, same overall spread.

    The excess over the loss of equal laws, in units of what a wrong scale (standard deviation 1/2) costs.
    """
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    std = torch.where(board == 0, 1.75**0.5, 0.25**0.5).double()
    z, other = torch.randn(2, 1000, 1, 8, 8, generator=generator, dtype=torch.float64)
    right, wrong, small = (float(whole_loss(x, std * other, make_draw, grids=grids).mean()) for x in (std * z, z, std * z / 2))
    assert low < (wrong - right) / (small - right) < high


# Feature maps ----------------------------------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """network(x, time, encoder_hidden_states) with two inner layers, whose maps depend on everything that it is given."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 2, stride=3), nn.Conv2d(4, 2, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor, time: Tensor, encoder_hidden_states: Tensor, **more: Tensor) -> Tensor:
        h = self.first(x + (time + encoder_hidden_states.mean((1, 2)))[:, None, None, None]).tanh()
        self.second(h)
        return self.out(h)


def test_feature_maps_are_what_layers_put_out(generator, randn):
    """As direct calls give them, in the order asked for, with a graph back to x_t; nothing is left hanging on the network."""
    net, x, text = Teacher(generator), randn(5, 2, 6, 9).requires_grad_(), randn(5, 3, 7)
    maps = FeatureMaps(Denoiser(net, RectifiedFlowSchedule(), "flow"), [net.second, net.first])
    level = RectifiedFlowSchedule().level(torch.full((5,), 0.25, dtype=torch.float64))
    second, first = maps(x, level, {"encoder_hidden_states": text})
    expected = net.first(x + (0.25 + text.mean((1, 2)))[:, None, None, None])
    assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert_close(second, net.second(expected.tanh()), rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(second.sum(), x)[0].abs().min() > 0
    assert not net.first._forward_hooks
    assert not net.second._forward_hooks


@pytest.mark.parametrize("sharded", [False, True])
def test_what_comes_after_the_last_map_is_not_run(sharded, generator, randn):
    """But of sharded weights, which all processes gather in the same order, it is."""
    net, x, text = Teacher(generator), randn(5, 2, 6, 9), randn(5, 3, 7)
    net.shared = SimpleNamespace(sharded=sharded)
    ran = []
    for name in ("first", "second", "out"):
        getattr(net, name).register_forward_hook(lambda module, args, out, name=name: ran.append(name))
    level = RectifiedFlowSchedule().level(torch.full((5,), 0.25, dtype=torch.float64))
    denoiser, condition = Denoiser(net, RectifiedFlowSchedule(), "flow"), {"encoder_hidden_states": text}
    (first,) = FeatureMaps(denoiser, [net.first])(x, level, condition)
    assert ran == (["first", "second", "out"] if sharded else ["first"])
    assert_close(first, net.first(x + (0.25 + text.mean((1, 2)))[:, None, None, None]), rtol=1e-12, atol=1e-12)
    ran.clear()
    denoiser(x, level, condition)
    assert ran == ["first", "second", "out"]


def test_unit_channels(randn):
    """Each channel over its own spread in the reference, wherever its mean lies; what does not vary there says nothing."""
    size, mean = (torch.tensor(v).double().view(4, 1, 1) for v in ([1.0, 1e-3, 40.0, 0.0], [0.0, 9.0, 0.0, 2.0]))
    reference, other = randn(11, 4, 3, 5) * size + mean, randn(7, 4, 3, 5)
    about = reference - reference.mean(0)
    assert unit_channels(about, reference).square().mean((0, 2, 3)).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0], rel=1e-9)
    of_one = unit_channels(torch.ones_like(other), reference)
    assert_close(unit_channels(other, reference), other * of_one)
    assert of_one[0, :, 0, 0].tolist() == pytest.approx([1.0, 1e3, 0.025, 0.0], rel=0.2)


@pytest.mark.parametrize("scale", [0.0, 0.8])
def test_loss_of_feature_maps_by_hand(scale, make_draw, randn, generator):
    """Positions of the maps are blocks, over the square root of their number; the mean over the whole and both maps."""
    net, t = Teacher(generator), 0.3
    x0, data, text = randn(5, 2, 6, 9).requires_grad_(), randn(5, 2, 6, 9), randn(5, 3, 7)
    condition = {"encoder_hidden_states": text}
    features = FeatureMaps(Denoiser(net, RectifiedFlowSchedule(), "flow"), [net.first, net.second])
    said = scale * spread(nn.functional.normalize(text.mean(1).float(), dim=1)).double()
    level = RectifiedFlowSchedule().level(torch.full((5,), t, dtype=torch.float64))
    x, y = 0.7 * x0 + 0.3, 0.7 * data - 0.3

    def share(a: Tensor, b: Tensor) -> Tensor:
        pair = [torch.cat([v.flatten(1), said * v[0].numel() ** 0.5], 1) for v in (a, b)]
        return energy_loss(*pair, 1.0, "full", same_condition=True)

    expected = share(x, y)
    for mine, theirs in zip(features(x, level, condition), features(y, level, condition), strict=True):
        mine, theirs = (unit_channels(m, theirs) for m in (mine, theirs))
        height, width = mine.shape[2:]
        for i in range(height):
            for j in range(width):
                expected = expected + share(mine[:, :, i, j], theirs[:, :, i, j]) / math.sqrt(height * width)
    loss = whole_loss(x0, data, make_draw, t, condition, condition_scale=scale, features=features)
    assert_close(loss, expected / 3, rtol=1e-6, atol=1e-9)
    (by_hand,) = torch.autograd.grad(expected.sum() / 3, x0)
    assert_close(torch.autograd.grad(loss.sum(), x0)[0], by_hand, rtol=1e-5, atol=1e-8)
