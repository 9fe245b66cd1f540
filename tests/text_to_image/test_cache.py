"""Encoding text-to-image data with the real commands: what a cache holds, when it is used again, and what is refused."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.data.images import to_unit
from trainers import cache, distill, train_teacher
from trainers.engine.draws import derive_seed

pytestmark = pytest.mark.usefixtures("fresh_accelerator", "one_thread", "own_datasets")
KINDS = ("sd15", "sd21", "sdxl")
SIZES = ((16, 16), (20, 12), (9, 31))  # (width, height)


@pytest.fixture
def own_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def written(config: dict) -> list[str]:
    """The configuration as a file, and the arguments that name it."""
    file = Path(config["output_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return ["--config", str(file)]


def run(main, config: dict, *overrides: str) -> Path:
    main([*written(config), *overrides])
    return Path(config["output_dir"])


def refusal(main, config: dict, capsys, *overrides: str) -> str:
    """What a command says when it refuses: exit status 2 and one message without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*written(config), *overrides])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    return said[said.index("error: ") :].strip()


def rows_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "shard_00000.safetensors")


def stock(path: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(folder: Path, captions: list[str]) -> dict:
    """A data section of images of SIZES with their captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = "".join(f"{i}.png,{caption}\n" for i, caption in enumerate(captions))
    (folder / "metadata.csv").write_text("file_name,caption\n" + rows)
    return {"name": "captions", "source": "imagefolder", "paths": [str(folder)]}


def assert_text(rows: dict[str, Tensor], pipe: DiffusionPipeline, prompts: list[str], size: int) -> None:
    """The stock pipeline's own encoding, prompt by prompt; SDXL's sizes are those of a whole image unless there are images."""
    for i, prompt in enumerate(prompts):
        if isinstance(pipe, StableDiffusionPipeline):
            embeds, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        else:
            embeds, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
            torch.testing.assert_close(rows["text_embeds"][i], pooled[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rows["encoder_hidden_states"][i], embeds[0], rtol=1e-5, atol=1e-5)
    if "time_ids" in rows and "latents" not in rows:
        assert rows["time_ids"].tolist() == [[size, size, 0, 0, size, size]] * len(prompts)


PROMPTS = ["a cat", "a dog on a mat", "a red house"]  # of prompt_file


# What is in it -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_prompts(kind, recipe, tiny, capsys):
    output = run(cache.main, recipe("vardiu", kind))
    assert f"3 rows in {output / 'cache'}" in capsys.readouterr().out
    rows = rows_of(output / "cache")
    more = {"text_embeds", "time_ids"} if kind == "sdxl" else set()
    assert rows.keys() == {"encoder_hidden_states"} | more
    assert_text(rows, stock(tiny[kind]), PROMPTS, 16)
    identity = json.loads((output / "cache" / "identity.json").read_text())
    expected = {"rows": 3, "image_size": 16, "dtype": "float32", "kind": "prompts"}
    expected = {k: v for k, v in expected.items() if k != "image_size" or kind == "sdxl"}  # which is told of it
    assert {k: identity[k] for k in expected} == expected
    assert "seed" not in identity


def vae_latents(pipe: DiffusionPipeline, images: Tensor, shape: tuple, seed: int) -> Tensor:
    """A draw of the encoder's Gaussian for each image, with noise that depends on its row alone, at the VAE's scale."""
    with torch.no_grad():
        gaussian = pipe.vae.encode(images).latent_dist
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(seed, "cache", i))) for i in range(len(images))
    ]
    assert float(gaussian.std.min()) > 1e-3  # else the noise would not show
    return (gaussian.mean + gaussian.std * torch.stack(noise)) * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("kind", KINDS)
def test_captioned_images(kind, recipe, tiny, tmp_path):
    data = pictures(tmp_path / "images", PROMPTS) | {"image_size": 8}
    output = run(cache.main, recipe("varflow", kind, data=data, seed=3))
    rows, pipe = rows_of(output / "cache"), stock(tiny[kind])
    assert_text(rows, pipe, PROMPTS, 8)
    images, ids = [], []
    for i, (width, height) in enumerate(SIZES):
        scale = 8 / min(width, height)
        resized = (round(width * scale), round(height * scale))
        left, top = (resized[0] - 8) // 2, (resized[1] - 8) // 2
        cut = Image.open(tmp_path / "images" / f"{i}.png").resize(resized, Image.Resampling.LANCZOS)
        images.append(np.array(cut.crop((left, top, left + 8, top + 8))))
        ids.append([height, width, top, left, 8, 8])
    images = to_unit(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    torch.testing.assert_close(rows["latents"], vae_latents(pipe, images, (4, 4, 4), 3), rtol=1e-4, atol=1e-4)
    if kind == "sdxl":
        assert rows["time_ids"].tolist() == ids
        assert len({tuple(i) for i in ids}) == 3


def test_what_was_done_to_images_is_said(recipe, tmp_path, capsys):
    config = recipe("varflow") | {"data": pictures(tmp_path / "images", ["a", "b", "c"])}
    Image.new("RGBA", (16, 16)).save(tmp_path / "images" / "1.png")
    run(cache.main, config)
    said = capsys.readouterr()
    assert "data: 1 pictures: transparency put on white; 1 pictures: smaller than image_size, enlarged\n" in said.err
    assert said.out.startswith("3 rows in")


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_samples(kind, recipe, tiny):
    """What the stock pipeline makes of the same prompts and latents, with its own scheduler and guidance, drawn one by one."""
    config = recipe("varflow", kind, seed=5)
    config["data"] |= {"guidance_scale": 3.0}
    output = run(cache.main, config)
    rows, pipe = rows_of(output / "cache"), stock(tiny[kind])
    prompts = [p for p in PROMPTS for _ in range(2)]
    assert_text(rows, pipe, prompts, 16)
    latents = []
    for i, prompt in enumerate(prompts):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(derive_seed(5, "cache", i)))
        options = {"num_inference_steps": 2, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
        latents.append(pipe(prompt, height=16, width=16, **options).images)
    latents = torch.cat(latents)
    assert float((latents[0] - latents[1]).abs().max()) > 0.1  # two images of one prompt are two
    torch.testing.assert_close(rows["latents"], latents, rtol=1e-3, atol=1e-3)
    assert torch.equal(rows["encoder_hidden_states"][0], rows["encoder_hidden_states"][1])


def test_a_low_precision_teacher_keeps_conditions_in_its_own(recipe):
    config = recipe("vardiu", "sdxl")
    config["teacher"] |= {"dtype": "bfloat16"}
    rows = rows_of(run(cache.main, config) / "cache")
    assert {k: v.dtype for k, v in rows.items()} == {
        "encoder_hidden_states": torch.bfloat16,
        "text_embeds": torch.bfloat16,
        "time_ids": torch.float32,  # bfloat16 would round 1023 pixels to 1024
    }


def test_prompts_that_are_too_long_are_counted_and_cut(recipe, prompt_file, tiny, capsys):
    """The tiny tokenizer has a token for each letter: 75 words of one and both ends are 77."""
    prompts = [" ".join(letter * count) for letter, count in (("y", 75), ("x", 76), ("c", 2), ("z", 200))]
    prompt_file.write_text("\n".join(prompts))
    output = run(cache.main, recipe("vardiu"))
    said = capsys.readouterr().out
    assert f"2 of 4 prompts have more than 77 tokens and were cut; the first: {prompts[1]!r}" in said
    rows = rows_of(output / "cache")
    assert rows["encoder_hidden_states"].shape == (4, 77, 32)
    assert_text(rows, stock(tiny["sd15"]), [p[: 2 * 75 - 1] for p in prompts], 16)
    prompt_file.write_text("a cat\n")
    run(cache.main, recipe("vardiu", output_dir=str(output.with_name("short"))))
    assert "tokens" not in capsys.readouterr().out


# Used again ------------------------------------------------------------------------------------------------------------------


def times(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}


@pytest.mark.parametrize("objective", ["vardiu", "varflow"])
def test_a_second_run_reuses_the_shards(objective, recipe, tmp_path):
    """Another run, another command and another objective with the same data: nothing in the folder is touched."""
    folder = tmp_path / "shared"
    config = recipe(objective)
    config["data"] |= {"cache": str(folder)}
    run(cache.main, config)
    assert not (tmp_path / f"{objective}_sd15" / "cache").exists()
    before = times(folder)
    assert set(before) == {"identity.json", "cache.json", "shard_00000.safetensors"}
    time.sleep(0.02)  # coarser than any clock of a file system
    run(cache.main, config)
    run(distill.main, config, "steps=1")
    others = {"data": config["data"], "output_dir": str(tmp_path / "other"), "steps": 1}
    if objective == "varflow":
        run(distill.main, recipe("diff_instruct", **others))
    assert times(folder) == before


def test_a_run_without_a_cache_makes_the_same_one(recipe, tmp_path):
    made = run(cache.main, recipe("varflow"))
    trained = run(distill.main, recipe("varflow", output_dir=str(tmp_path / "trained"), steps=1))
    for name in times(made / "cache"):
        assert (made / "cache" / name).read_bytes() == (trained / "cache" / name).read_bytes()


def test_a_teachers_configuration_is_encoded_too(recipe, tiny, tmp_path):
    """trainers.cache makes what train_teacher then finds."""
    config = {
        "output_dir": str(tmp_path / "teacher"),
        "pipeline": str(tiny["sd15"]),
        "data": pictures(tmp_path / "images", PROMPTS),
        "levels": {"name": "uniform", "low": 20.0, "high": 980.0},
        "optimizer": {"lr": 1e-3},
        "steps": 1,
        "batch_size": 2,
    }
    output = run(cache.main, config)
    before = times(output / "cache")
    assert rows_of(output / "cache")["latents"].shape == (3, 4, 8, 8)
    run(train_teacher.main, config)
    assert times(output / "cache") == before


# Refused -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(recipe, tmp_path) -> dict:
    """A configuration whose cache is made, and lies in a folder of its own."""
    config = recipe("varflow")
    config["data"] |= {"cache": str(tmp_path / "cache")}
    run(cache.main, config)
    return config


def copied(config: dict, tmp_path: Path) -> tuple[Path, dict]:
    """The teacher in another folder, and the configuration that names it."""
    teacher = shutil.copytree(config["teacher"]["path"], tmp_path / "teacher")
    return teacher, config | {"teacher": config["teacher"] | {"path": str(teacher)}}


def other_weights(part: str, key: int = -1) -> callable:
    """One number in a network of the teacher."""

    def change(config: dict, tmp_path: Path) -> dict:
        teacher, config = copied(config, tmp_path)
        file = next((teacher / part.partition(":")[0]).glob("*.safetensors"))
        weights = load_file(file)
        names = sorted(n for n in weights if n.startswith(part.partition(":")[2]))
        weights[names[key]].view(-1)[0] += 1e-3
        save_file(weights, file, {"format": "pt"})
        return config

    return change


def other_settings(file: str, **changes) -> callable:
    """Settings in a JSON file of the teacher, its weights as they were."""

    def change(config: dict, tmp_path: Path) -> dict:
        teacher, config = copied(config, tmp_path)
        content = json.loads((teacher / file).read_text())
        (teacher / file).write_text(json.dumps(content | changes))
        return config

    return change


def other_vocabulary(config: dict, tmp_path: Path) -> dict:
    """The numbers of two letters exchanged."""
    teacher, config = copied(config, tmp_path)
    for file in (teacher / "tokenizer").glob("*.json"):
        content = json.loads(file.read_text())
        words = content.get("model", {}).get("vocab", content if "a</w>" in content else {})
        if words:
            words["a</w>"], words["b</w>"] = words["b</w>"], words["a</w>"]
            file.write_text(json.dumps(content))
    return config


def other_prompts(config: dict, tmp_path: Path) -> dict:
    file = tmp_path / "others.txt"
    file.write_text("a cat\na dog on a mat\na blue house\n")
    return config | {"data": config["data"] | {"file": str(file)}}


def data(**changes) -> callable:
    return lambda config, tmp_path: config | {"data": config["data"] | changes}


def teacher(**changes) -> callable:
    return lambda config, tmp_path: config | {"teacher": config["teacher"] | changes}


def faults_said(main, config: dict, folder: Path, capsys) -> list[str]:
    """What a refused cache says differs."""
    said = refusal(main, config, capsys)
    start = f"error: cache {str(folder)!r} is of other data or another model: "
    end = f". Name another folder in data.cache, or remove {str(folder)!r}"
    assert said.startswith(start)
    assert said.endswith(end)
    return said.removeprefix(start).removesuffix(end).split("; ")


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (other_weights("text_encoder"), ["text_encoder.weights differ"]),
        (other_weights("unet"), ["unet.weights differ"]),
        (other_settings("scheduler/scheduler_config.json", beta_end=0.011), ["scheduler.beta_end is 0.012, needed 0.011"]),
        (other_settings("unet/config.json", act_fn="gelu"), ["unet.act_fn is not set, needed 'gelu'"]),
        (other_settings("text_encoder/config.json", hidden_act="gelu"), ["text_encoder.hidden_act is not set, needed 'gelu'"]),
        (
            other_settings("tokenizer/tokenizer_config.json", model_max_length=60),
            ["tokenizer.model_max_length is 77, needed 60"],
        ),
        (other_vocabulary, ["tokenizer.tokens differ"]),
        (other_prompts, ["prompts differ"]),
        (data(image_size=8), ["image_size is 16, needed 8"]),
        (data(num_inference_steps=3), ["steps is 2, needed 3"]),
        (data(guidance_scale=1.0), ["guidance_scale is 7.5, needed 1.0"]),
        (data(images_per_prompt=1), ["prompts differ", "rows is 6, needed 3"]),
        (lambda config, _: config | {"seed": 1}, ["seed is 0, needed 1"]),
        (teacher(dtype="bfloat16"), ["dtype is 'float32', needed 'bfloat16'"]),
    ],
)
def test_a_cache_of_something_else_is_refused(change, faults, cached, tmp_path, capsys):
    """By the name of what differs: samples of the teacher."""
    before = times(tmp_path / "cache")
    assert faults_said(distill.main, change(cached, tmp_path), tmp_path / "cache", capsys) == faults
    assert times(tmp_path / "cache") == before
    assert not (Path(cached["output_dir"]) / "metrics.jsonl").exists()


def encoded_images(recipe, tmp_path: Path, kind: str = "sdxl") -> dict:
    """A configuration with captioned images whose cache is made."""
    config = recipe("varflow", kind, data=pictures(tmp_path / "images", PROMPTS) | {"cache": str(tmp_path / "cache")})
    run(cache.main, config)
    return config


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (other_settings("vae/config.json", scaling_factor=0.13025), ["vae.scaling_factor is not set, needed 0.13025"]),
        (other_settings("vae/config.json", shift_factor=0.1), ["vae.shift_factor is not set, needed 0.1"]),
        (other_settings("vae/config.json", act_fn="relu"), ["vae.act_fn is not set, needed 'relu'"]),
        (
            other_settings("text_encoder_2/config.json", hidden_act="gelu"),
            ["text_encoder_2.hidden_act is not set, needed 'gelu'"],
        ),
        (other_weights("vae:encoder"), ["vae.weights differ"]),
        (other_weights("vae:quant_conv"), ["vae.weights differ"]),
    ],
)
def test_encoded_images_depend_on_the_encoders_settings(change, faults, recipe, tmp_path, capsys):
    config = encoded_images(recipe, tmp_path)
    assert faults_said(cache.main, change(config, tmp_path), tmp_path / "cache", capsys) == faults


def test_encoded_images_depend_on_which_caption_is_whose(recipe, tmp_path, capsys):
    """Files exchanged under their names, captions exchanged, and a caption whose words went over to its neighbour."""
    config = encoded_images(recipe, tmp_path, "sd15")
    images, metadata = tmp_path / "images", tmp_path / "images" / "metadata.csv"
    first, second = ((images / f"{i}.png").read_bytes() for i in (0, 1))
    (images / "0.png").write_bytes(second)
    (images / "1.png").write_bytes(first)
    assert faults_said(cache.main, config, tmp_path / "cache", capsys) == ["images differ"]
    (images / "0.png").write_bytes(first)
    (images / "1.png").write_bytes(second)
    run(cache.main, config)
    metadata.write_text('file_name,caption\n0.png,"a cat\na dog on"\n1.png,a mat\n2.png,a red house\n')
    assert faults_said(cache.main, config, tmp_path / "cache", capsys) == ["prompts differ"]


def nothing_else(teacher: Path, images: Path) -> None:
    """Files that take no part: a file manager's, a README, another variant, a safety checker, the decoder, the noise schedule."""
    for folder in (images, teacher, teacher / "vae", teacher / "tokenizer"):
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
    (images / "README.md").write_text("mine")
    (images / ".ipynb_checkpoints").mkdir()
    (teacher / "README.md").write_text("# tiny")
    (teacher / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(
        (teacher / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    for file in ("vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        content = json.loads((teacher / file).read_text())
        content |= {"_diffusers_version": "0.0.1", "transformers_version": "4.0.0", "_name_or_path": "elsewhere", "dropout": 0.1}
        (teacher / file).write_text(json.dumps(dict(reversed(content.items())), indent=4))
    file = teacher / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.011}))
    file = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.startswith("decoder."):
            weights[name] += 0.01
    save_file(weights, file, {"format": "pt"})
    for folder in (teacher, images):
        for file in folder.rglob("*"):
            os.utime(file, (1, 1))


def test_what_changes_nothing_makes_no_other_cache(recipe, tmp_path):
    config = encoded_images(recipe, tmp_path, "sd15")
    before = times(tmp_path / "cache")
    teacher, config = copied(config, tmp_path)
    images = tmp_path / "images"
    nothing_else(teacher, images)
    run(cache.main, config)
    moved = config["data"] | {"paths": [str(shutil.copytree(images, tmp_path / "elsewhere"))]}
    run(cache.main, config | {"data": moved, "output_dir": str(tmp_path / "another")})
    assert times(tmp_path / "cache") == before


def test_encoded_prompts_depend_on_neither_vae_nor_network(recipe, tmp_path):
    """Nor on the size of images, which only SDXL is told, nor on the seed, nor on what guidance leads away from."""
    config = recipe("vardiu")
    config["data"] |= {"cache": str(tmp_path / "cache")}
    run(cache.main, config)
    before = times(tmp_path / "cache")
    config = other_settings("vae/config.json", scaling_factor=0.13025)(config, tmp_path)
    folder = Path(config["teacher"]["path"])
    for part in ("vae", "unet"):
        file = folder / part / "diffusion_pytorch_model.safetensors"
        save_file({k: v + 0.01 for k, v in load_file(file).items()}, file, {"format": "pt"})
    config["teacher"] |= {"negative_prompt": "blurry"}
    run(cache.main, config, "seed=5", "data.image_size=8", f"output_dir={tmp_path / 'other'}")
    assert times(tmp_path / "cache") == before


def test_sdxls_prompts_depend_on_the_size_of_images(recipe, tmp_path, capsys):
    """It is told the size beside the prompt (time_ids)."""
    config = recipe("vardiu", "sdxl")
    config["data"] |= {"cache": str(tmp_path / "cache")}
    run(cache.main, config)
    assert faults_said(cache.main, data(image_size=8)(config, tmp_path), tmp_path / "cache", capsys) == [
        "image_size is 16, needed 8"
    ]


def test_a_damaged_cache_is_refused_and_the_remedy_works(cached, tmp_path, capsys):
    shard = tmp_path / "cache" / "shard_00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-99])
    said = refusal(distill.main, cached, capsys)
    assert said.startswith(f"error: cache file {str(shard)!r} is damaged (")
    shard.unlink()
    (tmp_path / "cache" / "cache.json").unlink()
    run(distill.main, cached, "steps=1")
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("image_size", [3, 15, 18, 1])
def test_an_image_size_that_does_not_fit_is_refused(image_size, recipe, capsys):
    """A latent is 2 pixels wide and the network halves it once."""
    config = recipe("vardiu")
    said = refusal(distill.main, config, capsys, f"data.image_size={image_size}")
    assert said == f"error: data.image_size={image_size} must be a multiple of 4 for this teacher"
    assert not Path(config["output_dir"]).exists()


def test_an_image_size_that_fits_is_trained(recipe):
    output = run(distill.main, recipe("diff_instruct"), "data.image_size=20", "steps=1")
    assert json.loads((output / "student" / "student.json").read_text())["image_size"] == 20
