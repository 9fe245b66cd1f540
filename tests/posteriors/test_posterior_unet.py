"""Posteriors over a U-Net: what the network sees, which of its channels are what, and the laws of the densities through it."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipelines.edm import PatchUNet
from pipelines.noise import EDMSchedule, RectifiedFlowSchedule
from trainers.posteriors import COVARIANCES, Covariance, UNetPosterior

CASES = [*COVARIANCES, "flow-spline"]
SIGMA_DATA = 0.7
CHANNELS, SIDE = 2, 4
KB, KK = 3, 5  # samples and latents for each

pytestmark = pytest.mark.usefixtures("float64_weights")


def fresh(case: str, side: int = SIDE) -> Covariance:
    options = {"transform": "spline"} if case == "flow-spline" else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return COVARIANCES[case.split("-")[0]]((CHANNELS, side, side), **options)


def log_prior(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(2).sum(-1)


def build(name: str, with_mean: bool = False, **config) -> UNetPosterior:
    side = config.get("sample_size", SIDE)
    covariance = fresh(name, side)
    network = {"sample_size": side, "in_channels": CHANNELS, "channels": 8, "num_blocks": 1}
    network |= {"out_channels": UNetPosterior.num_channels(covariance, with_mean), "num_classes": 3, "norm_groups": 2}
    return UNetPosterior(PatchUNet(**network | config), covariance, SIGMA_DATA, with_mean)


@pytest.fixture
def inputs(randn):
    level = RectifiedFlowSchedule().level(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    x_t, z, noise = randn(KB, CHANNELS, SIDE, SIDE), randn(KB, 1, CHANNELS, SIDE, SIDE), randn(KB, KK, CHANNELS, SIDE, SIDE)
    return x_t, level, {"class_labels": torch.tensor([0, 2, 1])}, z, noise


@pytest.mark.parametrize("name", CASES)
def test_untrained_posterior_is_the_prior(name, inputs):
    x_t, level, condition, z, noise = inputs
    out = build(name)(x_t, level, condition, z=z, noise=noise)
    for v, log_q in ((z, out.log_q), (noise, out.log_q_z), (out.z, out.log_q_z)):
        assert_close(log_q, log_prior(v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("name", CASES)
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
    posterior.network.register_forward_pre_hook(lambda module, args: given.append(args))
    posterior(x_t, level, None, z=inputs[3])
    ((x, time),) = given
    for i in range(KB):
        alpha, sigma = float(level.alpha[i]), float(level.sigma[i])
        assert_close(x[i], x_t[i] / math.sqrt(alpha**2 * SIGMA_DATA**2 + sigma**2), rtol=1e-12, atol=1e-12)
        assert float(time[i]) == pytest.approx(math.log(sigma / alpha) / 4, rel=1e-12)


def test_channels_are_means_then_log_deviations(inputs):
    """Output channel j of a constant U-Net is the mean of latent channel j, channel c + j its log standard deviation."""
    x_t, level, _, _, noise = inputs
    posterior = build("diag")
    with torch.no_grad():
        posterior.network.conv_out.bias.copy_(torch.tensor([0.3, -1.0, *(10 * math.atanh(math.log(s) / 10) for s in (2, 0.5))]))
    z = posterior(x_t, level, None, noise=noise).z
    assert_close(z[:, :, 0], 0.3 + 2 * noise[:, :, 0], rtol=1e-6, atol=1e-6)  # the bias was written in float32
    assert_close(z[:, :, 1], -1.0 + 0.5 * noise[:, :, 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
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
    for name in CASES:
        posterior = randomise(build(name, sample_size=8, channel_mult=(1, 2), patch_size=2), std=0.02)
        out = posterior(x_t, level, None, noise=noise)
        assert out.z.shape == noise.shape
        assert_close(posterior(x_t, level, None, z=out.z).log_q, out.log_q_z, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_densities_are_not_taken_in_half_precision(name, inputs, generator):
    x_t, level, condition, z, noise = inputs
    posterior = build(name).float()
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


@pytest.mark.parametrize("name", CASES)
def test_mean_of_images(name, inputs, randomise):
    """x0_mean = c_skip x_t + c_out F with F the last c channels, zero at first; the densities do not read them."""
    x_t, level, condition, z, noise = inputs
    assert build(name)(x_t, level, condition, z=z, noise=noise).x0_mean is None
    total = level.alpha.square() * SIGMA_DATA**2 + level.sigma.square()
    c_skip, c_out = level.alpha * SIGMA_DATA**2 / total, level.sigma * SIGMA_DATA / total.sqrt()
    posterior = build(name, with_mean=True)
    assert_close(posterior(x_t, level, condition).x0_mean, c_skip * x_t, rtol=1e-12, atol=1e-12)
    out = randomise(posterior, std=0.15)(x_t, level, condition, z=z, noise=noise)
    with torch.no_grad():
        posterior.network.conv_out.bias[-CHANNELS:] += 0.25
    moved = posterior(x_t, level, condition, z=z, noise=noise)
    assert_close(moved.x0_mean, out.x0_mean + 0.25 * c_out.expand_as(x_t), rtol=1e-9, atol=1e-9)
    for a, b in zip(moved[:3], out[:3], strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_network_must_fit():
    for name in COVARIANCES:
        for with_mean in (False, True):
            channels = fresh(name).num_maps + CHANNELS * with_mean
            with pytest.raises(ValueError, match=rf"out_channels={channels}, not 1"):
                build(name, with_mean, out_channels=1)
