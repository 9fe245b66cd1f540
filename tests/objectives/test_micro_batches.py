"""The numbers of an update: drawn once however many micro-batches share them, held in the memory of one batch."""

import gc
import weakref
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.data.images import ImageSet
from pipelines.noise import EDMSchedule
from trainers.data.examples import Images
from trainers.engine.draws import DrawSource
from trainers.objectives.amortized import Pool, batch_mean

B, M, SHAPE = 24, 3, (2, 5, 7)
IMAGE = 4 * 2 * 5 * 7  # bytes of one z
KEY = ("step", 3, "student", 0)


class Watch(TorchDispatchMode):
    """Counts the random numbers that are made, and the bytes of tensors that are alive at once at most."""

    RANDOM = ("randn", "rand", "randint", "randperm", "normal_", "uniform_", "random_")

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.peak, self._seen = 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.RANDOM:
            self.numbers += out.numel()
        if isinstance(out, Tensor):
            self._seen.append(weakref.ref(out))
            self.peak = max(self.peak, held(self.alive))
        return out

    @property
    def alive(self) -> list[Tensor]:
        self._seen = [r for r in self._seen if r() is not None]
        return [r() for r in self._seen]


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of what these tensors keep in memory: whole storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def source(micro: int | None, rank: int = 0, world: int = 1, **more) -> DrawSource:
    return DrawSource(5, B, SHAPE, torch.device("cpu"), rank=rank, world_size=world, micro_batch_size=micro, **more)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("micro", [None, M, 1])
def test_a_batch_is_drawn_once_and_held_once(micro, world):
    """z and eps of this process's rows, whatever the micro-batches; while they are made, one whole tensor beside them."""
    with Watch() as watch:
        draws = source(micro, 1 % world, world).batch(KEY, 0.0)
    share = B // world
    assert len(draws) == share // (micro or share)
    assert watch.numbers == B * (2 * 70 + 1)  # z, eps and u: each number of the batch once
    kept = 2 * share * IMAGE
    small = 100 * B
    assert held([t for d in draws for t in (d.z, d.eps)]) == kept
    assert watch.peak <= kept + B * IMAGE + small


def test_more_numbers_are_drawn_once_and_freed_by_the_last_micro_batch():
    """Two streams of three images a sample, asked for as a loss does: micro-batch after micro-batch."""
    draws = source(M).batch(KEY, 0.0)
    before = held([t for d in draws for t in (d.z, d.eps)])
    gc.collect()
    with Watch() as watch:
        for draw in draws:
            for name in ("proposals_0", "proposals_1"):
                assert draw.normal(name, 3, *SHAPE).shape == (M, 3, *SHAPE)
    assert watch.numbers == 2 * B * 3 * 70
    assert before == 2 * B * IMAGE
    assert watch.peak <= 2 * B * 3 * IMAGE
    assert held(watch.alive) == 0


def test_one_micro_batch_holds_nothing_back():
    """Without micro-batches a stream lives as long as the loss wants it."""
    (draw,) = source(None).batch(KEY, 0.0)
    with Watch() as watch:
        for name in ("a", "b", "c", "d"):
            draw.normal(name, 3, *SHAPE)
    assert watch.peak <= B * 3 * IMAGE
    assert held(watch.alive) == 0


