"""Files that were made to hurt, and files that are something else: refused in seconds, in bounded memory, with one clear line.

Each is converted by the real command in a process of its own (forked from one that has loaded it), with limits on its memory and
processor time, and leaves nothing behind.
"""

import gzip
import io
import json
import math
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes

ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEMORY = 10, 1 << 30  # of processor time; of address space beyond what python with numpy has
SERVER = f"""
import json, os, resource, sys, tempfile, traceback
from scripts import convert_edm
pages = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
for line in sys.stdin:
    said = tempfile.TemporaryFile()
    pid = os.fork()
    if not pid:
        os.dup2(said.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
        resource.setrlimit(resource.RLIMIT_AS, (pages + {MEMORY}, pages + {MEMORY}))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            convert_edm.main(json.loads(line))
            code = 0
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said.seek(0)
    print(json.dumps([status, said.read().decode(errors="backslashreplace")[:20000]]), flush=True)
"""
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def refused(server, tmp_path):
    """refused(content, what the line says): the command's message."""

    def check(content: bytes, match: str, name: str = "bad.pkl", options: tuple[str, ...] = ()) -> str:
        (tmp_path / name).write_bytes(content)
        server.stdin.write(json.dumps([str(tmp_path / name), str(tmp_path / "made" / "out"), *options]) + "\n")
        server.stdin.flush()
        status, said = json.loads(server.stdout.readline())
        assert status == 2, (status, said[-2000:])
        assert [p.name for p in tmp_path.iterdir()] == [name]
        assert said.startswith(f"error: {tmp_path / name}: ")
        line = said.removesuffix("\n")
        assert line.isprintable()
        assert len(line) < 1500
        assert match in line
        return line

    return check


# A small assembler ---------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    held = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(held)) + held


