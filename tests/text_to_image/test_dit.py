"""DiT: class-conditional latents, a learned variance beside the noise, a pipeline that takes neither latents nor timesteps."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from eval.images.sampler import load_sampler
from pipelines.adapters import AdapterHead, SharedNetwork
from pipelines.common.config import load_config
from pipelines.common.errors import UserError
from pipelines.dit import KIND
from pipelines.students import load_student
from pipelines.text_to_image import encode_images
from scripts import demo, export_kohya
from trainers.config.run import DistillConfig
from trainers.data.examples import to_unit
from trainers.engine.draws import derive_seed
from trainers.families import family_for

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

CLASSES, SIDE = 1000, 6  # DiTPipeline takes 1000 for no class; latents of 12x12 pixels
LORA, ADAM = {"rank": 3, "alpha": 2.0}, {"lr": 1e-2}
LEVELS = {"name": "uniform", "low": 20.0, "high": 980.0}
OBJECTIVES = {
    "varflow": {"name": "varflow", "levels": LEVELS, "weighting": "sigma2"},
    "diff_instruct": {
        "name": "diff_instruct",
        "levels": LEVELS,
        "fake_score": {"optimizer": ADAM, "lora": LORA, "levels": LEVELS, "weighting": "snr"},
    },
    "vardiu": {
        "name": "vardiu",
        "levels": LEVELS,
        "pool": "own",
        "posterior": {"network": "adapter", "lora": LORA, "covariance": "learned", "warmup_updates": 1, "optimizer": ADAM},
    },
}
# conv_in, one block with attention and one without
SMALL = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_levels": [1]}


def tiny_dit(folder: Path, variance: bool = True, classes: int = CLASSES) -> Path:
    """In 6x6 latents of 3 channels; facebook's DiT-XL-2-256 in everything but size."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6 if variance else 3,
        num_layers=2,
        attention_bias=True,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=classes,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=3,
        sample_size=12,
        scaling_factor=0.18215,
    )
    noise = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
    names = {"0": "tench, Tinca tinca", "1": "goldfish"}
    DiTPipeline(network, vae, DDIMScheduler(**noise), id2label=names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_dit(tmp_path_factory.mktemp("dit") / "pipeline")


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory) -> Path:
    """Of three classes, as `images`."""
    return tiny_dit(tmp_path_factory.mktemp("dit") / "pipeline", classes=3)


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of pictures of three classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "emu"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def recipe(teacher, small_teacher, images, tmp_path):
    def make(objective: str, **more) -> dict:
        path = str(small_teacher if objective == "varflow" else teacher)
        data = {"name": "folder", "path": str(images), "image_size": 12, "labels": True}
        made = {
            "output_dir": str(tmp_path / objective),
            "teacher": {"path": path, "guidance_scale": 1.0 if objective == "varflow" else 2.0},
            "student": {"lora": LORA, "optimizer": ADAM},
            "objective": OBJECTIVES[objective],
            "steps": 3,
            "batch_size": 4,
            "log_every": 1,
        }
        return made | ({"data": data} if objective == "varflow" else {}) | more

    return make


@pytest.fixture
def build(written):
    """build(config): the family of a configuration."""

    def make(config: dict):
        parsed = load_config(DistillConfig, written(config)[1], [])
        return family_for(parsed)(parsed, Accelerator())

    return make


# Roles --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def network(teacher) -> DiTTransformer2DModel:
    return DiTTransformer2DModel.from_pretrained(teacher, subfolder="transformer").double().eval().requires_grad_(False)


