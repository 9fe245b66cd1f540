"""Encoded data on disk: however they were built they are the same bytes, and what does not fit or is damaged is refused."""

import copy
import json
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.common.errors import UserError
from pipelines.common.identity import weights_sha256
from pipelines.common.lock import FolderLock
from trainers.data.examples import Tensors, without
from trainers.data.shards import Cached, CacheError, build
from trainers.engine.draws import DrawSource

ROWS, SHARD, BATCH = 19, 7, 3  # shards of 7, 7 and 5 rows, encoded 3, 3, 1 | 3, 3, 1 | 3, 2 at a time
CALLS = 8
DIGEST = "0123456789abcdef" * 4
IDENTITY = {"format": 2, "dtype": "float32", "vae.weights": DIGEST, "tokenizer.tokens": DIGEST, "prompts": DIGEST}
IDENTITY |= {"image_size": 16, "rows": ROWS, "steps": None}


def encoded(index: range) -> dict[str, Tensor]:
    """What depends on the row alone, in three dtypes."""

    def normal(row: int, name: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(100 * row + name))

    return {
        "encoder_hidden_states": torch.stack([normal(i, 0, 5, 3) for i in index]).bfloat16(),
        "time_ids": torch.tensor([[i, 2 * i] for i in index], dtype=torch.float32),
        "latents": torch.stack([normal(i, 1, 2, 3, 5) for i in index]),
    }


