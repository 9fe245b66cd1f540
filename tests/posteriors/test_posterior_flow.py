"""The parts of the flow: elementwise transforms, couplings, scales, and the convolutions between them."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from trainers.posteriors.flow import TRANSFORMS, Affine, Coupling, Flow, Spline
from trainers.posteriors.invertible_conv import InvertibleConv, block_dct, pivoted_lu

pytestmark = pytest.mark.usefixtures("float64_weights")

SHAPE = (3, 4, 6)


@pytest.fixture
def fresh(generator):
    """fresh(kind, ...) -> a module with the weights it starts with, from the test's own generator."""

    def build(kind: type[nn.Module], *args, **options) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(1000, (), generator=generator)))
            return kind(*args, **options)

    return build


# Elementwise transforms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_identity_at_zero(name, randn):
    x = 3 * randn(11, 13)
    transform = TRANSFORMS[name](torch.zeros(11, 13, TRANSFORMS[name].PARAMETERS))
    for y, log_slope in (transform(x), transform.inverse(x)):
        assert_close(y, x, rtol=1e-14, atol=1e-14)
        assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_slopes_and_inverses(name, randn):
    """dy/dx by automatic differentiation; the inverse gives x and the slope there."""
    x = (3 * randn(11, 13)).requires_grad_()
    transform = TRANSFORMS[name](2 * randn(11, 13, TRANSFORMS[name].PARAMETERS))
    y, log_slope = transform(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.min() > 0
    assert_close(log_slope, slope.log(), rtol=1e-9, atol=1e-9)
    for again, expected in zip(transform.inverse(y), (x, log_slope), strict=True):
        assert_close(again, expected, rtol=1e-8, atol=1e-8)
    assert (y - x).abs().mean() > 0.1


def test_affine_by_hand():
    y, log_slope = Affine(torch.tensor([[0.5, 2 * math.atanh(0.25)], [0.0, 1e6], [0.0, -1e6]]))(torch.tensor([3.0, 1.0, 1.0]))
    assert_close(y, torch.tensor([3 * math.exp(0.5) + 0.5, math.exp(2), math.exp(-2)]))
    assert_close(log_slope, torch.tensor([0.5, 2.0, -2.0]))


def test_spline_is_the_identity_outside(randn):
    x = torch.tensor([-50.0, -5.001, 5.001, 50.0])
    y, log_slope = Spline(3 * randn(4, Spline.PARAMETERS))(x)
    assert_close(y, x, rtol=0, atol=0)
    assert not log_slope.any()


def test_extreme_splines_invert_in_float32(randn):
    x = torch.linspace(-5.5, 5.5, 201, dtype=torch.float32)
    spline = Spline((1000 * randn(50, 1, Spline.PARAMETERS)).float().expand(-1, 201, -1))
    y, log_slope = spline(x.expand(50, -1))
    again, _ = spline.inverse(y)
    assert again.isfinite().all()
    # Rounding of y, seen through the slope.
    assert ((again - x).abs() * log_slope.exp().clamp(max=1)).max() < 1e-4


# Couplings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_passive", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_couplings(transform, first_passive, fresh, randn, randomise):
    """A half passes; the other depends on it and on the features of its own sample."""
    coupling = randomise(fresh(Coupling, 5, first_passive, transform, 4), std=0.3)
    x, features = randn(2, 3, 5, 4, 6), randn(2, Coupling.FEATURES, 4, 6)
    passes, changes = (slice(0, 2), slice(2, 5)) if first_passive else (slice(2, 5), slice(0, 2))
    y, log_det = coupling(x, features)
    assert_close(y[:, :, passes], x[:, :, passes], rtol=0, atol=0)
    assert (y[:, :, changes] - x[:, :, changes]).abs().mean() > 0.01
    again, same = coupling.inverse(y, features)
    assert_close(again, x, rtol=1e-10, atol=1e-10)
    assert_close(same, log_det, rtol=1e-10, atol=1e-10)

    other = features.clone()
    other[1] += randn(Coupling.FEATURES, 4, 6)
    moved, _ = coupling(x, other)
    assert_close(moved[0], y[0], rtol=0, atol=0)
    assert (moved[1] - y[1])[:, changes].abs().amax((1, 2, 3)).min() > 1e-3  # of all latents of that sample


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_fresh_flow_ignores_its_features(transform, fresh, randn):
    """But not the means and deviations before it: untrained it is a diagonal Gaussian, seen in rotated coordinates."""
    flow = fresh(Flow, SHAPE, transform=transform)
    maps, z = 0.3 * randn(2, flow.num_maps, *SHAPE[1:]), randn(2, 5, *SHAPE)
    mean, log_std = maps[:, None, :3], maps[:, None, 3:6]
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(z).sum((2, 3, 4))
    assert_close(flow(maps).log_prob(z), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_density_depends_on_features(transform, fresh, randn, randomise):
    flow = randomise(fresh(Flow, SHAPE, transform=transform, hidden=4))
    maps, z = 0.3 * randn(2, flow.num_maps, *SHAPE[1:]), randn(2, 5, *SHAPE)
    before = flow(maps).log_prob(z)
    maps[1, 6:] += randn(Coupling.FEATURES, *SHAPE[1:])
    after = flow(maps).log_prob(z)
    assert_close(after[0], before[0], rtol=1e-12, atol=1e-12)
    assert (after[1] - before[1]).abs().min() > 1e-3
    maps[:, 6:, ::2, ::2] += 1.0  # what averages to nothing over a place of the scale is not seen
    maps[:, 6:, 1::2, 1::2] -= 1.0
    assert_close(flow(maps).log_prob(z), after, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 8, 8), [(4, 4, 4), (8, 2, 2), (16, 1, 1)]),
        ((3, 16, 16), [(12, 8, 8), (24, 4, 4), (48, 2, 2)]),
        ((3, 4, 6), [(12, 2, 3)]),
        ((2, 6, 10), [(8, 3, 5)]),
        ((2, 5, 7), [(2, 5, 7)]),
        ((3, 4, 7), [(3, 4, 7)]),
    ],
)
def test_scales(shape, expected, fresh, randn):
    """Half of the channels goes on to the next scale, and odd sides stay as they are."""
    flow = fresh(Flow, shape, blocks=3, hidden=4)
    assert flow.out_shapes == expected
    assert [len(steps) for steps in flow.scales] == [3] * len(expected)
    assert [[step.coupling.first_passive for step in steps] for steps in flow.scales] == [[True, False, True]] * len(expected)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * randn(*parameter.shape))
    density, noise = flow(randn(2, flow.num_maps, *shape[1:])), randn(2, 3, *shape)
    z, log_q = density.sample(noise)
    assert_close(density.log_prob(z), log_q, rtol=1e-10, atol=1e-10)


