"""Metrics against brute force, and generation that does not depend on the batch size."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from eval.images.seeds import image_generator, image_label
from eval.metrics.frechet import GaussianStats, frechet_distance
from eval.metrics.samples import class_balance, energy_distance, halves_floor, nearest_neighbour_check, pixel_std, random_halves
from eval.studies.digits.generate import generate


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def random_pixels(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (n, 2, 5, 7), dtype=torch.uint8, generator=generator)


def test_class_balance():
    assert class_balance(torch.tensor([1, 1, 0, 3, 1]), 5).tolist() == [0.2, 0.6, 0.0, 0.2, 0.0]
    with pytest.raises(ValueError, match=r"range over 0\.\.3, expected 0\.\.2"):
        class_balance(torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match=r"n > 0, got \(0,\)"):
        class_balance(torch.tensor([], dtype=torch.long), 3)


def test_pixel_std():
    pixels = torch.zeros(2, 1, 3, 5, dtype=torch.uint8)
    pixels[1, 0, 0, 0] = 255  # one of 15 pixels takes -1 and 1: standard deviation sqrt(2), n - 1
    assert pixel_std(pixels) == pytest.approx(math.sqrt(2) / 15, rel=1e-12)
    assert pixel_std(pixels[:1].expand(7, -1, -1, -1)) == 0
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        pixel_std(pixels[:1])


def naive_energy(x: Tensor, y: Tensor) -> float:
    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return math.fsum(math.dist(a.tolist(), b.tolist()) for a, b in pairs) / len(pairs)

    def within(z: Tensor) -> float:
        return mean([(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    return 2 * mean([(a, b) for a in x for b in y]) - within(x) - within(y)


@pytest.mark.parametrize("block", [1, 7, 1024])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_energy_distance_against_loops(block, offset, generator):
    x = torch.randn(23, 5, generator=generator, dtype=torch.float64)
    y = 1.5 * torch.randn(31, 5, generator=generator, dtype=torch.float64) + 0.3
    y[4] = x[2]  # a distance of zero
    assert energy_distance(x + offset, y + offset, block) == pytest.approx(naive_energy(x, y), rel=1e-7)


def test_energy_distance_laws(generator):
    x = torch.randn(2003, 3, generator=generator)
    y = torch.randn(1009, 3, generator=generator)
    assert energy_distance(x, y) == pytest.approx(energy_distance(y, x), rel=1e-12)
    assert abs(energy_distance(x, y)) < 5e-3  # same distribution: zero in expectation
    assert energy_distance(x, y + 0.5) > 0.05
    assert energy_distance(x, 1.5 * y) > 0.02


def test_energy_distance_is_unbiased(generator):
    values = [
        energy_distance(torch.randn(5, 3, generator=generator), torch.randn(7, 3, generator=generator)) for _ in range(2000)
    ]
    std, mean = torch.std_mean(torch.tensor(values))
    assert abs(mean) < 4 * std / 2000**0.5  # the biased V-statistic would give about 0.7
    assert std > 0.1


def test_energy_distance_errors():
    with pytest.raises(ValueError, match="at least 2 rows a side, got 1 and 3"):
        energy_distance(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(3, 5\)"):
        energy_distance(torch.zeros(3, 2), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="NaN or infinite"):
        energy_distance(torch.full((3, 2), torch.nan), torch.zeros(3, 2))


@pytest.mark.parametrize("block", [1, 11, 1024])
def test_nearest_neighbours_against_brute_force(block, generator):
    real = random_pixels(29, generator)
    generated = random_pixels(37, generator)
    generated[5], generated[31] = real[17], real[3]  # two copies, and one near copy
    generated[8] = real[2]
    generated[8, 1, 4, 6] ^= 1
    check = nearest_neighbour_check(generated, real, block)

    def distance(a: Tensor, b: Tensor) -> float:
        return (a.double() - b.double()).square().sum().sqrt().item() / 127.5

    all_pairs = torch.tensor([[distance(a, b) for b in real] for a in generated], dtype=torch.float64)
    between = torch.tensor(
        [min(distance(a, b) for j, b in enumerate(real) if j != i) for i, a in enumerate(real)], dtype=torch.float64
    )
    torch.testing.assert_close(check.distances, all_pairs.min(1).values, rtol=1e-12, atol=0)
    assert check.indices.tolist() == all_pairs.argmin(1).tolist()
    assert check.indices[[5, 31, 8]].tolist() == [17, 3, 2]
    torch.testing.assert_close(check.real_distances, between, rtol=1e-12, atol=0)
    assert check.exact_duplicates == 2
    assert check.close_threshold == pytest.approx(between.quantile(0.01).item(), rel=1e-12)
    assert check.close_share == pytest.approx((all_pairs.min(1).values < between.quantile(0.01)).double().mean().item())
    assert check.close_share >= 3 / 37
    assert check.median_generated == pytest.approx(all_pairs.min(1).values.median().item(), rel=1e-12)
    assert check.median_real == pytest.approx(between.median().item(), rel=1e-12)
    assert set(check.summary()) >= {"median_generated", "median_real", "close_share", "exact_duplicates"}


def test_nearest_neighbours_of_real_duplicates(generator):
    real = random_pixels(5, generator)
    real[3] = real[1]
    check = nearest_neighbour_check(real, real)
    assert check.exact_duplicates == 5
    assert (check.real_distances == 0).tolist() == [False, True, False, True, False]


def test_nearest_neighbour_errors(generator):
    pixels = random_pixels(5, generator)
    with pytest.raises(ValueError, match=r"generated must be uint8 .* got torch\.float32"):
        nearest_neighbour_check(pixels.float(), pixels)
    with pytest.raises(ValueError, match=r"real must be uint8 .* n >= 2"):
        nearest_neighbour_check(pixels, pixels[:1])
    with pytest.raises(ValueError, match=r"image sizes differ: \(2, 5, 7\) generated, \(2, 5, 3\) real"):
        nearest_neighbour_check(pixels, pixels[..., :3])


def test_halves_floor(generator):
    features = torch.randn(101, 3, generator=generator, dtype=torch.float64)
    mean, std = halves_floor(features, torch.Generator().manual_seed(3), splits=4)
    halves = list(random_halves(101, 4, torch.Generator().manual_seed(3)))
    for a, b in halves:
        assert (len(a), len(b)) == (50, 51)
        assert sorted(torch.cat([a, b]).tolist()) == list(range(101))
    values = [frechet_distance(*(GaussianStats.of(features[half]) for half in pair)) for pair in halves]
    assert mean == pytest.approx(sum(values) / 4, rel=1e-12)
    assert std == pytest.approx(torch.tensor(values, dtype=torch.float64).std().item(), rel=1e-9)
    with pytest.raises(ValueError, match="at least 4 images and 2 splits, got 3 and 10"):
        halves_floor(features[:3], generator)


class TinyPipe:
    """The pipeline's signature around a real network; elementwise, so that batches cannot round differently."""

    def __init__(self, num_classes: int = 0, calls: int = 1, shift: float = 0.0) -> None:
        self.unet = nn.Sequential(nn.Tanh(), nn.Hardtanh())
        self.num_classes, self.calls, self.shift = num_classes, calls, shift
        self.batches: list[int] = []

    def __call__(self, batch_size, generator, class_labels=None, num_inference_steps=None, output_type="pil"):
        assert output_type == "pt"
        assert (class_labels is None) == (self.num_classes == 0)
        self.batches.append(batch_size)
        x = torch.stack([torch.randn(2, 5, 7, generator=g) for g in generator])
        if class_labels is not None:
            x = x + class_labels[:, None, None, None] / 10
        for _ in range(self.calls):
            x = self.unet(x)
        return SimpleNamespace(images=x / 2 + 0.5 + self.shift)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_generation_does_not_depend_on_the_batch_size(num_classes):
    pipe = TinyPipe(num_classes, calls=5)
    whole = generate(pipe, 23, seed=4, batch_size=23, num_classes=num_classes)
    parts = generate(pipe, 23, seed=4, batch_size=7, num_classes=num_classes)
    fewer = generate(pipe, 11, seed=4, batch_size=3, num_classes=num_classes)
    other = generate(pipe, 23, seed=5, batch_size=23, num_classes=num_classes)
    assert pipe.batches == [23, 7, 7, 7, 2, 3, 3, 3, 2, 23]
    assert whole.pixels.dtype == torch.uint8
    assert whole.pixels.shape == (23, 2, 5, 7)
    assert torch.equal(whole.pixels, parts.pixels)
    assert torch.equal(whole.pixels[:11], fewer.pixels)
    assert not torch.equal(whole.pixels, other.pixels)
    assert whole.calls == parts.calls == 5
    assert parts.seconds > 0
    assert parts.seconds_per_image == parts.seconds / 23
    assert not pipe.unet._forward_pre_hooks
    if num_classes:
        assert torch.equal(whole.labels, parts.labels)
        assert set(whole.labels.tolist()) == {0, 1, 2}
    else:
        assert whole.labels is None


