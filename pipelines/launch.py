"""What every command that may run in several processes does first and last."""

from __future__ import annotations

import hashlib
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


def say(error: BaseException, prefix: str = "error") -> None:
    """One clear message on stderr, no traceback: once for all processes that meet the same error.

    Before processes know of each other the first of each machine speaks; then the first to come, whichever it is.
    """
    text, rank = message(error), os.environ.get("RANK", "0")
    if _is_first_to_say(text):
        who = "" if rank == "0" else f" (process {rank})"
        print(f"{prefix}{who}: {text}", file=sys.stderr, flush=True)


def _is_first_to_say(text: str) -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store = distributed.distributed_c10d._get_default_store()
        return store.add(f"said/{hashlib.sha256(text.encode(errors='replace')).hexdigest()}", 1) == 1
    except (RuntimeError, AttributeError):  # whoever kept it has ended: better twice than never
        return True


def fail(error: BaseException, prefix: str = "error") -> NoReturn:
    """Say it and leave with exit status 2."""
    say(error, prefix)
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