def mapping(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def name(module: str, what: str) -> bytes:
    return text(module) + text(what) + b"\x93"


def instance(class_name: bytes, state: bytes) -> bytes:
    held = mapping(type=text("class"), version=b"K\x06", module_src=text(""), class_name=class_name, state=state)
    return name("torch_utils.persistence", "_reconstruct_persistent_obj") + held + b"\x85R"


def whole(value: bytes) -> bytes:
    """A pickle of {"ema": value}."""
    return b"\x80\x04" + mapping(ema=value) + b"."


def network(**state: bytes) -> bytes:
    return whole(instance(text("EDMPrecond"), mapping(**state)))


def deep(opcode: bytes = b"\x85", depth: int = 150_000) -> bytes:
    """((((...)))) of 150 kB."""
    return b")" + opcode * depth


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def laughs(levels: int = 60) -> bytes:
    """A tuple of 2^60 empty tuples, each half the same."""
    return b")" + b"".join(put(70_000 + i) + get(70_000 + i) + b"\x86" for i in range(levels))


def long(value: int) -> bytes:
    held = value.to_bytes(255, "little", signed=True)
    return b"\x8a\xff" + held


MODULES = name("torch.nn.modules.container", "ModuleDict") + b")\x81"
ORDERED = name("collections", "OrderedDict")
BLOB = io.BytesIO()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.save(torch.arange(6.0).storage(), BLOB, _use_new_zipfile_serialization=False)
BLOB = BLOB.getvalue()
STORAGE = name("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(BLOB)) + BLOB + b"\x85R"


def tensor(
    offset: bytes = b"K\x00", shape: bytes = b"K\x06\x85", strides: bytes = b"K\x01\x85", storage: bytes = STORAGE
) -> bytes:
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + offset + shape + strides + b"\x89}tR"


def shared_modules(levels: int) -> bytes:
    made = MODULES
    for i in range(levels):
        modules = b"}" + text("a") + made + put(70_000 + i) + b"s" + text("b") + get(70_000 + i) + b"s"
        made = MODULES + b"}" + text("_modules") + modules + b"sb"
    return made


# Pickles -------------------------------------------------------------------------------------------------------------------

NESTED = {
    "a key": lambda v: whole(b"}" + v + b"Ns"),
    "a key among others": lambda v: whole(b"}(" + v + b"Nu"),
    "in a set": lambda v: whole(b"\x8f(" + v + b"\x90"),
    "what is called": lambda v: whole(v + b")R"),
    "the arguments": lambda v: whole(ORDERED + v + b"R"),
    "a class's name": lambda v: whole(text("torch") + v + b"\x93"),
    "a module's name": lambda v: whole(v + text("x") + b"\x93"),
    "the meta": lambda v: whole(name("torch_utils.persistence", "_reconstruct_persistent_obj") + v + b"\x85R"),
    "the meta's type": lambda v: whole(instance(text("x"), b"}").replace(text("type") + text("class"), text("type") + v)),
    "the meta's version": lambda v: whole(instance(text("x"), b"}").replace(b"K\x06", v)),
    "the name of the class": lambda v: whole(instance(v, b"}")),
    "the state": lambda v: whole(instance(text("EDMPrecond"), v)),
    "the network": lambda v: whole(v),
    "everything": lambda v: b"\x80\x04" + v + b".",
    "the modules": lambda v: network(_modules=v),
    "a module": lambda v: network(_modules=mapping(model=v)),
    "a parameter": lambda v: network(_parameters=mapping(w=v)),
    "a shape": lambda v: whole(tensor(shape=v)),
    "a number of a shape": lambda v: whole(tensor(shape=v + b"\x85")),
    "strides": lambda v: whole(tensor(strides=v)),
    "an offset": lambda v: whole(tensor(offset=v)),
    "a storage": lambda v: whole(tensor(storage=v)),
    "a nested storage": lambda v: whole(name("torch.storage", "_load_from_bytes") + v + b"\x85R"),
    "a parameter's data": lambda v: whole(name("torch._utils", "_rebuild_parameter") + v + b"\x89}\x87R"),
    "a numpy type": lambda v: whole(name("numpy", "dtype") + v + b"\x85R"),
    "a numpy number": lambda v: whole(name("numpy._core.multiarray", "scalar") + v + b"K\x00\x86R"),
    "attributes": lambda v: whole(MODULES + v + b"b"),
    "attributes of a dictionary": lambda v: whole(ORDERED + b")R" + v + b"b"),
    "a persistent id": lambda v: whole(v + b"Q"),
}


@pytest.mark.parametrize("value", [deep(), deep(b"\x85", 60), laughs()], ids=["deep", "60 deep", "shared"])
@pytest.mark.parametrize("where", NESTED)
def test_nested_tuples(refused, where, value):
    """Hashing, printing or comparing them would end the process, or never end."""
    refused(NESTED[where](value), "")


def list_of(v: bytes) -> bytes:
    return b"]" + v + b"a"


@pytest.mark.parametrize(
    "where", ["what is called", "the meta", "the name of the class", "a class's name", "the modules", "a key"]
)
def test_nested_lists_and_dictionaries(refused, where):
    deep_lists = b"]" * 400_000 + b"a" * 399_999
    deep_dicts = (b"}" + text("k")) * 100_000 + b"N" + b"s" * 100_000
    for value in (deep_lists, deep_dicts, list_of(laughs()), mapping(a=laughs())):
        refused(NESTED[where](value), "")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (network(_modules=mapping(model=shared_modules(40))), "is in the network twice"),
        (network(_modules=mapping(model=shared_modules(1))), "is in the network twice"),
        (b"\x80\x04}" + b"K\x00" + tensor() + b"s.", "the file holds 0; expected a network"),
        (whole(long(1 << 2030)), "a whole number of 255 bytes; expected 16 at most"),
        (whole(tensor(shape=long(1 << 2030) + b"\x85")), "a whole number of 255 bytes"),
        (whole(b"\x8b" + struct.pack("<i", 1 << 20) + bytes(1 << 20)), "pickle opcode LONG4 is not something"),
        (whole(b"\x8b\xff\xff\xff\xff"), "pickle opcode LONG4 is not something"),
        (whole(b"N" + put(0xFFFFFFFF)), "the file holds 'ema'; expected a network"),
        (whole(b"N" + put(0xFFFFFFFF) + get(0xFFFFFFFE)), "damaged pickle"),
        (b"\x80\x05\x95" + b"\xff" * 8 + b"N.", "the file holds NoneType"),
        (whole(b"\x8e" + struct.pack("<Q", 1 << 63)), "the file ends here, where 9223372036854775808 more bytes should be"),
        (whole(b"\x8d" + struct.pack("<Q", (1 << 63) - 1)), "the file ends here"),
        (whole(b"B\xff\xff\xff\xff"), "the file ends here"),
        (whole(b"\x96" + struct.pack("<Q", 1 << 40)), "pickle opcode BYTEARRAY8 is not something"),
        (whole(b"\x8f" * 5_000_000), "more than 1,000,000 steps"),
        (whole(b"N\x94" * 3_000_000), "more than 1,000,000 steps"),
        (whole(b"(" * 5_000_000), "more than 1,000,000 steps"),
        (whole(b"X" + struct.pack("<I", 5_000_000) + b"a" * 5_000_000), "a string of 5,000,000 characters"),
        (whole((b"X" + struct.pack("<I", 1_000_000) + "\U0001f600".encode() * 250_000) * 60), "a string of 1,000,000 characters"),
        (whole(b"c" + b"a" * 5_000_000), "a name without an end"),
        (whole(b"cos\n" + b"a" * 300 + b"\n"), "a name without an end"),
        (whole(text("a" * 5_000) + text("b") + b"\x93"), "expected two short strings"),
        (whole(b"}K\x01Ns" + text("é") + b"Ns"), "expected a network"),
        (whole(b"}G" + struct.pack(">d", math.nan) + b"Ns"), "with the key nan"),
        (whole(b"}C\x01aNs"), "with the key a memoryview"),
        (whole(b"}]Ns"), "with the key a list"),
        (whole(b"}\x8a\x0a" + bytes(9) + b"\x01Ns"), "expected strings and small whole numbers"),
        (whole(b"(K\x01K\x02K\x03K\x04K\x05K\x06K\x07K\x08K\x09t" + b"\x85" * 3), "the file holds 'ema'"),
    ],
)
def test_bombs(refused, content, match):
    refused(content, match)


