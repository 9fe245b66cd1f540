"""Protocol emoji-2k on the embedded teacher, with few pictures and two steps: numbers, pictures, kept numbers, report."""

import copy
import hashlib
import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image

from eval.__main__ import main
from eval.images.sampler import load_sampler
from eval.images.seeds import image_generator
from eval.networks.extractors import Clip
from eval.networks.weights import find
from eval.report.html import Picture
from eval.studies.emoji import evaluate as evaluation
from eval.studies.emoji import prompts, teacher
from eval.studies.emoji.drawing import Workers, blocks, draw, encode, of_texts
from eval.studies.emoji.evaluate import evaluate
from eval.studies.emoji.page import page
from eval.studies.emoji.report import FILES, write_report
from eval.studies.emoji.teacher import load_teacher
from eval.studies.emoji.timing import time_in_turn
from eval.studies.protocols import PROTOCOLS
from eval.studies.runs import find_run
from pipelines import emoji
from pipelines.assets import EMOJI_CLIP, EMOJI_SD
from pipelines.common.errors import UserError
from pipelines.students import save_text_to_image
from pipelines.text_to_image import load_pipeline
from pipelines.variance_preserving import one_step_scheduler

N, STEPS = 5, 2
INFO = {"family": "sd", "weights": "lora", "readout_t": 999, "image_size": 32, "base_model": str(EMOJI_SD)}
INFO |= {"objective": "vardiu", "steps": 30, "train_seconds": 12.5}


@pytest.fixture(scope="module")
def pictures() -> emoji.Pictures:
    return emoji.load()


