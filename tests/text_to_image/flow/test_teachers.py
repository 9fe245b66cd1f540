"""Teachers of flow matching against the stock pipelines: levels, text, guidance, latents, the one step, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxPipeline,
    LCMScheduler,
    PNDMScheduler,
)
from pydantic import TypeAdapter
from torch import Tensor
from torch.testing import assert_close

from pipelines import kinds
from pipelines import text_to_image as t2i
from pipelines.adapters import Whole
from pipelines.common.errors import UserError
from pipelines.denoiser import Denoiser, FewStepGenerator
from pipelines.noise import EDMSchedule, RectifiedFlowSchedule, VPSchedule, add_noise, score, to_eps, to_x0
from pipelines.students import ONE_STEP_TOLERANCE
from trainers.config.level_range import check_levels
from trainers.config.levels import Levels
from trainers.config.run import DistillConfig

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a dog on a mat, in the rain", ""]
ONE_STEP = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture
def stock(tiny):
    """stock(kind): what a user gets from diffusers alone."""

    def load(kind: str) -> DiffusionPipeline:
        none = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3 without t5" else {}
        pipe = DiffusionPipeline.from_pretrained(tiny(kind), **none)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture
def ours(tiny):
    """ours(kind, **options): the pipeline as this project loads it."""
    return lambda kind, **options: t2i.load_pipeline(str(tiny(kind)), **options)


@pytest.fixture
def copied(tiny, tmp_path):
    """copied(kind): a folder that may be damaged."""
    return lambda kind: Path(shutil.copytree(tiny(kind), tmp_path / "pipeline"))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# Levels --------------------------------------------------------------------------------------------------------------------


def test_straight_lines(randn):
    """x_t = (1 - t) x0 + t eps; from v = eps - x0 come back x0 = x_t - t v and eps, also at t = 1, where x_t is all noise."""
    x0, eps, t = randn(3, 2, 5, 7), randn(3, 2, 5, 7), torch.tensor([1.0, 0.25, 0.01], dtype=torch.float64)
    level, wide = RectifiedFlowSchedule().level(t), t[:, None, None, None]
    x_t = add_noise(x0, eps, level)
    assert_close(x_t, x0 + wide * (eps - x0), rtol=1e-14, atol=1e-14)
    found = to_x0(eps - x0, x_t, level, "flow")
    assert_close(found, x0, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0], x_t[0] - (eps - x0)[0])
    assert_close(to_eps(x0, x_t, level), eps, rtol=1e-11, atol=1e-11)
    assert_close(score(x0, x_t, level), -eps / wide, rtol=1e-11, atol=1e-11)


def levels(**section):
    return TypeAdapter(Levels).validate_python(section)


def test_time_shift_and_logit_normal():
    """diffusers' own shift of its sigmas; the distribution function of logit-normal levels, shifted or not."""
    u = (torch.arange(997, dtype=torch.float64) + 0.5) / 997
    for shift in (1.0, 3.0, 0.4):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1])
        drawn = levels(name="uniform", low=1e-9, high=1.0, shift=shift).sampler(1)(torch.tensor([0.9, 0.5, 0.1]), 0.0)
        assert_close(drawn, scheduler.sigmas[:3], rtol=1e-6, atol=1e-7)
        t = levels(name="logit_normal", mean=0.3, std=1.7, shift=shift).sampler(1)(u, 0.0)
        # P(t' < x) where t' / (1 - t') = s t / (1 - t): a shift of the logit by ln s
        normal = (torch.log(t / (1 - t)) - math.log(shift) - 0.3) / 1.7
        assert_close(torch.special.ndtr(normal), u, rtol=0, atol=1e-10)
    assert torch.equal(levels(name="uniform", low=0.2, high=0.9).sampler(1)(u, 0.0), 0.2 + u * 0.7)


def distillation(section: dict, **more) -> DistillConfig:
    objective = {"name": "varflow", "levels": section} | more
    raw = {"output_dir": "x", "steps": 7, "batch_size": 2, "teacher": {"path": "x"}, "student": {"optimizer": {"lr": 1e-3}}}
    return DistillConfig.model_validate(raw | {"objective": objective, "data": {"name": "digits"}})


