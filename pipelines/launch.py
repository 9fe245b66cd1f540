"""What every command that may run in several processes does first and last."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from .errors import USER_ERRORS, UserError, message


def check_processes(accelerator: Any) -> None:
    """UserError where several processes were started that do not know of each other: each would do all of the work."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started, but accelerate takes each for the only one; on a CPU set ACCELERATE_USE_CPU=true "
            "(or launch with configs/accelerate/cpu_2.yaml)"
        )


def end_processes() -> None:
    """Leave the group of processes, if there is one. A command's last act, however it ends: threads of the group that still run
    when python exits can abort a process whose work is done (the more likely, the busier the machine).
    """
    if "torch" not in sys.modules:  # then there is no group, and to import it takes seconds
        return
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def fail(error: BaseException, prefix: str = "error") -> NoReturn:
    """One clear message on stderr, no traceback, exit status 2."""
    print(f"{prefix}: {message(error)}", file=sys.stderr, flush=True)
    end_processes()
    raise SystemExit(2)


@contextmanager
def user_errors(prefix: str = "error") -> Iterator[None]:
    """Around the whole of a command: what a user can mend is said and leaves with status 2; anything else is our defect and
    keeps its traceback.
    """
    try:
        yield
    except USER_ERRORS as error:
        fail(error, prefix)
