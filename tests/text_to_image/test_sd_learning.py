"""What runs of Stable Diffusion learn, and what they leave: students and teachers that stock pipelines load."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pipelines import adapters
from pipelines import stable_diffusion as sd
from pipelines import text_to_image as t2i
from pipelines.noise import add_noise, weight
from pipelines.students import load_student, read_info
from trainers import distill, train_teacher
from trainers.data.shards import Cached
from trainers.engine import checkpoint
from trainers.engine.draws import DrawSource, MicroDraw
from trainers.engine.loop import Trainer
from trainers.objectives.base import LossTerms, sample_level
from trainers.objectives.denoising import Denoising
from trainers.objectives.energy import pairwise_power
from trainers.objectives.varflow import Batch

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("sd15", "sd21", "sdxl")
# Some layers of each sort: fewer adapters than recipes have, for speed.
LORA = {"rank": 4, "alpha": 4.0, "targets": ["to_q", "to_v", "proj_in", "conv1", "conv_shortcut", "conv_out"]}
ADAM = {"lr": 1e-3, "betas": [0.5, 0.99]}
SMALL = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_levels": [1]}
STEPS = 30

pytestmark = pytest.mark.usefixtures("fresh_accelerator", "one_thread", "own_datasets")


@pytest.fixture
def own_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def images(tmp_path) -> dict:
    """A data section: two noisy pictures of each of three colours, captioned by colour."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    rows = ["file_name,caption"]
    for i in range(6):
        colour = np.roll([230, 20, 20], i % 3) + rng.normal(0, 30, (16, 16, 3))
        Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{('a red cat', 'a green dog', 'a blue house')[i % 3]}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return {"name": "captions", "source": "imagefolder", "paths": [str(folder)], "cache": str(tmp_path / "encoded")}


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def last_checkpoint(output: Path) -> Path:
    return checkpoint.list_checkpoints(output / "checkpoints")[-1]


@pytest.fixture
def loaded(monkeypatch, distil):
    """loaded(config, resume) -> the trainer that distill would start with, at that checkpoint ("no": at its beginning)."""
    made = []

    class Loaded(Trainer):
        def fit(self):
            self.restore()
            self.log.bar.close()
            made.append(self)

    def load(config: dict, resume: str | Path) -> Trainer:
        beginning = {"output_dir": config["output_dir"] + "_beginning"} if resume == "no" else {}
        with monkeypatch.context() as patch:
            patch.setattr(distill, "Trainer", Loaded)
            distil(config | beginning | {"resume": str(resume)})
        return made.pop()

    return load


# What is learned -----------------------------------------------------------------------------------------------------------


def draw_of(trainer: Trainer, b: int = 64) -> MicroDraw:
    """A fixed batch, drawn for no update of the run."""
    (draw,) = DrawSource(99, b, trainer.draws.shape, torch.device("cpu"), trainer.draws.examples).batch(("measure",), 0.0)
    return draw


def total(terms) -> float:
    """The mean of a loss, or of the sum of its parts."""
    return float(terms.loss.mean()) if isinstance(terms, LossTerms) else sum(float(part.loss.mean()) for part in terms)


@torch.no_grad()
def energy_distance(trainer: Trainer) -> float:
    """The objective's loss without the constant E|T - T'|/2, over a fixed large batch at three fixed levels: 0 for equal laws."""
    o, draw, distance = trainer.objective, draw_of(trainer, 128), 0.0
    x0, noise = o.student(draw.z, draw.condition), draw.normal("data_eps", *draw.eps.shape[1:])
    for u in (0.1, 0.3, 0.5):
        draw.shared_u = torch.tensor(u)
        level = o.level(draw, len(x0))
        data = add_noise(draw.x0, noise, level)
        loss = o.batch_loss(Batch(add_noise(x0, draw.eps, level), []), Batch(data, []), None, True).mean()
        among = pairwise_power(data, data, o.beta).sum() / (len(x0) * (len(x0) - 1))
        distance += float(level.sigma[0].square() * (loss - among / 2))
    return distance


def nearer(config: dict, loaded) -> tuple[float, float]:
    """The distance at the start and at the end of a run."""
    return energy_distance(loaded(config, "no")), energy_distance(loaded(config, last_checkpoint(Path(config["output_dir"]))))


def varflow(kind: str, recipe, images: dict, **more) -> dict:
    config = recipe("varflow", kind, data=images, steps=STEPS, checkpoint_every=STEPS, batch_size=8, **more)
    return config | {"student": {"lora": LORA, "optimizer": ADAM | {"lr": 0.01}}}


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
@pytest.mark.slow
def test_varflow_brings_the_student_nearer_to_the_data(kind, recipe, images, loaded, distil):
    """On captioned images. Measured where there is signal: 128 samples, three levels, the same numbers before and after."""
    config = varflow(kind, recipe, images)
    distil(config)
    before, after = nearer(config, loaded)
    assert after < 0.85 * before


