"""The embedded teacher: files are what the manifest says, stock libraries load them, captions of any text have tokens."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from pipelines import emoji
from scripts.assets.assemble import sums
from scripts.assets.pairs import shortened
from scripts.assets.vae import difference

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji_sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(ASSETS / "emoji_clip").eval()


@pytest.fixture(scope="module")
def pictures():
    return emoji.load(str(ASSETS / "emoji" / "emoji_32.parquet"))


def test_manifest_names_every_file_and_its_sum():
    assert json.loads((ASSETS / "manifest.json").read_text()) == sums(ASSETS)


def test_sums_are_of_the_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    assert sums(tmp_path) == {"a/b": {"bytes": 3, "sha256": hashlib.sha256(b"123").hexdigest()}}


def test_weights_are_float16_and_few():
    from safetensors import safe_open

    total = 0
    for file in (ASSETS / "emoji_sd").rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                part = tensors.get_slice(key)
                assert part.get_dtype() in ("F16", "I64"), key
                total += torch.Size(part.get_shape()).numel()
    assert 3e6 < total < 12e6


def test_stock_pipeline_draws_in_one_step(pipe):
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(
        ["red apple, noto style, on light blue"] * 2, num_inference_steps=1, generator=generator, output_type="pt"
    ).images
    assert drawn.shape == (2, 3, 32, 32)
    assert torch.isfinite(drawn).all()


def test_schedule_is_that_of_sd15(pipe):
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert config.prediction_type == "epsilon"
    assert config.steps_offset == 1
    assert config.clip_sample is False  # what DDIM is made from; latents are not within [-1, 1]


@pytest.mark.parametrize(
    "text", ["Schwarzwälder Kirschtorte", "日本の寺", "🍎", "👩‍🚀 🏳️‍🌈", "qwxzv flurbl-9", "q", "red apple", ""]
)
def test_any_text_has_tokens(pipe, text):
    """Bytes stand in for unknown words, so nothing is lost: the end token within a text would be an unknown one."""
    tokenizer = pipe.tokenizer
    ids = tokenizer(text, truncation=False).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]
    assert tokenizer.unk_token_id == tokenizer.eos_token_id  # so there is no unknown token in it either
    assert 0 <= min(ids) <= max(ids) < pipe.text_encoder.config.vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_text_encoder_is_clips_text_tower(pipe, clip):
    ids = pipe.tokenizer(["red apple", "cat face, twemoji style"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(pipe.text_encoder(ids).last_hidden_state, clip.text_model(ids).last_hidden_state)


def test_clip_reads_pictures(clip):
    from PIL import Image
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(ASSETS / "emoji_clip")
    given = processor(text=["red apple"], images=[Image.new("RGB", (32, 32), "white")], padding="max_length", return_tensors="pt")
    assert given["pixel_values"].shape == (1, 3, 32, 32)
    torch.testing.assert_close(given["pixel_values"], torch.ones(1, 3, 32, 32))
    with torch.no_grad():
        assert clip(**given).logits_per_image.shape == (1, 1)


def test_styles_of_an_emoji_are_held_out_together(pictures):
    kept, train = pictures.part(held_out=True), pictures.part(held_out=False)
    assert len(kept) + len(train) == len(pictures) == 6475
    assert not set(kept.codes) & set(train.codes)
    assert 0.03 < len(kept) / len(pictures) < 0.07


def test_captions(pictures):
    assert emoji.caption("red apple", "noto", "light blue") == "red apple, noto style, on light blue"
    assert emoji.caption("red apple", None, "light blue") == "red apple, on light blue"
    said = [shortened(n, s, "light blue") for n, s in zip(pictures.names, pictures.styles, strict=True)]
    assert 0.37 < sum("style" in s for s in said) / len(said) < 0.43
    assert 0.37 < sum("on light blue" in s for s in said) / len(said) < 0.43


def test_transparency_shows_the_background():
    rgba = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    rgba[0, :, 0, 0] = torch.tensor([255, 0, 0, 255])
    shown = emoji.on_background(rgba, torch.tensor([[0.0, 255.0, 127.5]]))
    torch.testing.assert_close(shown[0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(shown[0, :, 1, 1], torch.tensor([-1.0, 1.0, 0.0]))


def test_moved_mirrors_and_rolls():
    images = torch.arange(2 * 1 * 3 * 5).view(2, 1, 3, 5)
    moved = emoji.moved(images, torch.tensor([False, True]), torch.tensor([[1, 2], [0, 0]]))
    assert torch.equal(moved[0], images[0].roll((-1, -2), (1, 2)))
    assert torch.equal(moved[1], images[1].flip(2))


def test_difference_is_zero_of_equals_and_sees_edges(generator):
    a = torch.rand(2, 3, 5, 7, generator=generator)
    assert difference(a, a) == 0
    assert float(difference(a, a + 0.5)) == pytest.approx(0.5)  # a constant has no edges
    b = a.clone()
    b[..., 0] += 1.0
    assert float(difference(a, b)) > float((a - b).abs().mean())


def test_a_part_that_does_not_fit_is_named(tmp_path):
    from pipelines.common.errors import UserError
    from scripts.assets.assemble import new_unet, pipeline

    new_unet(8, 64).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="text of width 64"):
        pipeline(str(ASSETS / "emoji_sd" / "vae"), str(ASSETS / "emoji_clip"), str(tmp_path / "unet"))


def test_fitting_resumed_equals_fitting_on(tmp_path):
    from scripts.assets.fitting import draws, fit
    from trainers.config.networks import Optimizer

    def fitted(folder, steps):
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 2)

        def loss(step):
            return network(torch.randn(5, 3, generator=draws(0, step))).square().mean(), {}

        ema = fit(network, loss, tmp_path / folder, Optimizer(lr=0.01), steps, lambda file: None, save_every=2)
        return [*network.state_dict().values(), *ema.average.values()]

    whole = fitted("whole", 6)
    fitted("parts", 2)
    torch.testing.assert_close(fitted("parts", 6), whole, rtol=0, atol=0)


def test_fitting_does_not_go_on_from_another_task(tmp_path):
    from pipelines.common.errors import UserError
    from scripts.assets.fitting import fit
    from trainers.config.networks import Optimizer

    def fitted(task):
        network = torch.nn.Linear(3, 2)
        fit(network, lambda step: (network.weight.square().sum(), {}), tmp_path, Optimizer(lr=0.01), 2, lambda f: None, task=task)

    fitted({"latents_of": "a"})
    fitted({"latents_of": "a"})
    with pytest.raises(UserError, match=r"holds a training with \{'latents_of': 'a'\}, this one has \{'latents_of': None\}"):
        fitted({"latents_of": None})


def test_retrieval_of_perfect_and_of_blind_embeddings():
    from scripts.assets.clip import retrieval

    names = [str(i) for i in range(64)]
    own = torch.eye(64)
    assert retrieval(own, own, names) == 1
    assert retrieval(own, own.roll(1, 0), names) < 0.1


def test_contrast_counts_every_caption_that_fits(generator):
    from scripts.assets.clip import contrast

    logits = torch.randn(5, 5, generator=generator)
    assert contrast(logits, torch.ones(5, 5, dtype=torch.bool)) == pytest.approx(0.0, abs=1e-6)
    own = torch.eye(5, dtype=torch.bool)
    target = torch.arange(5)
    both = 0.5 * (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target))
    torch.testing.assert_close(contrast(logits, own), both)
