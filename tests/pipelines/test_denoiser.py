"""Denoisers, guidance, the one-step readout and the EDM pipeline, against closed forms for Gaussian data."""

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines.common.errors import UserError
from pipelines.denoiser import Denoiser, FeatureMaps, FewStepGenerator
from pipelines.edm import EDMPipeline, EDMScheduler, PatchUNet
from pipelines.noise import EDMSchedule, RectifiedFlowSchedule, VPSchedule, add_noise, score
from trainers.data.examples import without

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD, SIGMA_DATA = 0.3, 0.8, 0.7

VP = VPSchedule(DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod.double())
SCHEDULES = {"edm": EDMSchedule(), "vp": VP, "flow": RectifiedFlowSchedule()}


def levels_of(schedule):
    first, last = schedule.t_range
    t = [first + share * (last - first) for share in (0.11, 0.37, 0.83)]
    return schedule.level(torch.tensor(t, dtype=torch.float64))


def posterior_mean(x: Tensor, alpha, sigma, mean: float = MEAN, std: float = STD) -> Tensor:
    """E[x0 | x_t] for pixels x0 ~ N(mean, std^2)."""
    return (std**2 * alpha * x + sigma**2 * mean) / (alpha**2 * std**2 + sigma**2)


class Recorder(nn.Module):
    """Elementwise, with per-class weights, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def forward(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        self.calls.append((x, time, condition))
        shift = sum(v.flatten(1).double().sum(1) if v.ndim > 1 else v.double() for v in condition.values())
        return x * torch.sin(time)[:, None, None, None] + (shift[:, None, None, None] if condition else 0)


class Affine(nn.Module):
    """F = (D - c_skip x) / c_out for the exact denoiser D of N(mean, std^2), written as a network of (c_in x, c_noise)."""

    def forward(self, x_in: Tensor, c_noise: Tensor) -> Tensor:
        sigma = torch.exp(4 * c_noise)[:, None, None, None]
        total = sigma**2 + SIGMA_DATA**2
        x = x_in * total.sqrt()
        return (posterior_mean(x, 1, sigma) - SIGMA_DATA**2 / total * x) / (sigma * SIGMA_DATA / total.sqrt())


class ExactOutput(nn.Module):
    """The exact output of a given prediction type for pixels N(MEAN, STD^2), knowing only (x, t)."""

    def __init__(self, schedule, prediction_type: str) -> None:
        super().__init__()
        self.schedule, self.prediction_type = schedule, prediction_type

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        level = self.schedule.level(time)
        alpha, sigma = level.alpha, level.sigma
        x0 = posterior_mean(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[self.prediction_type]


# Preconditioning and prediction types -------------------------------------------------------------------------------------


def test_silent_network_leaves_the_skip(randn, shape):
    """F = 0 gives c_skip x."""
    x, level = randn(*shape), levels_of(EDMSchedule())
    x0 = Denoiser(lambda x, time: torch.zeros_like(x), EDMSchedule(), "edm", SIGMA_DATA)(x, level)
    for i in range(len(x)):
        assert_close(x0[i], x[i] * SIGMA_DATA**2 / (level.t[i] ** 2 + SIGMA_DATA**2), rtol=1e-12, atol=0)


def test_edm_exact_on_gaussian_data(randn, shape):
    x, level = 3 * randn(*shape), levels_of(EDMSchedule())
    x0 = Denoiser(Affine(), EDMSchedule(), "edm", SIGMA_DATA)(x, level)
    assert_close(x0, posterior_mean(x, 1, level.sigma), rtol=1e-10, atol=1e-10)
    assert_close(score(x0, x, level), -(x - MEAN) / (STD**2 + level.sigma**2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_prediction_types_exact_on_gaussian_data(name, prediction_type, randn, shape):
    schedule = SCHEDULES[name]
    x, level = randn(*shape), levels_of(schedule)
    x0 = Denoiser(ExactOutput(schedule, prediction_type), schedule, prediction_type)(x, level)
    assert_close(x0, posterior_mean(x, level.alpha, level.sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_output_is_widened(dtype, randn, shape):
    level = levels_of(RectifiedFlowSchedule())
    denoiser = Denoiser(lambda x, time: x.to(dtype), RectifiedFlowSchedule(), "sample")
    assert denoiser(randn(*shape).float(), level).dtype == torch.float32


# Guidance ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def condition(randn, shape):
    return {"class_labels": torch.tensor([2, 0, 5]), "encoder_hidden_states": randn(shape[0], 11, 13)}


@pytest.fixture
def null(randn):
    return {"class_labels": torch.tensor(7), "encoder_hidden_states": randn(11, 13)}


@pytest.mark.parametrize("parameterization", ["edm", "v_prediction"])
def test_guidance(parameterization, condition, null, randn, shape):
    schedule = SCHEDULES["edm" if parameterization == "edm" else "vp"]
    x, level, network = randn(*shape), levels_of(schedule), Recorder()

    def denoise(scale: float, condition) -> Tensor:
        network.calls.clear()
        return Denoiser(network, schedule, parameterization, SIGMA_DATA, scale, null)(x, level, condition)

    plain = denoise(1.0, condition)
    assert [len(call[0]) for call in network.calls] == [3]  # no guidance: one call, no null rows
    unconditional = denoise(1.0, {k: torch.stack([v] * 3) for k, v in null.items()})
    assert (plain - unconditional).abs().min() > 1e-3
    for scale in (0.0, 2.5, -1.0):
        guided = denoise(scale, condition)
        assert_close(guided, unconditional + scale * (plain - unconditional), rtol=1e-12, atol=1e-12)
        assert [len(call[0]) for call in network.calls] == [6]  # both in one batch
        x_in, time, given = network.calls[0]
        assert_close(x_in[:3], x_in[3:], rtol=0, atol=0)
        assert_close(time[:3], time[3:], rtol=0, atol=0)
        assert given["class_labels"].tolist() == [7, 7, 7, 2, 0, 5]
        assert given["encoder_hidden_states"].shape == (6, 11, 13)


def test_guidance_needs_its_conditions(null, randn, shape):
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a null condition"):
        Denoiser(Recorder(), EDMSchedule(), guidance_scale=2.0)
    guided = Denoiser(Recorder(), EDMSchedule(), guidance_scale=2.0, null_condition=null)
    with pytest.raises(ValueError, match="guidance needs a condition; got None"):
        guided(randn(*shape), levels_of(EDMSchedule()), None)


def test_null_of_labels_that_are_floats(randn, shape):
    """One-hot labels and mixtures of classes: the null label is no class, a row of zeros, as in EDM's networks."""
    x, level, network = randn(*shape), levels_of(EDMSchedule()), Recorder()
    labels = torch.tensor([[0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]], dtype=torch.float64)
    null = {"class_labels": torch.tensor(4)}
    Denoiser(network, EDMSchedule(), "edm", SIGMA_DATA, 2.0, null)(x, level, {"class_labels": labels})
    ((_, _, given),) = network.calls
    assert torch.equal(given["class_labels"], torch.cat([torch.zeros(3, 4, dtype=torch.float64), labels]))
    dropped = without({"class_labels": labels}, null, torch.tensor([True, False, True]))  # in training, for guidance
    assert torch.equal(dropped["class_labels"], labels * torch.tensor([[0.0], [1], [0]], dtype=torch.float64))
    for wrong in (torch.zeros(4), torch.tensor(4.0), torch.tensor(5)):
        with pytest.raises((ValueError, RuntimeError)):
            Denoiser(network, EDMSchedule(), "edm", SIGMA_DATA, 2.0, {"class_labels": wrong})(
                x, level, {"class_labels": labels[:, :3]}
            )