@pytest.mark.slow
def test_accelerate_launch_of_two_processes(recipe, images, loaded, tmp_path, distil, launched):
    """The command as users give it. Two processes encode the images, learn as one, and end where one process does.

    Gradients of both are added in another order; 30 updates may amplify that, the distance to the data hardly notices.
    """
    config = varflow("sd15", recipe, images)
    pair = launched(config)
    before, after = nearer(config, loaded)
    assert after < 0.85 * before
    shard = tmp_path / "encoded" / "shard_00000.safetensors"
    alone = config | {"output_dir": str(tmp_path / "alone"), "data": images | {"cache": str(tmp_path / "encoded_alone")}}
    one = distil(alone)
    assert (tmp_path / "encoded_alone" / shard.name).read_bytes() == shard.read_bytes()
    assert energy_distance(loaded(alone, last_checkpoint(one))) == pytest.approx(after, rel=0.01)
    first, other = (lines(output / "metrics.jsonl") for output in (one, pair))
    assert len(first) == len(other) == STEPS
    for key in ("student/loss", "student/student_grad_norm"):
        assert other[0][key] == pytest.approx(first[0][key], rel=1e-4)


@pytest.fixture
def two_steps(recipe, tmp_path):
    """two_steps(objective, dtype): SDXL, with recomputed blocks and a picture on the way."""

    def make(objective: str, dtype: str) -> dict:
        data = {"name": "prompts", "file": str(tmp_path / "prompts.txt"), "cache": str(tmp_path / "shared")}
        config = recipe(objective, "sdxl", steps=2, checkpoint_every=2, sample_every=2, num_samples=2, data=data)
        adam = ADAM | {"eps": 1e-2}  # a gradient that is little but rounding must not become a full step of random sign
        config |= {"student": {"lora": LORA, "optimizer": adam}, "objective": copy.deepcopy(config["objective"])}
        config["objective"]["posterior" if objective == "vardiu" else "fake_score"] |= {"lora": LORA, "optimizer": adam}
        config["teacher"]["dtype"] = dtype
        return config | {"gradient_checkpointing": True}

    return make


@pytest.mark.parametrize("objective", ["diff_instruct", "sid"])
@pytest.mark.slow
def test_sharded_weights_do_not_show(objective, two_steps, whole_and_sharded):
    """FSDP2 on two processes leaves what two processes without it leave, pictures too; SiD's gradient passes every role."""
    outputs = whole_and_sharded(two_steps(objective, "float32"))
    pictures = [np.asarray(Image.open(output / "samples" / "step_00000002.png")).astype(int) for output in outputs]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0].std() > 10


@pytest.mark.slow
def test_bfloat16_weights_are_sharded_below_float32_adapters(two_steps, launched):
    """The two dtypes do not meet in one shard; the run ends with finite numbers and a student that loads."""
    output = launched(two_steps("vardiu", "bfloat16"), "fsdp2.yaml")
    assert all(np.isfinite(list(line.values())).all() for line in lines(output / "metrics.jsonl"))
    adapter = load_file(output / "student" / "pytorch_lora_weights.safetensors")
    assert max(float(v.abs().max()) for k, v in adapter.items() if "lora_B" in k) > 0
    load_student(output)


def second_network(trainer: Trainer) -> str:
    return next(role for role in trainer.networks if role != "student")


@torch.no_grad()
def learner_loss(trainer: Trainer, student: Trainer) -> float:
    """The loss of the fake score, or of the posterior (log q and regression), on samples of another trainer's student."""
    for mine, other in zip(trainer.parameters["student"], student.parameters["student"], strict=True):
        mine.copy_(other)
    o = trainer.objective
    return total((o.fake_score_loss if second_network(trainer) == "fake_score" else o.posterior_loss)(draw_of(trainer)))


@torch.no_grad()
def student_samples(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """(g(z), the gradient that the objective would give them, w (alpha/sigma)^2 (x0_learned - x0_teacher)) on the fixed batch."""
    o, draw = trainer.objective, draw_of(trainer)
    x0, level = o.student(draw.z, draw.condition), sample_level(draw.u, o.levels, 0.0, o.teacher.schedule)
    x_t = add_noise(x0, draw.eps, level)
    teacher = o.teacher(x_t, level, draw.condition)
    if second_network(trainer) == "fake_score":
        learned = o.fake_score(x_t, level, draw.condition)
    else:
        learned = o.posterior(x_t, level, draw.condition).x0_mean
    w = weight(o.weighting, level, x0, teacher, 1.0)
    return x0, w * (level.alpha / level.sigma).square() * (learned - teacher)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["diff_instruct", "vardiu"])
