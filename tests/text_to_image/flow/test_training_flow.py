"""Runs of flow-matching teachers through the real commands: every objective, what is cached, must not show and is refused."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from pipelines.students import load_student
from trainers import cache, distill, train_teacher
from trainers.engine import checkpoint
from trainers.engine.draws import derive_seed

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
KINDS = ("sd3", "sd35", "sd3 without t5", "flux dev", "flux schnell")
# a gradient that is little but rounding must not become a full step of random sign: updates in proportion where it is small
SMOOTH = {"lr": 1e-3, "betas": [0.0, 0.99], "eps": 1e-2}
SMALL = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_levels": [1]}


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def guided(config: dict, guidance: float, **objective) -> dict:
    config = copy.deepcopy(config)
    config["teacher"]["guidance_scale"] = guidance
    config["objective"] |= objective
    return config


# Objectives ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd35", "flux dev", "z-image"])
@pytest.mark.parametrize("objective", ["vardiu", "varflow", "diff_instruct", "sid"])
@pytest.mark.slow
def test_objectives_run(objective, kind, recipe, distil):
    """Two steps with pictures, a student at the end; guidance calls SD3 twice a score, and Flux, which is told it, once."""
    guidance = 1.0 if objective == "varflow" else 2.5
    output = distil(guided(recipe(objective, kind), guidance), sample_every=2, num_samples=3)
    assert [line["step"] for line in lines(output)] == [1, 2]
    assert (output / "samples" / "step_00000002.png").is_file()
    info = json.loads((output / "student" / "student.json").read_text())
    if objective == "diff_instruct":
        assert info["calls"]["teacher"] == (1 if kind == "flux dev" else 2) * 2 * 4
    assert load_student(output).transformer.peft_config["student"].lora_alpha == 2.0


@pytest.mark.parametrize("kind", ["sd35", "flux dev", "z-image"])
@pytest.mark.parametrize("objective", ["vardiu", "diff_instruct", "sid"])
@pytest.mark.slow
def test_a_second_network_on_the_last_third_runs(objective, kind, recipe, distil):
    """Guided, with recomputed blocks; the checkpoint holds an adapter on the last block alone. A fake score that learns
    alone reads what the blocks before it make.
    """
    config = guided(recipe(objective, kind, gradient_checkpointing=True, checkpoint_every=2, steps=2), 2.5)
    second = "posterior" if objective == "vardiu" else "fake_score"
    config["objective"][second] |= {"network": "shared"}
    output = distil(config)
    stored = load_file(output / "checkpoints" / "step_00000002" / "networks.safetensors")
    mine = {name for name in stored if name.startswith(f"{second}/") and "lora_" in name}
    last = {"sd35": "transformer_blocks.1.", "flux dev": "single_transformer_blocks.0.", "z-image": "layers.1."}[kind]
    assert mine
    assert all(last in name for name in mine)
    assert max(float(stored[name].abs().max()) for name in mine if "lora_B" in name) > 0
    calls = json.loads((output / "student" / "student.json").read_text())["calls"]
    assert ("way_down" in calls) == (objective == "sid")  # Diff-Instruct learns jointly here


@pytest.mark.slow
def test_compiled_blocks_do_not_show_on_the_last_third(recipe, distil):
    """What the block before it puts out is kept though that block is compiled."""
    config = guided(recipe("vardiu", "sd35", checkpoint_every=2, steps=2, gradient_checkpointing=True), 2.5)
    config["student"]["optimizer"] = SMOOTH
    config["objective"]["posterior"] |= {"network": "shared", "optimizer": SMOOTH}
    plain = distil(config)
    compiled = distil(config, output_dir=f"{plain}_compiled", compile="aot_eager")
    ended, other = (load_file(run / "checkpoints" / "step_00000002" / "networks.safetensors") for run in (plain, compiled))
    moved = max(float(v.abs().max()) for k, v in ended.items() if "lora_B" in k)
    assert moved > 0
    assert max(float((other[k] - ended[k]).abs().max()) for k in ended) < 1e-4 * moved


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sd3 without t5", {"posterior": {"network": SMALL, "updates": 2}}),
        ("sd35", {"estimator": "resampled_score", "num_samples": 2}),
        ("z-image", {"posterior": {"network": SMALL}}),
        ("flux schnell", {"pool": "batch", "posterior": {"covariance": "flow"}}),
        ("flux dev", {"estimator": "bound"}),
    ],
    ids=["small network", "resampled", "small network of Z-Image", "flow posterior", "bound"],
)
@pytest.mark.slow
def test_posteriors_run(kind, options, recipe, distil):
    """A network of their own, told 1000 t; other estimators; other covariances."""
    config = guided(recipe("vardiu", kind), 1.0)
    given = copy.deepcopy(options)
    config["objective"]["posterior"] |= given.pop("posterior", {})
    if config["objective"]["posterior"]["network"] != "adapter":
        del config["objective"]["posterior"]["lora"]
    if "estimator" in given:
        del config["objective"]["pool"]
    config["objective"] |= given
    assert len(lines(distil(config))) == 2


def end_state(output: Path) -> dict:
    """What a run leaves that must not depend on whether it was stopped, bit for bit."""
    last = checkpoint.list_checkpoints(output / "checkpoints")[-1]
    files = [*sorted(last.glob("*.safetensors")), output / "metrics.jsonl"]
    state: dict = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    weights = load_file(output / "student" / "pytorch_lora_weights.safetensors")
    return state | {"folder": last.name} | {key: value.numpy().tobytes() for key, value in weights.items()}


@pytest.mark.parametrize("kind", ["sd35", "flux dev"])
@pytest.mark.slow
def test_resumed_is_never_stopped(kind, recipe, tmp_path, distil):
    """Four steps at once, or from the checkpoint after two of them: bit for bit the same."""
    config = guided(recipe("vardiu", kind, checkpoint_every=2, steps=4), 2.0)
    config["data"]["cache"] = str(tmp_path / "shared")
    whole, stopped = distil(config, output_dir=str(tmp_path / "whole")), tmp_path / "stopped"
    distil(config, output_dir=str(stopped))
    for gone in ("student", "checkpoints/step_00000004"):
        shutil.rmtree(stopped / gone)
    metrics = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(metrics[:2]))
    distil(config, "resume=latest", output_dir=str(stopped))
    assert end_state(stopped) == end_state(whole)


def weights(output: Path) -> dict[str, Tensor]:
    last = checkpoint.list_checkpoints(output / "checkpoints")[-1]
    groups = {name: load_file(last / f"{name}.safetensors") for name in ("networks", "ema")}
    return {f"{name}/{key}": value for name, group in groups.items() for key, value in group.items()}


@pytest.mark.parametrize(
    ("kind", "objective"),
    [("sd35", "vardiu"), ("flux dev", "diff_instruct"), ("flux schnell", "varflow"), ("sd3", "varflow"), ("z-image", "vardiu")],
)
@pytest.mark.slow
def test_neither_micro_batches_nor_recomputed_blocks_show(kind, objective, recipe, tmp_path, distil):
    """2 of 4 at a time, or each block computed again in backward: logged numbers and weights up to rounding."""
    config = guided(recipe(objective, kind, checkpoint_every=2), 1.0 if kind == "flux schnell" or objective == "varflow" else 2.0)
    config["data"]["cache"] = str(tmp_path / "shared")
    config["student"]["optimizer"] = SMOOTH
    for key in ("fake_score", "posterior"):
        if key in config["objective"]:
            config["objective"][key] = config["objective"][key] | {"optimizer": SMOOTH, "warmup_updates": 0}
    whole = distil(config)
    ended, first = weights(whole), lines(whole)[0]
    moved = max(v.abs().max().item() for k, v in ended.items() if "lora_B" in k)
    assert moved > 1e-5
    for name, option, tolerance in (("split", {"micro_batch_size": 2}, 2e-3), ("saving", {"gradient_checkpointing": True}, 1e-4)):
        other = distil(config, output_dir=str(tmp_path / name), **option)
        got = weights(other)
        assert max((got[k] - ended[k]).abs().max().item() for k in ended) < tolerance * moved
        for key, value in lines(other)[0].items():
            if name == "saving" or not key.endswith(("x0_std", "x0_gap")):  # not the standard deviation over fewer samples
                assert value == pytest.approx(first[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("kind", ["sd35", "flux dev"])
@pytest.mark.slow
def test_bfloat16_below_float32_adapters(kind, recipe, distil):
    config = guided(recipe("diff_instruct", kind), 2.0)
    config["teacher"]["dtype"] = "bfloat16"
    output = distil(config, gradient_checkpointing=True)
    student = load_file(output / "student" / "pytorch_lora_weights.safetensors")
    assert {v.dtype for v in student.values()} == {torch.float32}
    assert json.loads((output / "student" / "student.json").read_text())["base_dtype"] == "bfloat16"


# Data ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd35", "flux dev"])
def test_captioned_images_are_encoded(kind, recipe, tiny, tmp_path, monkeypatch):
    """The stock pipeline's own text, and latents whose mean is (mean - shift) scale of the VAE's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (folder := tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("file_name,caption\n0.png,a cat\n1.png,a red house\n")
    config = recipe("varflow", kind)
    config["data"] = {"name": "captions", "source": "imagefolder", "paths": [str(folder)], "image_size": 16}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    cache.main(["--config", str(tmp_path / "c.yaml")])
    rows = load_file(Path(config["output_dir"]) / "cache" / "shard_00000.safetensors")
    pipe = DiffusionPipeline.from_pretrained(tiny(kind))
    with torch.no_grad():
        embeds, *rest = pipe.encode_prompt(["a cat", "a red house"], None, **({"prompt_3": None} if kind == "sd35" else {}))
        pooled = rest[1] if kind == "sd35" else rest[0]
        gaussian = pipe.vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    assert_close(rows["encoder_hidden_states"], embeds, rtol=1e-5, atol=1e-5)
    assert_close(rows["pooled_projections"], pooled, rtol=1e-5, atol=1e-5)
    for i in range(2):
        noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(derive_seed(0, "cache", i)))
        expected = (gaussian.mean[i] + gaussian.std[i] * noise - 0.0609) * 1.5305
        assert_close(rows["latents"][i], expected, rtol=1e-4, atol=1e-4)