def test_calls_per_sample(null):
    """Guidance evaluates the network twice for each x_t."""
    schedule = EDMSchedule()
    plain, guided = Denoiser(Recorder(), schedule), Denoiser(Recorder(), schedule, "edm", SIGMA_DATA, 1.5, null)
    assert (plain.calls_per_sample, guided.calls_per_sample) == (1, 2)
    assert (FewStepGenerator(plain, [2.5]).calls_per_sample, FewStepGenerator(guided, [2.5]).calls_per_sample) == (1, 2)
    with pytest.raises(ValueError, match="feature maps are those of one call"):
        FeatureMaps(guided, ())


# The one-step readout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "t", "prediction_type"), [("edm", 2.5, "edm"), ("vp", 999, "v_prediction"), ("flow", 1.0, "flow")]
)
def test_one_step_reads_out_at_its_level(name, t, prediction_type, condition, randn, shape):
    """EDM feeds sigma z, VP and flow unit noise; at alpha = 0 that is x_t itself."""
    network, z = Recorder(), randn(*shape)
    x0 = FewStepGenerator(Denoiser(network, SCHEDULES[name], prediction_type, SIGMA_DATA), [t])(z, condition)
    (x_in, time, given) = network.calls[0]
    assert len(network.calls) == 1
    assert given.keys() == condition.keys()
    out = Recorder()(x_in, time, **condition)
    if name == "edm":
        scale = math.hypot(t, SIGMA_DATA)
        assert_close(x_in, t * z / scale, rtol=1e-12, atol=1e-12)
        assert_close(time, torch.full((3,), math.log(t) / 4, dtype=torch.float64), rtol=1e-12, atol=0)
        expected = (SIGMA_DATA / scale) ** 2 * t * z + t * SIGMA_DATA / scale * out
    else:
        assert_close(x_in, z, rtol=0, atol=0)
        assert time.tolist() == [t] * 3
        expected = -out if name == "vp" else z - out  # v = -x0 and eps - x0 where alpha = 0
    assert_close(x0, expected, rtol=1e-12, atol=1e-12)