UNIFORM = {"name": "uniform", "low": 0.02, "high": 0.98}
VP = VPSchedule(torch.linspace(0.999, 0.005, 1000))
REFUSED = {
    "shift, timesteps": (
        {"name": "uniform", "low": 20, "high": 980, "shift": 3.0},
        VP,
        r"levels\.shift: 3 is for teachers of flow",
    ),
    "shift, sigmas": (
        {"name": "log_normal", "shift": 3.0},
        EDMSchedule(0.0, math.inf),
        r"levels\.shift: 3 is for teachers of flow",
    ),
    "logit-normal, timesteps": ({"name": "logit_normal"}, VP, r"levels\.name: 'logit_normal' is for teachers of flow matching"),
    "karras": (
        {"name": "karras", "low": 0.1, "high": 0.9},
        RectifiedFlowSchedule(),
        r"levels\.name: 'karras' draws noise levels",
    ),
    "timesteps": (
        {"name": "uniform", "low": 20, "high": 980},
        RectifiedFlowSchedule(),
        r"levels\.high: 980 is outside .*, 0 to 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_levels_of_others_are_refused(name):
    section, schedule, message = REFUSED[name]
    if name == "timesteps":
        section = section | {"low": 0.5}
    with pytest.raises(UserError, match=message):
        check_levels(distillation(section), schedule)


def test_weights_at_the_ends():
    """alpha = 0 at t = 1: a weight that divides by it is refused by name, and is not where levels end before."""
    flow, whole = RectifiedFlowSchedule(), UNIFORM | {"high": 1.0}
    with pytest.raises(UserError, match=r"objective\.weighting: 'dmd' is not finite at t=1, which objective\.levels draws"):
        check_levels(distillation(whole, weighting="dmd"), flow)
    for section, weighting in ((whole, "sigma2"), (UNIFORM, "dmd"), ({"name": "logit_normal", "shift": 5.0}, "dmd")):
        check_levels(distillation(section, weighting=weighting), flow)


# Text ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd35", "sd3 without t5", "flux dev"])
def test_text_is_the_stock_pipelines(kind, ours, stock):
    """With the network left out, as when a cache is made: T5's zeros are then as wide as its settings say."""
    pipe, without = stock(kind), ours(kind, without=["transformer", "vae"])
    own, options = kinds.kind_of(without), {"device": CPU, "num_images_per_prompt": 1}
    with torch.no_grad():
        if kind == "flux dev":
            embeds, pooled, _ = pipe.encode_prompt(PROMPTS, None, **options)
            null, null_pooled, _ = pipe.encode_prompt([""], None, **options)
        else:
            embeds, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, None, None, **options)
    config = pipe.transformer.config
    condition = own.encode_prompts(without, PROMPTS, (16, 16), CPU, config)
    nothing = own.null_condition(without, None, CPU, config)
    assert without.transformer is None
    expected = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    expected_null = {"encoder_hidden_states": null[0], "pooled_projections": null_pooled[0]}
    for key, value in expected.items():
        assert_close(condition[key], value, rtol=1e-5, atol=1e-6)
        assert_close(nothing[key], expected_null[key], rtol=1e-5, atol=1e-6)
    assert bool((condition["encoder_hidden_states"][:, 77:] == 0).all()) == (kind == "sd3 without t5")
    if kind == "sd3 without t5":
        with pytest.raises(ValueError, match="has no width: give the settings"):
            own.encode_prompts(without, PROMPTS, (16, 16), CPU)


def test_text_of_different_lengths(ours, stock):
    """Z-Image's pipeline has a row for each prompt, of its own length: ours are these, zeros behind them, and their lengths."""
    pipe, without = stock("z-image"), ours("z-image", without=["transformer", "vae"])
    with torch.no_grad():
        rows, null = pipe.encode_prompt(list(PROMPTS), CPU)
    own = kinds.kind_of(without)
    condition, nothing = own.encode_prompts(without, PROMPTS, (16, 16), CPU), own.null_condition(without, None, CPU)
    assert len({len(row) for row in rows}) == 3
    for i, row in enumerate(rows):
        assert condition["attention_mask"][i].tolist() == [1] * len(row) + [0] * (512 - len(row))
        assert_close(condition["encoder_hidden_states"][i, : len(row)], row, rtol=1e-5, atol=1e-6)
        assert not condition["encoder_hidden_states"][i, len(row) :].any()
    assert_close(nothing["encoder_hidden_states"][: len(null[0])], null[0], rtol=1e-5, atol=1e-6)
    assert nothing["attention_mask"].sum() == len(null[0])


def test_overlong_prompts(ours):
    """Those that the longest reader cuts: T5 reads 256 or 512 tokens, CLIP alone 77; every character is a token."""
    prompts = ["a" * n for n in (75, 76, 254, 255, 256, 510, 511, 512)]
    pipe = ours("z-image", without=["transformer", "vae"])
    around = len(pipe.tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n").input_ids)
    assert t2i.overlong(pipe, ["a" * (512 - around), "a" * (513 - around)]) == [1]
    cut = {"sd3": 256, "sd3 without t5": 77, "flux dev": 512}
    for kind, most in cut.items():
        pipe = ours(kind, without=["transformer", "vae"])
        lengths = [n + (1 + 1 if most != 77 else 2) for n in (75, 76, 254, 255, 256, 510, 511, 512)]  # T5 begins with a space
        assert t2i.overlong(pipe, prompts) == [i for i, n in enumerate(lengths) if n > most]


# The network in its pipeline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [1.0, 4.5])
@pytest.mark.parametrize("kind", ["sd3", "sd35", "sd3 without t5", "flux dev", "flux schnell", "z-image"])
def test_one_step_of_the_stock_pipeline_is_x0(kind, w, ours, stock, randn):
    """From prompt to latents and image, to 1e-5 of the largest: SD3's own guidance on v is ours on x0; Flux dev is told w; the
    teacher's own scheduler does it too, whatever its shift."""
    mine, pipe, z = ours(kind), stock(kind), randn(3, 3, 8, 8).float()
    own, config = kinds.kind_of(mine), pipe.transformer.config
    network = Whole(mine.transformer, own.anatomy(config, w))
    guided = own.guidance(config) == "null"
    null = own.null_condition(mine, None, CPU, config) if guided else None
    student = FewStepGenerator(t2i.denoiser(mine, network, w if guided else 1.0, null), [1.0])
    with torch.no_grad():
        x0 = student(z, own.encode_prompts(mine, PROMPTS, (16, 16), CPU))
    none = 0.0 if kind == "z-image" else 1.0  # which counts from there
    options = ONE_STEP | {"latents": own.packed(z), "guidance_scale": none + w - 1.0}
    assert relative(own.unpacked(pipe(list(PROMPTS), **options).images, (3, 8, 8)), x0) < 1e-5
    pipe.scheduler = own.student_scheduler(pipe.scheduler, [1.0])
    assert relative(own.unpacked(pipe(list(PROMPTS), **options).images, (3, 8, 8)), x0) < 1e-5
    images = pipe(list(PROMPTS), **options | {"output_type": "pt"}).images
    assert_close(t2i.decode_latents(mine.vae, x0) / 2 + 0.5, images, rtol=0, atol=1e-5)
    if kind != "flux schnell" and w != 1:  # it counts
        assert relative(own.unpacked(pipe(list(PROMPTS), **options | {"guidance_scale": none}).images, (3, 8, 8)), x0) > 1e-4


def test_guidance_by_hand(ours, randn):
    """SD3: x0 of v_null + w (v - v_null) from two calls of the stock network, at any level."""
    mine, w = ours("sd3"), 3.7
    network = mine.transformer.double()
    own, x, t = kinds.kind_of(mine), randn(3, 3, 6, 10), torch.tensor([1.0, 0.4, 0.05], dtype=torch.float64)
    condition = {"encoder_hidden_states": randn(3, 11, 40), "pooled_projections": randn(3, 22)}
    null = {k: v[0].flip(-1) for k, v in condition.items()}
    v = network(x, timestep=1000 * t, **condition).sample
    v_null = network(x, timestep=1000 * t, **{k: n.expand_as(condition[k]) for k, n in null.items()}).sample
    guided = t2i.denoiser(mine, Whole(network, own.anatomy(network.config, w)), w, null)
    x0 = guided(x, guided.schedule.level(t), condition)
    assert_close(x0, x - t[:, None, None, None] * (v_null + w * (v - v_null)), rtol=1e-9, atol=1e-9)


def test_guidance_that_keeps_the_norm(ours, randn):
    """As Qwen-Image's pipeline has it, on packed tokens of 2x2 latents: comb |cond| / |comb| over the last axis."""
    mine, w = ours("sd3"), 3.7
    network = mine.transformer.double()
    own, x, t = kinds.kind_of(mine), randn(3, 3, 6, 10), torch.tensor([1.0, 0.4, 0.05], dtype=torch.float64)
    condition = {"encoder_hidden_states": randn(3, 11, 40), "pooled_projections": randn(3, 22)}
    null = {k: v[0].flip(-1) for k, v in condition.items()}

    def tokens(given: dict[str, Tensor]) -> Tensor:
        return FluxPipeline._pack_latents(network(x, timestep=1000 * t, **given).sample, 3, 3, 6, 10)

    cond, neg = tokens(condition), tokens({k: n.expand_as(condition[k]) for k, n in null.items()})
    comb = neg + w * (cond - neg)
    comb = comb * (torch.norm(cond, dim=-1, keepdim=True) / torch.norm(comb, dim=-1, keepdim=True))
    v = FluxPipeline._unpack_latents(comb, 6, 10, 1)
    guided = t2i.denoiser(mine, Whole(network, own.anatomy(network.config, w)), w, null, own.anatomy(network.config, w).side)
    x0 = guided(x, guided.schedule.level(t), condition)
    assert_close(x0, x - t[:, None, None, None] * v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), True),
        (lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, stochastic_sampling=True), True),
        (lambda: FlowMatchLCMScheduler(shift=5.0), True),
        (lambda: FlowMatchHeunDiscreteScheduler(), True),
        (lambda: FlowMatchEulerDiscreteScheduler(shift_terminal=0.02), False),
        (lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), False),
        (lambda: LCMScheduler(), False),
        (lambda: PNDMScheduler(), False),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_one_step_error(make, exact):
    own = kinds.kind_named("sd3")
    error = t2i.steps_error(own, make(), Denoiser(None, RectifiedFlowSchedule(), "flow", 1.0), [1.0])
    assert error < 1e-6 if exact else error > 10 * ONE_STEP_TOLERANCE