def test_keys_that_collide(refused):
    """Multiples of the modulus of python's hash: a dictionary of them is quadratic."""
    modulus = (1 << 61) - 1
    keys = b"".join(b"\x8a\x0a" + (i * modulus).to_bytes(10, "little") + b"N" for i in range(1, 80_000))
    refused(whole(b"}(" + keys + b"u"), "expected strings and small whole numbers")


def test_a_large_dictionary_copied_again_and_again(refused):
    """20,000 attributes for each of 50,000 modules."""
    state = b"}(" + b"".join(text(f"a{i}") + b"N" for i in range(20_000)) + b"u" + put(70_000)
    again = MODULES + put(70_001) + (name("torch.nn.modules.container", "ModuleDict") + b")\x81" + get(70_000) + b"b") * 50_000
    refused(whole(b"(" + state + again + b"t"), "more than 1,000,000 steps")


def test_a_large_tuple_used_again_and_again(refused):
    """As arguments, as a shape."""
    many = b"(" + b"K\x01" * 300_000 + b"t" + put(70_000)
    refused(whole(b"(" + many + (ORDERED + get(70_000) + b"R") * 100 + b"t"), "damaged pickle")
    refused(whole(tensor(shape=many, strides=get(70_000))), "a tensor whose shape is a tuple")


