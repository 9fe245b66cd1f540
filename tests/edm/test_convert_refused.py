"""What the converter refuses: commands, names, storages out of bounds, damaged files, networks that contradict themselves."""

import io
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pipelines.edm import EDMUNet
from pipelines.edm.conversion.convert import convert
from pipelines.edm.conversion.pickles import SnapshotError
from pipelines.edm.conversion.torch_pickles import read_torch_pickle

ROOT = Path(__file__).resolve().parents[2]
SIGMAS = (0.002, 0.03, 0.3, 2.5, 17.0, 80.0)


# What is refused ----------------------------------------------------------------------------------------------------------


def refused(tmp_path, data: bytes, match: str, name: str = "bad.pkl") -> None:
    """The command says why and with status 2, in a process that would have left a trace, and writes nothing."""
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(SnapshotError, match=match):
        convert(file, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


class Calls:
    """Pickled as function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def trap(tmp_path) -> Calls:
    """Running it leaves a file behind, which `refused` would see."""
    return Calls(os.system, f"touch {tmp_path}/executed")


@pytest.mark.parametrize("where", ["top", "in the network", "in a list"])
def test_a_command_is_not_run(tmp_path, reference, dump_pickle, persistent, where):
    evil = trap(tmp_path)
    value = {
        "top": evil,
        "in the network": {"ema": persistent("EDMPrecond", {"_modules": {"model": evil}})},
        "in a list": {"ema": None, "dataset_kwargs": [1, evil]},
    }[where]
    refused(tmp_path, dump_pickle(value), r"byte \d+: the file asks for 'posix\.system'|nt\.system")


@pytest.mark.parametrize(
    "function", [eval, exec, getattr, __import__, pickle.loads, subprocess.check_output, torch.load, io.open, np.load]
)
def test_functions_of_any_module_are_not_called(tmp_path, function):
    refused(tmp_path, pickle.dumps(Calls(function, "1"), protocol=4), "the file asks for .*; nothing has been executed")


def nested(tmp_path, change) -> bytes:
    """A tensor's inner pickle, changed, inside an outer one that is as it should be."""
    blob = io.BytesIO()
    torch.save(torch.arange(6.0).storage(), blob, _use_new_zipfile_serialization=False)
    return pickle.dumps({"ema": Calls(torch.storage._load_from_bytes, change(blob.getvalue()))}, protocol=4)


def test_a_storage_is_read_as_strictly(tmp_path):
    """torch would load the inner pickle without looking at it."""
    evil = pickle.dumps(trap(tmp_path), protocol=2)
    refused(tmp_path, nested(tmp_path, lambda blob: evil), "the file asks for 'posix.system'")
    refused(tmp_path, nested(tmp_path, lambda blob: blob[:-3]), "nested storage of 6 numbers has 21 bytes; it is truncated")
    refused(tmp_path, nested(tmp_path, lambda blob: blob + b"abc"), "nested storage of 6 numbers has 27 bytes")
    refused(tmp_path, nested(tmp_path, lambda blob: blob[:40]), "ends here|truncated|damaged")
    # a storage inside a storage inside ...: names that are known outside are not called inside
    inner = pickle.dumps(Calls(torch.storage._load_from_bytes, b"x"), protocol=2)
    refused(tmp_path, nested(tmp_path, lambda blob: inner), "the file asks for 'torch.storage._load_from_bytes'")


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (2, 2), (5, 1)),
        (-1, (2,), (1,)),
        (0, (3,), (-1,)),
        (0, (-6,), (1,)),
        (0, (2, 3), (3,)),
        (0, (1 << 40,), (0,)),
        (0, (2.0,), (1,)),
    ],
)
def test_tensors_outside_their_storage(tmp_path, offset, shape, strides):
    storage = torch.arange(6.0).storage()
    tensor = Calls(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, {})
    refused(tmp_path, pickle.dumps({"ema": tensor}, protocol=4), "reaches outside its storage of 6 numbers|is none")


def test_tensors_inside_their_storage():
    """Offsets and strides are followed, transposed views too."""
    tensor = torch.arange(24.0)[3:23].reshape(4, 5).T[1:4]
    value, _ = read_torch_pickle(memoryview(pickle.dumps(tensor, protocol=4)))
    assert np.array_equal(value.numpy(), tensor.numpy())
    assert not value.numpy().flags.writeable


def test_attributes_are_set_on_nothing_else(tmp_path):
    """The opcode that could change what a name stands for."""
    name = b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93"
    attributes = b"}\x8c\x08__call__K\x01s"
    refused(tmp_path, b"\x80\x04" + name + attributes + b"b.", "attributes are set on Global")
    refused(tmp_path, b"\x80\x04" + name + b")R" + attributes + b"b.", "attributes are set on dict")
    refused(tmp_path, b"\x80\x04]" + attributes + b"b.", "attributes are set on list")


