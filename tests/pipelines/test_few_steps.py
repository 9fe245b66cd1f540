"""Students of several steps: the generator by hand, the levels of stock schedulers, where training starts a step."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import nn
from torch.testing import assert_close

from pipelines import stable_diffusion as sd
from pipelines import text_to_image as t2i
from pipelines import variance_preserving as vp
from pipelines.common.errors import UserError
from pipelines.data.images import ImageSet
from pipelines.denoiser import Denoiser, FewStepGenerator, Start
from pipelines.edm import EDMScheduler
from pipelines.noise import EDMSchedule, RectifiedFlowSchedule, VPSchedule
from trainers.data.examples import Images
from trainers.engine.draws import DrawSource
from trainers.objectives.base import generate, start_of

SHAPE = (2, 5, 7)
LEVELS = {"vp": (999, 700, 313), "edm": (2.5, 0.7, 0.3), "flow": (1.0, 0.6, 0.25)}


class Halved(nn.Module):
    """x0 = x / 2 + time / 1000, and what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x, time, **condition):
        self.seen.append((x.detach().clone(), time.detach().clone()))
        return self.scale * x + time.view(-1, 1, 1, 1) / 1000


def schedules() -> dict[str, object]:
    vp = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return {"vp": VPSchedule(vp.alphas_cumprod.double()), "edm": EDMSchedule(), "flow": RectifiedFlowSchedule()}


def student(name: str, **options) -> FewStepGenerator:
    return FewStepGenerator(Denoiser(Halved(), schedules()[name], "sample"), LEVELS[name], **options)


def alpha_sigma(name: str, t: float) -> tuple[float, float]:
    """From the definitions: SD's scaled-linear betas; alpha 1; alpha 1 - t."""
    if name == "edm":
        return 1.0, t
    if name == "flow":
        return 1 - t, t
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32).square()
    abar = float((1 - betas).double().log().cumsum(0).exp()[int(t)])
    return abar**0.5, (1 - abar) ** 0.5


@pytest.mark.parametrize("name", LEVELS)
def test_steps_by_hand(name, randn):
    z, made = randn(3, 2, *SHAPE), student(name)
    got = made.sample(z)
    x0 = None
    for noise, t in zip(z, LEVELS[name], strict=True):
        alpha, sigma = alpha_sigma(name, t)
        # the first step sees pure noise, as stock pipelines begin with it: sigma z of EDM's, z of the others
        x = (sigma * noise if name == "edm" else noise) if x0 is None else alpha * x0 + sigma * noise
        x0 = x / 2 + t / 1000
    assert_close(got, x0, rtol=1e-5, atol=1e-6)


def test_rows_make_steps_of_their_own(randn):
    made = student("edm")
    z, x0 = randn(3, *SHAPE), randn(3, *SHAPE)
    got = made(z, None, Start(x0, torch.tensor([2, 0, 1])))
    for row, step in enumerate((2, 0, 1)):
        alone = made(z[row : row + 1], None, Start(x0[row : row + 1], torch.tensor([step])))
        assert_close(got[row : row + 1], alone, rtol=0, atol=0)
    first = made(z[1:2])  # which reads no x0
    assert_close(got[1:2], first, rtol=0, atol=0)


def test_images_are_clamped_at_the_end_alone(randn):
    """As EDMPipeline does: an x0 of 1.4 between two steps is noised as it is."""
    z = 3 * randn(3, 2, *SHAPE)
    made = student("edm", image_range=True)
    got = made.sample(z)
    inner = made.denoiser.network.seen[1][0] - 0.7 * z[1]
    assert float(inner.abs().max()) > 1.2
    assert float(got.detach().abs().max()) == 1
    assert_close(got, student("edm").sample(z).clamp(-1, 1), rtol=0, atol=0)


@pytest.mark.parametrize("levels", [[], [0.3, 2.5], [2.5, 2.5], [2.5, 90.0]])
def test_levels_that_are_none(levels):
    with pytest.raises(UserError, match=r"must descend|outside the schedule"):
        FewStepGenerator(Denoiser(Halved(), EDMSchedule(), "sample"), levels)


def test_noise_of_another_number_of_steps(randn):
    with pytest.raises(ValueError, match="3 steps"):
        student("edm").sample(randn(2, 2, *SHAPE))


# What stock schedulers do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("total", [1000, 997])
def test_the_samplers_own_levels(total, steps):
    scheduler = vp.one_step_scheduler(DDIMScheduler(num_train_timesteps=total))
    scheduler.set_timesteps(steps)
    assert vp.student_levels(total, steps) == scheduler.timesteps.tolist()


def test_more_steps_than_timesteps():
    with pytest.raises(UserError, match="1001 steps are more than the 1000"):
        vp.student_levels(1000, 1001)


def vp_denoiser(prediction_type: str) -> Denoiser:
    return Denoiser(Halved(), schedules()["vp"], prediction_type)


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("levels", [[999], [999, 499], [999, 749, 499, 249], [999, 700, 333], [625], [800, 10]])
def test_the_stored_scheduler_makes_the_students_steps(levels, prediction_type):
    stored = vp.one_step_scheduler(DDIMScheduler(**NOISE, prediction_type=prediction_type))
    assert t2i.steps_error(sd.KIND, stored, vp_denoiser(prediction_type), levels) < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        DDIMScheduler(**NOISE),
        DDIMScheduler(**NOISE, timestep_spacing="trailing"),
        EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing"),
        DPMSolverMultistepScheduler(**NOISE, timestep_spacing="trailing"),
        LCMScheduler(**NOISE),  # 50 original steps: 999, 759 ... instead of 749
        LCMScheduler(**NOISE, original_inference_steps=1000, timestep_scaling=0.02),  # its skip connection is felt
        LCMScheduler(**NOISE, original_inference_steps=1000, timestep_scaling=1e6, prediction_type="v_prediction"),
    ],
    ids=["ddim", "trailing", "euler", "dpm", "lcm", "skip", "v"],
)
def test_other_schedulers_are_told(wrong):
    assert t2i.steps_error(sd.KIND, wrong, vp_denoiser("epsilon"), [999, 749, 499, 249]) > 1e-2


