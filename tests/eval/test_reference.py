"""Reference statistics: stored and read back to the bit, published ones read as they are, all others refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.images.files import ImageFiles
from eval.metrics import reference as references
from eval.metrics.frechet import GaussianStats
from eval.metrics.measure import compute
from eval.metrics.one_pass import one_pass
from eval.networks.extractors import Clip, Inception
from eval.networks.weights import Found, sha256
from eval.protocols import PROTOCOLS
from pipelines.common.errors import UserError

PROTOCOL = replace(PROTOCOLS["cifar10-50k"], metrics=("fid", "kid"))


@pytest.fixture
def measured(networks, sets):
    extractor = Inception(Found(networks.inception, sha256(networks.inception), False), "legacy_tensorflow")
    images = ImageFiles(str(sets.b), PROTOCOL)
    gathered = one_pass(images, {"inception": extractor}, ["inception"], batch_size=23)
    return extractor, references.of_images(gathered, PROTOCOL, images.identity(), {"inception": extractor.describe()})


@pytest.fixture
def stored(measured, tmp_path):
    references.save(measured[1], tmp_path / "ref")
    return tmp_path / "ref"


def load(folder, extractor, protocol=PROTOCOL, raw=("inception",), **changed):
    facts = {"inception": extractor.describe() | changed}
    return references.load(str(folder), protocol, facts, {"inception": extractor.outputs["features"]}, list(raw))


def test_round_trip_is_exact(measured, stored, networks, sets):
    extractor, made = measured
    read = load(stored, extractor)
    assert read.facts == made.facts
    for a, b in zip(read.moments["inception"], made.moments["inception"], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(read.rows["inception"], made.rows["inception"])
    gathered = one_pass(ImageFiles(str(sets.a), PROTOCOL), {"inception": extractor}, ["inception"])
    assert compute(PROTOCOL.metrics, gathered, read) == compute(PROTOCOL.metrics, gathered, made)


@pytest.mark.parametrize(
    ("name", "made", "real"),  # images that are made and that they are compared with: all of val2014, all of ImageNet
    [("coco-30k", 30_000, 40_504), ("imagenet64-50k", 50_000, 1_281_167), ("cifar10-50k", 50_000, 50_000)],
)
def test_a_protocol_compares_with_its_own_number_of_images(name, made, real):
    protocol = PROTOCOLS[name]
    assert protocol.num_images == made
    references.require_size(protocol, real, "--reference", force=False)
    references.require_size(protocol, None, "--reference", force=False)  # a published file does not say
    for n in {made, real - 1} - {real}:
        with pytest.raises(UserError, match=f"--reference has {n:,} images, protocol {name} compares with {real:,}; add --force"):
            references.require_size(protocol, n, "--reference", force=False)
        references.require_size(protocol, n, "--reference", force=True)


def test_identity_is_whole(stored, sets):
    facts = json.loads((stored / "reference.json").read_text())
    assert facts["protocol"] == "cifar10-50k"
    assert facts["processing"] == {"size": 32, "crop_to": None, "grayscale": False}
    assert facts["images"]["n"] == len(sets.b_pixels)
    assert len(facts["images"]["sha256"]) == len(facts["extractors"]["inception"]["sha256"]) == 64


def test_another_protocol_or_extractor_is_refused(measured, stored):
    extractor, _ = measured
    with pytest.raises(ValueError, match=r"was made for protocol cifar10-50k with .*, protocol imagenet64-50k has"):
        load(stored, extractor, replace(PROTOCOLS["imagenet64-50k"]))
    with pytest.raises(ValueError, match=r"sha256 of inception is .* there and 'other' here"):
        load(stored, extractor, sha256="other")
    with pytest.raises(ValueError, match=r"input of inception is .* there and 'clean' here"):
        load(stored, extractor, input="clean")
    with pytest.raises(ValueError, match="has no statistics of dinov2, only of inception"):
        references.load(str(stored), PROTOCOL, {"dinov2": {}}, {"dinov2": 5}, [])


def test_the_same_weights_with_other_settings_are_another_network(networks, tmp_path):
    """Of CLIP and DINOv2 the weights do not say all: the activation, and how images become tensors."""
    model = Path(shutil.copytree(networks.clip, tmp_path / "clip"))
    wanted, protocol = {"clip_336": 48}, replace(PROTOCOL, metrics=("cmmd",))

    def described(folder: Path) -> dict:
        return {"clip_336": Clip("x/y", Found(folder, "0", False), ["features"]).describe()}

    facts = described(model)
    stats = {"clip_336": GaussianStats(48)}
    stats["clip_336"].update(torch.randn(60, 48, generator=torch.Generator().manual_seed(0)))
    gathered = SimpleNamespace(stats=stats, rows={})
    made = references.of_images(gathered, protocol, {"n": 60}, facts)
    references.save(made, tmp_path / "ref")
    (model / "README.md").write_text("mine")
    references.load(str(tmp_path / "ref"), protocol, described(model), wanted, [])
    for file, change, said in (
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, r"image_mean is \[0.48.*, needed \[0.5, 0.5, 0.5\]"),
        ("config.json", {"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act is not set, needed 'gelu'"),
    ):
        whole = (model / file).read_text()
        content = json.loads(whole)
        for key, value in change.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        (model / file).write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"settings of clip_336 are others there: {said}; make it again"):
            references.load(str(tmp_path / "ref"), protocol, described(model), wanted, [])
        (model / file).write_text(whole)


def test_a_reference_made_anew_in_its_place_is_never_half_of_each(measured, stored, monkeypatch):
    """Killed between its files: the old list of contents must not vouch for new statistics."""
    _, made = measured

    def killed(path, content):
        if path.name == "reference.json":
            raise KeyboardInterrupt
        path.write_bytes(content)

    monkeypatch.setattr(references, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        references.save(made, stored)
    assert not references.is_statistics(str(stored))


def test_features_are_needed_for_kid_only(measured, tmp_path):
    extractor, made = measured
    references.save(replace(made, rows={}), tmp_path / "moments")
    load(tmp_path / "moments", extractor, raw=())
    with pytest.raises(ValueError, match=r"inception.npz cannot be read .*expected the arrays mu, sigma, features"):
        load(tmp_path / "moments", extractor)


@pytest.mark.parametrize("damage", ["half", "nan", "shape", "rows", "format", "missing", "json"])
def test_damaged_statistics(damage, measured, stored):
    extractor, _ = measured
    file, facts = stored / "inception.npz", stored / "reference.json"
    arrays = dict(np.load(file))
    if damage == "half":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "missing":
        file.unlink()
    elif damage == "json":
        facts.write_text("{")
    elif damage == "format":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format": 99}))
    else:
        arrays["mu"] = {"nan": arrays["mu"] * np.nan, "shape": arrays["mu"][:-1]}.get(damage, arrays["mu"])
        arrays["features"] = arrays["features"][:-1] if damage == "rows" else arrays["features"]
        np.savez(file, **arrays)
    messages = {"half": "cannot be read", "nan": "mu holds NaN", "shape": r"mu has shape \(36,\), the extractor gives \(37,\)"}
    messages |= {
        "rows": "has 96 rows, reference.json says 97",
        "format": "format 99",
        "missing": "no such file",
        "json": "reference",
    }
    with pytest.raises((ValueError, FileNotFoundError), match=messages[damage]):
        load(stored, extractor)


def test_a_covariance_that_is_none(measured, tmp_path):
    """Files of others, in pytorch-fid's form: a distance to these would be a number that means nothing."""
    extractor, made = measured
    mean, cov = (v.numpy() for v in made.moments["inception"])
    lopsided, negative = cov.copy(), cov.copy()
    lopsided[0, 1] += 0.1 * cov.max()
    negative[3, 3] = -cov.max()
    damaged = {
        "not symmetric": lopsided,
        "negative variances": negative,
        "complex128": cov.astype(complex),
        "int64": cov.astype(int),
    }
    for message, sigma in damaged.items():
        np.savez(tmp_path / "x.npz", mu=mean, sigma=sigma)
        with pytest.raises(ValueError, match=f"sigma .*{message}"):
            load(tmp_path / "x.npz", extractor, raw=())
    np.savez(tmp_path / "x.npz", mu=mean.astype(np.float32), sigma=cov.astype(np.float32))
    assert load(tmp_path / "x.npz", extractor, raw=()).moments["inception"][1].dtype == torch.float64


def test_edms_file_is_read_as_it_is(measured, tmp_path):
    extractor, made = measured
    mean, cov = made.moments["inception"]
    np.savez(tmp_path / "cifar10-32x32.npz", mu=mean.numpy(), sigma=cov.numpy())
    read = load(tmp_path / "cifar10-32x32.npz", extractor, raw=())
    assert torch.equal(read.moments["inception"][1], cov)
    assert read.facts["images"]["n"] is None
    with pytest.raises(ValueError, match="enough for fid only"):
        load(tmp_path / "cifar10-32x32.npz", extractor)
    both, dims = {"inception": extractor.describe(), "dinov2": {}}, {"inception": 37, "dinov2": 5}
    with pytest.raises(ValueError, match="enough for fid only"):
        references.load(str(tmp_path / "cifar10-32x32.npz"), PROTOCOL, both, dims, [])


def test_pickles_in_npz_are_not_loaded(measured, tmp_path):
    trap = tmp_path / "trap"

    class Evil:
        def __reduce__(self):
            return (type(trap).touch, (trap,))

    np.savez(tmp_path / "x.npz", mu=np.array([Evil()], dtype=object), sigma=np.zeros((37, 37)))
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "x.npz", measured[0], raw=())
    assert not trap.exists()