@pytest.fixture(scope="module")
def few(pictures) -> emoji.Pictures:
    """41 to learn from and 3 held out."""
    mine = [i for i, group in enumerate(pictures.groups) if group in emoji.GROUPS]
    kept = [i for i in mine if emoji.is_held_out(pictures.codes[i])]
    return pictures.only([i for i in mine if i not in set(kept)][:41] + kept[:3])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run of a student with a random LoRA."""
    folder = tmp_path_factory.mktemp("run") / "run"
    pipe = load_pipeline(str(EMOJI_SD))
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"]), "student")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if "lora" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    scheduler = one_step_scheduler(pipe.scheduler)
    save_text_to_image(folder / "student", StableDiffusionPipeline, scheduler, INFO, adapter=(pipe.unet, "student"))
    rows = ({"step": step, "joint/loss": 1 / step} for step in range(1, 31))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def protocol():
    return PROTOCOLS["emoji-2k"].adjusted(N, seed=3, force=True)


@pytest.fixture(scope="module")
def evaluated(few, run, protocol, tmp_path_factory) -> SimpleNamespace:
    folder, said = tmp_path_factory.mktemp("out"), []
    students = [find_run("<b>a", run, "student")]
    found = evaluate(protocol, str(EMOJI_SD), students, folder / "teacher.json", few, STEPS, said.append)
    write_report(found, folder)
    report = json.loads((folder / "report.json").read_text())
    return SimpleNamespace(result=found, folder=folder, said=said, report=report, students=students)


def test_seconds_of_a_picture_are_those_of_a_call_with_its_prompt(few, monkeypatch):
    """Every model pays for its prompts. Here a batch of them takes at least a fifth of a second."""
    many, one = load_teacher(str(EMOJI_SD), STEPS)
    captions = prompts.reference(few).captions[:3]

    def slow(pipe):
        fast = pipe.encode_prompt

        def encode_prompt(*args, **options):
            time.sleep(0.2)
            return fast(*args, **options)

        return encode_prompt

    for pipe in (many.pipe, one.pipe):
        monkeypatch.setattr(pipe, "encode_prompt", slow(pipe))
    found = time_in_turn([many, one, one], captions, 5, 2)
    assert len(found.seconds) == 3
    assert min(*found.seconds, found.text) > 0.1  # half of it where a batch has two rows
    assert found.decoder > 0
    # the pictures of the first two calls: a guided one has a row for the empty prompt beside each
    assert torch.equal(found.first, torch.cat([many([0], 5, captions[:1]), many([1], 5, captions[1:2])]))


# What is asked for -----------------------------------------------------------------------------------------------------------


def test_prompts_are_names_of_training_pictures_in_the_order_of_a_hash(pictures):
    real = prompts.reference(pictures)
    captions = prompts.prompts(real, 2000)
    train = pictures.part(False, emoji.GROUPS)
    assert len(captions) == 2000 < len(real) == 2 * len(train)
    keys = [f"{code}|{style}" for code, style in zip(train.codes, train.styles, strict=True)]
    digests = sorted((hashlib.sha256(key.encode()).digest(), i) for i, key in enumerate(keys))
    for place in (0, 1, 999, 1999):  # the last one is in the second turn
        (digest, i), turn = digests[place % len(train)], place // len(train)
        background = list(emoji.BACKGROUNDS)[(int.from_bytes(digest[-4:]) + turn) % 6]
        assert captions[place] == train.names[i]
        shown = emoji.on_background(train.rgba[i : i + 1], torch.tensor([emoji.BACKGROUNDS[background]]).float())
        assert torch.equal(real.pixels[place], ((shown[0] + 1) * 127.5).round().to(torch.uint8))
    assert set(captions) == set(train.names)
    corners = real.pixels[:, :, 0, 0].float()  # mostly background
    for colour in emoji.BACKGROUNDS.values():
        assert 0.12 < ((corners - torch.tensor(colour)).abs().amax(1) == 0).float().mean() < 0.21


def test_the_protocol_is_the_same_for_all(pictures):
    """Another choice of prompts would need another name: numbers of the two could not be compared."""
    captions = prompts.prompts(prompts.reference(pictures), 2000)
    assert hashlib.sha256("\n".join(captions).encode()).hexdigest()[:16] == "2d1ae569cdccc6e8"


def test_held_out_pictures_are_on_every_background(few):
    held_out = prompts.held_out(few)
    assert len(held_out) == 3 * 6
    assert held_out.captions[:3] * 6 == held_out.captions
    assert set(held_out.captions) == set(few.part(True).names)
    assert len(held_out.pixels.flatten(1).unique(dim=0)) == 18


def test_more_prompts_than_captions_are_refused(few):
    with pytest.raises(UserError, match="num-images is 83; there are captions of 82 pictures"):
        prompts.prompts(prompts.reference(few), 83)


# Numbers -----------------------------------------------------------------------------------------------------------------------


def by_transformers(pixels, captions) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of pictures and captions, by transformers' own processor and model."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(EMOJI_CLIP).eval(), CLIPProcessor.from_pretrained(EMOJI_CLIP)
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    given = processor(text=captions, images=images, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**given)
    return out.image_embeds.double().numpy(), out.text_embeds.double().numpy()


def closed_form(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a^(1/2) S_b S_a^(1/2))^(1/2)."""
    means, covs = [x.mean(0) for x in (a, b)], [np.cov(x.T) for x in (a, b)]
    values, vectors = np.linalg.eigh(covs[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    middle = np.linalg.eigvalsh(root @ covs[1] @ root).clip(0)
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covs[0]) + np.trace(covs[1]) - 2 * np.sqrt(middle).sum())


@pytest.mark.slow
def test_numbers_are_those_of_transformers_and_numpy(evaluated, few):
    real = prompts.reference(few)
    reference, texts = by_transformers(real.pixels, real.captions)
    facts = evaluated.report["real"]
    assert facts["clip_score"] == pytest.approx(float((reference * texts).sum(1).mean()), abs=1e-5)
    held_out, captions = by_transformers(prompts.held_out(few).pixels, prompts.held_out(few).captions)
    assert facts["held_out"]["clip_score"] == pytest.approx(float((held_out * captions).sum(1).mean()), abs=1e-5)
    assert facts["held_out"]["fd"] == pytest.approx(closed_form(held_out, reference), rel=1e-4)
    for model in evaluated.result.models:
        assert model.samples.shape == (N, 3, 32, 32)  # all that were drawn
        drawn, asked = by_transformers(model.samples, real.captions[:N])
        assert model.numbers["clip_score"] == pytest.approx(float((drawn * asked).sum(1).mean()), abs=1e-5)
        assert model.numbers["fd"] == pytest.approx(closed_form(drawn, reference), rel=1e-4)