def test_an_edm_scheduler_keeps_the_levels_of_its_student(tmp_path):
    teacher = EDMScheduler(sigma_max=80.0)
    teacher.for_student([2.5, 0.7, 0.3], 2.5).save_pretrained(tmp_path)
    stored = EDMScheduler.from_pretrained(tmp_path)
    assert stored.default_sigmas().tolist() == [2.5, 0.7, 0.3]
    assert stored.default_sigmas(3).tolist() == [2.5, 0.7, 0.3]
    with pytest.raises(UserError, match=r"makes 3 steps, at sigma 2.5, 0.7, 0.3; got 4"):
        stored.default_sigmas(4)
    # Karras et al. 2022, Eq. 5 with rho 7, five points from 2.5 to 0.002, the last left out
    root = lambda x: x ** (1 / 7)  # noqa: E731
    by_hand = [(root(2.5) + i / 4 * (root(0.002) - root(2.5))) ** 7 for i in range(4)]
    assert_close(teacher.for_student(4, 2.5).default_sigmas(), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-9, atol=0)
    assert teacher.for_student(1, 2.5).config["student_sigmas"] is None
    with pytest.raises(UserError, match="student_sigmas needs"):
        EDMScheduler(student_sigmas=[2.5, 0.3])


# Where training starts a step -----------------------------------------------------------------------------------------------


def source(batch: int, micro: int | None, rank: int = 0, world: int = 1, data: bool = False) -> DrawSource:
    pixels = torch.arange(11 * 2 * 5 * 7).remainder(256).to(torch.uint8).view(11, *SHAPE)
    examples = Images(ImageSet(pixels)) if data else None
    device = torch.device("cpu")
    return DrawSource(3, batch, SHAPE, device, examples, rank=rank, world_size=world, micro_batch_size=micro)


def test_simulated_starts_are_the_students_own_steps():
    """Each row begins its step with what the steps before make of its own noise, and no gradient goes there."""
    made, (draw,) = student("edm"), source(64, None).batch((0, "x"), 0.5)
    start = start_of(made, draw)
    counts = start.step.bincount(minlength=3).tolist()
    assert min(counts) > 9  # uniform: 21 each, standard deviation 4
    noise = [draw.normal(f"step_{k}", *SHAPE) for k in range(2)]
    for row in range(64):
        step = int(start.step[row])
        if step:
            earlier = FewStepGenerator(made.denoiser, LEVELS["edm"][:step])
            expected = earlier.sample(torch.stack(noise[:step])[:, row : row + 1])
            assert_close(start.x0[row : row + 1], expected.float().detach(), rtol=1e-6, atol=1e-6)
    assert not start.x0.requires_grad
    x0 = generate(made, draw)
    assert_close(x0, made(draw.z, None, start), rtol=0, atol=0)
    x0.sum().backward()
    # d x0 / d scale = x_in of the trained step alone
    sigma = torch.tensor(LEVELS["edm"])[start.step].view(-1, 1, 1, 1)
    x_in = torch.where((start.step > 0).view(-1, 1, 1, 1), start.x0, 0) + sigma * draw.z
    assert float(made.denoiser.network.scale.grad) == pytest.approx(float(x_in.double().sum()), rel=1e-5)


def test_a_start_costs_the_steps_before_it():
    made, (draw,) = student("edm"), source(64, None).batch((0, "x"), 0.5)
    start = start_of(made, draw)
    calls = sum(len(x) for x, _ in made.denoiser.network.seen)
    assert calls == int(start.step.sum())


def test_starts_do_not_depend_on_how_a_batch_is_split():
    made = student("edm")
    (whole,) = source(12, None).batch((0, "x"), 0.5)
    expected = start_of(made, whole)
    parts = [d for rank in (0, 1) for d in source(12, 2, rank, 2).batch((0, "x"), 0.5)]
    starts = [start_of(made, d) for d in parts]
    assert torch.cat([s.step for s in starts]).tolist() == expected.step.tolist()
    assert_close(torch.cat([s.x0 for s in starts]), expected.x0, rtol=0, atol=0)
    shared = {int(k) for d in parts for k in start_of(made, d, shared=True).step}
    assert len(shared) == 1


def test_each_step_comes_as_often_when_it_is_shared():
    made = student("edm")
    drawn = [int(start_of(made, source(3, None).batch((i, "x"), 0.5)[0], shared=True).step[0]) for i in range(300)]
    assert min(drawn.count(k) for k in range(3)) > 70  # of 100, standard deviation 8


def test_data_in_the_place_of_earlier_steps():
    made, (draw,) = student("edm", inputs="data"), source(6, None, data=True).batch((0, "x"), 0.5)
    start = start_of(made, draw)
    assert start.x0 is draw.x0
    assert not made.denoiser.network.seen


def test_a_student_of_one_step_draws_nothing_more():
    made = FewStepGenerator(Denoiser(Halved(), EDMSchedule(), "sample"), [2.5])
    (draw,) = source(6, None).batch((0, "x"), 0.5)
    assert start_of(made, draw) is None
    assert_close(generate(made, draw), made(draw.z), rtol=0, atol=0)