def test_teacher_samples_are_the_stock_pipelines(recipe, tiny, tmp_path):
    """Flux, whose pipeline packs latents: the same noise in it gives the row; without its VAE too."""
    config = recipe("varflow", "flux dev")
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    cache.main(["--config", str(tmp_path / "c.yaml")])
    rows = load_file(Path(config["output_dir"]) / "cache" / "shard_00000.safetensors")
    pipe, generator = (
        DiffusionPipeline.from_pretrained(tiny("flux dev")),
        torch.Generator().manual_seed(derive_seed(0, "cache", 0)),
    )
    z = torch.randn(3, 8, 8, generator=generator)[None]
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16, "output_type": "latent"}
    drawn = pipe("a cat", latents=FluxPipeline._pack_latents(z, *z.shape), **options).images
    assert_close(rows["latents"][0], FluxPipeline._unpack_latents(drawn, 16, 16, 2)[0], rtol=1e-4, atol=1e-4)


def test_a_cache_of_another_size_or_text_encoder(recipe, tiny, tmp_path, refusal):
    """Named by what differs."""
    config = recipe("varflow", "sd35")
    config["data"]["cache"] = str(tmp_path / "shared")
    distill.main(["--config", write(config, tmp_path)])
    config |= {"data": config["data"] | {"image_size": 20}, "output_dir": str(tmp_path / "other")}
    assert "image_size is 16, needed 20" in refusal(config)
    config["data"]["image_size"] = 16
    config["teacher"]["path"] = str(tiny("sd3 without t5"))
    assert "text_encoder_3" in refusal(config)


