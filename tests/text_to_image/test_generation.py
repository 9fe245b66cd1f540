"""`python -m eval` with pipelines that take prompts: stock ones, students and LoRA folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eval.__main__ import main
from eval.images.sampler import load_sampler
from eval.images.seeds import image_generator
from eval.networks.extractors import Clip
from eval.networks.weights import Found
from pipelines.students import load_student
from scripts.bench.parts import random_networks
from trainers.engine.draws import derive_seed

CAPTIONS = ["a cat", "a dog on a mat", "a red house"]


@pytest.fixture
def student(recipe, distil, fresh_accelerator) -> Path:
    config = recipe("diff_instruct", "sd15")
    config["student"]["optimizer"] = {"lr": 0.03}
    return distil(config, ema_decay=0.0) / "student"


@pytest.fixture
def captions(tmp_path) -> Path:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return tmp_path / "captions.txt"


def generated(output: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f)) for f in sorted(output.rglob("*.png")) if f.parent.name == "000000"])


def test_stock_pipeline_by_prompt_and_seed(tiny, captions, tmp_path):
    call = ["generate", "--protocol", "custom", "--num-images", "3", "--model", str(tiny["sd15"]), "--captions", str(captions)]
    call += ["--steps", "2", "--guidance-scale", "3", "--image-size", "16"]
    assert main([*call, "--output", str(tmp_path / "out")]) == 0
    pipe = StableDiffusionPipeline.from_pretrained(tiny["sd15"])
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 3, "height": 16, "width": 16, "output_type": "np"}
    expected = [pipe([c], generator=[image_generator(0, i)], **options).images[0] for i, c in enumerate(CAPTIONS)]
    assert np.array_equal(generated(tmp_path / "out"), (np.stack(expected) * 255).round().astype(np.uint8))


@pytest.mark.parametrize("scale", ["0", "0.5", "-3"])
def test_guidance_that_a_stock_pipeline_does_not_have(scale, tiny, captions, tmp_path, capsys):
    """diffusers guides above 1 only: these would be the pictures of 1, under another name."""
    call = ["generate", "--protocol", "custom", "--num-images", "3", "--model", str(tiny["sd15"]), "--captions", str(captions)]
    assert main([*call, f"--guidance-scale={scale}", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"guidance scale {scale}: a StableDiffusionPipeline takes all below 1 for 1, none; give 1" in said
    assert not (tmp_path / "out" / "images").exists()


def test_a_student_is_called_as_it_was_trained(student, tiny, captions, tmp_path, one_thread):
    """By its run, its folder, or as the LoRA of its base model: one step, its own scheduler, no guidance, the same pictures."""
    ways = {
        "run": ["--model", str(student.parent)],
        "folder": ["--model", str(student)],
        "lora": ["--model", str(tiny["sd15"]), "--lora", str(student)],
    }
    pictures, made = {}, {}
    for name, model in ways.items():
        call = ["generate", "--protocol", "custom", "--num-images", "3", *model, "--captions", str(captions)]
        assert main([*call, "--output", str(tmp_path / name)]) == 0
        pictures[name] = generated(tmp_path / name)
        made[name] = json.loads((tmp_path / name / "images" / "draw0" / "generation.json").read_text())
        facts = made[name].pop("model")
        assert facts["call"] == {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16}
        assert facts["scheduler"] == "LCMScheduler"
        assert facts["student"]["objective"] == "diff_instruct"
    assert made["run"] == made["folder"] == made["lora"]  # what they depend on is the same
    assert np.array_equal(pictures["run"], pictures["folder"])
    assert np.array_equal(pictures["run"], pictures["lora"])
    plain = load_sampler(str(tiny["sd15"]), image_size=16)
    assert plain.call["num_inference_steps"] == 50
    assert plain.call["guidance_scale"] == 7.5


def changed(model: Path, file: str, **settings) -> None:
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | settings))


def other_lora(model: Path) -> None:
    """The same LoRA weights at another strength: alpha is no weight."""
    file = model / "lora" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = json.loads(stored.metadata()["lora_adapter_metadata"])
    metadata["unet.lora_alpha"] *= 2
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: changed(m, "vae/config.json", scaling_factor=0.13), "vae.scaling_factor is not set, needed 0.13"),
        (
            lambda m: changed(m, "text_encoder/config.json", hidden_act="gelu"),
            "text_encoder.hidden_act is not set, needed 'gelu'",
        ),
        (
            lambda m: changed(m, "tokenizer/tokenizer_config.json", model_max_length=60),
            "tokenizer.model_max_length is 77, needed 60",
        ),
        (lambda m: changed(m, "scheduler/scheduler_config.json", set_alpha_to_one=True), "scheduler.set_alpha_to_one is not"),
        (other_lora, "unet.lora_scale differs"),
    ],
    ids=["vae", "activation", "tokenizer", "scheduler", "alpha"],
)
@pytest.mark.slow
def test_another_model_in_the_same_place_is_refused(change, said, student, tiny, captions, tmp_path, capsys):
    """One LoRA, one base model, each under its own path all the time."""
    model = Path(shutil.copytree(tiny["sd15"], tmp_path / "model"))
    (model / "lora").mkdir()  # without student.json: any LoRA, on the pipeline's own scheduler
    shutil.copy(student / "pytorch_lora_weights.safetensors", model / "lora")
    call = ["generate", "--protocol", "custom", "--num-images", "3", "--model", str(model), "--lora", str(model / "lora")]
    call += ["--captions", str(captions), "--output", str(tmp_path / "out"), "--image-size", "16", "--steps", "1"]
    assert main(call) == 0
    assert main(call) == 0
    change(model)
    assert main(call) == 2
    assert f"holds images made otherwise: {said}" in capsys.readouterr().err


def test_captions_whose_words_went_over_are_others(tiny, captions, tmp_path, capsys):
    call = ["generate", "--protocol", "custom", "--num-images", "2", "--model", str(tiny["sd15"]), "--image-size", "16"]
    call += ["--steps", "1", "--captions", str(captions.with_suffix(".jsonl")), "--output", str(tmp_path / "out")]
    for texts, code in ((["a cat\na dog", "b"], 0), (["a cat", "a dog\nb"], 2)):
        captions.with_suffix(".jsonl").write_text("".join(json.dumps({"caption": t}) + "\n" for t in texts))
        assert main(call) == code
    assert "holds images made otherwise: captions differ; name another" in capsys.readouterr().err


def test_a_student_of_another_level(recipe, distil, fresh_accelerator):
    """Read out at t = 600, it is called at t = 600."""
    config = recipe("diff_instruct", "sd15")
    config["student"]["readout_t"] = 600
    sampler = load_sampler(str(distil(config)))
    assert sampler.call["timesteps"] == [600]
    assert "num_inference_steps" not in sampler.call
    options = {"timesteps": [600], "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "np"}
    expected = sampler.pipe(["a cat"], generator=[image_generator(0, 3)], **options).images
    assert np.array_equal(sampler([3], 0, ["a cat"]).permute(0, 2, 3, 1).numpy(), (expected * 255).round().astype(np.uint8))


@pytest.mark.slow
def test_whole_run_with_captions(student, tiny, captions, tmp_path):
    """CLIP score and latency of a student beside its teacher."""
    clip = random_networks.clip(tmp_path / "clip")
    call = [
        "run",
        "--protocol",
        "custom",
        "--num-images",
        "3",
        "--metrics",
        "clip_score",
        "--clip",
        str(clip),
        "--model",
        str(student),
    ]
    call += ["--captions", str(captions), "--teacher", str(tiny["sd15"]), "--teacher-steps", "5", "--image-size", "16"]
    assert main([*call, "--latency-batch", "2", "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert -1 <= found["metrics"]["clip_score"]["value"] <= 1
    assert found["captions"]["n"] == 3
    assert found["latency"]["teacher"]["call"]["num_inference_steps"] == 5
    assert found["latency"]["speedup"] > 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "times as fast as the teacher" in page


def test_prompts_are_needed(tiny, captions, tmp_path, capsys):
    call = [
        "generate",
        "--protocol",
        "custom",
        "--num-images",
        "4",
        "--model",
        str(tiny["sd15"]),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(call) == 2
    assert "4 images need as many captions, got 0; give --captions" in capsys.readouterr().err
    assert main([*call, "--captions", str(captions)]) == 2
    assert "has captions for 3 images, 4 are needed" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_a_student_on_a_student_is_refused(student, tmp_path):
    with pytest.raises(ValueError, match="is a student, and so is --model"):
        load_sampler(str(student), lora=str(student))


def test_clip_score_while_training(recipe, distil, tmp_path, fresh_accelerator, one_thread):
    """The last line's score is that of the stored student's images for the data's prompts, from the same seeds, by hand."""
    clip = random_networks.clip(tmp_path / "clip")
    config = recipe("diff_instruct", "sd15", ema_decay=0.0)
    evaluation = {"every": 3, "num_images": 5, "metrics": ["clip_score"], "clip": str(clip), "batch_size": 2}
    run = distil(config, evaluation=evaluation)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ["evaluation/clip_score" in row for row in logged] == [False, False, True]
    pipe, extractor = load_student(run), Clip("x", Found(clip, "", False), ["cosine"])
    scores = []
    for i in range(5):
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(derive_seed(0, "evaluation", i)))
        call = {"latents": z, "num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "np"}
        pixels = torch.from_numpy((pipe(CAPTIONS[i % 3], **call).images * 255).round()).to(torch.uint8)
        scores.append(float(extractor(pixels.permute(0, 3, 1, 2), [CAPTIONS[i % 3]])["cosine"]))
    assert logged[-1]["evaluation/clip_score"] == pytest.approx(sum(scores) / 5, abs=1e-4)
