"""Features against the libraries that define them, on the same files: clean-fid, torch-fidelity, torchmetrics, open_clip."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import AutoProcessor, AutoTokenizer, CLIPModel, Dinov2Model

from eval.networks.extractors import Aesthetic, Clip, DinoV2, Inception, clean_resize
from eval.networks.weights import Found, sha256
from scripts.bench.parts import random_networks


def found(path: Path) -> Found:
    return Found(path, sha256(path) if path.is_file() else "0", False)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("side", [7, 32, 101, 299, 513])
def test_clean_resize_is_clean_fids(side, make_pictures):
    images = make_pictures(3, side, side)
    resize = build_resizer("clean")
    theirs = np.stack([resize(i.permute(1, 2, 0).numpy()).transpose(2, 0, 1) for i in images])
    assert np.abs(clean_resize(images).numpy() - theirs).max() < 4e-3  # of 255


def test_clean_resize_of_oblong_images():
    image = torch.randint(256, (1, 3, 53, 71), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = build_resizer("clean")(image[0].permute(1, 2, 0).numpy()).transpose(2, 0, 1)
    assert np.abs(clean_resize(image)[0].numpy() - theirs).max() < 4e-3


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_torchscript_features_are_clean_fids(mode, networks, sets, tmp_path):
    script = found(networks.inception)
    (tmp_path / "inception-2015-12-05.pt").write_bytes(networks.inception.read_bytes())
    theirs = InceptionV3W(str(tmp_path), download=False, resize_inside=mode == "legacy_tensorflow")
    resize = build_resizer(mode)
    prepared = np.stack([np.asarray(resize(i.permute(1, 2, 0).numpy())).transpose(2, 0, 1) for i in sets.a_pixels])
    base = theirs.base if mode == "legacy_tensorflow" else theirs.layers
    x = torch.from_numpy(prepared).float()
    with torch.no_grad():  # clean-fid's wrapper insists on 2048 columns
        expected = base(x, return_features=True) if mode == "legacy_tensorflow" else base((x - 128) / 128)
    ours = Inception(script, mode)
    assert ours.outputs == {"features": networks.dim}
    assert relative(ours(sets.a_pixels)["features"], expected) < 1e-5


@pytest.mark.slow
def test_full_network_agrees_everywhere(full_inception, make_pictures, tmp_path):
    """One set of weights: TorchScript, pytorch-fid's file, clean-fid's wrapper, torch-fidelity's network."""
    script, weights = full_inception
    images = make_pictures(3, 9, 299)
    (tmp_path / "inception-2015-12-05.pt").write_bytes(script.read_bytes())
    with torch.no_grad():
        clean = InceptionV3W(str(tmp_path), download=False)(images.float())
        fidelity = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))(
            images
        )
    for mode in ("clean", "legacy_tensorflow"):
        ours = Inception(found(script), mode, logits=True)(images)
        assert relative(ours["features"], clean) < 1e-5
        assert relative(ours["features"], fidelity[0]) < 1e-5
        assert relative(ours["logits"], fidelity[1]) < 1e-5


@pytest.mark.slow
def test_legacy_pytorch_is_clean_fids(full_inception, make_pictures, monkeypatch):
    from cleanfid import inception_pytorch
    from cleanfid.features import build_feature_extractor

    weights = full_inception[1]
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: state)
    theirs = build_feature_extractor("legacy_pytorch", torch.device("cpu"), use_dataparallel=False)
    resize = build_resizer("legacy_pytorch")
    images = make_pictures(2, 10, 67)
    prepared = np.stack([resize(i.permute(1, 2, 0).numpy()).transpose(2, 0, 1) for i in images])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(prepared))
    assert relative(Inception(found(weights), "legacy_pytorch")(images)["features"], expected) < 1e-5


def test_logits_are_the_networks_own(networks, sets):
    ours = Inception(found(networks.inception), "legacy_tensorflow", logits=True)
    base = torch.jit.load(str(networks.inception))
    with torch.no_grad():
        expected = base(sets.a_pixels, no_output_bias=True)
    torch.testing.assert_close(ours(sets.a_pixels)["logits"].softmax(1), expected, rtol=1e-5, atol=1e-7)
    assert ours.outputs["logits"] == 11


class Without(random_networks.TorchScriptInception):
    """Class probabilities that no stored matrix gives."""

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        features = self.layers(img.to(torch.float32) / 128 - 1)
        return features if return_features else torch.sin(self.output(features)).softmax(1)