@pytest.mark.slow
def test_both_networks_learn(objective, kind, recipe, loaded, distil):
    """From the end of the warm-up to the end of the run, on a fixed batch of 64:

    - the second network's own loss, on what the student makes *now*, is below a share of what it was with its first weights;
    - the student's own loss, w (s_learned - s_teacher) . x_t with the scores as they were at its first step, has fallen: the
      samples (at fixed z) moved against that gradient. By chance their cosine would be 0 +- 1/128.

    The size of the scores' difference need not fall so early: it grows while the second network still learns.
    """
    config = recipe(objective, kind, steps=STEPS, checkpoint_every=STEPS, keep_checkpoints=9)
    config["student"], config["objective"] = {"lora": LORA, "optimizer": ADAM}, copy.deepcopy(config["objective"])
    second = config["objective"]["fake_score" if objective == "diff_instruct" else "posterior"]
    if objective == "vardiu":
        config["objective"]["noise_draws"] = 1
    second |= {"lora": LORA, "optimizer": ADAM | {"lr": 3e-3}, "warmup_updates": 8}
    output = distil(config)
    first, end = (loaded(config, r) for r in (output / "checkpoints" / "step_00000000", last_checkpoint(output)))
    assert (first.step, first.warmup_done, end.step) == (0, 8, STEPS)
    (x0, gradient), (moved, _) = student_samples(first), student_samples(end)
    change = moved - x0
    cosine = float((gradient * change).sum() / (gradient.norm() * change.norm()))
    ended, begun = learner_loss(end, end), learner_loss(first, end)
    share, bound = (0.98, -0.2) if objective == "diff_instruct" else (0.95, -0.1)
    assert ended < share * begun
    assert cosine < bound


# Other networks and precisions ---------------------------------------------------------------------------------------------


