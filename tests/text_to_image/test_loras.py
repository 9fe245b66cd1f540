"""LoRAs in every form that users have: a student's is known by any name, another goes beside it, and one that does not fit is
refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from eval.images.sampler import load_sampler
from pipelines.common.provenance import git_commit
from pipelines.loras import LORA_FILE, find_lora, load_lora
from pipelines.students import load_student, read_info


@pytest.fixture
def student(recipe, distil, fresh_accelerator) -> Path:
    """A run of sd15 with a LoRA that does something."""
    config = recipe("diff_instruct", "sd15", steps=2)
    config["student"]["optimizer"] = {"lr": 0.03}
    return distil(config, ema_decay=0.0)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """LoRA weights for the attention of a pipeline's U-Net, with diffusers' names."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False))
    found = get_peft_model_state_dict(pipe.unet, adapter_name="default")
    return {f"unet.{key}": 3 * value.contiguous() for key, value in found.items()}


@pytest.fixture(scope="module")
def style(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("style")
    save_file(weights_of(tiny["sd15"]), folder / LORA_FILE)
    return folder


def drawn(sampler) -> torch.Tensor:
    return sampler([0, 1], 0, ["a cat", "a dog"]).float()


def test_a_students_lora_by_any_name(student, tiny):
    """Folder, run or file: its scheduler, its one step, no guidance, its pictures."""
    expected = drawn(load_sampler(str(student)))
    for lora in (student, student / "student", student / "student" / LORA_FILE):
        sampler = load_sampler(str(tiny["sd15"]), lora=str(lora))
        assert sampler.call == {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16}
        assert sampler.describe()["scheduler"] == "LCMScheduler"
        assert sampler.facts["student"]["objective"] == "diff_instruct"
        assert torch.equal(drawn(sampler), expected)


def test_a_lora_without_text_encoders_is_loaded_in_silence(style, tiny, caplog):
    """diffusers warns of each text encoder that a LoRA says nothing about; afterwards it is as talkative as before."""
    pipe, before = StableDiffusionPipeline.from_pretrained(tiny["sd15"]), diffusers_logging.get_verbosity()
    pipe.load_lora_weights(style)
    assert "No LoRA keys" in caplog.text  # else this test could not fail
    pipe.unload_lora_weights()
    caplog.clear()
    load_lora(pipe, find_lora(style, "--lora"), "x")
    assert "No LoRA keys" not in caplog.text
    assert diffusers_logging.get_verbosity() == before
    assert pipe.get_list_adapters() == {"unet": ["x"]}


@pytest.mark.slow
def test_a_lora_beside_a_student(student, style):
    """Both act: what diffusers draws with both adapters set by hand; reported, and not the student's alone."""
    sampler = load_sampler(str(student), lora=str(style))
    alone = drawn(load_sampler(str(student)))
    assert sampler.facts["lora"] == str(style)
    assert sampler.call["num_inference_steps"] == 1
    assert sorted(sampler.pipe.get_active_adapters()) == ["added", "student"]
    pipe = load_student(student)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["student", "style"], [1.0, 1.0])
    by_hand = load_sampler(str(student))
    by_hand.pipe = pipe
    assert torch.equal(drawn(sampler), drawn(by_hand))
    assert (drawn(sampler) - alone).abs().max() > 2


def test_a_lora_beside_a_student_that_is_a_whole_network(recipe, distil, style, fresh_accelerator):
    config = recipe("varflow", "sd15", steps=1)
    config["student"] = {"optimizer": {"lr": 1e-3}}
    whole = distil(config)
    assert (drawn(load_sampler(str(whole), lora=str(style))) - drawn(load_sampler(str(whole)))).abs().max() > 2
    with pytest.raises(ValueError, match="is a whole network, not a LoRA; give it as --model"):
        load_sampler(str(whole), lora=str(whole))


def test_a_base_model_beside_a_students_lora(student, tiny):
    with pytest.raises(ValueError, match="--base-model has no effect with a student as --lora"):
        load_sampler(str(tiny["sd15"]), lora=str(student), base_model=str(tiny["sd15"]))