def test_pictures_are_those_of_stock_diffusers(evaluated, run, few):
    captions = prompts.reference(few).captions[:N]

    def stock(pipe, steps: int, guidance: float) -> torch.Tensor:
        generators = [image_generator(3, i) for i in range(N)]
        pipe.set_progress_bar_config(disable=True)
        images = pipe(captions, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np").images
        return torch.from_numpy((images * 255).round()).permute(0, 3, 1, 2)

    pipe = StableDiffusionPipeline.from_pretrained(EMOJI_SD)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected = [stock(pipe, STEPS, 2.0)]
    pipe.scheduler = LCMScheduler.from_pretrained(run / "student", subfolder="scheduler")
    expected.append(stock(pipe, 1, 1.0))
    pipe.load_lora_weights(run / "student")
    expected.append(stock(pipe, 1, 1.0))
    for model, pixels in zip(evaluated.result.models, expected, strict=True):
        assert (model.samples - pixels).abs().max() <= 1  # a rounding apart
    assert (expected[1] - expected[2]).abs().max() > 20  # the LoRA does something


def test_a_students_lora_is_fused(run):
    """The weights of the teacher plus alpha / rank B A, by hand, and no layer left that adds it again at each call."""
    from safetensors.torch import load_file

    unet = evaluation.load_student(find_run("a", run, "student"), str(EMOJI_SD)).pipe.unet
    plain = StableDiffusionPipeline.from_pretrained(EMOJI_SD).unet.state_dict()
    assert unet.state_dict().keys() == plain.keys()
    lora = load_file(run / "student" / "pytorch_lora_weights.safetensors")
    downs = [key for key in lora if key.endswith("to_q.lora_A.weight")]
    assert downs
    for key in downs:
        name = key.removeprefix("unet.").replace("lora_A.", "")
        expected = plain[name] + lora[key.replace("lora_A", "lora_B")] @ lora[key]  # alpha 2, rank 2
        assert torch.allclose(unet.state_dict()[name], expected, atol=1e-6)
        assert (expected - plain[name]).abs().max() > 1e-3


def test_pictures_do_not_depend_on_the_number_of_cores(few):
    sampler = load_sampler(str(EMOJI_SD), steps=1, guidance_scale=1.0)
    clip = Clip("emoji_clip", find("emoji_clip", str(EMOJI_CLIP), EMOJI_CLIP), ("features", "cosine"))
    captions = prompts.reference(few).captions[:7]
    drawn = []
    for count in (1, 3):
        workers = Workers(count)
        texts = encode(sampler.pipe, captions, of_texts(clip, captions, 2, workers), 2, workers)
        drawn.append(draw(sampler, blocks(0, 7, 2), 5, texts, clip, workers))
    assert torch.equal(drawn[0].pixels, drawn[1].pixels)
    assert torch.equal(drawn[0].units, drawn[1].units)


def test_workers_keep_the_order_and_raise_the_first_error():
    assert Workers(3).run([lambda i=i: i * i for i in range(7)]) == [i * i for i in range(7)]
    begun = []

    def job(i: int) -> None:
        begun.append(i)
        if i == 1:
            raise UserError("the second")

    with pytest.raises(UserError, match="the second"):
        Workers(1).run([lambda i=i: job(i) for i in range(100)])
    assert len(begun) < 100


# What is kept ------------------------------------------------------------------------------------------------------------------


def test_the_teachers_numbers_are_used_again(evaluated, few, protocol):
    said = []
    again = evaluate(protocol, str(EMOJI_SD), (), evaluated.folder / "teacher.json", few, STEPS, said.append)
    for name, file, steps in (("teacher", "teacher.json", f"{STEPS} steps"), ("one_step", "teacher_one_step.json", "1 step")):
        before, after = getattr(evaluated.result, name), getattr(again, name)
        first, second = before.numbers, after.numbers
        assert first["measured"] == "now"
        assert second["measured"].endswith(f"/{file}")
        assert (second["fd"], second["clip_score"]) == (first["fd"], first["clip_score"])
        assert torch.equal(after.samples, before.samples)
        assert any(f"teacher, {steps}: FD and CLIP score are those kept in" in line for line in said)


def test_what_differs_is_said(evaluated, tmp_path):
    kept = evaluated.folder / "teacher.json"
    identity = json.loads(kept.read_text())["identity"]
    found, reason = teacher.look_up(identity, (tmp_path / "none.json", kept))
    assert found.numbers == {key: evaluated.report["teacher"][key] for key in ("fd", "clip_score")}
    for key, value in (
        ("unet.weights", "0" * 64),
        ("call.num_inference_steps", 7),
        ("n", 9),
        ("format", 0),
        ("clip.sha256", "1" * 64),
    ):
        assert key in identity
        found, reason = teacher.look_up(identity | {key: value}, (kept,))
        assert found is None
        assert key in reason
    assert teacher.look_up(identity, (tmp_path / "none.json",)) == (None, "none are kept yet")


@pytest.mark.parametrize("content", ["{", "[]", '{"fd": 1.0}', '{"fd": NaN, "clip_score": 1.0, "seconds": 1.0, "identity": {}}'])
def test_damaged_numbers_are_refused(tmp_path, content):
    (tmp_path / "teacher.json").write_text(content)
    with pytest.raises(UserError, match=r"teacher\.json.*remove it"):
        teacher.look_up({}, (tmp_path / "teacher.json",))


# The report --------------------------------------------------------------------------------------------------------------------


def test_report_json(evaluated):
    report = evaluated.report
    assert report["seconds_total"] > 0
    assert (report["protocol"]["name"], report["protocol"]["n"], report["protocol"]["standard"]) == ("emoji-2k", N, False)
    assert f"of {N} pictures (not the 2,000 of the protocol), one seed each from seed 3" in report["protocol"]["computed"]
    student = report["students"]["<b>a"]
    assert (student["train_seconds"], student["train_steps"], student["objective"]) == (12.5, 30, "vardiu")
    assert report["teacher"]["call"] == {"num_inference_steps": STEPS, "guidance_scale": 2.0}
    assert report["teacher_one_step"]["call"] == {"num_inference_steps": 1, "guidance_scale": 1.0}
    for numbers in (report["teacher"], report["teacher_one_step"], student):
        assert numbers["fd"] > 0
        assert -1 <= numbers["clip_score"] <= 1
        assert numbers["seconds_per_image"] > report["machine"]["text_seconds_per_image"] > 0
    assert student["fd_over_teacher"] == pytest.approx(student["fd"] / report["teacher"]["fd"])
    assert student["times_faster"] == pytest.approx(report["teacher"]["seconds_per_image"] / student["seconds_per_image"])
    assert len(report["extractor"]["sha256"]) == 64
    assert {"python", "torch", "diffusers", "transformers"} <= set(report["versions"])
    assert report["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", report["git_commit"])


def test_samples_png_has_a_row_a_model_and_a_column_a_prompt(evaluated):
    image = Image.open(io.BytesIO((evaluated.folder / "samples.png").read_bytes())).convert("RGB")
    pixels = np.asarray(image)
    side, step = 96, 104
    left, bottom = image.width - 16 - N * step + 8, image.height - 16
    for r, model in enumerate(evaluated.result.models):
        for i in range(N):
            tile = Image.fromarray(model.samples[i].permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
            top = bottom - (len(evaluated.result.models) - r) * step + 8
            shown = pixels[top : top + side, left + i * step : left + i * step + side]
            assert np.array_equal(shown, np.asarray(tile))
    first_row = bottom - len(evaluated.result.models) * step + 8
    assert (pixels[16:first_row, left:] < 200).any()  # captions above
    assert (pixels[first_row:bottom, 16 : left - 8] < 200).any()  # names at the left


def test_report_html_is_self_contained(evaluated):
    html = (evaluated.folder / "report.html").read_text()
    assert sorted(file.name for file in evaluated.folder.iterdir()) == sorted((*FILES, "teacher.json", "teacher_one_step.json"))
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 3  # samples, quality against time, losses
    assert all(source.startswith("data:image/") for source in sources)
    assert "<b>a" not in html
    assert "&lt;b&gt;a" in html
    assert "Not the protocol" in html
    html = re.sub(r'src="[^"]*"', "", html)
    assert "FID" not in html.replace("the formula of FID", "").replace("no FID", "").replace("# FID and CLIP score of it", "")


def test_students_of_several_steps_say_so(evaluated):
    report, none = copy.deepcopy(evaluated.report), {key: [] for key in ("samples", "time", "loss")}
    assert "<h1>One step instead of" in page(report, none)
    student = next(iter(report["students"].values()))
    student["call"] = {"sigmas": [1.0, 0.9, 0.75, 0.5]}
    assert "<h1>Few steps instead of" in page(report, none)
    assert page(report, none).count(", 4 steps</td>") == 1


def test_no_text_of_a_report_becomes_a_tag(evaluated, hostile):
    pictures = {key: [Picture(b"", caption="x")] for key in ("samples", "time", "loss")}
    bad = {key: [Picture(b"", caption=hostile.text)] for key in pictures}
    hostile.check(page(evaluated.report, pictures), page(hostile.plant(evaluated.report), bad))


# Bad input ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--teacher is needed for emoji-2k"),
        (["--teacher", "{sd}", "--metrics", "fid"], "--metrics has no effect with protocol emoji-2k"),
        (["--teacher", "{sd}", "--num-images", "7"], "num-images is 7 but protocol emoji-2k has 2,000"),
        (["--teacher", "{sd}", "--num-images", "2001", "--force", "--student", "a=nowhere"], "student 'a': no such folder"),
        (["--teacher", "{sd}", "--student", "nowhere"], "expected NAME=RUN"),
        (["--teacher", "nowhere/at/all"], "no such folder 'nowhere/at/all'"),
    ],
)
def test_bad_commands(capsys, tmp_path, options, message):
    options = [option.format(sd=EMOJI_SD) for option in options]
    assert main(["run", "--protocol", "emoji-2k", "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_other_models_are_refused(edm, tmp_path, few, protocol):
    with pytest.raises(UserError, match="is a EDMPipeline; this study is of a StableDiffusionPipeline"):
        teacher.load_teacher(str(edm))
    pipe = load_pipeline(str(EMOJI_SD))
    pipe.unet.register_to_config(sample_size=16)
    pipe.save_pretrained(tmp_path / "large")
    with pytest.raises(UserError, match="draws 3 channels of 64 pixels a side, this study is of 3 of 32"):
        teacher.load_teacher(str(tmp_path / "large"))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "student.json").write_text("{}")
    with pytest.raises(UserError, match=r"student 'a': .* is no student of a StableDiffusionPipeline"):
        evaluate(protocol, str(EMOJI_SD), [find_run("a", tmp_path, "student")], tmp_path / "teacher.json", few)


def test_a_damaged_asset_is_said_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    from pipelines import assets

    (tmp_path / "assets" / "emoji").mkdir(parents=True)
    (tmp_path / "assets" / "emoji" / "emoji_32.parquet").write_bytes(b"half")
    (tmp_path / "assets" / "manifest.json").write_text(
        json.dumps({"emoji/emoji_32.parquet": {"bytes": 8, "sha256": "0"}, "emoji_clip/x": {}})
    )
    monkeypatch.setattr(assets.check_assets, "__kwdefaults__", {"assets": tmp_path / "assets"})
    assert main(["run", "--protocol", "emoji-2k", "--teacher", "nowhere/at/all", "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "damaged" in message
    assert "emoji_32.parquet" in message
    assert "git checkout -- " in message
