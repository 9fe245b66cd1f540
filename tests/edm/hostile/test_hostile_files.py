"""Zip files that lie, files that are no snapshots, files that are damaged."""

import gzip
import io
import json
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

ROOT = Path(__file__).resolve().parents[3]


def saved(value) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


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
        (gzip.compress(b"x" * 999, mtime=0), "this is a gzip archive; unpack it first"),
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


def test_a_file_whose_name_has_escapes(server, tmp_path):
    file = tmp_path / "net\x1b[31m\n.pkl"
    file.write_bytes(POINTER)
    server.stdin.write(json.dumps([str(file), str(tmp_path / "out")]) + "\n")
    server.stdin.flush()
    status, said = json.loads(server.stdout.readline())
    assert status == 2
    assert said.removesuffix("\n").isprintable()
    assert r"net\x1b[31m\n.pkl: this is a Git LFS pointer" in said


def test_a_disk_that_is_full(tmp_path, small):
    """As a limit on the size of a file: neither the folder nor those that it was to lie in are left."""
    (tmp_path / "net.pkl").write_bytes(small.dump())
    command = f"ulimit -f 4; exec {sys.executable} -m scripts.convert_edm {tmp_path}/net.pkl {tmp_path}/made/by/out"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "File too large" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["net.pkl"]


# Many damaged files --------------------------------------------------------------------------------------------------------


def test_damage_of_any_kind(tmp_path, small, with_attribute, archive):
    """Bytes changed, removed, inserted, repeated: refused in one line, or read as a network; never anything else."""
    from pipelines.common.errors import USER_ERRORS, message
    from pipelines.edm.conversion.convert import convert

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