def test_a_storage_read_again_and_again(refused):
    """Inside it, a pickle of many steps."""
    inner = b"\x80\x02" + b"N0"[:1] * 20_000 + b"."
    held = b"B" + struct.pack("<I", len(inner)) + inner + put(70_000)
    call = name("torch.storage", "_load_from_bytes")
    one = BLOB[:-1]
    refused(whole(call + held + b"\x85R"), "ends here")
    many = b"(" + (call + b"B" + struct.pack("<I", len(BLOB)) + BLOB + b"\x85R") * 40_000 + b"t"
    refused(whole(many), "more than 1,000,000 steps")
    refused(whole(call + b"B" + struct.pack("<I", len(one)) + one + b"\x85R"), "it is truncated or damaged")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": b"K\x06\x85", "strides": b"K\x00\x85"}, "shows numbers of its storage more than once"),
        ({"shape": b"K\x02K\x03\x86", "strides": b"K\x01K\x01\x86"}, "shows numbers of its storage more than once"),
        ({"strides": b"J\xff\xff\xff\xff\x85"}, "is none"),
        ({"offset": b"J\xff\xff\xff\xff"}, "is none"),
        ({"offset": b"\x8a\x08" + struct.pack("<q", 1 << 62)}, "is none"),
        ({"offset": b"\x8a\x08" + struct.pack("<q", 1 << 40)}, "reaches outside its storage"),
        ({"strides": b"\x8a\x08" + struct.pack("<q", 1 << 62) + b"\x85"}, "is none"),
        ({"shape": b"K\x00\x8a\x08" + struct.pack("<q", 1 << 62) + b"\x86", "strides": b"K\x01K\x01\x86"}, "is none"),
        ({"shape": b"G" + struct.pack(">d", math.nan) + b"\x85"}, "is none"),
        ({"shape": b"\x88\x85"}, "is none"),
        ({"shape": b"(" + b"K\x01" * 9 + b"t", "strides": b"(" + b"K\x01" * 9 + b"t"}, "a tensor whose shape is a tuple"),
    ],
)
def test_tensors_that_are_none(refused, changes, match):
    refused(whole(tensor(**changes)), match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (whole(instance(text("\x1b[31mEDM\nPrecond" + "x" * 9_000), b"}")), r"'\x1b[31mEDM\nPrecond"),
        (whole(text("os\x1b]0;") + text("sys\ntem\r") + b"\x93"), r"'os\x1b]0;.sys\ntem\r'"),
        (whole(text("\u202etorch") + text("x") + b"\x93"), r"\u202etorch"),
        (network(_modules=b"}" + text("mo\x1b[2Jdel") + MODULES + b"s"), r"a tensor or module with the name 'mo\x1b[2Jdel'"),
        (network(_buffers=b"}" + text("u\n" * 900) + b"Ns"), "a tensor or module with the name"),
        (network(_buffers=b"}" + text("1" * 200_000) + b"Ns"), "a tensor or module with the name '1111"),
        (network(_buffers=b"}K\x01Ns"), "a tensor or module with the name 1"),
        (b"\x80\x04}" + text("\x1b\n") + b"Ns.", r"the file holds '\x1b\n'"),
        (
            b"\x80\x04}(" + b"".join(text(f"k{i}") + b"N" for i in range(90_000)) + b"u.",
            "'k7' and 89992 more; expected a network",
        ),
    ],
)
def test_names_in_messages(refused, content, match):
    """Escaped, on one line, cut."""
    refused(content, match)


def test_many_names_of_many_digits(refused):
    """Two hundred ones, then an x: what an expression with a reference back takes long to search."""
    names = b"".join(text("enc." + "1" * 150 + f"x{i}") + tensor() for i in range(2_000))
    refused(network(_buffers=b"}(" + names + b"u"), "the model is a None")


# A network but for one attribute -------------------------------------------------------------------------------------------

SONG = {"model_type": "SongUNet", "img_resolution": 4, "model_channels": 4, "channel_mult": [1, 1], "num_blocks": 1}
SONG |= {"attn_resolutions": []}
MARK = "replace this by a deep tuple"
ATTRIBUTES = {
    "": ("sigma_data", "sigma_min", "sigma_max", "_init_kwargs", "_init_args", "_parameters"),
    "model": ("label_dropout", "_buffers"),
    "model.enc.4x4_block0": ("dropout", "num_heads", "skip_scale", "adaptive_scale"),
    "model.enc.4x4_block0.norm0": ("eps", "num_groups"),
    "model.map_noise": ("endpoint", "max_positions"),
}


@pytest.fixture(scope="module")
def small(new_reference):
    return new_reference("EDMPrecond", SONG)


def with_attribute(ref, module: str, key: str, value) -> bytes:
    tree = ref.tree

    def changed(convert):
        root = node = tree(convert)
        for part in filter(None, module.split(".")):
            node = (node._modules if isinstance(node, torch.nn.Module) else node.state["_modules"])[part]
        (node._modules if isinstance(node, torch.nn.Module) else node.state)[key] = value
        return root

    ref.tree = changed
    try:
        return ref.dump()
    finally:
        del ref.tree


def shared(levels: int = 60):
    value = ()
    for _ in range(levels):
        value = (value, value)
    return value


@pytest.mark.parametrize(("module", "key"), [(m, k) for m, keys in ATTRIBUTES.items() for k in keys])
def test_attributes_of_a_network(refused, small, module, key):
    refused(with_attribute(small, module, key, shared()), "")
    refused(with_attribute(small, module, key, [shared()]), "")
    data = with_attribute(small, module, key, MARK)
    held = b"\x8c" + bytes([len(MARK)]) + MARK.encode()
    assert data.count(held) == 1
    refused(data.replace(held, deep()), "")
    refused(with_attribute(small, module, key, "\x1b[31m\n" * 999), "")