def test_roles_are_networks_of_their_own(network, fill, randn):
    """Noise alone of what the stock network puts out, bit for bit; each adapter that of plain peft; gradients to 1e-9, blocks
    recomputed or not."""
    x, t, labels = randn(2, 3, SIDE, SIDE), torch.tensor([999.0, 301.0], dtype=torch.float64), torch.tensor([7, CLASSES])
    stock = copy.deepcopy(network)
    shared = SharedNetwork(network, KIND.anatomy(network.config, 1.0))
    assert torch.equal(shared.teacher()(x, t, class_labels=labels), stock(x, t, class_labels=labels).sample[:, :3])
    config = {
        name: LoraConfig(r=2, lora_alpha=alpha, target_modules=list(KIND.layers))
        for name, alpha in (("student", 1.0), ("aux", 3.0))
    }
    roles = {name: fill(shared.add_adapter(name, made)) for name, made in config.items()}
    assert torch.equal(shared.teacher()(x, t, class_labels=labels), stock(x, t, class_labels=labels).sample[:, :3])
    expected = {}
    for name, role in roles.items():
        alone = inject_adapter_in_model(config[name], copy.deepcopy(stock), name)
        own = {n.replace(f".{name}.", "."): p for n, p in alone.named_parameters() if ".lora_" in n}
        assert own.keys() == {n.removeprefix("adapter.") for n, _ in role.named_parameters()}
        for n, p in role.named_parameters():
            own[n.removeprefix("adapter.")].data = p.data.double()
        out = alone(x, t, class_labels=labels).sample[:, :3]
        assert torch.equal(role(x, t, class_labels=labels), out)
        expected[name] = dict(zip(own, torch.autograd.grad(out.square().sum(), list(own.values())), strict=True))
    for checkpointing in (False, True):
        if checkpointing:
            roles["student"].enable_gradient_checkpointing()
        for name, role in roles.items():
            out = role(x, t, class_labels=labels)
            with shared.running(None):
                out.square().sum().backward(inputs=list(role.parameters()))
            for n, p in role.named_parameters():
                assert_close(p.grad, expected[name][n.removeprefix("adapter.")], rtol=0, atol=1e-9)
                p.grad = None


@pytest.mark.parametrize("variance", [True, False])
def test_head_in_the_place_of_the_last_layer(variance, tmp_path, fill, randn):
    """With the rows that it replaces as its own last channels, those maps are the predicted noise, whether a variance is beside
    it or not."""
    network = DiTTransformer2DModel.from_pretrained(tiny_dit(tmp_path, variance), subfolder="transformer").double()
    nn.init.normal_(network.proj_out_2.bias)
    shared = SharedNetwork(network, KIND.anatomy(network.config, 1.0))
    aux = fill(shared.add_adapter("aux", LoraConfig(r=2, target_modules=list(KIND.layers))))
    given = randn(2, 3, SIDE, SIDE), torch.tensor([999.0, 3.0], dtype=torch.float64)
    labels, head = torch.tensor([5, 0]), AdapterHead(aux, 5).double()
    assert head.replaced.out_features == 3 * 2 * 2
    with torch.no_grad():
        for mine, theirs in zip(head.conv_out.parameters(), head.replaced.parameters(), strict=True):
            mine[-len(theirs) :] = theirs
    maps = head(*given, class_labels=labels)
    assert torch.equal(maps[:, :2], torch.zeros(2, 2, SIDE, SIDE).double())
    assert_close(maps[:, 2:], aux(*given, class_labels=labels), rtol=1e-12, atol=1e-12)


def test_guided_teacher_is_the_stock_pipelines(recipe, build, teacher, randn):
    """At every class, what DiTPipeline makes of two calls: the class 1000 stands for none."""
    made = build(recipe("diff_instruct"))
    x_t, t = randn(2, 3, SIDE, SIDE).float(), torch.tensor([700, 700])
    labels = torch.tensor([3, 990])
    stock = DiTPipeline.from_pretrained(teacher)
    with torch.no_grad():
        both = stock.transformer(torch.cat([x_t, x_t]), timestep=t.repeat(2), class_labels=torch.tensor([3, 990, 1000, 1000]))
        cond, null = both.sample[:, :3].chunk(2)
        noise = null + 2.0 * (cond - null)
        abar = stock.scheduler.alphas_cumprod[700]
        expected = (x_t - (1 - abar).sqrt() * noise) / abar.sqrt()
        level = made.teacher.schedule.level(t.float())
        assert_close(made.teacher(x_t, level, {"class_labels": labels}), expected, rtol=1e-4, atol=1e-4)


# Students -----------------------------------------------------------------------------------------------------------------------


def randomised(made):
    """Its student with large weights in the adapter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.student.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


STOCK = """
from peft import PeftModel
pipe = diffusers.DiTPipeline.from_pretrained(teacher)
wrapped = PeftModel.from_pretrained(pipe.transformer, student)
if fused:
    wrapped.merge_and_unload()
pipe.scheduler = diffusers.LCMScheduler.from_pretrained(student, subfolder="scheduler")
decode = pipe.vae.decode
def seen(latents):
    out["x0"] = latents * pipe.vae.config.scaling_factor
    return decode(latents)
