"""What a snapshot may hold at most, so that a file that was made to hurt costs no more than a good one of its size.

Every number is several times what the largest networks of the papers need (ADM on ImageNet: 155,000 opcodes, 553 tensors).
"""

from __future__ import annotations

import re
from typing import Any

from ...common.errors import UserError, printable

# what reading damaged bytes comes to in Python
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

STEPS = 1_000_000  # opcodes, and items that one opcode touches
TEXT = 1 << 25  # characters of all strings together
STRING = 1 << 20  # of one: the longest is the source code of NVlabs' networks
INTEGER_BYTES = 16  # the longest is the magic number of torch.save, 10
KEY = 1 << 60  # below it python's hash of an integer is the integer, so that no two collide by design
DIMENSIONS = 8
NUMBER = 1 << 48  # of elements, strides, offsets
TENSORS = 20_000
VISITS = 100_000  # modules, parameters and buffers below a network, absent ones too
DEPTH = 50  # modules within modules
NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")  # of a tensor or module, and of the global that a pickle asks for
RESOLUTION = 4096  # pixels; only the names of tensors say it
DIRECTORY = 1 << 22  # bytes of a zip file's directory


class SnapshotError(UserError):
    """A file that is not what it should be; nothing in it has been executed."""


def shown(value: Any, longest: int = 60) -> str:
    """A value of the file for a message: never long, one line, never a walk through what it holds."""
    if isinstance(value, str):
        text = ascii(value[: longest + 1])
        return text if len(value) <= longest else f"{value[:longest]!a}... ({len(value)} characters)"
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    return f"a {type(value).__name__}"


def listed(values: Any, most: int = 8) -> str:
    """The first of many."""
    values = list(values)
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(shown(v) for v in values[:most]) + more


def reason(error: BaseException) -> str:
    """What python says of damaged bytes, in one line."""
    return f"{type(error).__name__}: {printable(str(error), 200)}".replace("\n", " ")


def is_number(value: Any) -> bool:
    """A plain int or float; True is none."""
    return type(value) in (int, float)


class Budget:
    """Steps and characters that are left to a file, its nested pickles included."""

    def __init__(self) -> None:
        self.steps, self.text = STEPS, TEXT

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise SnapshotError(f"more than {STEPS:,} steps, which no network of the papers needs; refused")

    def read(self, characters: int) -> None:
        self.text -= characters
        if characters > STRING or self.text < 0:
            raise SnapshotError(f"a string of {characters:,} characters; expected {STRING:,} at most, and {TEXT:,} together")
