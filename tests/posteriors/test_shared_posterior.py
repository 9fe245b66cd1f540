"""A posterior on the teacher's encoder: what it starts as, and that no gradient is lost or left behind on the way through."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines.denoiser import Denoiser, FewStepGenerator
from pipelines.edm import PatchUNet
from pipelines.edm.features import second_decoder
from pipelines.noise import EDMSchedule, add_noise
from trainers.objectives.amortized import AmortizedScore
from trainers.objectives.importance import log_standard_normal
from trainers.objectives.resampled import ResampledScore
from trainers.objectives.vardiu import VarDiU
from trainers.posteriors import COVARIANCES, UNetPosterior

SIGMA_DATA, B, K = 0.7, 3, 2
SHAPE = (2, 4, 4)
UNET = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "channels": 4, "channel_mult": [1, 2], "num_blocks": 1}
UNET |= {"attention_levels": [1], "num_classes": 3, "norm_groups": 2}
ESTIMATORS = ("bound", "multi_sample", "resampled_score", "amortized_score")

pytestmark = pytest.mark.usefixtures("float64_weights")


class Networks(NamedTuple):
    student: FewStepGenerator
    teacher: Denoiser
    posterior: UNetPosterior


class WithItsOwnEncoder(nn.Module):
    """The same posterior with a copy of the teacher's encoder, called without any sharing."""

    on_teacher_features = False

    def __init__(self, posterior: UNetPosterior, teacher: Denoiser) -> None:
        super().__init__()
        self.posterior, self.encoder = copy.deepcopy(posterior), copy.deepcopy(teacher.network).requires_grad_(False)

    def forward(self, x_t, level, condition=None, features=None, **latents):
        assert features is None
        sigma = level.sigma.flatten()
        x_in = x_t / (level.sigma**2 + SIGMA_DATA**2).sqrt()
        features = self.encoder.encode(x_in, sigma.log() / 4, **(condition or {}))
        return self.posterior(x_t, level, condition, features, **latents)


@pytest.fixture
def build(randomise):
    """build(patch_size, trained): a student, a frozen teacher and a posterior on its features, at its start or randomised."""

    def make(patch_size: int = 1, trained: bool = False, guidance: float = 1.0) -> Networks:
        unet = randomise(PatchUNet(**UNET | {"patch_size": patch_size}))
        teacher = Denoiser(unet, EDMSchedule(), "edm", SIGMA_DATA, guidance, {"class_labels": torch.tensor(3)})
        student = FewStepGenerator(Denoiser(randomise(PatchUNet(**UNET)), EDMSchedule(), "edm", SIGMA_DATA), [2.5])
        covariance = COVARIANCES["diag"](SHAPE)
        decoder = second_decoder(unet.dec, UNetPosterior.num_channels(covariance, with_mean=True))
        posterior = UNetPosterior(decoder, covariance, SIGMA_DATA, with_mean=True)
        posterior.start_mean(unet.conv_out)
        if trained:
            randomise(posterior, std=0.15)
        return Networks(student, teacher.requires_grad_(False), posterior)

    return make


@pytest.fixture
def draw(make_draw, randn):
    normals = {"eps_1": randn(B, *SHAPE), "proposals": randn(B, K, *SHAPE)}
    condition = {"class_labels": torch.tensor([0, 2, 1])}
    return make_draw(randn(B, *SHAPE), randn(B, *SHAPE), torch.tensor([0.2, 0.5, 0.9]), condition, normals=normals)


def objective_of(estimator: str, networks: Networks) -> VarDiU:
    def levels(u: Tensor, progress: float) -> Tensor:
        return 0.3 + 1.7 * u

    parts = (*networks, levels)
    return {
        "bound": lambda: VarDiU(*parts, antithetic=False),
        "multi_sample": lambda: VarDiU(*parts, num_samples=K, antithetic=False),
        "resampled_score": lambda: ResampledScore(*parts, num_samples=K + 1, antithetic=False),
        "amortized_score": lambda: AmortizedScore(*parts),
    }[estimator]()


def gradients(world, objective: VarDiU, draw, *networks: nn.Module, phase: int = -1) -> list[Tensor]:
    if isinstance(objective, ResampledScore):
        noise = torch.cat([draw.normals["proposals"], draw.normals["eps_1"][:, None]], 1)
        draw = type(draw)(draw.z, draw.eps, draw.u, draw.condition, normals={"proposals": noise})
    loss = world.whole(objective.phases[phase].loss(draw)).loss.mean()
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def at_a_level(networks: Networks, draw):
    level = EDMSchedule().level(0.3 + 1.7 * draw.u)
    x_t = add_noise(networks.student(draw.z, draw.condition).detach(), draw.eps, level)
    x0_hat, features = networks.teacher(x_t, level, draw.condition, return_features=True)
    return x_t, level, x0_hat, features


