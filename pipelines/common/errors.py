"""What a user can mend, and how a command says it: one clear message and exit status 2. A defect of ours keeps its traceback."""

from __future__ import annotations

import reprlib

from safetensors import SafetensorError

LONGEST = 4_000  # characters of a message: several faults of a configuration fit, a hostile name does not


class UserError(ValueError):
    """Something in the command, the configuration or the files that the user can mend; the message says what and how.

    A plain ValueError is a wrong argument between functions: where it reaches a command it is a defect of ours.
    """


# OSError: the machine refuses (a full disk, a file that may not be read); SafetensorError: a damaged file of weights.
USER_ERRORS = (UserError, OSError, SafetensorError)


def printable(text: str, longest: int = LONGEST) -> str:
    """`text` with control characters escaped (names of files may hold any), line breaks kept, cut to `longest` characters.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    >>> printable("abcdef", longest=3)
    'abc... (3 more characters)'
    """
    safe = "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text[: longest + 1])
    return safe if len(text) <= longest else f"{safe[:longest]}... ({len(text) - longest} more characters)"


class _Limits(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Python writes no integers of more than 4,300 digits."""
        return repr(x) if x.bit_length() < 10_000 else f"<{type(x).__name__}>"


def shown(value: object, longest: int = 80) -> str:
    """A value in a message: its repr, cut where it is long, deep or wide (what YAML's anchors make of it may have no end)."""
    limits = _Limits()
    limits.maxstring = limits.maxother = 10 * longest
    limits.maxlevel, limits.maxlist, limits.maxdict = 4, 20, 20
    text = limits.repr(value)
    return printable(text if len(text) <= longest else f"{text[:longest]}...")


def message(error: BaseException) -> str:
    """What a command prints of an error. An OSError of the system is its file and reason, without errno."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return printable(f"{error.filename!s}: {error.strerror}")
    return printable(str(error) or type(error).__name__)