def write(config: dict, folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


@pytest.mark.parametrize("kind", ["sd35", "flux dev"])
@pytest.mark.slow
def test_a_teacher_is_trained_further(kind, recipe, tiny, tmp_path):
    """All weights of the transformer, on samples: the loss falls, and the pipeline that is saved is a teacher again."""
    data = recipe("varflow", kind)["data"]
    config = {"output_dir": str(tmp_path / "further"), "pipeline": str(tiny(kind)), "data": data, "steps": 40, "batch_size": 6}
    config |= {
        "levels": {"name": "logit_normal"},
        "weighting": "edm",
        "optimizer": {"lr": 3e-3},
        "log_every": 20,
        "num_samples": 2,
    }
    train_teacher.main(["--config", write(config | {"sample_every": 40}, tmp_path)])
    losses = [next(v for k, v in line.items() if k.endswith("loss")) for line in lines(tmp_path / "further")]
    assert losses[-1] < losses[0]
    student = recipe("varflow", kind, output_dir=str(tmp_path / "student"), steps=1)
    student["teacher"]["path"] = str(tmp_path / "further")
    distill.main(["--config", write(student, tmp_path)])


# What is refused -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(tmp_path, capsys):
    """refusal(config, *overrides): what distill says when it refuses: exit status 2 and one message without a traceback."""

    def run(config: dict, *overrides: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            distill.main(["--config", write(config, tmp_path), *overrides])
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert "Traceback" not in said
        assert said.count("error: ") == 1
        return said[said.index("error: ") :].strip()

    return run


REFUSED = {
    "targets": (
        "sd35",
        "diff_instruct",
        "student.lora.targets=[conv1]",
        "lora.targets: 'conv1' fits no layer of SD3Transformer2DModel",
    ),
    "targets of flux": (
        "flux dev",
        "vardiu",
        "student.lora.targets=[to_w]",
        "lora.targets: 'to_w' fits no layer of FluxTransformer2D",
    ),
    "timesteps": (
        "sd3",
        "vardiu",
        "objective.levels={name: uniform, low: 20, high: 980}",
        "objective.levels.low: 20 is outside the teacher's levels, 0 to 1",
    ),
    "dmd at noise": (
        "sd3",
        "vardiu",
        "objective.levels={name: uniform, low: 0.02, high: 1}",
        "objective.weighting: 'dmd' is not finite at t=1",
    ),
    "features": (
        "sd35",
        "varflow",
        "objective.features=true",
        "objective.features: a Stable Diffusion 3 teacher has no feature maps",
    ),
    "readout": ("flux dev", "varflow", "student.readout_t=999", "student.readout_t has no effect for a Flux teacher; remove it"),
    "sigma": ("sd3", "varflow", "student.sigma_init=2.5", "student.sigma_init has no effect for a Stable Diffusion 3 teacher"),
    "copy": (
        "sd3",
        "vardiu",
        "objective.posterior={network: copy, warmup_updates: 0, optimizer: {lr: 1e-3}}",
        "objective.posterior.network: 'copy' is for EDM teachers; set shared, adapter",
    ),
    "shared layers": (
        "sd3",
        "vardiu",
        "objective.posterior={network: shared, lora: {targets: [proj_out]}, warmup_updates: 0, optimizer: {lr: 1e-3}}",
        "objective.posterior.lora.targets: none of ['proj_out'] is a layer of the last third of the blocks",
    ),
    "guidance of schnell": (
        "flux schnell",
        "vardiu",
        "teacher.guidance_scale=2",
        "teacher.guidance_scale: 2, and this teacher has no guidance: its transformer is not told one",
    ),
    "negative prompt of dev": (
        "flux dev",
        "vardiu",
        ["teacher.guidance_scale=3.5", "teacher.negative_prompt=bad"],
        "teacher.negative_prompt has no effect for a teacher without a null condition; remove it",
    ),
    "norm of what is not guided": (
        "sd35",
        "vardiu",
        "teacher.guidance_normalization=true",
        "teacher.guidance_normalization has no effect for a teacher without guidance (guidance_scale 1); remove it",
    ),
    "norm of dev": (
        "flux dev",
        "vardiu",
        ["teacher.guidance_scale=3.5", "teacher.guidance_normalization=true"],
        "teacher.guidance_normalization has no effect for a teacher without a null condition; remove it",
    ),
    "data": (
        "flux dev",
        "vardiu",
        "data={name: digits}",
        "data: a Flux teacher needs data.name prompts, captions or teacher_samples",
    ),
    "size": ("sd35", "vardiu", "data.image_size=18", "data.image_size=18 must be a multiple of 4 for this teacher"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, recipe, refusal):
    """One clear message each, before anything is encoded."""
    kind, objective, override, message = REFUSED[name]
    config = recipe(objective, kind)
    assert message in refusal(config, *(override if isinstance(override, list) else [override]))
    assert not Path(config["output_dir"]).exists()


def test_t5_asked_for_but_absent(recipe, tiny, tmp_path, refusal):
    """Said before weights are loaded: those of the other encoders are damaged here, and nobody notices."""
    folder = Path(shutil.copytree(tiny("sd35"), tmp_path / "pipeline"))
    shutil.rmtree(folder / "text_encoder_3")
    config = recipe("vardiu", "sd35")
    config["teacher"]["path"] = str(folder)
    said = refusal(config)
    assert "has no text_encoder_3/ (T5), which its model_index.json asks for; copy it, or write" in said
    assert not (Path(config["output_dir"]) / "cache").exists()
