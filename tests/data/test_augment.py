"""EDM's augmentations: what they do to pixels, what the network is told, how often; and a teacher that is told."""

import math

import pytest
import torch
from torch.testing import assert_close

from trainers.data.augment import DIM, NUMBERS, Changes, apply, augment, choose, rotation
from trainers.data.examples import Images
from trainers.engine.draws import DrawSource

B, C, H, W = 5, 3, 7, 11


def changes(**given) -> Changes:
    zero = torch.zeros(B, dtype=torch.float64)
    fields = {name: zero.clone() for name in Changes._fields[:-1]} | {"shift": torch.zeros(B, 2, dtype=torch.float64)}
    return Changes(**fields | {k: torch.as_tensor(v, dtype=torch.float64).expand_as(fields[k]).clone() for k, v in given.items()})


def test_nothing_is_nothing(randn):
    """Bit for bit, also beside images to which something is done."""
    x = randn(B, C, H, W)
    assert torch.equal(apply(x, changes()), x)
    assert not changes().labels().any()
    some = changes()
    some.angle[1] = 0.3
    out = apply(x, some)
    assert torch.equal(out[[0, 2, 3, 4]], x[[0, 2, 3, 4]])
    assert (out[1] - x[1]).abs().max() > 0.1


def test_flips_and_quarter_turns(randn):
    x = randn(B, C, H, W)
    assert torch.equal(apply(x, changes(mirror=1)), x.flip(3))
    assert torch.equal(apply(x, changes(upside_down=1)), x.flip(2))
    square = randn(B, C, 9, 9)
    assert_close(apply(square, changes(angle=math.pi)), square.flip(2, 3), rtol=0, atol=1e-9)
    quarter = apply(square, changes(angle=math.pi / 2))
    assert_close(quarter, torch.rot90(square, 1, (2, 3)), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("columns", "rows"), [(2, 0), (0, 3), (-4, 1)])
def test_shifts_by_whole_pixels(randn, columns, rows):
    """What comes in at an edge is the image mirrored there, its outermost pixels once."""
    x = randn(B, C, H, W)
    out = apply(x, changes(shift=[8 * columns / W, 8 * rows / H]))  # in eighths of the width and of the height
    mirrored = torch.nn.functional.pad(x, [5, 5, 5, 5], mode="reflect")
    assert_close(out, mirrored[:, :, 5 - rows : 5 - rows + H, 5 - columns : 5 - columns + W], rtol=0, atol=1e-9)


A_SCALE, A_ANISO, A_TRANS = 2**0.2, 2**0.2, 1 / 8  # Karras et al. 2022, Appendix F.2


def paper_transform(label: list[float], stretch: float, direction: float, width: int, height: int) -> torch.Tensor:
    """Where a point (x, y, 1), seen from the image's centre, goes: scaled, rotated, stretched, shifted, in this order."""

    def matrix(*rows):
        return torch.tensor(rows, dtype=torch.float64)

    def rotate(angle):
        c, s = math.cos(angle), math.sin(angle)
        return matrix([c, -s, 0], [s, c, 0], [0, 0, 1])

    _, _, scale, cos_minus_one, sin, _, _, right, down = label
    s, k = A_SCALE**scale, A_ANISO**stretch
    scaling = matrix([s, 0, 0], [0, s, 0], [0, 0, 1])
    rotation = matrix([cos_minus_one + 1, sin, 0], [-sin, cos_minus_one + 1, 0], [0, 0, 1])  # by -a_3
    stretching = rotate(-direction) @ matrix([k, 0, 0], [0, 1 / k, 0], [0, 0, 1]) @ rotate(direction)
    shifting = matrix([1, 0, A_TRANS * right * width], [0, 1, A_TRANS * down * height], [0, 0, 1])
    return shifting @ stretching @ rotation @ scaling