def test_the_output_layer_is_found_by_what_it_says(tmp_path):
    """Another matrix of its shape comes first; where none gives the network's own probabilities there is no score."""
    torch.manual_seed(0)
    net = random_networks.TorchScriptInception(random_networks.small_layers(13), 13, 7)
    net.register_parameter("another", torch.nn.Parameter(torch.randn(7, 13)))
    torch.jit.script(net.eval()).save(str(tmp_path / "net.pt"))
    ours = Inception(found(tmp_path / "net.pt"), "clean", logits=True)
    assert torch.equal(ours.output, torch.jit.load(str(tmp_path / "net.pt")).output.weight)
    torch.jit.script(Without(random_networks.small_layers(13), 13, 7).eval()).save(str(tmp_path / "without.pt"))
    with pytest.raises(ValueError, match="no output layer that gives its own class probabilities"):
        Inception(found(tmp_path / "without.pt"), "clean", logits=True)


def test_features_do_not_depend_on_neighbours(networks, sets):
    ours = Inception(found(networks.inception), "clean")
    alone = torch.cat([ours(image[None])["features"] for image in sets.a_pixels[:7]])
    assert relative(ours(sets.a_pixels)["features"][:7], alone) < 1e-6


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is no TorchScript Inception"), (b"PK\x03\x04 half a zip", "is no TorchScript Inception"), (None, "has no attribute")],
)
def test_other_files_are_refused(content, message, tmp_path):
    file = tmp_path / "inception.pt"
    if content is None:
        torch.jit.script(torch.nn.Linear(2, 3)).save(str(file))
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Inception(found(file), "clean")


def test_damaged_tensors_are_refused(full_inception, tmp_path):
    file = tmp_path / "inception.pth"
    file.write_bytes(full_inception[1].read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        Inception(found(file), "legacy_pytorch")


def test_no_pickle_is_executed(tmp_path):
    trap = tmp_path / "trap"
    file = tmp_path / "evil.pth"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (trap,))

    torch.save({"layers.0.weight": Evil()}, file)
    for build in (lambda: Inception(found(file), "legacy_pytorch"), lambda: Aesthetic.load(found(file))):
        with pytest.raises(ValueError, match="cannot be read as tensors"):
            build()
    assert not trap.exists()


# CLIP ------------------------------------------------------------------------------------------------------------------


def transformers_cosine(folder: Path, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    model, processor = CLIPModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(text=captions, images=list(images), return_tensors="pt", padding=True, truncation=True, max_length=77)
    with torch.no_grad():
        out = model(**inputs)
    return torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)


def test_cosine_is_transformers_own(networks, sets):
    captions = [f"a photo of thing {i}" for i in range(5)]
    ours = Clip("x", found(networks.clip), ["cosine"])
    expected = transformers_cosine(networks.clip, sets.a_pixels[:5], captions)
    torch.testing.assert_close(ours(sets.a_pixels[:5], captions)["cosine"][:, 0], expected, rtol=1e-5, atol=1e-6)


def test_cosine_is_torchmetrics(networks, sets):
    """torchmetrics 1.9 needs transformers 5's outputs unwrapped; it sums 100 times the cosine."""
    from torchmetrics.multimodal import CLIPScore

    model, captions = CLIPModel.from_pretrained(networks.clip).eval(), [f"number {i}" for i in range(7)]

    class Unwrapped(torch.nn.Module):
        config, device = model.config, model.device

        def get_image_features(self, *args, **kwargs):
            return model.get_image_features(*args, **kwargs).pooler_output

        def get_text_features(self, *args, **kwargs):
            return model.get_text_features(*args, **kwargs).pooler_output

    metric = CLIPScore(model_name_or_path=lambda: (Unwrapped(), AutoProcessor.from_pretrained(networks.clip)))
    with torch.no_grad():
        metric.update(list(sets.a_pixels[:7]), captions)
    ours = Clip("x", found(networks.clip), ["cosine"])(sets.a_pixels[:7], captions)["cosine"]
    assert ours.mean().item() == pytest.approx(metric.score.item() / 700, rel=1e-5)  # before it cuts negative means to 0


def test_long_captions_keep_their_end(networks, sets):
    """Cut to 77 tokens with the end token last; different captions stay different (torchmetrics gives both one score)."""
    long = ["x" * 100 + "a", "y" * 100 + "a"]
    ours = Clip("x", found(networks.clip), ["cosine"])
    tokens = ours.net.tokenizer(long, truncation=True, max_length=77)["input_ids"]
    assert all(len(t) == 77 and t[-1] == ours.net.tokenizer.eos_token_id for t in tokens)
    a, b = ours(sets.a_pixels[:1].expand(2, -1, -1, -1), long)["cosine"][:, 0]
    assert abs(a - b) > 1e-4
    expected = transformers_cosine(networks.clip, sets.a_pixels[:1].expand(2, -1, -1, -1), long)
    torch.testing.assert_close(torch.stack([a, b]), expected, rtol=1e-5, atol=1e-6)