# Where it starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_it_starts_as_the_prior_with_the_teachers_mean(patch_size, guidance, build, draw):
    networks = build(patch_size, guidance=guidance)
    x_t, level, _, features = at_a_level(networks, draw)
    out = networks.posterior(x_t, level, draw.condition, features, z=draw.z[:, None], noise=draw.normals["proposals"])
    assert networks.posterior.on_teacher_features
    assert_close(out.log_q[:, 0], log_standard_normal(draw.z.flatten(1)), rtol=1e-12, atol=1e-12)
    assert_close(out.z, draw.normals["proposals"], rtol=1e-12, atol=1e-12)
    unguided = Denoiser(networks.teacher.network, EDMSchedule(), "edm", SIGMA_DATA)(x_t, level, draw.condition)
    assert_close(out.x0_mean, unguided, rtol=1e-10, atol=1e-12)


def test_training_moves_the_mean_and_not_the_teacher(build, draw, world):
    networks = build()
    before = copy.deepcopy(networks.teacher.state_dict())
    parameters = [*networks.student.parameters(), *networks.posterior.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for estimator in ESTIMATORS:
        gradients_ = gradients(world, objective_of(estimator, networks), draw, networks.student, networks.posterior)
        for parameter, gradient in zip(parameters, gradients_, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert all(p.grad is None for p in networks.teacher.parameters())
    after = networks.teacher.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    x_t, level, x0_hat, features = at_a_level(networks, draw)
    x0_mean = networks.posterior(x_t, level, draw.condition, features).x0_mean.detach()
    assert float((x0_mean - x0_hat).abs().max()) > 1e-3


# Gradients through the teacher's encoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_are_those_of_an_encoder_of_its_own(estimator, build, draw, world, assert_all_close):
    """theta's, which for the bounds run through log q into x_t, hence through the encoder, and phi's."""
    networks = build(trained=True)
    apart = networks._replace(posterior=WithItsOwnEncoder(networks.posterior, networks.teacher))
    shared = gradients(world, objective_of(estimator, networks), draw, networks.student, networks.posterior)
    expected = gradients(world, objective_of(estimator, apart), draw, networks.student, apart.posterior)
    assert_all_close(shared, expected, 1e-9)


def test_the_bound_of_the_student_needs_the_encoders_gradient(build, draw, world):
    """With features that carry none it is another one: the test above would see the loss."""
    networks = build(trained=True)
    objective = objective_of("bound", networks)
    whole = gradients(world, objective, draw, networks.student)
    read = objective.read_teacher

    def without_a_graph(x_t, level, condition):
        with torch.no_grad():
            return read(x_t, level, condition)

    objective.read_teacher = without_a_graph
    cut = gradients(world, objective, draw, networks.student)
    assert max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(cut, whole, strict=True)) > 0.01


@pytest.mark.parametrize("estimator", ["bound", "amortized_score"])
def test_posterior_alone_gets_its_gradient_without_one_in_the_encoder(estimator, build, draw, world, assert_all_close):
    networks = build(trained=True)
    apart = networks._replace(posterior=WithItsOwnEncoder(networks.posterior, networks.teacher))
    results, seen = [], []
    networks.teacher.network.register_forward_pre_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    for these in (networks, apart):
        objective = objective_of(estimator, these)
        loss = world.whole(objective.posterior_loss(draw)).loss.mean()
        parameters = [p for p in these.posterior.parameters() if p.requires_grad]
        results.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    rows = [(a, b) for a, b in zip(*results, strict=True) if a is not None]
    assert_all_close([a for a, _ in rows], [b for _, b in rows], 1e-9)
    assert set(seen) == {False}


# Gradient checkpointing and half precision -------------------------------------------------------------------------------


def in_float32(networks: Networks, draw):
    floats = Networks(*(copy.deepcopy(n).float() for n in networks))
    normals = {name: v.float() for name, v in draw.normals.items()}
    return floats, type(draw)(draw.z.float(), draw.eps.float(), draw.u.float(), draw.condition, normals=normals)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_checkpointing_in_float32(estimator, build, draw, world):
    networks, draw = in_float32(build(trained=True), draw)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            for network in (networks.posterior.network, networks.student.denoiser.network):
                network.enable_gradient_checkpointing()
        results.append(gradients(world, objective_of(estimator, networks), draw, networks.student, networks.posterior))
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm()) <= 1e-6 * float(b.norm())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_under_autocast(estimator, build, draw, world):
    """bfloat16 in the networks, with checkpointing or without: the direction of the whole gradient stays."""
    networks, draw = in_float32(build(trained=True), draw)

    def direction() -> Tensor:
        found = gradients(world, objective_of(estimator, networks), draw, networks.student, networks.posterior)
        return torch.cat([g.flatten() for g in found])

    exact = direction()
    with torch.autocast("cpu", torch.bfloat16):
        half = direction()
        networks.posterior.network.enable_gradient_checkpointing()
        checkpointed = direction()
    assert not torch.equal(half, exact)
    assert float(nn.functional.cosine_similarity(half, exact, 0)) > 0.99
    assert_close(checkpointed, half, rtol=1e-5, atol=1e-5 * float(half.abs().max()))
