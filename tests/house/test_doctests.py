"""The examples in docstrings are true."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = (file for folder in ("pipelines", "trainers", "eval") for file in sorted((ROOT / folder).rglob("*.py")))
MODULES = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in FILES if ">>>" in f.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, capsys):
    found = doctest.testmod(import_module(name))
    assert found.attempted
    assert not found.failed, capsys.readouterr().out
