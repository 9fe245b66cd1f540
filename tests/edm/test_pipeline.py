"""EDMPipeline on converted snapshots: the paper's sampler step by step, labels, generators, adapters and their scheduler."""

import itertools
import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.testing import assert_close

from pipelines.edm import EDMPipeline, EDMScheduler
from pipelines.students import load_student, save_edm_student

CHURN = {"S_churn": 5, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}


def algorithm_2(ref, z: Tensor, labels, steps: int, low: float, generators=None, S_churn=0.0, S_min=0.0, S_max=0.0, S_noise=1.0):
    """Karras et al. 2022, line by line, on the reference network in float64."""

    def nearest(t):
        if ref.precond != "iDDPMPrecond":
            return t
        levels = ref.iddpm_levels().double()
        return float(levels[(levels - t).abs().argmin()])

    rho, high = 7, 80.0
    times = [(high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)]
    times = [nearest(t) for t in times] + [0.0]
    x = z.double() * times[0]

    def slope(x, t):
        return (x - ref(x, torch.full((len(x),), t, dtype=torch.float64), labels)) / t

    for t, after in itertools.pairwise(times):
        hat = t
        if generators:
            gamma = min(S_churn / steps, math.sqrt(2) - 1) if S_min <= t <= S_max else 0.0
            hat = nearest(t + gamma * t)
            eps = torch.cat([torch.randn(1, *x.shape[1:], generator=g, dtype=torch.float64) for g in generators])
            x = x + math.sqrt(hat**2 - t**2) * S_noise * eps
        d = slope(x, hat)
        euler = x + (after - hat) * d
        x = euler if after == 0 else x + (after - hat) * (d + slope(euler, after)) / 2
    return x


def generators(n: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def one_hot(ref) -> Tensor | None:
    n = ref.k["label_dim"]
    return torch.eye(n, dtype=torch.float64)[[0, 1, n - 1]] if n else None


@pytest.fixture
def pipe(case, converted) -> EDMPipeline:
    made = EDMPipeline.from_pretrained(converted(case), dtype=torch.float64)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.slow
def test_heun_sampler(case, pipe, reference, stochastic):
    """Deterministic and with churn, at the noise levels that the network knows, from the same noise."""
    ref = reference(case)
    shape = (3, ref.k["img_channels"], *[ref.k["img_resolution"]] * 2)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low = pipe.scheduler.config.sigma_min
    more = ({"generators": generators()} | CHURN) if stochastic else {}
    expected = algorithm_2(ref, z, one_hot(ref), 3, low, **more) / 2 + 0.5
    more = ({"generator": generators()} | CHURN) if stochastic else {}
    made = pipe(3, one_hot(ref), 3, latents=z, output_type="pt", **more).images
    # iDDPM's levels are single precision, and the two tables of them are made in two ways
    assert_close(made, expected.clamp(0, 1), rtol=0, atol=2e-5 if case == "iddpm_adm" else 1e-8)
    assert ((made > 0) & (made < 1)).any()  # not all of it is cut off


@pytest.mark.parametrize("case", ["vp_ddpmpp"], scope="session")
def test_images_do_not_depend_on_their_batch(case, pipe):
    """A generator for each image; labels by number, by vector and missing are three ways to say the same."""
    labels = [4, 0, 5]
    together = pipe(3, labels, 3, generator=generators(), output_type="pt", **CHURN).images
    for i, generator in enumerate(generators()):
        alone = pipe(1, labels[i : i + 1], 3, generator=[generator], output_type="pt", **CHURN).images
        assert_close(alone, together[i : i + 1], rtol=0, atol=1e-9)
    vectors = torch.eye(6)[labels][:, :5]
    assert torch.equal(pipe(3, vectors, 3, generator=generators(), output_type="pt", **CHURN).images, together)
    null = pipe(3, [5, 5, 5], 3, generator=generators(), output_type="pt").images
    assert torch.equal(pipe(3, None, 3, generator=generators(), output_type="pt").images, null)


@pytest.mark.parametrize("case", ["vp_ddpmpp"], scope="session")
def test_batch_size_is_what_is_given(case, pipe):
    """As class-conditional pipelines have it: one image for each label."""
    z = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    calls = ({"class_labels": [0, 3, 1]}, {"latents": z}, {"generator": generators(4)}, {})
    assert [len(pipe(num_inference_steps=1, **call).images) for call in calls] == [3, 2, 4, 1]


@pytest.mark.parametrize("case", ["vp_ddpmpp"], scope="session")
def test_few_steps_of_a_student(case, pipe, reference):
    """x0 = D(x; sigma), then fresh noise at the next level; the levels stop before the lowest, where nothing would change."""
    scheduler = EDMScheduler.from_config(pipe.scheduler.config, sigma_max=2.5, sampler="renoise", num_inference_steps=1)
    grid = scheduler.sigmas(3)
    assert_close(scheduler.sigmas(1), torch.tensor([2.5], dtype=torch.float64))
    assert_close(grid, EDMScheduler.from_config(scheduler.config, sampler="heun").sigmas(4)[:3])
    teacher, pipe.scheduler = pipe.scheduler, scheduler
    made = pipe(2, [0, 1], 3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    pipe.scheduler = teacher
    generator, x0 = torch.Generator().manual_seed(0), 0
    for sigma in grid:
        x = x0 + sigma * torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
        x0 = reference(case)(x, sigma.expand(2), torch.eye(5, dtype=torch.float64)[:2])
    assert_close(made, (x0 / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["vp_ddpmpp"], scope="session")
def test_output_types_and_grids(case, pipe):
    pil = pipe(2, [0, 1], 2, generator=torch.Generator().manual_seed(0)).images
    array = pipe(2, [0, 1], 2, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)[0]
    assert [image.size for image in pil] == [(8, 8)] * 2
    assert array.shape == (2, 8, 8, 3)
    grid = pipe.scheduler.sigmas(2, 0.1, 9.0, 3.0)
    assert_close(grid, torch.tensor([9.0, 0.1], dtype=torch.float64))
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    ways = ({"sigmas": grid.tolist()}, {"num_inference_steps": 2, "sigma_min": 0.1, "sigma_max": 9.0, "rho": 3.0})
    images = [pipe(2, [0, 1], latents=z, output_type="pt", **way).images for way in ways]
    assert_close(images[0], images[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["vp_ddpmpp"], scope="session")
@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"class_labels": [0, 6]}, r"class_labels must be in \[0, 5\], where 5 is the null label; got \[0, 6\]"),
        ({"class_labels": [-1, 0]}, r"class_labels must be in \[0, 5\]"),
        ({"class_labels": [0]}, r"class_labels have shape \(1,\); expected \(2,\)"),
        ({"class_labels": torch.zeros(2, 4)}, r"class_labels have shape \(2, 4\); expected \(2, 5\)"),
        ({"sigmas": [2.0], "rho": 3.0}, "exclude each other; give one grid"),
        ({"sigma_max": 200.0}, "within what vp knows"),
        ({"latents": torch.zeros(2, 3, 8, 9)}, r"latents have shape \(2, 3, 8, 9\)"),
        ({"output_type": "jpg"}, "output_type is 'jpg'"),
    ],
)
def test_wrong_calls(case, pipe, call, match):
    with pytest.raises(ValueError, match=match):
        pipe(2, **{"num_inference_steps": 2} | call if "sigmas" not in call else call)