FOUR = [1.0, 0.9, 0.75, 0.5]


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), True),
        (lambda: FlowMatchLCMScheduler(), True),
        (lambda: FlowMatchEulerDiscreteScheduler(), False),  # goes on along the line
        (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True), False),  # shifts what it is given
        (lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, stochastic_sampling=True), False),
        (lambda: FlowMatchHeunDiscreteScheduler(), False),
        (lambda: LCMScheduler(), False),
    ],
)
def test_error_of_four_steps(make, exact):
    error = t2i.steps_error(kinds.kind_named("flux"), make(), Denoiser(None, RectifiedFlowSchedule(), "flow", 1.0), FOUR)
    assert error < 1e-5 if exact else error > 10 * ONE_STEP_TOLERANCE


def test_levels_of_students():
    """Even steps under the teacher's shift, of 1024 pixels where it depends on them; the stored scheduler makes them."""
    own = kinds.kind_named("sd3")
    for options, expected in (
        ({"shift": 3.0}, FOUR),
        ({}, [1.0, 0.75, 0.5, 0.25]),
        ({"use_dynamic_shifting": True, "max_shift": math.log(3)}, FOUR),
    ):
        teacher = FlowMatchEulerDiscreteScheduler(**options)
        assert own.student_levels(teacher, 4) == expected
        scheduler = own.student_scheduler(teacher, expected)
        assert own.call(expected, scheduler) == {"sigmas": expected}
        assert t2i.steps_error(own, scheduler, Denoiser(None, RectifiedFlowSchedule(), "flow", 1.0), expected) < 1e-5


