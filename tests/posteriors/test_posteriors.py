"""Posteriors are normalised densities: the prior at the start, exact samples, gradients that arrive everywhere."""

import math

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pipelines.common.config import validate
from pipelines.common.errors import UserError
from trainers.posteriors import COVARIANCES, Covariance
from trainers.posteriors.section import Posterior

# Samples, latents for each, and an image of different sides that can be halved, and halved once only.
B, K, SHAPE = 5, 7, (3, 4, 6)
SQUARE = (1, 2, 2)  # the smallest image that every covariance takes
# Small options, so that Jacobians of all of them are quick.
OPTIONS = {
    "lowrank": {"rank": 2},
    "flow": {"blocks": 2, "hidden": 4},
    "flow-spline": {"blocks": 2, "hidden": 4, "transform": "spline"},
    "learned-1": {"block": 1},
    "nsf": {"transforms": 2, "hidden": 8, "bins": 4},
    "planar": {"transforms": 3},
}
CASES = [*COVARIANCES, "flow-spline", "learned-1"]
GAUSSIAN = [case for case in CASES if case.split("-")[0] not in ("flow", "nsf", "planar")]

pytestmark = pytest.mark.usefixtures("float64_weights")


def fresh(case: str, shape: tuple[int, int, int] = SHAPE, seed: int = 3) -> Covariance:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return COVARIANCES[case.split("-")[0]](shape, **OPTIONS.get(case, {}))


@pytest.fixture
def make(randn):
    """make(case, shape) -> a covariance with random weights off its start by `std`, and maps of size `scale` for B samples."""

    def build(case: str, shape=SHAPE, batch: int = B, scale: float = 0.5, std: float = 0.2) -> tuple[Covariance, Tensor]:
        covariance = fresh(case, shape)
        with torch.no_grad():
            for parameter in covariance.parameters():
                parameter.add_(std * randn(*parameter.shape))
        return covariance, scale * randn(batch, covariance.num_maps, *shape[1:])

    return build