pipe.vae.decode = seen
torch.manual_seed(11)
pipe(labels, num_inference_steps=n, guidance_scale=1.0, output_type="pt")
"""
READOUTS = [{"readout_t": 699}, {}, {"steps": 2}, {"steps": 4}, {"steps": 8}, {"steps": [699, 524, 349, 174]}]


@pytest.mark.parametrize("student", READOUTS, ids=str)
def test_stock_diffusers_draws_the_trainers_x0(student, recipe, build, elsewhere, tmp_path):
    """In a process that knows diffusers and peft alone, to 1e-5 of the largest; fused too, and by load_student."""
    made = randomised(build(recipe("diff_instruct", sample_every=1, student={"lora": LORA, "optimizer": ADAM} | student)))
    made.export(tmp_path / "student", made.facts | {"base_model": made.config.teacher.path})
    levels, labels = made.student.levels, [3, 999, 0]
    assert list(levels) == (
        [699]
        if "readout_t" in student
        else student.get("steps")
        if isinstance(student.get("steps"), list)
        else [999 - i * 1000 // student.get("steps", 1) for i in range(student.get("steps", 1))]
    )
    torch.manual_seed(11)
    z = torch.stack([torch.randn(3, 3, SIDE, SIDE) for _ in levels])
    with torch.no_grad():
        expected = made.student.sample(z, {"class_labels": torch.tensor(labels)})
    run = type("Run", (), {"folder": tmp_path, "teacher": made.config.teacher.path, "z": z})
    for fused in (False, True):
        got = elsewhere(run, STOCK, labels=labels, n=len(levels), fused=fused)["x0"]
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    pipe = load_student(tmp_path / "student")
    assert type(pipe) is DiTPipeline
    half = load_student(tmp_path / "student", dtype=torch.bfloat16)
    assert {p.dtype for n, p in half.transformer.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"pipe([207], num_inference_steps={len(levels)}, guidance_scale=1.0)" in card
    assert 'PeftModel.from_pretrained(pipe.transformer, "student").merge_and_unload()' in card
    torch.manual_seed(11)
    drawn = pipe(labels, num_inference_steps=len(levels), guidance_scale=1.0, output_type="np").images
    with torch.no_grad():
        assert_close(torch.from_numpy(drawn).permute(0, 3, 1, 2), made.decode(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_run(objective, recipe, distil):
    """Trained by the command, stopped and resumed: the same bits; loaded, it draws what the run showed; measured without text."""
    config = recipe(objective, sample_every=3, num_samples=4, checkpoint_every=2)
    whole = distil(config)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(np.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    part = distil(config | {"output_dir": str(whole.parent / "part")}, "steps=2")
    distil(config | {"output_dir": str(whole.parent / "part")}, "resume=latest")
    one, other = (load_file(folder / "student" / "adapter_model.safetensors") for folder in (whole, part))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert any(bool(v.any()) for k, v in one.items() if "lora_B" in k)
    info = json.loads((whole / "student" / "student.json").read_text())
    assert (info["family"], info["image_size"], info["readout_t"]) == ("dit", 12, 999)
    sampler = load_sampler(str(whole))
    assert (sampler.takes, sampler.num_classes) == ("class_labels", 3 if objective == "varflow" else CLASSES)
    drawn = sampler(range(3), 0, labels=[1, 2, 0])
    assert drawn.shape == (3, 3, 12, 12)
    assert torch.equal(sampler(range(1, 2), 0, labels=[2]), drawn[1:2])
    added = load_sampler(config["teacher"]["path"], lora=str(whole))
    assert torch.equal(added(range(3), 0, labels=[1, 2, 0]), drawn)


def test_images_of_several_steps_depend_on_their_own_seed(recipe, build, tmp_path):
    """Noise between steps too, whatever else is in the batch; guided teachers as well."""
    made = randomised(build(recipe("diff_instruct", student={"lora": LORA, "optimizer": ADAM, "steps": 3})))
    made.export(tmp_path / "student", made.facts | {"base_model": made.config.teacher.path})
    for guidance in (None, 2.0):
        sampler = load_sampler(str(tmp_path / "student"), guidance_scale=guidance)
        together = sampler(range(3), 0, labels=[4, 5, 6])
        torch.manual_seed(1)
        assert torch.equal(together[2:], sampler([2], 0, labels=[6]))


@pytest.mark.parametrize("objective", ["vardiu", "diff_instruct"])
@pytest.mark.slow
def test_a_second_network_on_the_last_third(objective, recipe, build):
    """It starts as the teacher, on what its first block has made: the network asks that block for its embedding too."""
    config = recipe(objective)
    second = "posterior" if objective == "vardiu" else "fake_score"
    config["objective"] = config["objective"] | {second: config["objective"][second] | {"network": "shared"}}
    made = build(config)
    level = made.teacher.schedule.level(torch.tensor([801.0, 23.0]))
    x_t, condition = torch.randn(2, 3, SIDE, SIDE), {"class_labels": torch.tensor([3, 999])}
    section = getattr(made.config.objective, second)
    with torch.no_grad():
        _, features = made.teacher(x_t, level, condition, return_features=True)
        own = made.student.denoiser(x_t, level, condition)  # a fresh adapter: the teacher without guidance
        if objective == "vardiu":
            x0 = made.posterior(section, with_mean=True)(x_t, level, condition, features).x0_mean
        else:
            x0 = made.fake_score(section)(x_t, level, features)
    assert_close(x0, own, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_sharded_weights_do_not_show(recipe, whole_and_sharded):
    """FSDP2 on two processes, with recomputed blocks."""
    config = recipe("vardiu", steps=2, checkpoint_every=2, gradient_checkpointing=True)
    smooth = ADAM | {"betas": [0.0, 0.99], "eps": 1e-2}  # rounding must not become a full step of random sign
    config["student"] = {"lora": LORA, "optimizer": smooth}
    posterior = OBJECTIVES["vardiu"]["posterior"] | {"optimizer": smooth}
    whole_and_sharded(config | {"objective": OBJECTIVES["vardiu"] | {"posterior": posterior}})


def test_whole_student(recipe, build, tmp_path):
    """No LoRA: a network in transformer/, in the stock pipeline."""
    made = randomised(build(recipe("diff_instruct", sample_every=1, student={"optimizer": ADAM, "readout_t": 700})))
    made.export(tmp_path / "student", made.facts | {"base_model": made.config.teacher.path})
    assert "pipe.transformer = DiTTransformer2DModel.from_pretrained" in (tmp_path / "student" / "README.md").read_text()
    torch.manual_seed(3)
    drawn = load_student(tmp_path / "student")([1], num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    torch.manual_seed(3)
    with torch.no_grad():
        x0 = made.student.sample(torch.randn(1, 1, 3, SIDE, SIDE), {"class_labels": torch.tensor([1])})
        assert_close(torch.from_numpy(drawn).permute(0, 3, 1, 2), made.decode(x0), rtol=0, atol=1e-4)


def test_small_posterior_reads_the_class(recipe, build, randn):
    config = recipe("vardiu")
    config["objective"] = config["objective"] | {"posterior": config["objective"]["posterior"] | {"network": SMALL, "lora": None}}
    config["objective"]["posterior"].pop("lora")
    made = build(config)
    posterior = made.posterior(made.config.objective.posterior, with_mean=True)
    nn.init.normal_(posterior.network.conv_out.weight)
    x_t, t = randn(1, 3, SIDE, SIDE).float().repeat(2, 1, 1, 1), torch.tensor([500.0, 500.0])
    maps = posterior.network(x_t, t, class_labels=torch.tensor([1, 2]))
    assert not torch.equal(maps[0], maps[1])


def test_latents_are_the_vaes(recipe, build, images, small_teacher):
    """Each picture with its label, noise of its own seed."""
    made = build(recipe("varflow"))
    x0, condition = made.examples.rows(torch.arange(15))
    assert condition["class_labels"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    picture = torch.from_numpy(np.array(Image.open(images / "dog" / "0.png"))).permute(2, 0, 1)[None]
    noise = torch.randn((3, SIDE, SIDE), generator=torch.Generator().manual_seed(derive_seed(0, "cache", 5)))
    vae = AutoencoderKL.from_pretrained(small_teacher, subfolder="vae")
    assert_close(x0[5], encode_images(vae, to_unit(picture), noise[None])[0], rtol=1e-5, atol=1e-5)


# Refused ------------------------------------------------------------------------------------------------------------------------

FOLDER = {"name": "folder", "path": "images", "image_size": 12}
CASES = {
    "data of no use": ("diff_instruct", {"data": FOLDER | {"labels": True}}, "data has no effect .*which need no data"),
    "no labels": ("varflow", {"data.labels": False}, r"data: folder without labels.* 3 classes"),
    "fewer classes": (
        "varflow",
        {"teacher.path": "TEACHER"},
        "data: 3 classes, and this teacher draws 1000; give all, in its order",
    ),
    "another size": ("varflow", {"data.image_size": 16}, "data.image_size=16: this teacher makes images of 12 pixels"),
    "one channel": ("varflow", {"data.channels": 1}, "data.channels=1"),
    "text": (
        "varflow",
        {"data": {"name": "captions", "source": "parquet", "paths": ["x"]}},
        "has no images with labels",
    ),
    "a negative prompt": ("diff_instruct", {"teacher.negative_prompt": "x"}, "teacher.negative_prompt has no effect"),
    "early": ("diff_instruct", {"student.readout_t": 400}, r"400: DiTPipeline takes no timesteps.* begin at 500"),
    "other steps": ("diff_instruct", {"student.steps": [699, 500]}, r"the 2 of its scheduler from 699 on are \[699, 349\]"),
    "features": ("varflow", {"objective.features": True}, "objective.features: a DiT teacher has no feature maps"),
    "no layer": ("diff_instruct", {"student.lora.targets": ["to_x"]}, "'to_x' fits no layer"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case, recipe, build, teacher):
    objective, changes, message = CASES[case]
    changes = {key: str(teacher) if value == "TEACHER" else value for key, value in changes.items()}
    config = recipe(objective)
    config["data"] = config.get("data") or None
    for key, value in changes.items():
        *path, last = key.split(".")
        section = config
        for name in path:
            section[name] = dict(section[name])
            section = section[name]
        section[last] = value
    with pytest.raises(UserError, match=message):
        build({k: v for k, v in config.items() if v is not None})


def test_damaged_student(recipe, build, tmp_path):
    """Each by name: no weights, others', some missing, NaN."""
    made = randomised(build(recipe("diff_instruct")))
    made.export(tmp_path / "student", made.facts | {"base_model": made.config.teacher.path})
    file = tmp_path / "student" / "adapter_model.safetensors"
    good = load_file(file)
    first = next(iter(good))
    cases = {
        "NaN or infinite": good | {first: good[first] * torch.nan},
        "lacks 1 layers": {k: v for k, v in good.items() if ".0.attn1.to_q." not in k},
        "layers are not there": good | {"base_model.model.other.lora_A.weight": good[first].clone()},
        "made for another model": {k: torch.cat([v, v], -1).contiguous() for k, v in good.items()},
    }
    for message, content in cases.items():
        save_file(content, file)
        with pytest.raises(UserError, match=message):
            load_student(tmp_path / "student")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no LoRA weights"):
        load_student(tmp_path / "student")