@pytest.mark.parametrize(
    "key", ["img_resolution", "channel_mult", "resample_filter", "encoder_type", "num_blocks", "augment_dim"]
)
def test_arguments_of_a_network(refused, small, key):
    given = {"img_channels": 3, "label_dim": 0} | SONG
    for value in (shared(), [shared()], "\x1b\n" * 999, list(range(50_000)), 2**100, math.nan, {}):
        refused(with_attribute(small, "", "_init_kwargs", given | {key: value}), f"init_kwargs.{key} is")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("_init_kwargs", [1], "init_kwargs is a list"),
        ("_init_args", (32,), "positional arguments"),
        ("sigma_data", 10**30, "sigma_data is 10000"),
    ],
)
def test_attributes_by_name(refused, small, key, value, match):
    refused(with_attribute(small, "", key, value), match)


# State dicts ---------------------------------------------------------------------------------------------------------------


def saved(value) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def test_one_storage_for_all_tensors(refused):
    """4,000 views of four megabytes would be 16 GB of weights."""
    base = torch.zeros(1_000_000)
    refused(saved({f"enc.{i}": base for i in range(4_000)}), "some are the same numbers; expected each once", "bad.pth")
    refused(
        saved(
            {f"net.{2 * i}.weight": base[: 4 * 1].view(2, 2) for i in range(9)}
            | {f"net.{2 * i}.bias": base[:2] for i in range(9)}
        ),
        "'net",
        "bad.pth",
    )


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"enc.99999x99999_conv.weight": torch.zeros(4, 3, 3, 3)}, "a network of 99999x99999 pixels"),
        ({"enc.0x0_conv.weight": torch.zeros(4, 3, 3, 3)}, "resolutions 0"),
        (
            {"enc.8x8_conv.weight": torch.zeros(4, 3, 3, 3), "dec.7x7_up.conv0.weight": torch.zeros(4, 4, 3, 3)},
            "resolutions 8, 7",
        ),
        ({f"enc.{i}x{i}_conv.weight": torch.zeros(1, 1, 1, 1) for i in range(1, 3_000)}, "each is half of the one before"),
        (
            {f"dec.4096x4096_block{i}.conv0.weight": torch.zeros(1, 1, 1, 1) for i in range(3_000)},
            "no tensor 'enc.4096x4096_conv",
        ),
        (dict.fromkeys((f"enc.{i}" for i in range(20_001)), torch.zeros(1)), "the file holds 20,001 tensors"),
        ({"enc.8x8_conv.weight": torch.zeros(0, 3, 3, 3)}, "it holds nothing"),
        ({"enc.8x8_conv.weight": torch.zeros(4)}, "expected 4 dimensions"),
        ({"a\x1b[31m": torch.zeros(1)}, r"with the name 'a\x1b[31m'"),
        ({3: torch.zeros(1)}, "with the name 3"),
        ({"x" * 300: torch.zeros(1)}, "with the name 'xxx"),
        ({"u": torch.zeros(1), "model.u": torch.zeros(1)}, "the file holds both 'u' and 'model.u'"),
        # networks of points
        ({"net.0.weight": torch.zeros(1), "net.0.bias": torch.zeros(1)}, "expected a weight and a bias of net.0"),
        ({f"net.{'9' * 180}.weight": torch.zeros(1)}, "expected a weight and a bias"),
        ({f"net.{i}.weight": torch.zeros(1) for i in range(9_999)}, "and 9991 more; expected a weight and a bias"),
    ],
)
def test_state_dicts(refused, tensors, match):
    refused(saved(tensors), match, "bad.pth")


