"""What `accelerate launch` is asked for and a command does not follow is refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.run import start
from pipelines.common.launch_options import EVALUATION, TRAINING, check_launch, launch_arguments

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "set micro_batch_size in the configuration"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "set compile in the configuration"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "use --mixed_precision bf16 or no"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "use --mixed_precision bf16 or no"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "use FSDP2"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "use FSDP2"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "use FSDP2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "how the frozen network is split is fixed"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "set gradient_checkpointing: true in the configuration"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "how the frozen network is split is fixed"),
        ("FSDP_SHARDING_STRATEGY", "SHARD_GRAD_OP", "how the frozen network is split is fixed"),
    ],
)
def test_what_a_process_is_told(variable, value, message, monkeypatch):
    check_launch(TRAINING)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}={value} .*is not followed: .*{message}"):
        check_launch(TRAINING)


# What accelerate 1.15 tells every process, and what asks for nothing.
IDLE = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


def test_what_asks_for_nothing(monkeypatch):
    for variable, value in IDLE.items():
        monkeypatch.setenv(variable, value)
    check_launch(TRAINING)
    check_launch(EVALUATION)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launch(TRAINING)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")],
)
def test_an_evaluation_computes_in_its_own_way(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}={value}"):
        start()


def test_what_an_evaluation_says_of_precision(monkeypatch):
    """It is an option of its own there, whatever training does."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"is not followed: an evaluation computes in --dtype; remove it"):
        start()


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("python /x/bin/accelerate launch --gradient_accumulation_steps 8 -m trainers.distill --config y", True),
        ("python /x/bin/accelerate-launch --gradient-accumulation-steps=8 -m trainers.distill --config y", True),
        ("python -m accelerate.commands.launch --gradient_accumulation_steps 8 -m trainers.distill", True),
        ("python /x/bin/accelerate launch --num_processes 1 -m trainers.distill --gradient_accumulation_steps 8", False),
    ],
)
def test_the_launchers_command_line_is_read(command, given):
    assert ("gradient_accumulation_steps" in launch_arguments(command.split()).nondefault) is given


@pytest.mark.parametrize("command", ["bash", "python -m pytest", "python -m torch.distributed.run -m trainers.distill", ""])
def test_other_parents(command):
    assert launch_arguments(command.split()) is None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--gradient_accumulation_steps 8", "accelerate launch --gradient_accumulation_steps 8 is not followed: batch_size is"),
        ("--dynamo_backend inductor", "is not followed: set compile in the configuration"),
        ("--gradient_accumulation_steps 1 --dynamo_backend no", None),
    ],
)
@pytest.mark.slow
def test_accelerate_itself(option, message, tmp_path):
    """Gradient accumulation reaches a process in no variable: only the launcher's command line has it."""
    script = tmp_path / "script.py"
    script.write_text("from pipelines.common.launch_options import *\ncheck_launch(TRAINING)\nprint('started')\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *option.split(), str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=120)
    assert ("started" in done.stdout) is (message is None)
    assert message is None or message in done.stderr
