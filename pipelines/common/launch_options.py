"""What `accelerate launch` was asked for and the commands here do not do: refused by name instead of ignored in silence."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import PurePath
from typing import NamedTuple

import psutil

from .errors import UserError


class Option(NamedTuple):
    """name: of accelerate's option, or a pattern of several; variable: the environment variable that carries it to a process, if
    any does; idle: values that ask for nothing; instead: what to do."""

    name: str
    variable: str | None
    idle: tuple[str, ...]
    instead: str


OFF = ("false", "0", "")
COMPILE = "set compile in the configuration, to a torch.compile backend (compile=inductor)"
ENGINE = (
    "its engine cannot follow a step that differentiates several networks separately; use FSDP2, which shards the frozen network "
    "(configs/accelerate/fsdp2.yaml)"
)
FSDP = "how the frozen network is split is fixed (configs/accelerate/fsdp2.yaml); remove it"
ACCUMULATE = "batch_size is that of one update; set micro_batch_size in the configuration to accumulate over parts of it"
PRECISION = (
    "a run must stop at the first non-finite number, and loss scaling makes such numbers on purpose; "
    "use --mixed_precision bf16 or no"
)

# Of training commands. DeepSpeed's and Megatron's own options reach no process unless their engine is asked for.
TRAINING = (
    Option("use_deepspeed", "ACCELERATE_USE_DEEPSPEED", OFF, ENGINE),
    Option("use_megatron_lm", "ACCELERATE_USE_MEGATRON_LM", OFF, ENGINE),
    Option("use_parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG", OFF, ENGINE),
    Option("gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1", "auto", ""), ACCUMULATE),
    Option("gradient_clipping", "ACCELERATE_GRADIENT_CLIPPING", ("auto", ""), "set clip of an optimizer in the configuration"),
    Option("mixed_precision", "ACCELERATE_MIXED_PRECISION", ("no", "bf16", ""), PRECISION),
    Option("dynamo_backend", "ACCELERATE_DYNAMO_BACKEND", ("no", ""), COMPILE),
    Option("dynamo_mode", None, ("default",), COMPILE),
    Option("dynamo_use_*", None, OFF, COMPILE),
    Option("fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", OFF, FSDP),
    Option(
        "fsdp_activation_checkpointing",
        "FSDP_ACTIVATION_CHECKPOINTING",
        OFF,
        "set gradient_checkpointing: true in the configuration",
    ),
    Option("fsdp_activation_checkpointing_offload", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", OFF, FSDP),
    Option("fsdp_reshard_after_forward", "FSDP_RESHARD_AFTER_FORWARD", ("true", "full_shard", ""), FSDP),
    Option("fsdp_sharding_strategy", "FSDP_SHARDING_STRATEGY", ("full_shard", "1", ""), FSDP),
    Option("fsdp_ignored_modules", "FSDP_IGNORED_MODULES", ("",), FSDP),
    Option("fsdp_[!v]*", None, (), FSDP),
    Option("deepspeed_*", None, (), ENGINE),
    Option("zero*", None, (), ENGINE),
    Option("offload_*", None, (), ENGINE),
    Option("megatron_lm_*", None, (), ENGINE),
    Option("parallelism_config_*", None, (), ENGINE),
    Option("fp8_*", None, (), PRECISION),
    Option("downcast_bf16", None, ("no",), "it is for TPUs, on which this has not been run; remove it"),
)
DTYPE = "an evaluation computes in --dtype; remove it"
NO_TRAINING = "it is for training, and an evaluation trains nothing; remove it"
EVALUATION = (
    *(o._replace(instead=NO_TRAINING) for o in TRAINING if o.name != "mixed_precision"),
    Option("mixed_precision", "ACCELERATE_MIXED_PRECISION", ("no", ""), DTYPE),
    Option("use_fsdp", "ACCELERATE_USE_FSDP", OFF, "every process of an evaluation holds the whole model; remove it"),
)


def check_launch(options: Sequence[Option]) -> None:
    """UserError for what the launcher was asked for and the command will not do. To be called before an Accelerator is made."""
    for option in options:
        value = os.environ.get(option.variable or "", "")
        if option.variable and value.lower() not in option.idle and value not in ("None", ""):
            raise UserError(f"{option.variable}={value} (accelerate launch --{option.name}) is not followed: {option.instead}")
    given = launch_arguments(parent_command())
    for name in sorted(getattr(given, "nondefault", ())):
        value = str(getattr(given, name))
        refused = next((o for o in options if fnmatch(name, o.name)), None)
        if refused is not None and value.lower() not in refused.idle:
            raise UserError(f"accelerate launch --{name} {value} is not followed: {refused.instead}")


def parent_command() -> list[str]:
    """The command line of the process that started this one: some options of the launcher reach a process in no other way."""
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def launch_arguments(command: Sequence[str]) -> Namespace | None:
    """What `accelerate launch` read from its command line (nondefault: the options given); None for another command."""
    words = [PurePath(word).name.removesuffix(".exe") for word in command]
    pairs = enumerate(pairwise(words))
    starts = [i + 2 for i, (first, second) in pairs if first in ("accelerate", "accelerate_cli.py") and second == "launch"]
    starts += [i + 1 for i, w in enumerate(words) if w in ("accelerate-launch", "accelerate.commands.launch")]
    if not starts:
        return None
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_args(list(command[min(starts) :]))