def test_prefix_goes_before_each_caption(networks, sets):
    plain, prefixed = (Clip("x", found(networks.clip), ["cosine"], prefix=p) for p in ("", "A photo depicts "))
    captions = ["a cat", "two dogs"]
    torch.testing.assert_close(
        prefixed(sets.a_pixels[:2], captions)["cosine"],
        plain(sets.a_pixels[:2], [f"A photo depicts {c}" for c in captions])["cosine"],
    )
    assert prefixed.describe()["prefix"] == "A photo depicts "


def test_open_clip_is_open_clips(sets, tmp_path):
    shape = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}}
    shape["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    (tmp_path / "tiny-open-clip.json").write_text(json.dumps(shape))
    open_clip.add_model_config(tmp_path / "tiny-open-clip.json")
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("tiny-open-clip")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    captions = ["a dog on a mat", "word " * 90 + "cat", "word " * 90 + "dog"]
    images = sets.a_pixels[:3]
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([transform(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in images]))
        text = model.encode_text(open_clip.get_tokenizer("tiny-open-clip")(captions))
    expected = torch.nn.functional.cosine_similarity(image, text)
    ours = Clip("open_clip:tiny-open-clip:tag", found(tmp_path / "weights.pt"), ["cosine"])
    torch.testing.assert_close(ours(images, captions)["cosine"][:, 0], expected, rtol=1e-5, atol=1e-6)
    assert ours.describe()["longest_text"] == 77


def test_aesthetic_is_its_definition(networks, sets):
    """Affine layers on the unit embedding, without activations (improved-aesthetic-predictor)."""
    ours = Clip("x", found(networks.clip_768), ["features", "aesthetic"], aesthetic=found(networks.aesthetic))
    out = ours(sets.a_pixels[:5])
    state = torch.load(networks.aesthetic, weights_only=True)
    assert [f"layers.{i}.weight" in state for i in (0, 2, 4, 6, 7)] == [True] * 5
    x = out["features"]
    torch.testing.assert_close(x.norm(dim=1), torch.ones(5))
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    torch.testing.assert_close(out["aesthetic"], x, rtol=1e-5, atol=1e-6)


def test_aesthetic_needs_its_own_clip(networks):
    with pytest.raises(ValueError, match=r"reads 768 columns, .* gives 48"):
        Clip("x", found(networks.clip), ["aesthetic"], aesthetic=found(networks.aesthetic))


def test_dinov2_sees_what_dgm_eval_shows(networks, make_pictures):
    """Pillow's bicubic to 224 whatever the shape, rounded to 8 bits; the class token after the last norm."""
    images = make_pictures(2, 11, 149)
    shown = np.stack([np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC)) for i in images])
    mean, std = torch.tensor(DinoV2.mean).view(3, 1, 1), torch.tensor(DinoV2.std).view(3, 1, 1)
    model = Dinov2Model.from_pretrained(networks.dinov2).eval()
    with torch.no_grad():
        expected = model((torch.from_numpy(shown).permute(0, 3, 1, 2) / 255 - mean) / std).last_hidden_state[:, 0]
    ours = DinoV2(found(networks.dinov2))
    assert relative(ours(images)["features"], expected) < 5e-3  # Pillow rounds some pixels by one of 255 differently


def test_published_weights_with_other_settings_are_not_published(networks, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(networks.clip, folder)
    assert Clip("x/y", Found(folder, "0", True), ["features"]).describe()["published"]
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_std": [0.5, 0.5, 0.5]}))
    assert not Clip("x/y", Found(folder, "0", True), ["features"]).describe()["published"]


def test_a_score_of_captions_depends_on_the_tokenizer(networks):
    """Its identity is that of its rules: calls with other lengths leave it as it was."""
    clip = Clip("x/y", Found(networks.clip, "0", False), ["cosine"])
    before = clip.describe()["tokenizer"]
    clip.net.texts(["a", "a longer one " * 40])
    assert clip.describe()["tokenizer"] == before
    assert "tokenizer" not in Clip("x/y", Found(networks.clip, "0", False), ["features"]).describe()


def test_incomplete_clip_is_refused(networks, tmp_path):
    (tmp_path / "config.json").write_text((networks.clip / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="is no whole CLIP model"):
        Clip("x", found(tmp_path), ["cosine"])


def test_tokenizer_is_the_models(networks):
    assert len(AutoTokenizer.from_pretrained(networks.clip)) == 190