# Convolutions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "block"), [(5, 1), (3, 2), (1, 4), (2, 3)])
def test_invertible_convolution(channels, block, fresh, randn):
    """It starts orthogonal; its log |det| is that of its Jacobian; the inverse is one, and gives the same log |det|."""
    conv, x = fresh(InvertibleConv, channels, block), randn(channels, 2 * block, 3 * block)

    def jacobian() -> torch.Tensor:
        return torch.autograd.functional.jacobian(lambda x: conv(x)[0], x).reshape(x.numel(), x.numel())

    assert_close(jacobian() @ jacobian().T, torch.eye(x.numel()), rtol=1e-12, atol=1e-12)
    assert conv(x)[1].abs() < 1e-12
    with torch.no_grad():
        conv.factors.add_(0.2 * randn(*conv.factors.shape))
    y, log_det = conv(x)
    assert y.shape == (channels * block**2, 2, 3)
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian()).logabsdet.item(), abs=1e-9)
    assert abs(log_det.item()) > 0.1
    back, same = conv.inverse(y)
    assert_close(back, x, rtol=1e-10, atol=1e-10)
    assert_close(same, log_det, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 8])
def test_permutation_does_not_hang_on_rounding(block, randn):
    """It is not in a checkpoint: a machine whose cosines end in other digits has to find it again."""
    matrix = torch.kron(block_dct(block), torch.eye(2))
    order, lower, upper = pivoted_lu(matrix)
    assert_close((lower @ upper)[order], matrix, rtol=0, atol=1e-14)
    assert_close(lower, lower.tril(-1) + torch.eye(len(matrix)), rtol=0, atol=0)
    assert_close(upper, upper.triu(), rtol=0, atol=0)
    assert lower.abs().max() < 1 + 1e-3  # pivots are the largest there are, or as good as
    for _ in range(20):
        assert pivoted_lu(matrix + 1e-14 * randn(*matrix.shape))[0].equal(order)