def test_a_scheduler_that_lies_beside_a_lora(style, tiny, tmp_path):
    """comes with it; without one the pipeline's own stays."""
    shutil.copytree(style, tmp_path / "fast")
    EulerDiscreteScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "fast" / "scheduler")
    for source in (tmp_path / "fast", tmp_path / "fast" / LORA_FILE):
        assert load_sampler(str(tiny["sd15"]), lora=str(source), steps=2).describe()["scheduler"] == "EulerDiscreteScheduler"
    assert load_sampler(str(tiny["sd15"]), lora=str(style)).describe()["scheduler"] == "PNDMScheduler"


FAULTS = {
    "another prefix": (lambda k: k.replace("unet.", "transformer."), "of its .* layers are not there, the first transformer."),
    "no prefix": (lambda k: k.removeprefix("unet."), "layers are not there, the first down_blocks"),
    "a block too many": (
        lambda k: k.replace("down_blocks.0", "down_blocks.7"),
        "layers are not there, the first unet.down_blocks.7",
    ),
    "other layers": (lambda k: k.replace("attn", "attention_"), "not found in the base model"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_lora_for_another_model(name, style, tiny, tmp_path):
    """diffusers loads what fits, or nothing, and logs it at most."""
    rename, message = FAULTS[name]
    save_file({rename(k): v for k, v in load_file(style / LORA_FILE).items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"does not fit a StableDiffusionPipeline: .*{message}"):
        load_sampler(str(tiny["sd15"]), lora=str(tmp_path / "lora.safetensors"))


def test_a_lora_of_another_size(style, tiny):
    with pytest.raises(ValueError, match=r"does not fit a StableDiffusionXLPipeline: .*it was made for another model"):
        load_sampler(str(tiny["sdxl"]), lora=str(style))


def test_a_student_on_another_base_model(student, tiny):
    with pytest.raises(ValueError, match="does not fit a StableDiffusionXLPipeline"):
        load_student(student, base_model=str(tiny["sdxl"]))


def test_formats_of_others(style, tiny, tmp_path):
    """diffusers' older names and kohya's, with a text encoder's layers: all of them are loaded."""
    stored, kohya = load_file(style / LORA_FILE), {}
    old = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in stored.items()}
    for key, value in stored.items():
        layer, part = key.removeprefix("unet.").split(".lora_")
        module = f"lora_unet_{layer.replace('.', '_')}"
        kohya[f"{module}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value.clone()
        kohya[f"{module}.alpha"] = torch.tensor(3.0)
    for i in range(2):
        for name, (inputs, outputs) in {
            **{f"self_attn_{p}_proj": (32, 32) for p in ("q", "k", "v", "out")},
            "mlp_fc1": (32, 37),
            "mlp_fc2": (37, 32),
        }.items():
            module = f"lora_te_text_model_encoder_layers_{i}_{name}"
            kohya[f"{module}.lora_down.weight"], kohya[f"{module}.lora_up.weight"] = torch.ones(2, inputs), torch.ones(outputs, 2)
            kohya[f"{module}.alpha"] = torch.tensor(2.0)
    for name, weights in {"old": old, "kohya": kohya}.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
        pipe = StableDiffusionPipeline.from_pretrained(tiny["sd15"])
        load_lora(pipe, find_lora(tmp_path / f"{name}.safetensors", "--lora"), "x")
        expected = {"unet": ["x"]} | ({"text_encoder": ["x"]} if name == "kohya" else {})
        assert pipe.get_list_adapters() == expected


def test_a_file_of_another_name_beside_a_student(student, style):
    shutil.copy(style / LORA_FILE, student / "student" / "style.safetensors")
    with pytest.raises(ValueError, match=f"lies in a student's folder, whose LoRA is {LORA_FILE}"):
        find_lora(student / "student" / "style.safetensors", "--lora")


def test_what_a_student_says_of_how_it_was_made(student):
    """The commit of this code and the libraries' versions, in student.json and on the card."""
    info = read_info(student / "student", "student")
    assert info["git_commit"] == git_commit()
    assert set(info["versions"]) >= {"python", "torch", "diffusers", "peft"}
    assert load_sampler(str(student)).facts["student"]["git_commit"] == git_commit()
    card = (student / "student" / "README.md").read_text()
    assert f"- git_commit: {git_commit()}" in card
    assert json.loads((student / "student" / "student.json").read_text())["steps"] == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, files): a repository in the cache of the hub, which does not answer."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def make(name: str, files: dict[str, Path], missing: tuple[str, ...] = ()) -> None:
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        for file, source in files.items():
            place = folder / "snapshots" / ("0" * 40) / file
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place)
        for file in missing:
            (folder / ".no_exist" / ("0" * 40)).mkdir(parents=True)
            (folder / ".no_exist" / ("0" * 40) / file).touch()

    return make


def test_a_students_lora_from_the_hub(student, tiny, hub):
    """It is known as one there, too."""
    files = ["student.json", LORA_FILE, "scheduler/scheduler_config.json"]
    hub("somebody/student", {file: student / "student" / file for file in files})
    sampler = load_sampler(str(tiny["sd15"]), lora="somebody/student")
    assert sampler.call["num_inference_steps"] == 1
    assert torch.equal(drawn(sampler), drawn(load_sampler(str(student))))


def test_a_hub_that_does_not_say_what_a_lora_is(style, hub):
    hub("somebody/style", {LORA_FILE: style / LORA_FILE}, missing=("student.json",))
    assert not find_lora("somebody/style", "--lora").student
    hub("somebody/unknown", {LORA_FILE: style / LORA_FILE})
    for name in ("somebody/unknown", "nobody/nothing"):
        with pytest.raises(
            FileNotFoundError, match=f"--lora: '{name}' is no file or folder here, and the hub could not be asked"
        ):
            find_lora(name, "--lora")


def test_a_folder_with_several_files_of_weights(style, tiny, tmp_path):
    """As kohya's trainers leave them, one an epoch: diffusers takes the first of them and says so in a log."""
    for name in ("style-000001.safetensors", "style.safetensors"):
        shutil.copy(style / LORA_FILE, tmp_path / name)
    with pytest.raises(ValueError, match=r"2 files of weights \(style-000001.safetensors, style.safetensors\); name the one"):
        find_lora(tmp_path, "--lora")
    (tmp_path / "style-000001.safetensors").unlink()
    assert find_lora(tmp_path, "--lora").file == "style.safetensors"


def test_a_pickle_is_refused_in_a_folder_as_by_its_name(style, tiny, tmp_path):
    torch.save(load_file(style / LORA_FILE), tmp_path / "pytorch_lora_weights.bin")
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises((FileNotFoundError, ValueError), match="a pickle could run any code"):
            load_sampler(str(tiny["sd15"]), lora=str(source))


def test_an_adapter_as_peft_saves_it(tiny, style, tmp_path):
    """Not "made for another model": its form is another one, and what the message says makes the right one of it."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny["sd15"])
    torch.manual_seed(2)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False)
    network = get_peft_model(pipe.unet, config)
    network.save_pretrained(tmp_path / "peft")
    for source in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match="as PEFT saves it; make it one of diffusers"):
            load_sampler(str(tiny["sd15"]), lora=str(source))
    x, condition = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    expected = network(x, 10, condition).sample
    made = PeftModel.from_pretrained(StableDiffusionPipeline.from_pretrained(tiny["sd15"]).unet, tmp_path / "peft")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "made",
        unet_lora_layers=get_peft_model_state_dict(made.base_model.model, adapter_name="default"),
        unet_lora_adapter_metadata=made.peft_config["default"].to_dict(),
    )
    loaded = load_sampler(str(tiny["sd15"]), lora=str(tmp_path / "made")).pipe.unet
    assert torch.equal(loaded(x, 10, condition).sample, expected)


def test_weights_that_are_nan_are_refused_when_they_are_loaded(style, tiny, tmp_path):
    """Not after all images have been drawn."""
    weights = load_file(style / LORA_FILE)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match="NaN or infinite values in 1 tensors, the first unet"):
        load_sampler(str(tiny["sd15"]), lora=str(tmp_path))


@pytest.mark.parametrize(("value", "message"), [("NaN", "readout_t is nan, no timestep"), ("5000", "has none after 999")])
def test_a_student_whose_timestep_is_none(value, message, student):
    file = student / "student" / "student.json"
    file.write_text(file.read_text().replace('"readout_t": 999', f'"readout_t": {value}'))
    with pytest.raises(ValueError, match=message):
        load_student(student)
