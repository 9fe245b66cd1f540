"""Commands that may run in several processes leave their group however they end."""

import pytest
from torch import distributed

from eval.__main__ import main
from trainers import setup


@pytest.fixture
def group(tmp_path):
    """This process as a group of one, left again where a test's command fails to."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_evaluation_leaves_its_group(group, tmp_path, capsys):
    assert main(["compare", str(tmp_path / "nothing"), "--output", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not distributed.is_initialized()


def test_a_run_that_fails_leaves_its_group(group, capsys):
    with pytest.raises(SystemExit, match="2"):
        setup.fail(ValueError("steps: -3"))
    assert "error: steps: -3" in capsys.readouterr().err
    assert not distributed.is_initialized()
