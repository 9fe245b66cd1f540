"""Posteriors are normalised densities: the prior at the start, exact samples, gradients that arrive everywhere."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pipelines.edm import EDMUNet
from pipelines.noise import EDMSchedule, RectifiedFlowSchedule
from trainers.posteriors import Diagonal, Full, LearnedLinear, UNetPosterior
from trainers.posteriors.gaussian import COVARIANCES

B, K, DIM = 3, 7, 5


@pytest.fixture
def make(randn):
    """make(name, dim) -> a covariance with random weights, and random outputs for B samples."""

    def build(name: str, dim: int = DIM, batch: int = B, scale: float = 0.5) -> tuple[nn.Module, Tensor]:
        covariance = COVARIANCES[name](dim).double()
        with torch.no_grad():
            for parameter in covariance.parameters():
                parameter.add_(0.3 * randn(*parameter.shape))
        return covariance, scale * randn(batch, covariance.num_outputs)

    return build


def specified(covariance: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, covariance matrix) of one sample's output, written out entry by entry."""
    mean, rest = output[: (d := len(output) // 2 if not isinstance(covariance, Full) else covariance.dim)], output[d:]
    if isinstance(covariance, Full):
        lower, entries = torch.diag(rest[:d].exp()), iter(rest[d:])
        for i in range(d):
            for j in range(i):
                lower[i, j] = next(entries)
        return mean, torch.linalg.inv(lower @ lower.T)
    variance = torch.diag((2 * rest).exp())
    if isinstance(covariance, Diagonal):
        return mean, variance
    inverse = torch.linalg.inv(covariance.matrix.detach())
    return inverse @ mean, inverse @ variance @ inverse.T


def test_every_covariance_is_tried():
    assert COVARIANCES == {"diagonal": Diagonal, "linear": LearnedLinear, "full": Full}


def test_numbers_per_sample():
    assert [COVARIANCES[name](DIM).num_outputs for name in COVARIANCES] == [10, 10, 5 + 15]


@pytest.mark.parametrize("name", COVARIANCES)
def test_starts_as_the_prior(name, randn):
    covariance, z = COVARIANCES[name](DIM).double(), randn(B, K, DIM)
    density = covariance(torch.zeros(B, covariance.num_outputs, dtype=torch.float64))
    prior = -0.5 * (z.square().sum(-1) + DIM * math.log(2 * math.pi))
    assert_close(density.log_prob(z), prior, rtol=1e-12, atol=1e-12)
    sample, log_q = density.sample(z)
    assert_close(sample, z, rtol=1e-12, atol=1e-12)
    assert_close(log_q, prior, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", COVARIANCES)
def test_density_against_torch(name, make, randn):
    covariance, output = make(name)
    z = 2 * randn(B, K, DIM)
    log_q = covariance(output).log_prob(z)
    assert log_q.shape == (B, K)
    for i in range(B):
        expected = MultivariateNormal(*specified(covariance, output[i])).log_prob(z[i])
        assert_close(log_q[i], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", COVARIANCES)
def test_integrates_to_one(name, make):
    """The sum over a grid of +-20 in two dimensions; spectral accuracy, as the density is smooth and gone at the rim."""
    covariance, output = make(name, dim=2)
    step = 0.08
    line = torch.arange(-20, 20, step, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line).expand(B, -1, -1)
    for i in range(B):
        mean, cov = specified(covariance, output[i])
        narrowest, widest = torch.linalg.eigvalsh(cov).sqrt().tolist()
        assert narrowest > 1.5 * step  # so that the grid resolves it
        assert float(mean.abs().max()) + 5 * widest < 20  # and holds it
    mass = covariance(output).log_prob(grid).exp().sum(1) * step**2
    assert_close(mass, torch.ones(B, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", COVARIANCES)
def test_samples_know_their_density(name, make, randn):
    covariance, output = make(name)
    density = covariance(output)
    z, log_q = density.sample(randn(B, K, DIM))
    assert z.shape == (B, K, DIM)
    assert log_q.shape == (B, K)
    assert_close(density.log_prob(z), log_q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", COVARIANCES)
def test_moments_of_samples(name, make, randn):
    """Noise at +-sqrt(d) along a random basis has mean 0 and covariance I exactly; samples are linear in it."""
    covariance, output = make(name)
    basis = math.sqrt(DIM) * torch.linalg.qr(randn(DIM, DIM)).Q
    z, _ = covariance(output).sample(torch.cat([basis, -basis]).expand(B, -1, -1))
    for i in range(B):
        mean, cov = specified(covariance, output[i])
        assert_close(z[i].mean(0), mean, rtol=1e-9, atol=1e-9)
        assert_close((z[i] - mean).T @ (z[i] - mean) / (2 * DIM), cov, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", COVARIANCES)
def test_log_determinant(name, make, randn):
    """log q(z(noise)) = log N(noise) - log |det dz/dnoise|, the Jacobian by automatic differentiation."""
    covariance, output = make(name, batch=1)
    density, noise = covariance(output), randn(1, 1, DIM)
    jacobian = torch.autograd.functional.jacobian(lambda n: density.sample(n)[0], noise).reshape(DIM, DIM)
    expected = -0.5 * (noise.square().sum() + DIM * math.log(2 * math.pi)) - torch.linalg.slogdet(jacobian).logabsdet
    assert density.sample(noise)[1].item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("name", COVARIANCES)
def test_gradients(name, make, randn):
    """Of densities in z and of samples in their noise, and of both in the network's output and the shared weights."""
    covariance, output = make(name, dim=3, batch=2)
    z, weights = randn(2, 2, 3).requires_grad_(), list(covariance.parameters())
    output.requires_grad_()
    assert torch.autograd.gradcheck(lambda o, z, *w: covariance(o).log_prob(z), (output, z, *weights), atol=1e-6)
    assert torch.autograd.gradcheck(lambda o, n, *w: covariance(o).sample(n), (output, z, *weights), atol=1e-6)
    assert (len(weights) == 1) == (name == "linear")


@pytest.mark.parametrize("name", COVARIANCES)
def test_each_sample_has_its_own_density(name, make, randn):
    covariance, output = make(name)
    z = randn(B, K, DIM)
    whole = covariance(output).log_prob(z)
    for i in range(B):
        assert_close(covariance(output[i : i + 1]).log_prob(z[i : i + 1]), whole[i : i + 1], rtol=1e-12, atol=1e-12)


def test_full_refuses_many_dimensions():
    Full(256)
    message = r"covariance='full' has 257 dimensions and needs 33153 numbers.*at most 256\. Use 'linear' or 'diagonal'"
    with pytest.raises(ValueError, match=message):
        Full(257)


# Over a U-Net ------------------------------------------------------------------------------------------------------------

SIGMA_DATA = 0.7
CHANNELS, SIDE = 2, 4
KB, KK = 3, 5  # samples and latents for each


def build(name: str, calibrated: bool = False, **config) -> UNetPosterior:
    network = {"sample_size": SIDE, "in_channels": CHANNELS, "channels": 8, "num_blocks": 1}
    network |= {"out_channels": UNetPosterior.num_channels(CHANNELS, name, calibrated), "num_classes": 3, "norm_groups": 2}
    return UNetPosterior(EDMUNet(**network | config), name, SIGMA_DATA, calibrated)


@pytest.fixture
def inputs(randn):
    level = RectifiedFlowSchedule().level(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    x_t, z, noise = randn(KB, CHANNELS, SIDE, SIDE), randn(KB, 1, CHANNELS, SIDE, SIDE), randn(KB, KK, CHANNELS, SIDE, SIDE)
    return x_t, level, {"class_labels": torch.tensor([0, 2, 1])}, z, noise


@pytest.mark.parametrize("name", COVARIANCES)
def test_untrained_posterior_is_the_prior(name, inputs):
    x_t, level, condition, z, noise = inputs
    out = build(name).double()(x_t, level, condition, z=z, noise=noise)
    dim = CHANNELS * SIDE**2
    for v, log_q in ((z, out.log_q), (noise, out.log_q_z)):
        prior = -0.5 * (v.flatten(2).square().sum(-1) + dim * math.log(2 * math.pi))
        assert_close(log_q, prior, rtol=1e-12, atol=1e-12)
    assert_close(out.z, noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", COVARIANCES)
def test_posterior_shapes_and_consistency(name, inputs, randomise):
    """(b, k) for k latents, samples shaped as latents; a sample scored again has the density it came with."""
    x_t, level, condition, z, noise = inputs
    posterior = randomise(build(name), std=0.15)
    out = posterior(x_t, level, condition, z=z, noise=noise)
    assert (out.log_q.shape, out.z.shape, out.log_q_z.shape) == ((KB, 1), noise.shape, (KB, KK))
    again = posterior(x_t, level, condition, z=out.z)
    assert again.z is None
    assert again.log_q_z is None
    assert_close(again.log_q, out.log_q_z, rtol=1e-8, atol=1e-8)
    only = posterior(x_t, level, condition, noise=noise)
    assert only.log_q is None
    assert_close(only.z, out.z, rtol=0, atol=0)


@pytest.mark.parametrize("name", COVARIANCES)
def test_posterior_of_each_sample(name, inputs, randomise):
    """Alone as in a batch, and another x_t, level or class is another density."""
    x_t, level, condition, z, noise = inputs
    posterior = randomise(build(name), std=0.15)
    whole = posterior(x_t, level, condition, z=z, noise=noise)

    def one(i: int, x_t: Tensor = x_t, t: float = 0.0, label: int = 0):
        at = RectifiedFlowSchedule().level(level.t[i : i + 1] + t)
        labels = {"class_labels": (condition["class_labels"][i : i + 1] + label) % 3}
        return posterior(x_t[i : i + 1], at, labels, z=z[i : i + 1], noise=noise[i : i + 1])

    for i in range(KB):
        alone = one(i)
        assert_close(alone.log_q[0], whole.log_q[i], rtol=1e-9, atol=1e-9)
        assert_close(alone.z[0], whole.z[i], rtol=1e-9, atol=1e-9)
        for other in (one(i, x_t=x_t + 0.1), one(i, t=0.05), one(i, label=1)):
            assert (other.log_q - alone.log_q).abs().item() > 1e-4
    unlabelled = posterior(x_t, level, None, z=z)  # None is the null label
    assert (unlabelled.log_q - whole.log_q).abs().min().item() > 1e-4


@pytest.mark.parametrize("schedule", [RectifiedFlowSchedule(), EDMSchedule()])
def test_network_sees_unit_variance(schedule, inputs, randomise):
    """x_t / sqrt(alpha^2 sigma_data^2 + sigma^2) and ln(sigma / alpha) / 4, sample by sample."""
    x_t, level = inputs[0], schedule.level(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    posterior, given = randomise(build("linear")), []
    posterior.unet.register_forward_pre_hook(lambda module, args: given.append(args))
    posterior(x_t, level, None, z=inputs[3])
    ((x, time),) = given
    for i in range(KB):
        alpha, sigma = float(level.alpha[i]), float(level.sigma[i])
        assert_close(x[i], x_t[i] / math.sqrt(alpha**2 * SIGMA_DATA**2 + sigma**2), rtol=1e-12, atol=1e-12)
        assert float(time[i]) == pytest.approx(math.log(sigma / alpha) / 4, rel=1e-12)


def test_channels_are_means_then_log_deviations(inputs):
    """Output channel j of a constant U-Net is the mean of latent channel j, channel c + j its log standard deviation."""
    x_t, level, _, _, noise = inputs
    posterior = build("diagonal").double()
    with torch.no_grad():
        posterior.unet.conv_out.bias.copy_(torch.tensor([0.3, -1.0, math.log(2), math.log(0.5)]))
    z = posterior(x_t, level, None, noise=noise).z
    assert_close(z[:, :, 0], 0.3 + 2 * noise[:, :, 0], rtol=1e-6, atol=1e-6)  # the bias was written in float32
    assert_close(z[:, :, 1], -1.0 + 0.5 * noise[:, :, 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", COVARIANCES)
def test_gradients_reach_x_t_and_all_weights(name, inputs, randn, randomise):
    """log q is differentiable in x_t, against finite differences along one direction: the bound's path to the student."""
    x_t, level, condition, z, noise = inputs
    posterior = randomise(build(name), std=0.15)
    x_t = x_t.requires_grad_()

    def value(x_t: Tensor) -> Tensor:
        out = posterior(x_t, level, condition, z=z, noise=noise)
        return out.log_q.sum() + (out.log_q_z * out.z.sum((2, 3, 4))).sum()

    parameters = dict(posterior.named_parameters())
    gradient, *others = torch.autograd.grad(value(x_t), [x_t, *parameters.values()], allow_unused=True)
    assert [n for n, g in zip(parameters, others, strict=True) if g is None or not g.abs().max() > 1e-12] == []
    direction, h = randn(*x_t.shape), 1e-5
    with torch.no_grad():
        difference = (value(x_t + h * direction) - value(x_t - h * direction)) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-6)


def test_patches_and_lower_resolutions(randn, randomise):
    """Latents keep their shape through space-to-depth and a coarser level."""
    x_t, noise = randn(KB, CHANNELS, 8, 8), randn(KB, KK, CHANNELS, 8, 8)
    level = EDMSchedule().level(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    for name in COVARIANCES:
        posterior = randomise(build(name, sample_size=8, channel_mult=(1, 2), patch_size=2), std=0.02)
        out = posterior(x_t, level, None, noise=noise)
        assert out.z.shape == noise.shape
        assert_close(posterior(x_t, level, None, z=out.z).log_q, out.log_q_z, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", COVARIANCES)
def test_densities_are_not_taken_in_half_precision(name, inputs, generator):
    x_t, level, condition, z, noise = inputs
    posterior = build(name)
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    level = RectifiedFlowSchedule().level(level.t.float())
    exact = posterior(x_t.float(), level, condition, z=z.float(), noise=noise.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = posterior(x_t.float(), level, condition, z=z.float(), noise=noise.float())
        again = posterior(x_t.float(), level, condition, z=out.z)
    assert {v.dtype for v in (out.log_q, out.z, out.log_q_z)} == {torch.float32}
    # bfloat16 keeps 8 bits of each of 32 coordinates' moments
    assert_close(out.log_q, exact.log_q, rtol=0.03, atol=0.3)
    # but what is made of them is not rounded again: a sample scored as a latent has the density it came with
    assert_close(again.log_q, out.log_q_z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COVARIANCES)
def test_calibration_maps(name, inputs, randomise):
    """The last 2c channels, zero at first; the densities do not read them."""
    x_t, level, condition, z, noise = inputs
    plain = build(name).double()(x_t, level, condition, z=z, noise=noise)
    assert plain.calibration is None
    posterior = build(name, calibrated=True).double()
    untrained = posterior(x_t, level, condition)
    assert untrained.calibration.shape == (KB, 2 * CHANNELS, SIDE, SIDE)
    assert not untrained.calibration.any()
    out = randomise(posterior, std=0.15)(x_t, level, condition, z=z, noise=noise)
    with torch.no_grad():
        posterior.unet.conv_out.bias[-2 * CHANNELS :] += 0.25
    moved = posterior(x_t, level, condition, z=z, noise=noise)
    assert_close(moved.calibration, out.calibration + 0.25, rtol=1e-9, atol=1e-9)
    for a, b in zip(moved[:3], out[:3], strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_unet_must_fit():
    for name in COVARIANCES:
        for calibrated in (False, True):
            channels = (8 if name == "full" else 2 * CHANNELS) + 2 * CHANNELS * calibrated
            with pytest.raises(ValueError, match=rf"out_channels={channels}, not {CHANNELS}"):
                build(name, calibrated, out_channels=CHANNELS)
    with pytest.raises(ValueError, match=r"covariance='full' has 512 dimensions.*Use 'linear' or 'diagonal'"):
        build("full", sample_size=16)
