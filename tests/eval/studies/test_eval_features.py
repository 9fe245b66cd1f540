"""The digits extractor: accurate, the same on every machine, strict about its input, free of side effects."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval.metrics.frechet import GaussianStats, frechet_distance
from eval.metrics.samples import halves_floor
from eval.studies.digits.features import (
    EXTRACTORS,
    AreaDownsampled,
    PcaPixels,
    digits_extractor,
    one_thread,
    train_digits_extractor,
)
from pipelines.data.images import load_digits, to_pixels, to_unit


@pytest.fixture(scope="module")
def extractor():
    return digits_extractor()


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.mark.slow
def test_accuracy_and_standardised_features(extractor, digits):
    features = extractor(digits.pixels)
    assert extractor.accuracy >= 0.975
    assert (extractor.classify(digits.pixels) == digits.labels).double().mean() > 0.98
    assert features.shape == (1797, extractor.dim) == (1797, 32)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.mean(0), torch.zeros(32).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(features.std(0), torch.ones(32).double(), rtol=1e-10, atol=0)


def test_describes_itself(extractor):
    description = json.loads(json.dumps(extractor.describe()))
    assert description["name"] == "digits-classifier"
    assert EXTRACTORS[description["name"]]() is extractor
    assert len(bytes.fromhex(description["sha256"])) == 32
    assert description["accuracy"] == extractor.accuracy


@pytest.mark.slow
def test_two_trainings_agree_bit_for_bit_whatever_the_threads(digits):
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            state = torch.get_rng_state()
            one = train_digits_extractor(epochs=2)
            assert torch.get_num_threads() == count
            assert torch.equal(torch.get_rng_state(), state)
            found.append((one.sha256, one(digits.pixels)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert train_digits_extractor(seed=1, epochs=1).sha256 != train_digits_extractor(seed=0, epochs=1).sha256


@pytest.mark.slow
def test_same_weights_with_other_cpu_instructions():
    """As on another processor: without vector instructions sums round differently, and the rounded weights hide it."""
    code = "from eval.studies.digits.features import train_digits_extractor; print(train_digits_extractor(epochs=4).sha256)"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).resolve().parents[3], capture_output=True, text=True
    )
    assert done.stdout.strip() == train_digits_extractor(epochs=4).sha256, done.stderr


def test_training_works_without_gradients_and_one_thread_restores_after_errors():
    with torch.no_grad():
        trained = train_digits_extractor(epochs=1)
    assert trained.accuracy > 0.5
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="shape"):  # noqa: PT012 - the thread count is looked at inside the block
        with one_thread():
            assert torch.get_num_threads() == 1
            torch.zeros(2).reshape(3)
    assert torch.get_num_threads() == before


def test_features_do_not_depend_on_the_batch(extractor, digits):
    whole = extractor(digits.pixels[:701])
    torch.testing.assert_close(extractor(digits.pixels[699:701]), whole[699:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 3, 8, 8), (5, 1, 8, 7), (0, 1, 8, 8)])
def test_wrong_shapes(extractor, shape):
    with pytest.raises(ValueError, match=r"\(n, 1, 8, 8\) with n > 0"):
        extractor(torch.zeros(shape, dtype=torch.uint8))


def test_floats_are_refused(extractor):
    with pytest.raises(ValueError, match=r"uint8 pixels, got torch\.float32"):
        extractor(torch.full((5, 1, 8, 8), torch.nan))


def test_distance_sees_what_it_should(extractor, digits):
    """Ordering on real digits: a resampled copy < two halves < a missing class < Gaussian noise < one mean image."""
    generator = torch.Generator().manual_seed(0)
    features = extractor(digits.pixels)
    real = GaussianStats.of(features)

    def fd(pixels):
        return frechet_distance(real, GaussianStats.of(extractor(pixels)))

    flat = to_unit(digits.pixels).flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    noise = torch.randn(4001, 64, generator=generator, dtype=torch.float64) * values.clamp(min=0).sqrt() @ vectors.T
    noise = to_pixels((flat.mean(0) + noise).reshape(-1, 1, 8, 8))
    copy = digits.pixels[torch.randint(1797, (4001,), generator=generator)]
    mean = to_pixels(flat.mean(0)).reshape(1, 1, 8, 8).expand(11, -1, -1, -1)
    floor, spread = halves_floor(features, generator)
    assert fd(digits.pixels) < 1e-9
    assert fd(copy) < floor < fd(digits.pixels[digits.labels != 9]) < fd(noise) < fd(mean)
    assert spread < floor / 2
    assert fd(noise) > 8 * floor


def test_pca_pixels_are_white_on_the_real_images_and_ordered():
    real = torch.randint(0, 256, (211, 2, 3, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    extractor = PcaPixels(real, dim=7)
    features = extractor(real)
    assert features.shape == (211, 7)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.mean(0), torch.zeros(7).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(features.T @ features / 210, torch.eye(7).double(), rtol=0, atol=1e-10)
    unit = to_unit(real).flatten(1).double()
    singular = torch.linalg.svdvals(unit - unit.mean(0))[:7]
    torch.testing.assert_close(1 / extractor.axes.norm(dim=0), singular / 210**0.5, rtol=1e-10, atol=0)
    # the Frechet distance of a shift along the first axis by two of its standard deviations
    shifted = features + 2 * torch.eye(7)[0]
    assert frechet_distance(GaussianStats.of(shifted), GaussianStats.of(features)) == pytest.approx(4, rel=1e-6)
    assert PcaPixels(real, dim=7).describe() == extractor.describe()
    with pytest.raises(ValueError, match="made from images"):
        extractor(real[:, :1])
    with pytest.raises(ValueError, match="31 principal axes need more than"):
        PcaPixels(real, dim=31)


def test_area_downsampling_undoes_an_enlargement(extractor, digits):
    some = digits.pixels[:23]
    small = AreaDownsampled(extractor, 8)
    enlarged = some.repeat_interleave(3, 2).repeat_interleave(3, 3)
    for pixels in (some, enlarged):
        torch.testing.assert_close(small(pixels), extractor(some), rtol=0, atol=0)
        assert small.classify(pixels).equal(extractor.classify(some))
    assert small.describe()["sha256"] == extractor.sha256
    assert small.dim == 32
    with pytest.raises(ValueError, match="multiple of 8"):
        small(enlarged[..., :-1])


def test_enlarged_digits_show_the_same_digits(extractor, digits):
    large = load_digits(16)
    assert large.pixels.shape == (1797, 1, 16, 16)
    assert large.labels.equal(digits.labels)
    seen = AreaDownsampled(extractor, 8).classify(large.pixels)
    assert (seen == digits.labels).double().mean() > 0.9