def test_the_numbers_are_those_of_torch_from_a_seed_of_their_own():
    """What runs have always drawn: randn of the whole batch from a seed that blake2b makes of (seed, key, name)."""
    import hashlib

    def whole(name: str, *shape: int) -> Tensor:
        digest = hashlib.blake2b(repr((5, *KEY, name)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return torch.randn(B, *shape, generator=generator)

    for micro, world in ((None, 1), (M, 1), (M, 2), (1, 4)):
        draws = [d for rank in range(world) for d in source(micro, rank, world).batch(KEY, 0.0)]
        assert torch.equal(torch.cat([d.z for d in draws]), whole("z", *SHAPE))
        assert torch.equal(torch.cat([d.eps for d in draws]), whole("eps", *SHAPE))
        for _ in range(2):  # asked again, the same; also by micro-batches out of turn
            backwards = [d.normal("more", 2, 3) for d in reversed(draws)]
            assert torch.equal(torch.cat(backwards[::-1]), whole("more", 2, 3))
            assert torch.equal(draws[0].normal("more", 2, 3), backwards[-1])
            assert draws[0].normal("more").shape == (len(draws[0].z),)  # another shape is another tensor


def test_rows_of_data_and_what_is_dropped_have_seeds_of_their_own():
    """Neither tells of z, eps or the levels: each stream's seed is of its own name, as runs have always drawn them."""
    import hashlib

    def generator(name: str) -> torch.Generator:
        digest = hashlib.blake2b(repr((5, *KEY, name)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    pixels = torch.zeros(1000, *SHAPE, dtype=torch.uint8)
    data = Images(ImageSet(pixels, torch.arange(1000), tuple(map(str, range(1000)))))  # the label is the row
    (whole,) = source(None, examples=data).batch(KEY, 0.0)
    rows = {name: torch.randint(1000, (B,), generator=generator(name)) for name in ("data", "z", "eps", "u", "label_dropout")}
    assert torch.equal(whole.condition["class_labels"], rows.pop("data"))
    assert not any(torch.equal(whole.condition["class_labels"], r) for r in rows.values())
    null = {"class_labels": torch.tensor(1000)}
    (some,) = source(None, examples=data, null_condition=null, dropout=0.5).batch(KEY, 0.0)
    dropped = some.condition["class_labels"] == 1000
    assert torch.equal(dropped, torch.rand(B, generator=generator("label_dropout")) < 0.5)
    assert not torch.equal(dropped, some.u < 0.5)
    assert torch.equal(some.condition["class_labels"][~dropped], whole.condition["class_labels"][~dropped])


def test_dropout_has_a_seed_for_each_micro_batch_and_the_same_whoever_runs_it():
    seeds = {w: [d.seed for rank in range(w) for d in source(M, rank, w).batch(KEY, 0.0)] for w in (1, 2, 4)}
    assert seeds[1] == seeds[2] == seeds[4]
    assert len(set(seeds[1])) == B // M
    assert source(None).batch(KEY, 0.0)[0].seed == seeds[1][0]


class Counted(Images):
    """Notes which rows are read."""

    def __init__(self, images: ImageSet) -> None:
        super().__init__(images)
        self.read: list[int] = []

    def rows(self, index: Tensor):
        self.read += index.tolist()
        return super().rows(index)


def test_each_row_of_data_is_read_once_and_by_one_process():
    pixels = torch.arange(11, dtype=torch.uint8)[:, None, None, None].expand(11, *SHAPE).contiguous()
    rows = []
    for world in (1, 2):
        for micro in (None, M):
            data = Counted(ImageSet(pixels, torch.arange(11), tuple("abcdefghijk")))
            more = {"examples": data, "null_condition": {"class_labels": torch.tensor(11)}, "dropout": 0.5}
            with Watch() as watch:
                draws = [d for rank in range(world) for d in source(micro, rank, world, **more).batch(KEY, 0.0)]
            assert watch.numbers == world * B * (2 * 70 + 3)  # and which rows, and which conditions are dropped
            assert len(data.read) == B
            rows.append((data.read, torch.cat([d.condition["class_labels"] for d in draws]).tolist()))
    assert all(r == rows[0] for r in rows)


def test_a_common_pool_compares_prompts_without_holding_them_b_times():
    """Targets among 24 samples of three prompts of 77 x 768 numbers: 24 x 24 comparisons, in less than the 34 MB of their bits;
    the same target for a sample as in a pool of its own prompt's samples alone.
    """
    generator = torch.Generator().manual_seed(0)
    x0, prompts = torch.randn(B, *SHAPE, generator=generator), torch.randn(1, 77, 768, generator=generator).repeat(3, 1, 1)
    prompts[1, 5, 7] += 1  # three prompts that differ in one number
    prompts[2, 76, 767] += 1
    which = torch.arange(B) % 3
    level = EDMSchedule().level(torch.full((B,), 2.0))
    x_t = x0 + 2.0 * torch.randn(x0.shape, generator=generator)
    pool = Pool(x0, {"encoder_hidden_states": prompts[which], "time_ids": torch.ones(B, 6, dtype=torch.long)})
    with Watch() as watch:
        target, _ = batch_mean(x_t, level, pool.condition, pool)
    answers, own = B * B * 77 * 768, B * 77 * 768 * 4  # the pool's own prompts are seen too
    assert watch.peak - own < answers / 8
    for label in range(3):
        mine = which == label
        alone, _ = batch_mean(x_t[mine], EDMSchedule().level(level.t[mine]), None, Pool(x0[mine], None))
        torch.testing.assert_close(target[mine], alone, rtol=1e-5, atol=1e-5)


ESTIMATORS = [
    ("bound", {}),
    ("multi_sample", {}),
    ("resampled_score", {}),
    ("resampled_score", {"moves": 1}),
    ("amortized_score", {"noise_draws": 3}),
    ("amortized_score", {"noise_draws": 3, "num_samples": 2}),
]


@pytest.mark.parametrize(("estimator", "options"), ESTIMATORS, ids=str)
def test_a_loss_asks_for_a_stream_once(estimator, options, world):
    """What is asked for twice by the last micro-batch is drawn twice; what is never used need not be drawn."""
    objective = world.objective(estimator, **options)
    draw, asked = world.random(4, **world.extra_of(objective)), []
    answer = draw.normal

    def normal(name: str, *shape: int) -> Tensor:
        asked.append(name)
        return torch.rand(len(draw.z), *shape) if name == "moves" else answer(name, *shape)

    draw.normal = normal
    world.joint(objective, draw)
    assert len(asked) == len(set(asked))
    used = {"bound": [], "multi_sample": ["proposals"], "resampled_score": ["proposals"] + ["moves"] * len(options)}
    used["amortized_score"] = ["proposals_0"] * ("num_samples" in options) + ["eps_1", "eps_2"]
    assert asked == used[estimator]