def test_scheduler_that_is_stored(tmp_path):
    """The teacher's shift is kept, what spoils a single step is not, also after a round trip to disk."""
    spoilt = {"shift": 3.0, "shift_terminal": 0.02, "use_karras_sigmas": True, "stochastic_sampling": True}
    teacher = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, **spoilt)
    kinds.kind_named("sd3").student_scheduler(teacher, [1.0]).save_pretrained(tmp_path)
    stored = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert stored.config.shift_terminal is None
    assert not stored.config.use_karras_sigmas
    assert (stored.config.shift, stored.config.max_shift, stored.config.use_dynamic_shifting) == (3.0, 0.9, True)
    stored.set_timesteps(1, mu=0.7)
    assert stored.sigmas.tolist() == [1.0, 0.0]


def test_latent_shapes(ours):
    """Of square images at the network's own size or the one asked for; multiples of a square of latents."""
    sd3, flux = kinds.kind_named("sd3"), kinds.kind_named("flux")
    config = {"in_channels": 16, "sample_size": 128, "patch_size": 2, "pos_embed_max_size": 192}
    assert sd3.latent_shape(config, 8, None) == (16, 128, 128)
    assert sd3.latent_shape(config, 8, 528) == (16, 66, 66)
    assert flux.latent_shape({"in_channels": 64}, 8, None) == (16, 128, 128)
    for kind in (sd3, flux):
        for size in (520, 516):
            with pytest.raises(UserError, match=rf"data\.image_size={size} must be a multiple of 16 for this teacher"):
                kind.latent_shape(config, 8, size)
    with pytest.raises(UserError, match=r"data\.image_size=4096: this teacher has places for 3072 pixels a side"):
        sd3.latent_shape(config, 8, 4096)


