"""Reference statistics: stored and read back to the bit, published ones read as they are, all others refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval import reference as references
from eval.extractors import Inception
from eval.image_files import ImageFiles
from eval.measure import compute
from eval.one_pass import one_pass
from eval.protocols import PROTOCOLS
from eval.weights import Found, sha256

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