def test_one_step_of_vp_with_signal(randn, shape):
    """Without zero terminal SNR x0 = (z - sigma eps) / alpha, as a stock scheduler's x0 prediction."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(1)
    z, network = randn(*shape), Recorder()
    x0 = FewStepGenerator(Denoiser(network, VPSchedule.from_scheduler(scheduler), "epsilon"), [999])(z)
    assert scheduler.timesteps.tolist() == [999]
    out = Recorder()(z, torch.full((3,), 999.0, dtype=torch.float64))
    stock = scheduler.step(out, 999, z).pred_original_sample
    assert_close(x0, stock, rtol=1e-10, atol=1e-10)


def test_a_readout_of_noise_in_bfloat16_is_at_its_own_timestep(randn, shape):
    """bfloat16 has 8 bits: between 512 and 1024 every fourth number, so that 999 would be 1000, which no such network knows."""
    network = Recorder()
    schedule = VPSchedule(DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
    FewStepGenerator(Denoiser(network, schedule, "epsilon"), [999])(randn(*shape).bfloat16())
    assert network.calls[0][1].tolist() == [999.0] * 3


@pytest.mark.parametrize(("name", "t"), [("edm", 0.001), ("edm", 81), ("vp", -1), ("vp", 1000), ("flow", -0.1), ("flow", 1.01)])
def test_readout_out_of_range(name, t):
    with pytest.raises(ValueError, match=rf"t={t} is outside the schedule's range"):
        FewStepGenerator(Denoiser(Recorder(), SCHEDULES[name], "sample"), [t])


def test_image_range(randn):
    """The clamp is part of g: forward as the pipelines clamp, backward a projected gradient."""
    x0 = torch.tensor([-1.5, -1.5, -1.0, 0.3, 1.0, 1.5, 1.5], dtype=torch.float64).reshape(1, 1, 1, 7)
    x0 = x0.expand(3, 2, 5, 7).clone().requires_grad_()
    pull = torch.tensor([1.0, -1, 1, 1, -1, 1, -1], dtype=torch.float64).expand(3, 2, 5, 7) * randn(3, 2, 5, 1).abs()
    for image_range in (True, False):
        student = FewStepGenerator(Denoiser(lambda x, time: x0, SCHEDULES["flow"], "sample"), [1.0], image_range)
        out = student(randn(3, 2, 5, 7))
        assert_close(out, x0.clamp(-1, 1) if image_range else x0, rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(out, x0, pull)
        # a step is against the gradient: pixel 0 would fall further below -1, pixel 6 rise further above 1
        kept = torch.tensor([0.0, 1, 1, 1, 1, 1, 0]).double() if image_range else 1
        assert_close(gradient, pull * kept, rtol=0, atol=0)


SMALL = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "channels": 8, "num_blocks": 1, "norm_groups": 2}


# The pipeline ------------------------------------------------------------------------------------------------------------


class GaussianUNet(ModelMixin, ConfigMixin):
    """Affine behind the interface of PatchUNet: its pipeline samples N(mean, std^2) exactly, or N(label, .) with classes."""

    @register_to_config
    def __init__(self, in_channels: int = 2, sample_size: int = 5, num_classes: int = 0, mean: float = 0.1, std: float = 0.2):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))  # what the pipeline reads device and dtype from
        self.calls = 0

    def forward(self, x_in: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.calls += 1
        mean = self.config.mean if class_labels is None else 0.1 * class_labels.double()[:, None, None, None]
        sigma = torch.exp(4 * c_noise)[:, None, None, None]
        total = sigma**2 + SIGMA_DATA**2
        x = x_in * total.sqrt()
        x0 = posterior_mean(x, 1, sigma, mean, self.config.std)
        return (x0 - SIGMA_DATA**2 / total * x) / (sigma * SIGMA_DATA / total.sqrt())


def quiet(pipeline: EDMPipeline) -> EDMPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gaussian_pipeline(sampler: str = "heun", num_classes: int = 0, **config) -> EDMPipeline:
    scheduler = EDMScheduler(**{"sigma_data": SIGMA_DATA, "sigma_min": 1e-4, "sigma_max": 5.0, "sampler": sampler} | config)
    return quiet(EDMPipeline(GaussianUNet(num_classes=num_classes), scheduler))


def drawn(pipeline: EDMPipeline, *args, **kwargs) -> Tensor:
    """Images on the network's scale; the test worlds stay inside [-1, 1], so that clamping changes nothing."""
    images = pipeline(*args, output_type="pt", **kwargs).images
    assert float(images.min()) > 0
    assert float(images.max()) < 1
    return 2 * images - 1