def log_prior(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(2).sum(-1)


def whitened(covariance: Covariance, maps: Tensor, z: Tensor) -> Tensor:
    """The normal numbers (b, k, d) that z is made of."""
    y = z.flatten(2)
    for f in covariance(maps).maps:
        y, _ = f(y)
    return y


# What the Gaussians are, written out ------------------------------------------------------------------------------------


def dct_of(shape: tuple[int, int, int]) -> Tensor:
    """Its matrix (d, d), by scipy: row f holds frequency f of every unit image."""
    units = np.eye(math.prod(shape)).reshape(-1, *shape)
    return torch.from_numpy(scipy.fft.dctn(units, axes=(2, 3), norm="ortho").reshape(len(units), -1).T.copy())


def haar_rows(shape: tuple[int, int, int]) -> list[tuple[Tensor, int, int]]:
    """(row of the matrix (d,), map of its log std, pixels along a side of its support), by the values of the wavelets."""
    (c, h, w), rows, levels = shape, [], 0
    while h % 2 ** (levels + 1) == w % 2 ** (levels + 1) == 0:
        levels += 1

    def wavelets(level: int, signs: list[tuple[int, int]], first_map: int):
        side = 2**level
        for channel in range(c):
            for j, (vertical, horizontal) in enumerate(signs):
                for top in range(0, h, side):
                    for left in range(0, w, side):
                        row = torch.zeros(c, h, w)
                        for i in range(side):
                            for k in range(side):
                                sign = vertical ** (i >= side / 2) * horizontal ** (k >= side / 2)
                                row[channel, top + i, left + k] = sign / side
                        rows.append((row.flatten(), first_map + channel * len(signs) + j, side))

    for level in range(1, levels + 1):
        wavelets(level, [(1, -1), (-1, 1), (-1, -1)], c + 3 * c * (level - 1))
    wavelets(levels, [(1, 1)], c + 3 * c * levels)
    return rows


def conv_of(conv: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    """The matrix (d, d) of P L U at each block, entry by entry; output channels first, then the blocks."""
    (c, h, w), p, factors = shape, conv.block, conv.factors.detach()
    size, matrix = c * p**2, torch.zeros(math.prod(shape), math.prod(shape))
    lower, upper = torch.eye(size), torch.zeros(size, size)
    for i in range(size):
        lower[i, :i], upper[i, i + 1 :] = factors[i, :i], factors[i, i + 1 :]
        upper[i, i] = conv.sign[i] * math.exp(factors[i, i])
    small = (lower @ upper)[conv.order]
    index = torch.arange(len(matrix)).reshape(c, h, w)
    for row in range(h // p):
        for column in range(w // p):
            pixels = index[:, row * p : (row + 1) * p, column * p : (column + 1) * p].flatten()
            outputs = torch.arange(size) * (h // p) * (w // p) + row * (w // p) + column
            matrix[outputs[:, None], pixels] = small
    return matrix


def diagonal_in(basis: Tensor, log_std: Tensor) -> Tensor:
    """Covariance of z where basis @ z has independent coordinates."""
    inverse = torch.linalg.inv(basis)
    return inverse @ torch.diag((2 * log_std).exp()) @ inverse.T


def specified(covariance: Covariance, maps: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (d,), covariance matrix (d, d)) of one sample's maps (num_maps, h, w), from the definition."""
    name = next(n for n, kind in COVARIANCES.items() if type(covariance) is kind)
    c, h, w = shape = covariance.shape
    d = math.prod(shape)
    mean, rest = maps[:c].flatten(), maps[c:]
    if name == "diag":
        return mean, torch.diag((20 * torch.tanh(rest / 10)).exp().flatten())
    if name == "haar":
        supports = [((row != 0).reshape(shape).any(0), maps[m], side**2) for row, m, side in haar_rows(shape)]
        log_std = torch.stack([(m * inside).sum() / size for inside, m, size in supports])
        return mean, diagonal_in(torch.stack([row for row, _, _ in haar_rows(shape)]), log_std)
    if name == "dct":
        log_std = covariance.head.weight @ rest.mean((1, 2)) + covariance.head.bias
        return mean, diagonal_in(dct_of(shape), log_std.detach())
    if name == "learned":
        p, weight = covariance.conv.block, covariance.head.weight.detach()
        blocks = rest.reshape(-1, h // p, p, w // p, p)
        log_std = torch.einsum("oipq,ihpwq->ohw", weight, blocks) + covariance.head.bias.detach()[:, None, None]
        return mean, diagonal_in(conv_of(covariance.conv, shape), log_std.flatten())
    if name == "lowrank":
        r, s = len(covariance.template), (rest[:c]).exp().flatten()
        raw = covariance.template.detach() + rest[c : c + r * c].reshape(r, d)
        v = torch.linalg.qr(raw.T).Q  # the same directions up to sign
        a = (covariance.head.weight @ rest[c + r * c :].mean((1, 2)) + covariance.head.bias).detach()
        stretch = torch.eye(d) + v @ torch.diag((-2 * a).exp() - 1) @ v.T
        return mean, s[:, None] * stretch * s
    if name == "linear":
        inverse = torch.linalg.inv(covariance.matrix.detach())
        return inverse @ mean, inverse @ torch.diag((2 * rest).exp().flatten()) @ inverse.T
    assert name == "full"
    numbers = (covariance.head.weight @ maps.flatten() + covariance.head.bias).detach()
    lower, entries = torch.diag(numbers[d : 2 * d].exp()), iter(numbers[2 * d :])
    for i in range(d):
        for j in range(i):
            lower[i, j] = next(entries)
    return numbers[:d], torch.linalg.inv(lower @ lower.T)


# Laws of them all -------------------------------------------------------------------------------------------------------


def test_every_covariance_is_tried():
    assert list(COVARIANCES) == ["diag", "haar", "dct", "learned", "lowrank", "flow", "linear", "full", "nsf", "planar"]


def test_maps():
    maps = {case: fresh(case).num_maps for case in COVARIANCES}
    expected = {"diag": 2 * 3, "haar": 3 + (3 + 1) * 3, "dct": 3 + 8, "learned": 3 + 8, "lowrank": 3 + 3 + 2 * 3 + 8}
    assert maps == expected | {"flow": 2 * 3 + 8, "linear": 2 * 3, "full": 8, "nsf": 2 * 3 + 16, "planar": 2 * 3}
    assert fresh("haar", (5, 8, 24)).num_maps == 5 * (1 + 3 * 3 + 1)


@pytest.mark.parametrize("case", CASES)
def test_starts_as_the_prior(case, randn):
    """At maps 0 z is a rotation of its noise, which is N(0, I) again."""
    covariance, z = fresh(case), randn(B, K, *SHAPE)
    density = covariance(torch.zeros(B, covariance.num_maps, *SHAPE[1:]))
    assert_close(density.log_prob(z), log_prior(z), rtol=1e-12, atol=1e-12)
    sample, log_q = density.sample(z)
    assert_close(log_q, log_prior(z), rtol=1e-12, atol=1e-12)
    sample, noise = sample.flatten(2), z.flatten(2)
    assert_close(sample @ sample.mT, noise @ noise.mT, rtol=1e-12, atol=1e-12)
    if case in ("diag", "lowrank", "linear", "full"):
        assert_close(sample, noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [SHAPE, (1, 8, 8), (2, 6, 10), (3, 16, 16)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_samples_know_their_density(case, shape, make, randn):
    """Forward and back: log q of a sample, and the noise it was made of."""
    if math.prod(shape) > getattr(COVARIANCES[case.split("-")[0]], "MAX_DIM", math.inf):
        pytest.skip("refused, as another test checks")
    # Matrices of so many dimensions that are further from orthogonal lose the digits that are compared here.
    covariance, maps = make(case, shape, batch=2, scale=0.05 if case == "full" else 0.5, std=0.05)
    density, noise = covariance(maps), randn(2, 3, *shape)
    z, log_q = density.sample(noise)
    assert (z.shape, log_q.shape) == (noise.shape, (2, 3))
    assert (z - noise).abs().max() > 0.1
    assert_close(density.log_prob(z), log_q, rtol=1e-10, atol=1e-10)
    assert_close(whitened(covariance, maps, z), noise.flatten(2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", GAUSSIAN)
def test_density_against_torch(case, make, randn):
    covariance, maps = make(case, scale=0.1)
    z = 2 * randn(B, K, *SHAPE)
    log_q = covariance(maps).log_prob(z)
    assert log_q.shape == (B, K)
    for i in range(B):
        expected = MultivariateNormal(*specified(covariance, maps[i])).log_prob(z[i].flatten(1))
        assert_close(log_q[i], expected, rtol=1e-8, atol=1e-8)


def test_a_diagonal_is_never_infinitely_narrow():
    """Maps of -60 would be standard deviations of 1e-26, whose density overflows: it is large and finite, and has a gradient."""
    covariance, maps = COVARIANCES["diag"]((2, 1, 1)).float(), torch.tensor([0.0, 0.0, -60.0, 60.0]).view(1, 4, 1, 1)
    maps.requires_grad_()
    log_q = covariance(maps).log_prob(torch.ones(1, 1, 2, 1, 1))
    assert -1e9 < log_q.item() < -1e8
    (gradient,) = torch.autograd.grad(log_q.sum(), maps)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("case", GAUSSIAN)
def test_moments_of_samples(case, make, randn):
    """Noise at +-sqrt(d) along a random basis has mean 0 and covariance I exactly; samples are linear in it."""
    covariance, maps = make(case, scale=0.1)
    d = covariance.dim
    basis = math.sqrt(d) * torch.linalg.qr(randn(d, d)).Q
    z, _ = covariance(maps).sample(torch.cat([basis, -basis]).unflatten(1, SHAPE).expand(B, -1, -1, -1, -1))
    for i in range(B):
        mean, cov = specified(covariance, maps[i])
        points = z[i].flatten(1)
        assert_close(points.mean(0), mean, rtol=1e-8, atol=1e-8)
        assert_close((points - mean).T @ (points - mean) / (2 * d), cov, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_log_determinant(case, make, randn):
    """log q = log N(noise) + log |det dnoise/dz|, the Jacobian by automatic differentiation, of both directions."""
    covariance, maps = make(case, batch=1, scale=0.3)
    density, noise, d = covariance(maps), randn(1, 1, *SHAPE), covariance.dim
    z, log_q = (v.detach() for v in density.sample(noise))
    forward = torch.autograd.functional.jacobian(lambda z: whitened(covariance, maps, z), z).reshape(d, d)
    backward = torch.autograd.functional.jacobian(lambda n: density.sample(n)[0], noise).reshape(d, d)
    # not 1e-9: the Jacobian of "full", a triangle of random numbers, has the condition number 1e10
    assert log_q.item() == pytest.approx((log_prior(noise) + torch.linalg.slogdet(forward).logabsdet).item(), rel=1e-8)
    assert log_q.item() == pytest.approx((log_prior(noise) - torch.linalg.slogdet(backward).logabsdet).item(), rel=1e-8)


@pytest.mark.parametrize("case", [c for c in CASES if c != "haar"])
@pytest.mark.slow
def test_integrates_to_one(case, make):
    """The sum over a grid of +-20 on images of two pixels: one column of two channels."""
    covariance, maps = make(case, shape=(2, 1, 1), batch=3, scale=0.4)
    step = 0.08
    line = torch.arange(-20, 20, step)
    grid = torch.cartesian_prod(line, line).reshape(1, -1, 2, 1, 1)
    with torch.no_grad():
        mass = torch.cat([covariance(m[None]).log_prob(grid).exp().sum(1) for m in maps]) * step**2
    assert_close(mass, torch.ones(3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_mean_of_importance_weights_is_one(case, make, randn):
    """E[q/p] over p = N(0, s^2 I) with fixed numbers, within four standard errors; s is wide enough for a finite variance."""
    covariance, maps = make(case, shape=SQUARE, batch=3, scale=0.2, std=0.1)
    with torch.no_grad():
        noise, s = randn(3, 40_000, *SQUARE), 1.8
        log_p = log_prior(noise) - covariance.dim * math.log(s)
        ratio = (covariance(maps).log_prob(s * noise) - log_p).exp()
    error = ratio.std(1) / math.sqrt(ratio.shape[1])
    assert error.max() < 0.02
    assert ((ratio.mean(1) - 1).abs() / error).max() < 4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_gradients(case, make, randn):
    """Of densities in z and of samples in their noise, and of both in the maps and the weights, against finite differences."""
    covariance, maps = make(case, shape=SQUARE, batch=2)
    z, weights = randn(2, 3, *SQUARE).requires_grad_(), list(covariance.parameters())
    maps.requires_grad_()
    fast = len(weights) > 4  # a random projection of the Jacobian where it is large
    check = torch.autograd.gradcheck
    assert check(lambda m, z, *w: covariance(m).log_prob(z), (maps, z, *weights), atol=1e-6, fast_mode=fast)
    assert check(lambda m, n, *w: covariance(m).sample(n), (maps, z, *weights), atol=1e-6, fast_mode=fast)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_each_sample_has_its_own_density(case, make, randn):
    covariance, maps = make(case)
    z = randn(B, K, *SHAPE)
    whole, samples = covariance(maps).log_prob(z), covariance(maps).sample(z)[0]
    for i in range(B):
        alone = covariance(maps[i : i + 1])
        assert_close(alone.log_prob(z[i : i + 1]), whole[i : i + 1], rtol=1e-10, atol=1e-10)
        assert_close(alone.sample(z[i : i + 1])[0], samples[i : i + 1], rtol=1e-10, atol=1e-10)
        for k in range(K):
            assert_close(alone.log_prob(z[i : i + 1, k : k + 1]), whole[i : i + 1, k : k + 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_never_in_half_precision(case, make, randn):
    """Density is exponentiated into importance weights: a network may run in half precision, what is made of its maps may not."""
    covariance, maps = make(case, scale=0.1)
    covariance, maps, z = covariance.float(), maps.to(torch.bfloat16), randn(B, K, *SHAPE).float()
    density = covariance(maps.float())
    exact = (density.log_prob(z), *density.sample(z))
    with torch.autocast("cpu", torch.bfloat16):
        density = covariance(maps)
        given = (density.log_prob(z), *density.sample(z))
    assert {v.dtype for v in given} == {torch.float32}
    for a, b in zip(given, exact, strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_directions_that_vanish_are_not_finite(make, randn):
    """The loop stops at such a loss and says where; an exception or wrong numbers would say less."""
    covariance, maps = make("lowrank")
    maps[0, 6:12] = -covariance.template.detach().reshape(6, *SHAPE[1:])
    log_q = covariance(maps).log_prob(randn(B, K, *SHAPE))
    assert log_q[0].isnan().all()
    assert log_q[1:].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_converts_to_channels_last(case):
    """As the training loop converts networks, which refuses parameters of five dimensions."""
    fresh(case).to(memory_format=torch.channels_last)


# Bases ------------------------------------------------------------------------------------------------------------------


def coefficients(case: str, image: Tensor) -> Tensor:
    """(d,) of an image (c, h, w), in the basis of a fresh covariance."""
    covariance = fresh(case, tuple(image.shape))
    maps = torch.zeros(1, covariance.num_maps, *image.shape[1:])
    return whitened(covariance, maps, image[None, None]).flatten().detach()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6), (2, 5, 7)], ids=str)
def test_dct_is_scipys(shape, randn):
    image = randn(*shape)
    expected = scipy.fft.dctn(image.numpy(), axes=(1, 2), norm="ortho")
    assert_close(coefficients("dct", image), torch.from_numpy(expected).flatten(), rtol=1e-12, atol=1e-12)


def test_dct_keeps_float32(randn):
    """A cosine of large angles would not: 1e-5 at 64 pixels."""
    image = randn(1, 64, 64).float()
    covariance = fresh("dct", (1, 64, 64)).float()
    maps = torch.zeros(1, covariance.num_maps, 64, 64, dtype=torch.float32)
    z, _ = covariance(maps).sample(whitened(covariance, maps, image[None, None]).unflatten(2, (1, 64, 64)))
    assert_close(z[0, 0], image, rtol=0, atol=4e-6)


def test_haar_values():
    p, q, r, s = 3.0, 5.0, 7.0, 13.0
    expected = torch.tensor([p - q + r - s, p + q - r - s, p - q - r + s, p + q + r + s]) / 2
    assert_close(coefficients("haar", torch.tensor([[[p, q], [r, s]]])), expected, rtol=1e-14, atol=1e-14)
    flat = coefficients("haar", torch.ones(1, 8, 8))  # a constant image is its last low-pass
    assert_close(flat, torch.tensor([0.0] * 63 + [8.0]), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("case", ["haar", "dct", "learned"])
def test_orthonormal(case):
    """Coefficients of the unit images; `learned` starts as the DCT of blocks."""
    units = torch.eye(math.prod(SHAPE)).unflatten(1, SHAPE)
    basis = torch.stack([coefficients(case, image) for image in units])
    assert_close(basis @ basis.T, torch.eye(len(units)), rtol=1e-12, atol=1e-12)


def test_learned_starts_as_the_dct_of_blocks(randn):
    """Frequencies first, then channels, then blocks."""
    image = randn(3, 8, 12)
    blocks = image.reshape(3, 2, 4, 3, 4).permute(1, 3, 0, 2, 4)
    expected = scipy.fft.dctn(blocks.numpy(), axes=(3, 4), norm="ortho").transpose(3, 4, 2, 0, 1)
    assert_close(coefficients("learned", image), torch.from_numpy(expected.copy()).flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "block"), [((1, 8, 12), 4), ((3, 4, 6), 2), ((2, 5, 7), 1)])
def test_default_block(shape, block):
    assert fresh("learned", shape).conv.block == block


# Options ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("full", (1, 1, 257), {}, r"'full' has 257 dimensions and needs 33153 numbers.*at most 256\. Use 'lowrank' or 'learned'"),
        ("linear", (1, 25, 41), {}, r"'linear' has 1025 dimensions.* 1050625 weights.*at most 1024\. Use 'learned'"),
        (
            "haar",
            (3, 4, 5),
            {},
            r"'haar' halves both sides.* 4x5 has an odd one; use images with even sides, or covariance 'dct'",
        ),
        ("flow", (1, 4, 5), {}, r"'flow' couples halves .* 4x5 images of one channel.*even sides, or covariance 'dct'"),
        ("learned", SHAPE, {"block": 4}, r"posterior\.block: 4, expected a divisor of both sides of 4x6 images; remove it"),
        ("lowrank", SQUARE, {"rank": 5}, r"posterior\.rank: 5, expected at most c h w = 4.*Set objective\.posterior\.rank=4"),
    ],
)
def test_refuses_what_does_not_fit(name, shape, options, message):
    with pytest.raises(ValueError, match=message):
        COVARIANCES[name](shape, **options)


def test_at_the_limits():
    COVARIANCES["linear"]((1, 32, 32))
    COVARIANCES["full"]((1, 16, 16))
    COVARIANCES["lowrank"](SQUARE, rank=4)


def options_of(**given) -> dict:
    return validate(Posterior, {"optimizer": {"lr": 1e-3}} | given, "test").covariance_options()


def test_configured_options():
    assert options_of(covariance="diag") == options_of() == {}
    assert options_of(covariance="lowrank", rank=3) == {"rank": 3}
    assert options_of(covariance="learned") == {"block": None}
    assert options_of(covariance="learned", block=2) == {"block": 2}
    spline = {"blocks": 2, "transform": "spline", "hidden": 32}
    assert options_of(covariance="flow", flow={"blocks": 2, "transform": "spline"}) == spline
    for name in COVARIANCES:
        COVARIANCES[name]((1, 4, 4), **options_of(covariance=name))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"covariance": "diag", "rank": 3}, r"rank has no effect with covariance='diag'; remove it \(it is for lowrank\)"),
        ({"covariance": "flow", "block": 2}, r"block has no effect with covariance='flow'; remove it \(it is for learned\)"),
        ({"flow": {"blocks": 2}}, r"flow has no effect with covariance='linear'; remove it \(it is for flow\)"),
        ({"covariance": "flow", "flow": {"block": 2}}, r"unknown key 'flow\.block'; did you mean 'blocks'\?"),
        ({"covariance": "flow", "flow": {"transform": "linear"}}, r"flow\.transform: .*'affine' or 'spline'"),
        ({"covariance": "lowrank", "rank": 0}, r"rank: .*greater than 0"),
        ({"covariance": "diagonal"}, r"covariance: .*'diag'"),
    ],
)
def test_faulty_options(given, message):
    with pytest.raises(UserError, match=message):
        options_of(**given)
