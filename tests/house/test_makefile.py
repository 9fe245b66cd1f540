"""The set-up of the Makefile, with an interpreter that only looks like one: what is said before anything is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKE = shutil.which("make")
TOOLS = ("mkdir", "cp", "touch", "head", "sh")
PYTHON = f"""#!/bin/sh
case "$1 $2" in
  --version*) echo "Python $VERSION" ;;
  "-c "*) exec '{sys.executable}' -I -S -c "import sys; sys.version_info = tuple(map(int, '$VERSION'.split('.'))); $2" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") [ "$3" = --version ] || echo "pip $*" ;;
esac
"""

pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")


@pytest.fixture
def install(tmp_path):
    """install(version, system, gpu) -> (exit status, what was said): `make install` in an empty copy of the project."""

    def script(file: Path, content: str) -> None:
        file.write_text(content)
        file.chmod(0o755)

    def run(version: str = "3.11.7", system: str = "Linux x86_64", gpu: bool = False) -> tuple[int, str]:
        tools = tmp_path / "bin"
        tools.mkdir()
        for tool in TOOLS:
            (tools / tool).symlink_to(shutil.which(tool))
        script(tools / "uname", f"#!/bin/sh\necho '{system}'\n")
        script(tools / "python3", PYTHON)
        if gpu:
            script(tools / "nvidia-smi", "#!/bin/sh\n")
        for name in ("Makefile", "requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "PYTHON"}
        environment = clean | {"PATH": str(tools), "VERSION": version}
        done = subprocess.run([MAKE, "install"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize(
    ("system", "gpu", "size", "smaller"),
    [
        ("Linux x86_64", False, True, True),
        ("Linux x86_64", True, True, False),
        ("Darwin arm64", False, False, False),  # PyTorch is small there
    ],
)
def test_the_size_is_said_before_anything_is_downloaded(system, gpu, size, smaller, install):
    code, said = install(system=system, gpu=gpu)
    assert code == 0, said
    before, _, after = said.partition("pip -m pip install")
    assert "requirements.txt" in after
    assert ("3 GB of downloads, 5.6 GB on disk" in before) == size
    assert ("--index-url https://download.pytorch.org/whl/cpu\n  make install\n" in before) == smaller


@pytest.mark.parametrize("version", ["3.11.0", "3.13.9", "3.14.0", "3.14.2"])
def test_pythons_that_do(version, install):
    assert install(version)[0] == 0


@pytest.mark.parametrize("version", ["2.7.18", "3.10.14", "3.14.1", "3.15.0"])
def test_other_pythons_are_refused_before_anything_is_made(version, install, tmp_path):
    code, said = install(version)
    assert code != 0
    assert f"Python 3.11 to 3.14 is needed (not 3.14.1, which torchvision refuses); 'python3' is: Python {version}." in said
    assert "make install PYTHON=python3.12" in said
    assert not (tmp_path / ".venv").exists()
