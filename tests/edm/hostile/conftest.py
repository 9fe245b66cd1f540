"""The real command on files that were made to hurt, and on files that are something else.

Each is converted in a process of its own (forked from one that has loaded the converter), with limits on its memory and processor
time: refused with status 2 and one clear line, nothing left behind.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
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


@pytest.fixture(scope="module")
def server():
    if not Path("/proc/self/statm").exists():
        pytest.skip("limits memory as Linux does")
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


SONG = {"model_type": "SongUNet", "img_resolution": 4, "model_channels": 4, "channel_mult": [1, 1], "num_blocks": 1}
SONG |= {"attn_resolutions": []}


@pytest.fixture(scope="session")
def small(new_reference):
    return new_reference("EDMPrecond", SONG)


@pytest.fixture(scope="session")
def with_attribute() -> Callable[..., bytes]:
    """with_attribute(reference, module, key, value): its snapshot, but for one attribute of one module."""
    return set_attribute


def set_attribute(ref, module: str, key: str, value) -> bytes:
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