@pytest.mark.parametrize(
    ("opcodes", "match"),
    [
        (b"ios\nsystem\n(S'true'\ntR.", "pickle opcode INST is not something"),
        (b"(S'true'\nios\nsystem\n.", "pickle opcode STRING is not something"),
        (b"\x80\x04\x82\x01.", "pickle opcode EXT1 is not something"),
        (b"\x80\x05\x97.", "pickle opcode NEXT_BUFFER is not something"),
        (b"\x80\x06N.", "pickle protocol 6"),
        (b"\x80\x04\xff.", "byte 0xff is not something"),
        (b"\x80\x04a.", "damaged pickle"),
        (b"\x80\x04.", "the stack is empty"),
        (b"\x80\x04]K\x01(e.", "int where a list should be"),
        (b"\x80\x04\x8eABCDEFGHxx.", "the file ends here.*truncated"),
        (b"\x80\x04h\x07.", "damaged pickle"),
        (b"\x80\x04NQ.", "a persistent id where a snapshot has none"),
        (b"\x80\x04N.N.", "2 more bytes after the end"),
        (b"\x80\x04N.", "the file holds NoneType; expected a network under 'ema'"),
        (b"", "is empty"),
        (b"\x00" * 64, "is not something"),
    ],
)
def test_damaged_and_unknown_opcodes(tmp_path, opcodes, match):
    refused(tmp_path, opcodes, match)


def test_truncated_anywhere(tmp_path, reference):
    """Cut off at any of many places: always refused, never half a model."""
    data = reference("vp_ddpmpp").dump()
    for cut in np.linspace(1, len(data) - 1, 97, dtype=int):
        refused(tmp_path, data[:cut], r"truncated|damaged|ends here")


@pytest.mark.slow
def test_any_byte_changed(tmp_path, reference, converted):
    """Either refused, or a change to a number or to what is not read: nothing else can come of a damaged file."""
    data = bytearray(reference("vp_ddpmpp").dump())
    expected = (converted("vp_ddpmpp") / "unet" / "config.json").read_text()
    generator = np.random.default_rng(0)
    outcomes = set()
    for position in generator.integers(0, len(data), 150):
        changed = data.copy()
        changed[position] ^= 0xFF
        file, out = tmp_path / "net.pkl", tmp_path / "out"
        file.write_bytes(changed)
        try:
            convert(file, out)
            outcomes.add("read")
            assert (out / "unet" / "config.json").read_text() == expected
            subprocess.run(["rm", "-r", str(out)], check=True)
        except SnapshotError:
            outcomes.add("refused")
        assert [p.name for p in tmp_path.iterdir()] == ["net.pkl"]
    assert outcomes == {"read", "refused"}


# A network, but another one -----------------------------------------------------------------------------------------------


def changed(reference_type, cases, case: str, change) -> bytes:
    ref = reference_type(*cases[case])
    change(ref)
    return ref.dump()


def set_attribute(name, key, value):
    return lambda ref: ref.objects[name][1].update({key: value})


def drop(name):
    return lambda ref: ref.tensors.pop(name)


def replace(name, make):
    return lambda ref: ref.tensors.update({name: make(ref.tensors[name])})


@pytest.mark.parametrize(
    ("case", "change", "match"),
    [
        ("edm_ddpmpp", set_attribute("model.enc.8x8_block0", "skip_scale", 1.0), "8x8_block0.skip_scale is 1.0"),
        ("edm_ddpmpp", set_attribute("model.enc.8x8_block0", "num_heads", 2), "8x8_block0.num_heads is 2"),
        ("edm_ddpmpp", set_attribute("model.enc.8x8_block0", "adaptive_scale", True), "adaptive_scale is True"),
        ("edm_ddpmpp", set_attribute("model.dec.4x4_in1", "dropout", 0.2), "blocks with dropout"),
        ("edm_ddpmpp", set_attribute("model.enc.16x16_block0.norm1", "eps", 1e-5), "norm1.eps is 1e-05"),
        ("edm_ddpmpp", set_attribute("model.enc.16x16_block0.norm1", "num_groups", 2), "norm1.num_groups is 2"),
        ("edm_ddpmpp", set_attribute("model.map_noise", "endpoint", False), "map_noise.endpoint is False"),
        ("edm_ddpmpp", lambda ref: ref.kwargs.update(model_channels=32), "init_kwargs.model_channels is 32"),
        ("edm_ddpmpp", drop("map_layer1.bias"), r"'map_layer1.bias' is missing"),
        ("edm_ddpmpp", drop("dec.4x4_in0.qkv.weight"), r"in0.qkv.weight' is missing"),
        ("edm_ddpmpp", replace("map_layer1.weight", lambda t: t[:, :-1]), r"map_layer1.weight' is \(64, 63\)"),
        ("edm_ddpmpp", replace("map_layer1.weight", lambda t: t.long()), "holds int64; expected floating point"),
        ("edm_ddpmpp", replace("map_layer1.weight", lambda t: t * float("nan")), "holds NaN or infinite values"),
        ("edm_ddpmpp", replace("enc.8x8_down.skip.resample_filter", lambda t: t + 0.1), "is not a separable filter|differs from"),
        ("iddpm_adm", replace("u", lambda t: t * 1.01), "the table of noise levels, u, is not that of"),
    ],
)
def test_a_network_that_contradicts_itself(tmp_path, new_reference, cases, case, change, match):
    refused(tmp_path, changed(new_reference, cases, case, change), match)