class Encoder:
    """`encoded`, noting each call; raises KeyboardInterrupt at the call number `stop`, as a signal would."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls, self.stop = [], stop

    def __call__(self, index: range) -> dict[str, Tensor]:
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append(index)
        return encoded(index)


def one_process() -> Accelerator:
    return Accelerator(cpu=True)


def make(folder: Path, encode: Callable = encoded, identity: dict = IDENTITY, accelerator=None, rows: int = ROWS) -> Path:
    build(folder, identity, rows, encode, accelerator or one_process(), BATCH, SHARD)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a cache that is not what a killed process left half written."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if not f.name.startswith(".partial_")}


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    return files(make(tmp_path / "whole"))


# Building ------------------------------------------------------------------------------------------------------------------


def test_a_build_encodes_every_row_once(tmp_path):
    encoder = Encoder()
    folder = make(tmp_path / "cache", encoder)
    assert [(i.start, i.stop) for i in encoder.calls] == [(0, 3), (3, 6), (6, 7), (7, 10), (10, 13), (13, 14), (14, 17), (17, 19)]
    assert set(files(folder)) == {"identity.json", "cache.json", *(f"shard_0000{i}.safetensors" for i in range(3))}
    assert json.loads((folder / "identity.json").read_text()) == IDENTITY
    for shard, rows in enumerate((range(7), range(7, 14), range(14, 19))):
        tensors, expected = load_file(folder / f"shard_0000{shard}.safetensors"), encoded(rows)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[k], expected[k]) and tensors[k].dtype == expected[k].dtype for k in expected)


def test_a_finished_cache_is_left_as_it_is(tmp_path, whole):
    folder, times = tmp_path / "whole", {f: f.stat().st_mtime_ns for f in (tmp_path / "whole").iterdir()}
    encoder = Encoder()
    make(folder, encoder)
    assert encoder.calls == []
    assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == times


@pytest.mark.parametrize("stop", range(CALLS))
def test_an_interrupted_build_goes_on_at_the_first_shard_that_is_missing(stop, tmp_path, whole):
    folder, first, second = tmp_path / "cache", Encoder(stop), Encoder()
    with pytest.raises(KeyboardInterrupt):
        make(folder, first)
    finished = sorted(folder.glob("shard_*"))
    assert len(finished) == stop // 3
    assert not (folder / "cache.json").exists()
    times = [f.stat().st_mtime_ns for f in finished]
    make(folder, second)
    assert [f.stat().st_mtime_ns for f in finished] == times
    assert second.calls[0].start == SHARD * len(finished)
    assert sum(len(i) for i in second.calls) == ROWS - SHARD * len(finished)
    assert files(folder) == whole


def test_what_a_kill_left_half_written_is_written_again(tmp_path, whole):
    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        make(folder, Encoder(4))
    (folder / ".partial_1").write_bytes(b"half")
    (folder / ".partial_cache.json").write_bytes(b"{")
    make(folder)
    assert files(folder) == whole
    assert not (folder / ".partial_1").exists()


def test_a_cache_that_another_command_is_making_is_refused(tmp_path):
    """Its halves stay; it is a wait of seconds to hours, which the user decides on."""
    lock = FolderLock(tmp_path)
    lock.acquire()
    (tmp_path / ".partial_1").write_bytes(b"half")
    with pytest.raises(UserError, match=f"data.cache '{tmp_path}' is in use by another run .process [0-9]+ on .*; wait until"):
        make(tmp_path)
    assert (tmp_path / ".partial_1").exists()
    lock.release()
    make(tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_shards_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        make(tmp_path / "cache")
    finally:
        os.umask(before)
    assert {oct(f.stat().st_mode & 0o777) for f in (tmp_path / "cache").iterdir()} == {"0o640"}


def processes(count: int, run: Callable[[SimpleNamespace], None]) -> list[BaseException]:
    """run(accelerator) in `count` threads that meet in wait_for_everyone; what they raised."""
    barrier, raised = threading.Barrier(count, timeout=60), []

    def one(rank: int) -> None:
        try:
            facts = {"process_index": rank, "num_processes": count, "is_main_process": rank == 0}
            run(SimpleNamespace(**facts, wait_for_everyone=barrier.wait))
        except BaseException as error:
            raised.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_processes_builds_the_same_files(count, tmp_path, whole):
    """Each shard by one of them; five processes for three shards leave two with nothing to do. None is done before all are."""
    folder, encoders, finished = tmp_path / "cache", [Encoder() for _ in range(count)], []

    def slowly(rank: int, index: range) -> dict[str, Tensor]:
        time.sleep(0.02 * rank)
        finished.append((folder / "cache.json").exists())
        return encoders[rank](index)

    assert processes(count, lambda a: make(folder, partial(slowly, a.process_index), accelerator=a)) == []
    assert files(folder) == whole
    assert finished == [False] * CALLS
    for rank, encoder in enumerate(encoders):
        assert {i.start // SHARD for i in encoder.calls} == set(range(3)[rank::count])
    rows = sorted(row for encoder in encoders for i in encoder.calls for row in i)
    assert rows == list(range(ROWS))


def test_one_process_goes_on_where_two_were_stopped(tmp_path, whole):
    """Process 0 is killed in its second shard, number 2; whatever shard 1 came to, all ends as it should."""
    folder, encoders = tmp_path / "cache", [Encoder(4), Encoder()]
    raised = processes(2, lambda a: make(folder, encoders[a.process_index], accelerator=a))
    assert {type(error) for error in raised} == {KeyboardInterrupt, threading.BrokenBarrierError}
    assert [f.name for f in sorted(folder.glob("shard_*"))] == ["shard_00000.safetensors", "shard_00001.safetensors"]
    again = Encoder()
    make(folder, again)
    assert [i.start for i in again.calls] == [14, 17]
    assert files(folder) == whole


# Reading -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, SHARD, SHARD + 1, 2 * SHARD, ROWS])
def test_rows_are_those_that_were_encoded(rows, tmp_path, generator):
    """In any order, with repetitions and across the borders of shards; the same as from memory."""
    cached, memory = Cached(make(tmp_path / "cache", rows=rows)), Tensors(encoded(range(rows)))
    assert len(cached) == len(memory) == rows
    assert (cached.has_x0, memory.has_x0) == (True, True)
    everything = encoded(range(rows))
    orders = [torch.arange(rows), torch.arange(rows - 1, -1, -1), torch.randint(rows, (31,), generator=generator)]
    for index in orders:
        x0, condition = cached.rows(index)
        assert torch.equal(x0, everything["latents"][index])
        assert condition.keys() == {"encoder_hidden_states", "time_ids"}
        for key, value in condition.items():
            assert value.dtype == everything[key].dtype
            assert torch.equal(value, everything[key][index])
        x0_memory, condition_memory = memory.rows(index)
        assert torch.equal(x0, x0_memory)
        assert all(torch.equal(condition[k], condition_memory[k]) for k in condition)


def test_latents_are_read_as_float32_and_may_be_missing(tmp_path):
    half = Cached(make(tmp_path / "half", lambda i: encoded(i) | {"latents": encoded(i)["latents"].bfloat16()}))
    x0, _ = half.rows(torch.tensor([3, 11]))
    assert x0.dtype == torch.float32
    assert torch.equal(x0, encoded(range(ROWS))["latents"][[3, 11]].bfloat16().float())
    prompts = Cached(make(tmp_path / "none", lambda i: {k: v for k, v in encoded(i).items() if k != "latents"}))
    x0, condition = prompts.rows(torch.tensor([18, 0]))
    assert x0 is None
    assert not prompts.has_x0
    assert condition["time_ids"].tolist() == [[18, 36], [0, 0]]


def test_a_draw_takes_its_rows_of_the_cache_whatever_the_split(tmp_path):
    """x0 and condition of one row stay together; dropped conditions become null but for the keys that null has not."""
    cached, null = Cached(make(tmp_path / "cache")), {"encoder_hidden_states": torch.full((5, 3), 7.0)}

    def draws(world: int, micro: int | None) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for rank in range(world):
            source = DrawSource(1, 60, (2, 3, 5), torch.device("cpu"), cached, null, 0.3, rank, world, micro)
            parts += source.batch(("step", 0, "student", 0), 0.0)
        keys = ("encoder_hidden_states", "time_ids")
        return torch.cat([d.x0 for d in parts]), *(torch.cat([d.condition[k] for d in parts]) for k in keys)

    x0, text, ids = draws(1, None)
    row = ids[:, 0].long()
    everything = encoded(range(ROWS))
    assert torch.equal(x0, everything["latents"][row])
    dropped = (text == 7).all(2).all(1)
    assert torch.equal(text[~dropped], everything["encoder_hidden_states"][row[~dropped]])
    assert 5 < int(dropped.sum()) < 35  # 18 of 60 are expected, with a standard deviation of 3.5
    for split in ((1, 7 + 5), (3, 4), (4, None)):
        assert all(torch.equal(a, b) for a, b in zip(draws(*split), (x0, text, ids), strict=True))


def test_without_replaces_whole_rows():
    condition = {"text": torch.arange(24.0).view(4, 3, 2), "ids": torch.arange(4)}
    out = without(condition, {"text": -torch.ones(3, 2)}, torch.tensor([True, False, True, False]))
    assert out["text"].flatten(1)[:, 0].tolist() == [-1, 6, -1, 18]
    assert (out["text"][[0, 2]] == -1).all()
    assert torch.equal(out["text"][[1, 3]], condition["text"][[1, 3]])
    assert torch.equal(out["ids"], condition["ids"])


# What does not fit, and what is damaged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 32}, "image_size is 16, needed 32."),
        ({"vae.weights": "f" * 64}, "vae.weights differ."),
        ({"steps": 50}, "steps is not set, needed 50."),
        ({"dtype": "bfloat16", "vae.weights": "f" * 64}, "dtype is 'float32', needed 'bfloat16'."),
        ({"prompts": "f" * 64, "tokenizer.tokens": "f" * 64}, "prompts differ."),
        ({"tokenizer.tokens": "f" * 64}, "tokenizer.tokens differ."),
        ({"image_size": 32, "rows": 5}, "image_size is 16, needed 32; rows is 19, needed 5."),
        ({"more": 1}, "more is not set, needed 1."),
    ],
)
def test_a_cache_of_something_else_is_refused_by_its_keys(change, message, tmp_path, whole):
    folder, encoder = tmp_path / "whole", Encoder()
    with pytest.raises(CacheError) as raised:
        make(folder, encoder, IDENTITY | change)
    said = f"cache {str(folder)!r} is of other data or another model: {message} "
    said += f"Name another folder in data.cache, or remove {str(folder)!r}"
    assert str(raised.value) == said
    assert encoder.calls == []
    assert files(folder) == whole


def test_two_processes_both_refuse(tmp_path, whole):
    raised = processes(2, lambda a: make(tmp_path / "whole", identity=IDENTITY | {"rows": 1}, accelerator=a))
    assert any(isinstance(error, CacheError) for error in raised)
    assert {type(error) for error in raised} <= {CacheError, threading.BrokenBarrierError}
    assert len(raised) == 2
    assert files(tmp_path / "whole") == whole


def test_an_identity_that_is_missing_or_damaged_is_refused(tmp_path, whole):
    folder = tmp_path / "whole"
    (folder / "identity.json").write_text("{")
    with pytest.raises(UserError, match=rf"identity.json' is not valid JSON \(.*\); remove the cache '{folder}'"):
        make(folder)
    (folder / "identity.json").unlink()
    with pytest.raises(
        CacheError, match=f"cache '{folder}' has no identity.json; remove it or name another folder in data.cache"
    ):
        make(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert files(make(empty)) == whole


def test_a_cache_of_an_earlier_version_is_told_apart(tmp_path, whole):
    """Its identity left out what changes the result, so it cannot be believed; it is refused as what it is."""
    folder = tmp_path / "whole"
    (folder / "identity.json").write_text(json.dumps({"weights": DIGEST, "image_size": 16, "rows": ROWS}))
    with pytest.raises(CacheError, match=r"was made by an earlier version, .*\. Name another folder in data.cache, or remove"):
        make(folder)
    (folder / "identity.json").write_text("[]")
    with pytest.raises(UserError, match=r"identity.json' holds a list, expected an object"):
        make(folder)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "short"])
def test_a_damaged_shard_is_named_and_the_remedy_works(damage, tmp_path, whole):
    """Of a finished cache, and of one whose build was interrupted."""
    folder = tmp_path / "whole"
    file, finished = folder / "shard_00001.safetensors", folder / "cache.json"

    def spoil() -> None:
        if damage == "missing":
            file.unlink()
        elif damage == "short":
            save_file({k: v[:-1].contiguous() for k, v in encoded(range(7, 14)).items()}, file)
        else:
            file.write_bytes(file.read_bytes()[:-9] if damage == "truncated" else b"")

    spoil()
    make(folder)  # finished, so nothing is looked at before it is read
    with pytest.raises(CacheError) as raised:
        Cached(folder)
    assert str(raised.value).startswith(f"cache file {str(file)!r} is ")
    assert str(finished) in str(raised.value)
    finished.unlink()  # what the message says
    if damage in ("truncated", "emptied"):
        with pytest.raises(CacheError, match=r"shard_00001.safetensors' is damaged \(.*\); remove it and"):
            make(folder)
        file.unlink()
    encoder = Encoder()
    make(folder, encoder)
    assert sorted(row for i in encoder.calls for row in i) == list(range(7, 14))
    assert files(folder) == whole
    assert len(Cached(folder)) == ROWS


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 19}'])
def test_a_damaged_list_of_contents_is_named_and_the_remedy_works(text, tmp_path, whole):
    folder = tmp_path / "whole"
    (folder / "cache.json").write_text(text)
    with pytest.raises(CacheError, match=rf"'{folder / 'cache.json'}' is damaged \(.*\); remove it to make it again"):
        Cached(folder)
    (folder / "cache.json").unlink()
    encoder = Encoder()
    assert files(make(folder, encoder)) == whole
    assert encoder.calls == []


# Whose cache it is -----------------------------------------------------------------------------------------------------------


def networks(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {"unet": nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(dtype), "text": nn.Linear(5, 5).to(dtype)}


def test_the_digest_of_weights_is_of_their_values_alone():
    """Not of the objects, their order, memory layout or mode."""
    digest = weights_sha256(networks())
    assert weights_sha256(networks()) == digest
    assert weights_sha256(copy.deepcopy(networks())) == digest
    assert weights_sha256(dict(reversed(networks().items()))) == digest
    assert weights_sha256(networks() | {"vae": None}) == digest
    moved = networks()
    moved["unet"].to(memory_format=torch.channels_last).eval().requires_grad_(False)
    assert weights_sha256(moved) == digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", ["unet.0.weight", "unet.1.running_var", "unet.1.num_batches_tracked", "text.bias"])
def test_the_digest_changes_with_any_one_number(key, dtype):
    changed = networks(dtype)
    name, _, inner = key.partition(".")
    value = changed[name].state_dict()[inner]
    value.view(-1)[-1] += 1 if value.dtype == torch.int64 else 2**-5
    assert weights_sha256(changed) != weights_sha256(networks(dtype))


def test_the_digest_tells_dtypes_names_and_places_apart():
    digests = [weights_sha256(networks(dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
    swapped = networks()
    with torch.no_grad():
        swapped["text"].weight.copy_(networks()["text"].weight.T)
    zeros = [{"a": nn.Linear(2, 3, bias=False)}, {"a": nn.Linear(3, 2, bias=False)}, {"b": nn.Linear(2, 3, bias=False)}]
    zeros += [{"a": nn.Linear(2, 3, bias=False, dtype=dtype)} for dtype in (torch.bfloat16, torch.float16)]
    for network in zeros:
        nn.init.zeros_(next(iter(network.values())).weight)
    less = {"text": networks()["text"]}
    digests += [weights_sha256(n) for n in (swapped, less, *zeros)]
    assert len(set(digests)) == len(digests)
