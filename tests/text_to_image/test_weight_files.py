"""Files of weights as pipelines have them: variants, shards, pointers, and what is missing, found before any work is done."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from eval.images.sampler import load_sampler
from pipelines.common.errors import UserError
from pipelines.students import load_student
from pipelines.text_to_image import load_pipeline


@pytest.fixture
def copied(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny["sd15"], tmp_path / "copy"))


@pytest.fixture
def halves(tiny, tmp_path) -> Path:
    """As most fine-tuned models are published: every file of the variant fp16, none without."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny["sd15"], dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    return tmp_path / "fp16"


def test_a_pipeline_of_one_variant_only(halves, recipe, distil, fresh_accelerator):
    """Trained on, loaded with its student and sampled from, without a word of the variant: there is no other file to mean."""
    config = recipe("diff_instruct", steps=1)
    config["teacher"]["path"] = str(halves)
    run = distil(config)
    assert json.loads((run / "student" / "student.json").read_text())["base_model"] == str(halves)
    load_student(run)
    assert load_sampler(str(halves), steps=1)([0], 0, ["a cat"]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("plain", ["unet", "text_encoder", "vae"])
def test_some_components_of_a_variant(plain, halves, tiny):
    """As where a VAE that holds in float16 has been put in."""
    for file in (halves / plain).glob("*.safetensors"):
        file.unlink()
    shutil.copytree(tiny["sd15"] / plain, halves / plain, dirs_exist_ok=True)
    load_pipeline(str(halves))
    load_sampler(str(halves), steps=1)


def test_variants_to_choose_from(halves):
    for file in halves.glob("*/*.fp16.safetensors"):
        shutil.copy(file, file.with_name(file.name.replace("fp16", "ema")))
    with pytest.raises(UserError, match=r"variants only \(.*unet: ema, fp16.*teacher.variant"):
        load_pipeline(str(halves))
    load_pipeline(str(halves), variant="ema")


def test_plain_weights_beside_a_variant_are_those_meant(copied, halves):
    shutil.copytree(halves, copied, dirs_exist_ok=True)
    assert load_pipeline(str(copied)).unet.dtype == torch.float32


def damage(folder: Path, how: str) -> str:
    """Damage the U-Net's weights -> what must be said."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "shard":
        StableDiffusionPipeline.from_pretrained(folder).unet.save_pretrained(folder / "unet", max_shard_size="100KB")
        file.unlink(missing_ok=True)
        sorted((folder / "unet").glob("*-of-*"))[1].unlink()
        return "lacks 1 of the .* files that diffusion_pytorch_model.safetensors.index.json lists"
    if how == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 22\n")
        return "pointer of Git LFS, not the weights; run git lfs pull"
    file.write_bytes(file.read_bytes()[:1000])
    return "is damaged"


@pytest.mark.parametrize("how", ["shard", "pointer", "half"])
def test_damaged_weights_are_found_before_prompts_are_encoded(how, copied, recipe, distil, fresh_accelerator, capsys):
    """To encode a data set may take hours, and needs the U-Net for nothing."""
    message, config = damage(copied, how), recipe("diff_instruct", steps=1)
    config["teacher"]["path"] = str(copied)
    with pytest.raises(SystemExit):
        distil(config)
    assert re.search(message, capsys.readouterr().err)
    assert not Path(config["output_dir"]).exists()
    with pytest.raises((UserError, FileNotFoundError), match=message):
        load_sampler(str(copied))


@pytest.mark.parametrize("steps", [0, 10**9, -5, 1e3, "1000", None, True])
def test_a_schedule_without_bounds(steps, copied):
    """A table of 10^9 levels would fill the memory of most machines before a word is said."""
    file = copied / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": steps}))
    with pytest.raises(UserError, match=r"num_train_timesteps is .*, expected 1 to 1,000,000"):
        load_pipeline(str(copied))