def test_all_at_once_moves_every_point_where_the_paper_says(generator):
    """Images whose pixels say where they lie, drawn with every change at once: each pixel of the result names its source."""
    width, height, n = 44, 36, 64
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    places, compared = torch.stack([x.expand(height, width), y[:, None].expand(height, width)]), 0
    numbers = torch.randn(n, NUMBERS, generator=generator, dtype=torch.float64)
    drawn, (out, labels) = choose(numbers, 1.0), augment(places.expand(n, 2, height, width), numbers, 1.0)
    points = torch.cat([places, torch.ones(1, height, width, dtype=torch.float64)])
    half = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    for i in range(n):
        label = labels[i].tolist()
        moved = paper_transform(label, float(drawn.stretch[i]), float(drawn.direction[i]), width, height)
        source = torch.einsum("ij,jhw->hwi", torch.linalg.inv(moved), points)[..., :2]
        flips = torch.tensor([1 - 2 * label[0], 1 - 2 * label[1]], dtype=torch.float64)  # done first
        image, grid = flips[:, None, None] * places, source / half
        how = {"mode": "bicubic", "padding_mode": "reflection", "align_corners": True}
        assert_close(out[i], torch.nn.functional.grid_sample(image[None], grid[None], **how)[0], rtol=0, atol=1e-9)
        inside = (grid.abs() < 0.8).all(2)
        if bool(inside.any()):  # and so it is the source that a pixel names, but for what torch's bicubic does to a straight line
            assert_close((flips * out[i].movedim(0, 2))[inside], source[inside], rtol=0, atol=0.06)
            compared += int(inside.sum())
    assert compared > n * width * height / 4