def points(**changes) -> dict:
    made = {
        f"net.{2 * i}.{k}": torch.ones((5, 4) if i == 0 else (2, 5) if i == 3 else (5, 5)) for i in range(4) for k in ("weight",)
    }
    made |= {f"net.{2 * i}.bias": torch.ones(2 if i == 3 else 5) for i in range(4)}
    return made | {key.replace("_", "."): value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"net_0_weight": torch.tensor(1.0)}, "'net.0.weight' is (); expected that of a linear layer"),
        ({"net_6_weight": torch.ones(2)}, "expected that of a linear layer"),
        ({"net_2_bias": torch.ones(5, dtype=torch.long)}, "holds int64; expected floating point"),
        ({"net_2_bias": torch.full((5,), 1e300, dtype=torch.float64)}, "numbers beyond float32"),
        ({"net_2_bias": torch.full((5,), -math.inf)}, "NaN or infinite"),
        ({"net_2_bias": torch.ones(1).expand(5)}, "reaches outside its storage|more than once".split("|")[0]),
    ],
)
def test_networks_of_points(refused, changes, match):
    refused(saved(points(**changes)), match, "bad.pth")


def test_points_have_no_preconditioning(refused):
    refused(saved(points()), "a network of points, which has no preconditioning 'vp'", "p.pth", ("--preconditioning", "vp"))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, -1e300])
def test_numbers_that_overflow(refused, small, value):
    """Said in one line, without numpy's warnings."""
    name = "enc.2x2_down.conv0.resample_filter"
    wide = {key: tensor.double() for key, tensor in small.state_dict().items()}
    refused(saved(wide | {f"model.{name}": torch.full((1, 1, 2, 2), value, dtype=torch.float64)}), f"{name} is not", "bad.pth")
    refused(saved(wide | {"model.u": torch.full((1001,), value, dtype=torch.float64)}), "channels in", "bad.pth")


# Zip files -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(small) -> bytes:
    return saved(OrderedDict(small.state_dict()))