def test_a_table_of_noise_levels_is_needed(tmp_path, reference):
    data = reference("iddpm_adm").dump()
    position = data.index(b"\x8c\x01u\x94")
    refused(tmp_path, data[:position] + b"\x8c\x01v" + data[position + 3 :], "'v' is .*; expected no such tensor|u, is not")


def test_what_concerns_training_alone_is_said(tmp_path, new_reference, cases):
    data = changed(new_reference, cases, "edm_adm", set_attribute("model", "label_dropout", 0.1))
    (tmp_path / "net.pkl").write_bytes(data)
    assert convert(tmp_path / "net.pkl", tmp_path / "out").left_out == ("label_dropout 0.1 (of training only)",)


def test_other_objects_are_refused(tmp_path, dump_pickle, persistent):
    state = {"_modules": {"model": persistent("UNet", {})}}
    refused(tmp_path, dump_pickle({"ema": persistent("EDMPrecond", state)}), "the model is a UNet; expected one of SongUNet")
    refused(tmp_path, dump_pickle({"ema": persistent("StyleGAN", {})}), "the network is a StyleGAN; expected one of EDMPrecond")
    refused(tmp_path, dump_pickle({"G": persistent("EDMPrecond", {})}), "the file holds 'G'; expected a network under 'ema'")
    refused(tmp_path, dump_pickle({"ema": persistent("EDMPrecond", {"_modules": [1]})}), "_modules is not a dictionary")
    refused(tmp_path, dump_pickle({"ema": persistent("EDMPrecond", {"_buffers": {"u": 3}})}), "u is a int, not a tensor")
    refused(tmp_path, dump_pickle({"ema": persistent("EDMPrecond", {"_modules": {"model": 3}})}), "model is a int, not a module")


def test_a_module_inside_itself(tmp_path, dump_pickle):
    """A cycle, which a pickle can make through its memo."""
    name = b"\x8c\x1atorch.nn.modules.container\x8c\x0aModuleDict\x93"
    cycle = b"\x80\x04" + name + b")\x81\x94}\x94\x8c\x08_modules}\x94\x8c\x05model" + b"h\x00ssb."
    refused(tmp_path, cycle, "the network is a ModuleDict")


# Zip files ----------------------------------------------------------------------------------------------------------------


def rewritten(data: bytes, change) -> bytes:
    """torch.save's zip with change(name, content, info) applied to each entry; None drops it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content, kind = change(info.filename, old.read(info)) or (None, None)
            if content is not None:
                new.writestr(info.filename, content, compress_type=kind)
    return out.getvalue()


def test_zip_files(tmp_path, reference):
    blob = io.BytesIO()
    torch.save(reference("edm_ncsnpp").state_dict(), blob)
    data, stored = blob.getvalue(), zipfile.ZIP_STORED
    evil = pickle.dumps(trap(tmp_path), protocol=2)
    cases = {
        "the file asks for 'posix.system'": lambda n, c: (evil if n.endswith("data.pkl") else c, stored),
        "is compressed": lambda n, c: (c, zipfile.ZIP_DEFLATED),
        "damaged or truncated": lambda n, c: None if n.endswith("data/3") else (c, stored),
        "storage .* is truncated": lambda n, c: (c[:-4] if n.endswith("data/3") else c, stored),
        "big-endian": lambda n, c: (b"big" if n.endswith("byteorder") else c, stored),
        "0 data.pkl": lambda n, c: None if n.endswith("data.pkl") else (c, stored),
    }
    for match, change in cases.items():
        refused(tmp_path, rewritten(data, change), match, "bad.pth")
    refused(tmp_path, data[: len(data) // 2], "damaged or truncated", "bad.pth")
    for value, match in (({"a": 1}, "no state dict"), ([], "no state dict"), ({}, "no state dict")):
        other = io.BytesIO()
        torch.save(value, other)
        refused(tmp_path, other.getvalue(), match, "bad.pth")


def test_half_precision_is_widened(tmp_path, reference):
    torch.save({n: t.half() for n, t in reference("edm_ncsnpp").state_dict().items()}, tmp_path / "half.pth")
    convert(tmp_path / "half.pth", tmp_path / "out")
    weights = EDMUNet.from_pretrained(tmp_path / "out" / "unet").state_dict()
    assert_close(
        weights["map_layer1.weight"], reference("edm_ncsnpp").tensors["map_layer1.weight"].half().float(), rtol=0, atol=0
    )


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file .*none\.pkl"):
        convert(tmp_path / "none.pkl", tmp_path / "out")