def test_shifts_have_a_standard_deviation_of_an_eighth_of_the_image(generator):
    """Measured on the pixels of images that are only shifted; labels are shifts in that unit, as NVlabs' networks know them."""
    n, p, width, height = 40_000, 0.12, 9, 13
    numbers = torch.randn(n, NUMBERS, generator=generator, dtype=torch.float64)
    labels = choose(numbers, p).labels()
    only = (labels[:, :7] == 0).all(1) & (labels[:, 7:] != 0).all(1)
    ramp = torch.stack(
        [
            (torch.arange(width, dtype=torch.float64) - (width - 1) / 2).expand(height, width),
            (torch.arange(height, dtype=torch.float64) - (height - 1) / 2)[:, None].expand(height, width),
        ]
    )
    out, told = augment(ramp.expand(int(only.sum()), 2, height, width), numbers[only], p)
    shift = -out[:, :, height // 2, width // 2]  # the pixel in the middle shows what lay that far on the other side
    inner = (told[:, 7:].abs() < 2).all(1)  # not mirrored at the edge
    expected = told[inner, 7:] * torch.tensor([width, height]) / 8
    assert_close(shift[inner], expected, rtol=0, atol=0.06)  # torch's bicubic of a straight line is off by as much
    assert float(inner.double().mean()) == pytest.approx(0.9545**2, abs=0.02)
    assert float(told[:, 7:].std()) == pytest.approx(1, abs=0.04)
    shares = shift[inner] / torch.tensor([width, height])
    assert_close(shares.square().mean(0), torch.full((2,), 0.7737 / 64, dtype=torch.float64), rtol=0.06, atol=0)  # cut off at 2


def test_scale_and_stretch_of_a_wave():
    """A smooth wave, stretched: the wave of another frequency (bicubic, so nearly)."""
    n = 64
    at = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    wave = (2 * math.pi * at / 32).cos().expand(B, 1, n, n)  # along x
    inner = slice(16, 48)
    bigger = apply(wave, changes(scale=2.0))  # 2^(.2 * 2)
    expected = (2 * math.pi * at / 32 / 2**0.4).cos().expand(B, 1, n, n)
    assert_close(bigger[..., inner, inner], expected[..., inner, inner], rtol=0, atol=0.02)
    wide = apply(wave, changes(stretch=2.0))  # along x, and narrower along y, where the wave is constant
    assert_close(wide[..., inner, inner], expected[..., inner, inner], rtol=0, atol=0.02)
    tall = apply(wave, changes(stretch=2.0, direction=math.pi / 2))
    narrower = (2 * math.pi * at / 32 * 2**0.4).cos().expand(B, 1, n, n)
    assert_close(tall[..., inner, inner], narrower[..., inner, inner], rtol=0, atol=0.02)


def test_stretch_along_an_oblique_axis():
    """The axis is (cos r, -sin r), rows counted downwards."""
    n, r = 64, 0.6
    at = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    along = math.cos(r) * at[None, :] - math.sin(r) * at[:, None]
    wave, expected = ((2 * math.pi * along / 32 / k).cos().expand(B, 1, n, n) for k in (1, 2**0.4))
    out = apply(wave, changes(stretch=2.0, direction=r))
    inner = slice(16, 48)
    assert_close(out[..., inner, inner], expected[..., inner, inner], rtol=0, atol=0.02)


def test_matrices_keep_the_area_but_for_the_scale():
    some = changes(angle=0.7, stretch=1.3, direction=0.4, scale=-0.8)
    assert_close(torch.linalg.det(some.matrices()), torch.full((B,), 2 ** (2 * 0.2 * 0.8), dtype=torch.float64))
    assert_close(rotation(torch.tensor([0.3])) @ rotation(torch.tensor([-0.3])), torch.eye(2)[None])


def test_labels():
    """Their order and form are those that the published networks were trained with."""
    all_of_it = changes(mirror=1, upside_down=1, scale=0.5, angle=0.7, stretch=1.1, direction=0.3, shift=[0.2, -0.4])
    expected = [1, 1, 0.5, math.cos(0.7) - 1, math.sin(0.7), 1.1 * math.cos(0.3), 1.1 * math.sin(0.3), 0.2, -0.4]
    assert_close(all_of_it.labels()[0], torch.tensor(expected, dtype=torch.float64))
    assert all_of_it.labels().shape == (B, DIM)


def test_how_often(generator):
    """Mirrored half of the time; the rest p of the time, flips half of that, each on its own."""
    n, p = 40_000, 0.12
    drawn = choose(torch.randn(n, NUMBERS, generator=generator, dtype=torch.float64), p)
    rates = {"mirror": 0.5, "upside_down": p / 2, "scale": p, "angle": p, "stretch": p, "direction": 0.5}
    for name, rate in rates.items():
        assert abs(float((getattr(drawn, name) != 0).double().mean()) - rate) < 5 * math.sqrt(rate / n), name
    moved = (drawn.shift != 0).double()
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert abs(float(moved[:, 0].mean()) - p) < 5 * math.sqrt(p / n)
    done = torch.stack([drawn.scale != 0, drawn.angle != 0, drawn.stretch != 0, moved[:, 0] != 0], 1).double()
    assert (torch.corrcoef(done.T) - torch.eye(4, dtype=torch.float64)).abs().max() < 0.03
    uniform = math.pi / math.sqrt(3)
    for value, std in (
        (drawn.scale, 1),
        (drawn.stretch, 1),
        (drawn.angle, uniform),
        (drawn.direction, uniform),
        (drawn.shift, 1),
    ):
        assert abs(float(value[value != 0].std()) / std - 1) < 0.05


def test_draws_change_the_data_and_say_so():
    """The same whatever the micro-batches, and others at every step."""
    from pipelines.data.images import ImageSet

    pixels = torch.randint(0, 256, (13, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Images(ImageSet(pixels, torch.arange(13) % 3, ("a", "b", "c")))
    sources = [
        DrawSource(3, 12, (3, 8, 8), torch.device("cpu"), data, micro_batch_size=m, augmentation=p)
        for m, p in ((12, 0.5), (4, 0.5), (12, 0))
    ]
    whole, parts, plain = (source.batch(("step", 1), 0.0) for source in sources)
    for key in ("class_labels", "augment_labels"):
        assert torch.equal(torch.cat([d.condition[key] for d in parts]), whole[0].condition[key])
    assert_close(torch.cat([d.x0 for d in parts]), whole[0].x0, rtol=0, atol=1e-6)
    x0, labels = augment(plain[0].x0, plain[0].normal("augment", NUMBERS), 0.5)
    assert torch.equal(whole[0].x0, x0)
    assert torch.equal(whole[0].condition["augment_labels"], labels)
    assert set(plain[0].condition) == {"class_labels"}
    assert not torch.equal(sources[0].batch(("step", 2), 0.0)[0].condition["augment_labels"], labels)