def entries(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as held:
        return [(info.filename, held.read(info)) for info in held.infolist()]


def zipped(held: list[tuple[str, bytes]], change=None, kind: int = zipfile.ZIP_STORED) -> bytes:
    """change(info) -> None sees each entry before it is written."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", kind) as archive:
        warnings.simplefilter("ignore")  # names that are there twice
        for entry, content in held:
            info = zipfile.ZipInfo(entry)
            info.compress_type = kind
            if change:
                change(info)
            archive.writestr(info, content)
    return out.getvalue()


def directory(data: bytes, index: int) -> int:
    """Where the record of an entry in the central directory begins."""
    at = data.index(b"PK\x01\x02")
    for _ in range(index):
        at = data.index(b"PK\x01\x02", at + 4)
    return at


def patched(data: bytes, at: int, form: str, value: int) -> bytes:
    held = bytearray(data)
    struct.pack_into(form, held, at, value)
    return bytes(held)


def test_zip_files_that_lie(refused, archive):
    held = entries(archive)
    plain = zipped(held)
    first, second = directory(plain, 0), directory(plain, 1)
    storages = [i for i, (n, _) in enumerate(held) if "/data/" in n]
    big, other = (directory(plain, i) for i in storages[:2])
    end = plain.index(b"PK\x05\x06")
    cases = {
        "encrypted": (patched(plain, first + 8, "<H", 1), "is encrypted"),
        "another method": (patched(plain, first + 10, "<H", 99), "is compressed, which torch.save does not do"),
        "one entry in another": (patched(plain, second + 42, "<I", 0), "reaches into another entry"),
        "two entries at one place": (
            patched(plain, other + 42, "<I", struct.unpack_from("<I", plain, big + 42)[0]),
            "reaches into another entry",
        ),
        "a size of 4 GB": (patched(patched(plain, big + 24, "<I", 0xFFFFFFF0), big + 20, "<I", 0xFFFFFFF0), "reaches into"),
        "two sizes": (patched(plain, big + 24, "<I", 0xFFFFFFF0), "which cannot be"),
        "an offset outside": (patched(plain, big + 42, "<I", 0x7FFFFFFF), "reaches into another entry"),
        "zip64 without numbers": (patched(plain, big + 24, "<I", 0xFFFFFFFF), "which cannot be"),
        "a checksum": (patched(plain, directory(plain, storages[0]) + 16, "<I", 1), "its checksum differs"),
        "a directory of 4 GB": (patched(plain, end + 12, "<I", 0xFFFFFFF0), "damaged or truncated"),
        "a directory elsewhere": (patched(plain, end + 16, "<I", 0xFFFFFFF0), "damaged or truncated"),
        "a version of the future": (patched(plain, first + 6, "<H", 990), "damaged or truncated"),
        "a name in the header": (patched(plain, struct.unpack_from("<I", plain, big + 42)[0] + 30, "<B", 65), "is not where"),
        "an extra field": (patched(plain, struct.unpack_from("<I", plain, big + 42)[0] + 28, "<H", 60_000), "is not where"),
        "a cut": (plain[: len(plain) // 2], "damaged or truncated"),
        "no end": (plain[:end], "damaged or truncated"),
    }
    for data, match in cases.values():
        refused(data, match, "bad.pth")


def test_zip_files_of_zip64(refused, archive):
    """Sizes of 2^60, where zip64 says them."""
    held = entries(archive)
    plain = zipped(held)
    index = next(i for i, (n, _) in enumerate(held) if "/data/" in n)
    at = directory(plain, index)
    length = struct.unpack_from("<H", plain, at + 28)[0]
    extra = struct.pack("<HHQQ", 1, 16, 1 << 60, 1 << 60)
    data = bytearray(plain)
    struct.pack_into("<II", data, at + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", data, at + 30, len(extra))
    data[at + 46 + length : at + 46 + length] = extra
    end = data.index(b"PK\x05\x06")
    struct.pack_into("<I", data, end + 12, struct.unpack_from("<I", data, end + 12)[0] + len(extra))
    refused(bytes(data), "reaches into another entry", "bad.pth")


def test_zip_files_of_other_things(refused, archive):
    held = entries(archive)
    root = held[0][0].split("/")[0]
    zeros = zipped([(f"{root}/data.pkl", bytes(50_000_000))], kind=zipfile.ZIP_DEFLATED)
    assert len(zeros) < 100_000
    refused(zeros, "is compressed, which torch.save does not do", "bad.pth")
    refused(zipped([*held, held[-1]]), "twice", "bad.pth")
    refused(zipped([*held, ("other/data.pkl", b"N.")]), "a zip file with 2 data.pkl", "bad.pth")

    def link(info):
        info.external_attr = 0o120777 << 16

    refused(zipped([*held[:-1], (f"{root}/data/x", b"/etc/passwd")], link), "is a link or a device", "bad.pth")
    refused(zipped([*held, (f"{root}/\x1b[31m\n", b"")]), r"an entry with the name '", "bad.pth")
    refused(zipped([*held, ("é", b"")]), r"an entry with the name '\xe9'", "bad.pth")
    refused(zipped([(f"{i:040d}", b"") for i in range(60_000)]), "a zip file whose directory has", "bad.pth")
    refused(zipped([(f"{i}", b"") for i in range(9_000)]), "a zip file with 0 data.pkl", "bad.pth")
    numbers = io.BytesIO()
    np.savez(numbers, a=np.zeros(3))
    refused(numbers.getvalue(), "a zip file with 0 data.pkl; it holds 'a.npy'; expected a file of torch.save", "bad.pth")
    pickled = next(content for n, content in held if n.endswith("data.pkl"))
    for old, new, match in (
        (b"FloatStorage", b"BFloat16Storage"[:12], "the file asks for"),
        (b"storage", b"st\x1brage", "a persistent id that is a tuple"),
        (b"\x00cpu", b"\x00cpu", ""),
    ):
        changed = pickled.replace(old, new)
        if match:
            refused(zipped([(n, changed if n.endswith("data.pkl") else c) for n, c in held]), match, "bad.pth")


@pytest.mark.parametrize(
    ("key", "match"),
    [
        (deep(), "a persistent id that is a tuple"),
        (laughs(), "a persistent id that is a tuple"),
        (b"(" + text("storage") + deep() + text("0") + text("cpu") + b"K\x01t", "a storage of a tuple"),
        (b"(" + text("storage") + name("torch", "FloatStorage") + deep() + text("cpu") + b"K\x01t", "with the key a tuple"),
        (
            b"(" + text("storage") + name("torch", "FloatStorage") + text("../../x\x1b") + text("cpu") + b"K\x01t",
            "with the key '../",
        ),
        (b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + long(1 << 2000) + b"t", "255 bytes"),
        (
            b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"\x8a\x08" + bytes(7) + b"\x70t",
            "and 80",
        ),
        (b"(" + text("storage") + name("torch", "FloatStorage") + text("9") + text("cpu") + b"K\x01t", "storage 9 is missing"),
        (b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x09t", "it is truncated"),
    ],
)
def test_persistent_ids(refused, key, match):
    content = b"\x80\x02" + key + b"Q."
    refused(zipped([("a/data.pkl", content), ("a/data/0", bytes(8))]), match, "bad.pth")


# Files that are something else ---------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 223123456\n"


def legacy() -> bytes:
    out = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (POINTER, "this is a Git LFS pointer to a file of 223,123,456 bytes, not the file; run 'git lfs pull'"),
        (POINTER.replace(b"\n", b"\r\n"), "this is a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><head><title>Google Drive - Virus scan warning</title>", "this is a web page"),
        (b"\xef\xbb\xbf\n  <html>", "this is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "this is a web page (HTML or XML)"),
        (b'{"error": "Repository not found"}', 'this is a text file that begins with \'{"error": "Repository'),
        (b"Entry not found", "this is a text file that begins with 'Entry not found'"),
        (b"404: Not Found\n", "this is a text file that begins with '404"),
        (b"", "the file is empty"),
        (safetensors_bytes({"w": torch.zeros(3)}), "this is a safetensors file"),
        (gzip.compress(b"x" * 999), "this is a gzip archive; unpack it first"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(99), "this is a 7z archive"),
        (zipped([]), "this is an empty zip file"),
        (zipped([("net.pkl", b"x")]), "a zip file with 0 data.pkl; it holds 'net.pkl'; expected a file of torch.save"),
        (legacy(), "torch.save's format of before 2020"),
        (saved([torch.zeros(3)]), "the file holds no state dict"),
        (pickle.dumps({"a": 1}, protocol=2), "the file holds 'a'; expected a network under 'ema'"),
        (pickle.dumps(np.zeros(3), protocol=4), "the file asks for"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "byte 1: pickle opcode PERSID is not something that a snapshot holds"),
    ],
)
def test_other_files(refused, content, match):
    refused(content, match, "edm-cifar10-32x32-uncond-vp.pkl")


def test_a_folder(server, tmp_path):
    server.stdin.write(json.dumps([str(tmp_path), str(tmp_path / "out")]) + "\n")
    server.stdin.flush()
    status, said = json.loads(server.stdout.readline())
    assert (status, said) == (
        2,
        f"error: {tmp_path}: is a folder; expected a .pkl of NVlabs' EDM or of SiD, or a .pth of FastGen\n",
    )


def test_a_disk_that_is_full(tmp_path, small):
    """As a limit on the size of a file: neither the folder nor those that it was to lie in are left."""
    (tmp_path / "net.pkl").write_bytes(small.dump())
    command = f"ulimit -f 4; exec {sys.executable} -m scripts.convert_edm {tmp_path}/net.pkl {tmp_path}/made/by/out"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "File too large" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["net.pkl"]


# Many damaged files --------------------------------------------------------------------------------------------------------


def test_damage_of_any_kind(refused, tmp_path, small, archive):
    """Bytes changed, removed, inserted, repeated: refused in one line, or read as a network; never anything else."""
    from pipelines.edm.convert import convert
    from pipelines.errors import USER_ERRORS, message

    generator = np.random.default_rng(5)
    sources = {"a.pkl": with_attribute(small, "", "sigma_data", 0.5), "a.pth": archive}
    for file, data in sources.items():
        structure = data.index(b"_rebuild_tensor") if file == "a.pkl" else 0
        for _ in range(120):
            damaged = bytearray(data)
            for _ in range(generator.integers(1, 4)):
                at = int(generator.integers(0, len(data)) if generator.random() < 0.6 else structure + generator.integers(0, 900))
                at %= len(damaged)
                kind = generator.integers(0, 4)
                if kind == 0:
                    damaged[at] = generator.integers(0, 256)
                elif kind == 1:
                    del damaged[at : at + int(generator.integers(1, 9))]
                elif kind == 2:
                    damaged[at:at] = generator.bytes(int(generator.integers(1, 9)))
                else:
                    damaged[at:at] = damaged[at : at + int(generator.integers(1, 999))]
            (tmp_path / file).write_bytes(damaged)
            try:
                convert(tmp_path / file, tmp_path / "out")
            except USER_ERRORS as error:
                said = message(error)
                assert said.isprintable()
                assert len(said) < 1500
                assert not (tmp_path / "out").exists()
            else:
                subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)
        (tmp_path / file).unlink()