def test_unconditional_networks_take_no_labels(converted):
    pipe = EDMPipeline.from_pretrained(converted("edm_ddpmpp"))
    with pytest.raises(ValueError, match=r"unconditional network \(num_classes=0\)"):
        pipe(1, [0], 2)


# Adapters -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(converted, tmp_path_factory):
    """(folder of a LoRA student with random weights, its images from fixed noise)."""
    pipe = EDMPipeline.from_pretrained(converted("edm_ncsnpp"))
    pipe.scheduler = EDMScheduler.from_config(pipe.scheduler.config, sigma_max=2.5, sampler="renoise", num_inference_steps=1)
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=["conv0", "qkv", "affine"]), "mine")
    generator = torch.Generator().manual_seed(2)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("student") / "student"
    info = {"family": "edm", "weights": "lora", "base_model": str(converted("edm_ncsnpp")), "readout_sigma": 2.5}
    save_edm_student(folder, pipe, info, "mine")
    return folder, draw(pipe)


def draw(pipe: EDMPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(3, [0, 6, 7], generator=torch.Generator().manual_seed(4), output_type="pt").images


def test_adapter_and_scheduler_are_loaded_together(converted, student):
    """Bit for bit the student; unloaded, bit for bit the teacher; alpha is kept."""
    folder, expected = student
    pipe = EDMPipeline.from_pretrained(converted("edm_ncsnpp"))
    teacher = draw(pipe)
    pipe.load_lora_weights(folder)
    assert torch.equal(draw(pipe), expected)
    assert (teacher - expected).abs().max() > 0.1
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), teacher)
    assert pipe.scheduler.config.sampler == "heun"
    pipe.load_lora_weights(str(folder), adapter_name="again")
    assert pipe.get_active_adapters() == ["again"]
    pipe.fuse_lora()
    assert_close(draw(pipe), expected, rtol=0, atol=1e-4)


def test_folder_of_a_lora_student(student, converted, tmp_path):
    """It is a pipeline by itself: the base model is where its student.json says, or where one says it is."""
    folder, expected = student
    assert torch.equal(draw(EDMPipeline.from_pretrained(folder)), expected)
    assert torch.equal(draw(load_student(folder)), expected)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
        "scheduler",
        "student.json",
    ]
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "student.json").write_text(json.dumps({"family": "edm", "weights": "lora", "base_model": "gone/to/nowhere"}))
    with pytest.raises(FileNotFoundError, match=r"base model of .*moved' is not at 'gone/to/nowhere'; give base_model="):
        EDMPipeline.from_pretrained(moved)
    with pytest.raises(FileNotFoundError, match="give base_model="):
        load_student(moved)
    assert torch.equal(draw(load_student(moved, base_model=str(converted("edm_ncsnpp")))), expected)
    (moved / "student.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no student\.json to name its base model"):
        EDMPipeline.from_pretrained(moved)
    with pytest.raises(ValueError, match="base_model has no effect"):
        EDMPipeline.from_pretrained(converted("edm_ncsnpp"), base_model="x")


def test_weights_for_something_else(converted):
    pipe = EDMPipeline.from_pretrained(converted("edm_ncsnpp"))
    with pytest.raises(ValueError, match=r"holds no LoRA weights for a U-Net: expected keys that start with 'unet\.'"):
        pipe.load_lora_weights({"transformer.x.lora_A.weight": torch.zeros(2, 2)})
    pipe.scheduler = EDMScheduler.from_config(pipe.scheduler.config, sampler="renoise")
    with pytest.raises(ValueError, match="are for the 'heun' sampler"):
        pipe(1, S_churn=3)


def test_half_precision(converted):
    """A pipeline in bfloat16 draws nearly the same images: noise levels and the sampler's state stay exact."""
    images = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = EDMPipeline.from_pretrained(converted("edm_ddpmpp"), dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        images.append(pipe(2, latents=z, num_inference_steps=3, output_type="pt").images)
    assert images[1].dtype == torch.float32
    assert (images[0] - images[1]).abs().mean() < 0.02