def test_image_seeds_and_labels():
    # One noise vector an image: none alike, none correlated with its neighbour, though seeds are consecutive.
    noise = torch.stack([torch.randn(64, generator=image_generator(0, i)) for i in range(2003)])
    assert abs((noise[1:] * noise[:-1]).mean()) < 4 / (2002 * 64) ** 0.5
    assert image_generator(0, 17).initial_seed() == 17
    # The CPU generator keeps 32 bits: within a set no two images may share them, whatever the seed.
    for seed in (0, 1, 2**31, 2**40 + 3):
        assert len({image_generator(seed, i).initial_seed() % 2**32 for i in range(5003)}) == 5003
    assert not torch.equal(torch.randn(3, generator=image_generator(1, 0)), noise[0, :3])
    labels = torch.tensor([image_label(0, i, 7) for i in range(7001)])
    assert (torch.bincount(labels) - 7001 / 7).abs().max() < 4 * (7001 / 7) ** 0.5


@pytest.mark.parametrize(("shift", "message"), [(math.nan, "NaN or infinite"), (1.0, r"\[0, 1\]"), (-1.0, r"\[0, 1\]")])
def test_generation_refuses_bad_images(shift, message):
    with pytest.raises(ValueError, match=message):
        generate(TinyPipe(shift=shift), 5)


def test_generation_refuses_bad_sizes():
    with pytest.raises(ValueError, match="n=0, batch_size=500"):
        generate(TinyPipe(), 0)
    with pytest.raises(ValueError, match="n=3, batch_size=0"):
        generate(TinyPipe(), 3, batch_size=0)