def test_heun_converges_with_second_order(randn):
    """For a Gaussian the flow is a straight map of z: x(0) = m + (sigma_max z - m) s / sqrt(s^2 + sigma_max^2)."""
    mean, std, top = 0.1, 0.2, 5.0
    z = randn(3, 2, 5, 5).clamp(-2, 2)
    z[0], z[1] = 0, 1  # their images show the mean, and one standard deviation from it
    exact = mean + (top * z - mean) * std / math.hypot(std, top)
    pipeline = gaussian_pipeline()
    errors = []
    for steps in (16, 32, 64, 128):
        pipeline.unet.calls = 0
        errors.append(float((drawn(pipeline, 3, latents=z, num_inference_steps=steps) - exact).abs().max()))
        assert pipeline.unet.calls == 2 * steps - 1
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < 3e-4
    assert all(1.8 < order < 2.3 for order in orders[-2:]), (errors, orders)
    # sigma_max = 25 s leaves 4% of the mean and 0.1% of the standard deviation
    final = drawn(pipeline, 3, latents=z, num_inference_steps=128)
    assert float(final[0].mean()) == pytest.approx(mean, abs=0.05 * mean)
    assert float((final[1] - final[0]).mean()) == pytest.approx(std, rel=2e-3)


def test_heun_by_hand(randn):
    """Two steps of Algorithm 1, for one pixel at a time."""
    z, (high, low) = randn(3, 2, 5, 5).clamp(-2, 2), (0.9, 0.25)

    def slope(x, sigma):
        return (x - posterior_mean(x, 1, sigma, 0.1, 0.2)) / sigma

    x = high * z
    d = slope(x, high)
    euler = x + (low - high) * d
    x = x + (low - high) * (d + slope(euler, low)) / 2
    expected = x - low * slope(x, low)
    assert_close(drawn(gaussian_pipeline(), 3, latents=z, sigmas=[high, low]), expected, rtol=1e-10, atol=1e-10)
    grid = gaussian_pipeline(sigma_max=high, sigma_min=low)
    assert_close(drawn(grid, 3, latents=z, num_inference_steps=2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", ["heun", "renoise"])
def test_one_step_is_the_generator(sampler, randn, randomise):
    unet, z = randomise(PatchUNet(**SMALL)), randn(3, 2, 4, 4)
    scheduler = EDMScheduler(sigma_data=0.3, sigma_max=2.5, sampler=sampler, num_inference_steps=1)
    pipeline = quiet(EDMPipeline(unet, scheduler))
    x0 = FewStepGenerator(Denoiser(unet, EDMSchedule(), "edm", 0.3), [2.5])(z)
    images = pipeline(3, latents=z, output_type="pt").images
    assert_close(images, (x0 / 2 + 0.5).clamp(0, 1), rtol=1e-10, atol=1e-10)
    assert_close(FewStepGenerator(pipeline.denoiser(), [2.5])(z), x0, rtol=0, atol=0)


def test_renoise_by_hand(generator, randn):
    """x0 = D(sigma_0 z), then x0 = D(x0 + sigma_i eps) with fresh noise."""
    z, sigmas, pipeline = randn(3, 2, 5, 5).clamp(-2, 2), [2.0, 0.7, 0.3], gaussian_pipeline("renoise")
    state = generator.get_state()
    images = drawn(pipeline, 3, latents=z, sigmas=sigmas, generator=generator)
    assert pipeline.unet.calls == 3
    generator.set_state(state)
    x = sigmas[0] * z
    for sigma, following in zip(sigmas, [*sigmas[1:], None], strict=True):
        x0 = posterior_mean(x, 1, sigma, 0.1, 0.2)
        if following:
            x = x0 + following * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    assert_close(images, x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", ["heun", "renoise"])
def test_images_do_not_depend_on_the_batch(sampler, randomise):
    unet = randomise(PatchUNet(**SMALL, num_classes=3))
    pipeline = quiet(EDMPipeline(unet, EDMScheduler(sampler=sampler, sigma_max=3.0)))

    def draw(numbers: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(n) for n in numbers]
        labels = [n % 3 for n in numbers]
        given = {"generator": generators, "class_labels": labels, "num_inference_steps": 3, "output_type": "pt"}
        return pipeline(len(numbers), **given).images

    together = draw([11, 12, 13, 14, 15])
    assert together.std() > 0.05
    assert_close(torch.cat([draw([11, 12]), draw([13]), draw([14, 15])]), together, rtol=1e-10, atol=1e-10)
    assert_close(draw([15, 11]), together[[4, 0]], rtol=1e-10, atol=1e-10)
    assert (together[1:] - together[:1]).abs().amax((1, 2, 3)).min() > 1e-2


def test_guided_pipeline(randn):
    """The null label is num_classes: with x0_c linear in the label's mean 0.1 c, guidance moves the mean linearly, too."""
    pipeline, z = gaussian_pipeline(num_classes=3), randn(3, 2, 5, 5).clamp(-1, 1)
    plain = {c: drawn(pipeline, 3, class_labels=[c] * 3, latents=z, num_inference_steps=7) for c in (0, 1, 2)}
    assert pipeline.unet.calls == 3 * 13
    labels = {"class_labels": torch.tensor([0, 2, 1]), "latents": z, "num_inference_steps": 7}
    guided = drawn(pipeline, 3, guidance_scale=1.5, **labels)
    assert pipeline.unet.calls == 4 * 13
    slope = plain[1] - plain[0]  # of the image in the label
    for i, label in enumerate((0, 2, 1)):
        assert_close(guided[i], plain[0][i] + slope[i] * (3 + 1.5 * (label - 3)), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="guidance needs a condition"):
        pipeline(3, guidance_scale=1.5)
    with pytest.raises(ValueError, match="needs a null condition"):
        gaussian_pipeline()(3, guidance_scale=1.5)


def test_output_types(randn):
    pipeline, z = gaussian_pipeline(), randn(3, 2, 5, 5)
    pipeline.unet.register_to_config(in_channels=3)
    z = randn(3, 3, 5, 5) * 3  # far enough that pixels are clamped
    images = {kind: pipeline(3, latents=z, output_type=kind, num_inference_steps=3).images for kind in ("pt", "np", "pil")}
    assert images["pt"].shape == (3, 3, 5, 5)
    assert float(images["pt"].min()) >= 0
    assert float(images["pt"].max()) <= 1
    assert_close(torch.from_numpy(images["np"]).permute(0, 3, 1, 2), images["pt"].float(), rtol=0, atol=0)
    for image, array in zip(images["pil"], images["np"], strict=True):
        assert np.array_equal(np.asarray(image), (array * 255).round())
    (first,) = pipeline(3, latents=z, output_type="pt", num_inference_steps=3, return_dict=False)
    assert_close(first, images["pt"], rtol=0, atol=0)


def test_default_steps_are_the_schedulers(randn):
    pipeline, z = gaussian_pipeline(num_inference_steps=6), randn(1, 2, 5, 5).clamp(-2, 2)
    default = drawn(pipeline, latents=z)
    assert pipeline.unet.calls == 11
    assert_close(drawn(pipeline, latents=z, num_inference_steps=6), default, rtol=0, atol=0)


def test_scheduler_grid():
    """Karras et al. 2022, Eq. 5."""
    scheduler = EDMScheduler(sigma_min=0.02, sigma_max=3.0, rho=5.0)
    sigmas = scheduler.sigmas(7)
    for i in range(7):
        expected = (3.0 ** (1 / 5) + i / 6 * (0.02 ** (1 / 5) - 3.0 ** (1 / 5))) ** 5
        assert float(sigmas[i]) == pytest.approx(expected, rel=1e-12)
    assert scheduler.sigmas(1).tolist() == pytest.approx([3.0], rel=1e-12)
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        scheduler.sigmas(0)
    for wrong in (
        {"rho": 0.0},
        {"rho": -7.0},
        {"sigma_min": 0.0},
        {"sigma_min": -0.1},
        {"sigma_max": math.inf},
        {"sigma_min": 4.0},
    ):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}"):
            scheduler.sigmas(7, **wrong)
    with pytest.raises(ValueError, match=r"scheduler\.sampler is 'euler'; expected 'heun' or 'renoise'"):
        EDMScheduler(sampler="euler")


ERRORS = {
    "latents": ({"batch_size": 3, "latents": torch.zeros(3, 2, 5, 7)}, r"\(3, 2, 5, 7\); expected \(3, 2, 5, 5\)"),
    "latents batch": ({"batch_size": 2, "latents": torch.zeros(3, 2, 5, 5)}, r"expected \(2, 2, 5, 5\)"),
    "generators": ({"batch_size": 3, "generator": [torch.Generator()] * 2}, "2 generators for batch_size=3; give one for each"),
    "output": ({"output_type": "jpeg"}, "output_type is 'jpeg'; expected 'pil', 'np', 'pt' or 'latent'"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
    "negative steps": ({"num_inference_steps": -1}, "num_inference_steps must be at least 1, got -1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_pipeline_errors(name):
    arguments, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        gaussian_pipeline()(**arguments)


IN_A_FRESH_PROCESS = """
import sys
import numpy, torch
torch.set_num_threads(int(sys.argv[2]))
from pipelines.edm import EDMPipeline
pipeline = EDMPipeline.from_pretrained(sys.argv[1] + "/model")
assert not pipeline.unet.training
given = dict(class_labels=[0, 2, 1], generator=torch.Generator().manual_seed(5), output_type="np")
numpy.save(sys.argv[1] + "/images.npy", pipeline(3, **given).images)
"""


@pytest.mark.slow
def test_pipeline_save_and_load_in_a_fresh_process(tmp_path, randomise):
    unet = randomise(PatchUNet(**SMALL, num_classes=3, attention_levels=(0,))).float().eval()
    pipeline = quiet(EDMPipeline(unet, EDMScheduler(sigma_data=0.4, sigma_max=3.0, rho=5.0, num_inference_steps=3)))
    given = {"class_labels": [0, 2, 1], "generator": torch.Generator().manual_seed(5), "output_type": "np"}
    images = pipeline(3, **given).images
    assert images.std() > 0.05
    pipeline.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "images.npy"), images)


def test_generator_is_differentiable(randn, randomise):
    """The student's gradient through one readout, against a directional finite difference."""
    unet, z = randomise(PatchUNet(**SMALL)), randn(3, 2, 4, 4)
    student = FewStepGenerator(Denoiser(unet, EDMSchedule(), "edm", 0.3), [2.5])
    weights, direction = unet.conv_in.weight, randn(*unet.conv_in.weight.shape)
    (gradient,) = torch.autograd.grad(student(z).pow(3).sum(), weights)
    h, values = 1e-5, []
    with torch.no_grad():
        for sign in (1, -1):
            weights.add_(sign * h * direction)
            values.append(float(student(z).pow(3).sum()))
            weights.sub_(sign * h * direction)
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


def test_noise_and_denoise_are_consistent(randn, shape):
    """Denoising with a network that knows x0 returns it, whatever the guidance."""
    x0, eps = randn(*shape), randn(*shape)
    level = levels_of(VP)
    null = {"class_labels": torch.tensor(3)}

    def network(x, time, class_labels):
        return torch.cat([eps] * (len(x) // 3))

    denoiser = Denoiser(network, VP, "epsilon", guidance_scale=3.0, null_condition=null)
    assert_close(denoiser(add_noise(x0, eps, level), level, {"class_labels": torch.zeros(3)}), x0, rtol=1e-10, atol=1e-10)


# What a caller gives as sigmas, by preconditioning: the message of what is wrong with it
GRIDS = {
    "trailing zero": (
        "edm",
        [80.0, 2.0, 0.0],
        r"sigmas end with 0, which the last step reaches by itself; leave it out: \[80.0, 2.0\]",
    ),
    "only zero": ("edm", [0.0], "sigmas end with 0"),
    "negative": ("edm", [2.0, -1.0], "sigmas must be positive and finite"),
    "nan": ("edm", [math.nan, 1.0], "sigmas must be positive and finite"),
    "infinite": ("edm", [math.inf, 1.0], "sigmas must be positive and finite"),
    "ascending": ("edm", [0.1, 2.0], "sigmas must descend"),
    "twice": ("edm", [2.0, 2.0], "sigmas must descend"),
    "none": ("edm", [], "at least one noise level"),
    "nested": ("edm", [[2.0, 1.0]], "at least one noise level"),
    "above vp": ("vp", [160.0, 1.0], "sigmas must be within what vp knows, 0.00097"),
    "below ve": ("ve", [90.0, 0.01], "sigmas must be within what ve knows, 0.02 to 100"),
    "above iddpm": ("iddpm", [30000.0, 1.0], "sigmas must be within what iddpm knows"),
}


@pytest.mark.parametrize("name", GRIDS)
def test_sigmas_that_cannot_be_sampled(name):
    preconditioning, sigmas, message = GRIDS[name]
    pipeline = gaussian_pipeline(preconditioning=preconditioning, sigma_min=0.05)
    with pytest.raises(UserError, match=message):
        pipeline(2, sigmas=sigmas)
    assert pipeline.unet.calls == 0


def test_given_sigmas_are_those_of_the_grid():
    """As lists, arrays and tensors; of iDDPM's networks the nearest that they know, which `sigmas(steps)` takes too."""
    for sampler in ("heun", "renoise"):
        scheduler = EDMScheduler(sampler=sampler)
        for given in ([5.0, 0.3], np.array([5.0, 0.3]), torch.tensor([5.0, 0.3], dtype=torch.float64), (5, 0.3)):
            assert scheduler.given(given).tolist() == [5.0, 0.3]
    iddpm = EDMScheduler(preconditioning="iddpm", sigma_min=0.0065)
    ramp = [(80 ** (1 / 7) + i / 5 * (0.0065 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(6)]
    assert_close(iddpm.given(ramp), iddpm.sigmas(6), rtol=0, atol=0)
    assert iddpm.given(ramp).tolist() != ramp


@pytest.mark.parametrize("wrong", [{"S_churn": -1.0}, {"S_noise": -1.0}, {"S_churn": math.nan}, {"S_min": 2.0, "S_max": 1.0}])
def test_churn_that_makes_no_sense(wrong):
    with pytest.raises(UserError, match="S_churn and S_noise must be 0 or more, and S_min at most S_max"):
        gaussian_pipeline()(1, **wrong)


def test_float_labels_are_for_networks_that_take_them(randomise):
    unet = randomise(PatchUNet(**SMALL, num_classes=3)).float().eval()
    pipeline = quiet(EDMPipeline(unet, EDMScheduler(sampler="renoise", sigma_max=3.0)))
    with pytest.raises(ValueError, match=r"class_labels of a PatchUNet are \(2,\) integers; got torch.float32"):
        pipeline(2, class_labels=torch.eye(3)[:2])