def test_packed_as_flux_packs(randn):
    z, own = randn(2, 3, 8, 8), kinds.kind_named("flux")
    assert torch.equal(own.packed(z), FluxPipeline._pack_latents(z, 2, 3, 8, 8))
    assert torch.equal(own.unpacked(own.packed(z), (3, 8, 8)), z)


# What is refused -----------------------------------------------------------------------------------------------------------


def no_t5(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_3")


def other_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    PNDMScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])


def lacks_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "transformer" / WEIGHTS
    save_file({k: v for k, v in load_file(file).items() if k != "proj_out.bias"}, file)


SCHEDULER = "scheduler/scheduler_config.json"
WRONG = {
    "t5": (
        "sd3",
        no_t5,
        r"has no text_encoder_3/ \(T5\), which its model_index\.json asks for; copy it, or write .*: \[null, null\]",
    ),
    "t5 of flux": (
        "flux dev",
        lambda f: edit(f / "model_index.json", text_encoder_2=[None, None]),
        r"has no text_encoder_2 \(T5\), without which it cannot read prompts",
    ),
    "scheduler": (
        "sd3",
        other_scheduler,
        r"its scheduler is PNDMScheduler, which is none of flow matching; expected one of FlowM",
    ),
    "timesteps": (
        "flux dev",
        lambda f: edit(f / SCHEDULER, num_train_timesteps=500),
        r"num_train_timesteps is 500, and networks",
    ),
    "inverted": ("sd3", lambda f: edit(f / SCHEDULER, invert_sigmas=True), r"invert_sigmas is set"),
    "many levels": (
        "sd3",
        lambda f: edit(f / SCHEDULER, num_train_timesteps=10**9),
        r"num_train_timesteps is 1000000000, expected",
    ),
    "lost tensor": (
        "sd35",
        lacks_a_tensor,
        r"the weights of transformer/ lack 1 tensors of its config\.json, the first 'proj_out",
    ),
    "tokenizer": (
        "sd3",
        lambda f: [file.unlink() for file in (f / "tokenizer_2").iterdir()],
        r"tokenizer_2 knows 2 tokens, its text encoder 190; files of tokenizer_2/ are missing",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_folders_are_named(name, copied):
    """Each one clear message that names the folder."""
    kind, damage, message = WRONG[name]
    folder = copied(kind)
    damage(folder)
    with pytest.raises((FileNotFoundError, UserError), match=message) as raised:
        t2i.load_pipeline(str(folder))
    assert str(folder) in str(raised.value)


def test_t5_that_is_not_asked_for(copied, stock):
    """model_index.json says null: loaded as the stock pipeline with zeros, and what is left out is not looked for."""
    folder = copied("sd3")
    no_t5(folder)
    assert t2i.load_pipeline(str(folder), without=["text_encoder_3", "tokenizer_3"]).text_encoder_3 is None
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    pipe, reference = t2i.load_pipeline(str(folder)), stock("sd3")
    reference.text_encoder_3 = None
    expected, *_ = reference.encode_prompt(PROMPTS, None, None, device=CPU, do_classifier_free_guidance=False)
    found = kinds.kind_of(pipe).encode_prompts(pipe, PROMPTS, (16, 16), CPU)["encoder_hidden_states"]
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_registry():
    """Every kind that student.json may name has its own pipeline, and a module with the kind."""
    pipelines = [entry.pipeline for entry in kinds.KINDS.values()]
    assert len(set(pipelines)) == len(pipelines)
    for name, entry in kinds.KINDS.items():
        assert kinds.family_of(entry.pipeline) == name
        assert hasattr(__import__("diffusers"), entry.pipeline)
        assert isinstance(kinds.kind_named(name), kinds.Kind)
    assert kinds.family_of("PixArtSigmaPipeline") is None