def test_what_cannot_be_exported(recipe, build, tmp_path, capsys):
    made = build(recipe("diff_instruct"))
    made.export(tmp_path / "student", made.facts | {"base_model": made.config.teacher.path})
    with pytest.raises(SystemExit):
        export_kohya.main([str(tmp_path / "student"), str(tmp_path / "x.safetensors")])
    assert "is a student of a DiT" in capsys.readouterr().err


def test_recipes():
    """Those of the repository begin where the network's errors are not multiplied by 157, as at t = 999."""
    for objective in OBJECTIVES:
        config = yaml.safe_load(Path(f"configs/dit_{objective}.yaml").read_text())
        assert config["teacher"]["path"] == "facebook/DiT-XL-2-256"
        assert config["student"]["readout_t"] < 999


def test_demo_draws_classes(recipe, build, tmp_path):
    """Student and teacher of a class; the strength of the LoRA: 0 leaves the teacher's weights."""
    made = randomised(build(recipe("diff_instruct")))
    made.export(tmp_path / "student", made.facts | {"base_model": made.config.teacher.path})
    given = {"prompt": [], "base_model": None, "teacher_steps": 2, "teacher_guidance": None, "dtype": "float32", "device": "cpu"}
    pair = demo.load_pair(SimpleNamespace(student=str(tmp_path / "student"), **given))
    assert (pair.num_classes, pair.takes_prompt, pair.has_scale) == (CLASSES, False, True)
    (full, *_), (teacher, *_) = pair.draw(label=3, seed=1)
    (none, *_), _ = pair.draw(label=3, seed=1, scale=0.0)
    assert np.asarray(full).shape == (12, 12, 3)
    bare = load_sampler(made.config.teacher.path, steps=1, guidance_scale=1.0)
    bare.pipe.scheduler = load_student(tmp_path / "student").scheduler
    assert np.array_equal(np.asarray(none), bare([0], 1, labels=[3])[0].permute(1, 2, 0).numpy())
    assert not np.array_equal(np.asarray(full), np.asarray(none))
    assert not np.array_equal(np.asarray(full), np.asarray(teacher))
