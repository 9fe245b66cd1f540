"""Pickles whose depth, sharing, size, numbers or names were made to hurt, put together opcode by opcode."""

import io
import math
import struct
import warnings
import zipfile

import pytest
import torch

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
@pytest.mark.slow
def test_nested_tuples(refused, where, value):
    """Hashing, printing or comparing them would end the process, or never end."""
    refused(NESTED[where](value), "")


def list_of(v: bytes) -> bytes:
    return b"]" + v + b"a"


@pytest.mark.parametrize(
    "where", ["what is called", "the meta", "the name of the class", "a class's name", "the modules", "a key"]
)
@pytest.mark.slow
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
        (whole(b"N" + put(0xFFFFFFFF)), "'ema' is None; expected a network"),
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
        (whole(b"(K\x01K\x02K\x03K\x04K\x05K\x06K\x07K\x08K\x09t" + b"\x85" * 3), "'ema' is a tuple; expected a network"),
    ],
)
@pytest.mark.slow
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


@pytest.mark.slow
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


def module(class_name: str = "M", **state: bytes) -> bytes:
    return instance(text(class_name), mapping(**state))


def test_modules_that_share_their_parameters(refused):
    """Five hundred modules with the same two thousand names: a million to visit."""
    names = b"}(" + b"".join(text(f"p{i}") + b"N" for i in range(2_000)) + b"u" + put(70_000)
    children = b"".join(text(f"m{i}") + module(_parameters=get(70_000)) for i in range(500))
    refused(network(_parameters=names, _modules=b"}(" + children + b"u"), "a network of more than 100,000 modules and tensors")


def test_modules_within_modules(refused):
    made = MODULES
    for _ in range(80):
        made = module(_modules=mapping(a=made))
    refused(network(_modules=mapping(model=made)), "modules within modules without end")


def test_many_names_of_many_digits(refused):
    """Two hundred ones, then an x: what an expression with a reference back takes long to search."""
    names = b"".join(text("enc." + "1" * 150 + f"x{i}") + tensor() for i in range(2_000))
    refused(network(_buffers=b"}(" + names + b"u"), "the model is a None")


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
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + key + b"Q.")
        archive.writestr("a/data/0", bytes(8))
    refused(out.getvalue(), match, "bad.pth")