def assert_student_is_what_was_trained(output: Path, trainer: Trainer, dtype: torch.dtype = torch.float32) -> None:
    """One step of the stock pipeline that load_student gives is g(z) of the averaged student."""
    pipe = load_student(output, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    condition = sd.KIND.encode_prompts(pipe, ["a cat"], (16, 16), torch.device("cpu"))
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with trainer.ema.swapped() as student, torch.no_grad():
        x0 = student(z, condition)
    size = {"height": 16, "width": 16}
    made = pipe("a cat", num_inference_steps=1, guidance_scale=1.0, latents=z.to(dtype), output_type="latent", **size).images
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(made.float(), x0, rtol=tolerance, atol=tolerance * float(x0.std()))


def test_a_whole_student_and_a_small_posterior(recipe, loaded, distil):
    """All weights of the student are its own: the teacher's stay, and its folder holds a network."""
    config = recipe("vardiu", "sd21", steps=2, checkpoint_every=2, student={"lora": None, "optimizer": ADAM})
    config["objective"] = config["objective"] | {"posterior": {"network": SMALL, "warmup_updates": 1, "optimizer": ADAM}}
    output = distil(config)
    assert all(np.isfinite(list(line.values())).all() for line in lines(output / "metrics.jsonl"))
    trainer = loaded(config, last_checkpoint(output))
    teacher = load_file(Path(config["teacher"]["path"]) / "unet" / "diffusion_pytorch_model.safetensors")
    student = load_file(output / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert student.keys() == teacher.keys()
    assert sum(not torch.equal(student[k], teacher[k]) for k in student) > 0.9 * len(student)
    base = trainer.objective.teacher.network.shared.network.state_dict()
    assert all(torch.equal(base[k], teacher[k]) for k in teacher)
    posterior = trainer.networks["posterior"].network.network
    assert posterior.config.block_out_channels == (8, 16)
    assert posterior.config.down_block_types == ("DownBlock2D", "CrossAttnDownBlock2D")
    assert_student_is_what_was_trained(output, trainer)


def test_a_teacher_in_bfloat16(recipe, loaded, distil):
    """Frozen weights in half of the memory, as in the rounded file; adapters and their optimisers in float32."""
    config = recipe("vardiu", "sdxl", steps=1, checkpoint_every=1)
    config["student"], config["objective"] = {"lora": LORA, "optimizer": ADAM}, copy.deepcopy(config["objective"])
    config["objective"]["posterior"] |= {"lora": LORA, "warmup_updates": 1}
    config["teacher"]["dtype"] = "bfloat16"
    output = distil(config)
    assert all(np.isfinite(list(line.values())).all() for line in lines(output / "metrics.jsonl"))
    trainer = loaded(config, last_checkpoint(output))
    frozen = {k: v for k, v in trainer.objective.teacher.network.shared.network.state_dict().items() if "lora_" not in k}
    assert {v.dtype for v in frozen.values()} == {torch.bfloat16}
    file = load_file(Path(config["teacher"]["path"]) / "unet" / "diffusion_pytorch_model.safetensors")
    frozen = {k.replace(".base_layer.", "."): v for k, v in frozen.items()}
    assert frozen.keys() == file.keys()
    assert all(torch.equal(frozen[k], file[k].bfloat16()) for k in file)
    for name in ("networks", "ema", "optimizers"):
        tensors = load_file(last_checkpoint(output) / f"{name}.safetensors")
        assert {v.dtype for v in tensors.values()} == {torch.float32}
    assert_student_is_what_was_trained(output, trainer, torch.bfloat16)


# A teacher, trained further ------------------------------------------------------------------------------------------------


def denoising_loss_of(folder: Path, examples: Cached) -> float:
    """The teacher's own objective on a fixed batch of the encoded data."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    objective = Denoising(t2i.denoiser(pipe, adapters.Whole(pipe.unet)), lambda u, progress: 20 + 960 * u, "sigma2")
    (draw,) = DrawSource(99, 64, (4, 8, 8), torch.device("cpu"), examples).batch(("measure",), 0.0)
    with torch.no_grad():
        return float(objective.loss(draw).loss.mean())


def teacher_config(kind: str, tiny, images: dict, tmp_path: Path, **more) -> dict:
    return {
        "output_dir": str(tmp_path / "teacher"),
        "pipeline": str(tiny[kind]),
        "data": images,
        "levels": {"name": "uniform", "low": 20.0, "high": 980.0},
        "weighting": "sigma2",
        "optimizer": {"lr": 3e-3},
        "steps": 12,
        "batch_size": 8,
        "ema_decay": 0.5,
        "num_samples": 2,
    } | more


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_trained_further(kind, tiny, images, tmp_path, written):
    """All weights of the network and nothing else; what is saved is a pipeline that loads and denoises the data better."""
    config = teacher_config(kind, tiny, images, tmp_path, **({"sample_every": 12} if kind == "sdxl" else {}))
    before = {f.relative_to(tiny[kind]): f.read_bytes() for f in tiny[kind].rglob("*.safetensors")}
    train_teacher.main(written(config))
    folder, examples = tmp_path / "teacher" / "teacher", Cached(tmp_path / "encoded")
    assert denoising_loss_of(folder, examples) < 0.7 * denoising_loss_of(tiny[kind], examples)
    for file, data in before.items():
        assert (tiny[kind] / file).read_bytes() == data
        ours, theirs = load_file(folder / file), load_file(tiny[kind] / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours) == (file.parts[0] != "unet")
    info = read_info(folder, "teacher")
    assert (info["steps"], info["image_size"], info["base_model"]) == (12, 16, str(tiny[kind]))
    if kind == "sdxl":  # two pictures, one above the other, with a border of 2
        assert Image.open(tmp_path / "teacher" / "samples" / "step_00000012.png").size == (16 + 4, 2 * 16 + 6)


def test_guidance_of_the_pictures_of_a_teacher_in_training(tiny, images, tmp_path, written):
    """guidance_scale is the stock pipeline's: 7.5 where the key is left out, as diffusers has it."""

    def shown(name: str, **given) -> tuple[bytes, bytes]:
        folder = tmp_path / name
        given |= {"steps": 1, "sample_every": 1, "output_dir": str(folder)}
        train_teacher.main(written(teacher_config("sd15", tiny, images, tmp_path, **given)))
        weights, pictures = folder / "teacher" / "unet" / SAFETENSORS_WEIGHTS_NAME, folder / "samples" / "step_00000001.png"
        return weights.read_bytes(), pictures.read_bytes()

    runs = shown("default"), shown("stock", guidance_scale=7.5), shown("less", guidance_scale=2.0)
    weights, pictures = zip(*runs, strict=True)
    assert weights[0] == weights[1] == weights[2]  # what is shown changes nothing
    default, stock, less = pictures
    assert default == stock
    assert default != less


@pytest.mark.parametrize("where", ["teacher/teacher", "teacher"])
def test_a_teacher_that_was_trained_further_is_distilled(where, tiny, images, tmp_path, recipe, distil, written):
    """By the pipeline's folder, or by the output_dir that holds it, as an EDM teacher."""
    train_teacher.main(written(teacher_config("sd15", tiny, images, tmp_path, steps=1)))
    output = distil(recipe("diff_instruct", steps=1, teacher={"path": str(tmp_path / where)}))
    assert read_info(output / "student", "student")["steps"] == 1
