"""What every command that may run in several processes does first and last."""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil

from .errors import USER_ERRORS, UserError, message

# Python's last collection goes through all that torch and its friends have made: seconds of work in which a process that has been
# asked to stop still seems to run, to free what ends with it anyway.
atexit.register(gc.freeze)

# What starts the processes of a command and waits for them: the first words of its command line.
LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun"}
LAUNCHERS |= {"accelerate.commands.launch", "accelerate.commands.accelerate_cli", "torch.distributed.run"}
FIRST_SPEAKS = 30.0  # seconds in which the first process of a machine has said what all have met


def follow_launcher() -> None:
    """From now on the end of `accelerate launch` is a SIGTERM to this process. Of a single process the launcher passes no signal
    on: stopped alone it would leave an orphan that trains to the end, unseen. Other parents, such as a shell, may go.
    """
    parent = os.getppid()
    try:
        command = psutil.Process(parent).cmdline()[:3]
    except psutil.Error:
        return
    if not LAUNCHERS & {Path(word).name for word in command}:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def check_processes(accelerator: Any) -> None:
    """UserError where several processes were started that do not know of each other: each would do all of the work. From here on
    the process ends with its launcher.
    """
    follow_launcher()
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

    Before processes know of each other the first of each machine speaks; then the first to come, whichever it is. One that alone
    has met an error says it when the first would have spoken.
    """
    text, rank = message(error), os.environ.get("RANK", "0")
    if _is_first_to_say(text):
        who = "" if rank == "0" else f" (process {rank})"
        print(f"{prefix}{who}: {text}", file=sys.stderr, flush=True)


def _is_first_to_say(text: str) -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # a launcher ends all processes as soon as one has ended: this one, ahead of the first, would silence it
            time.sleep(FIRST_SPEAKS)
        return True
    try:
        store = distributed.distributed_c10d._get_default_store()
        return store.add(f"said/{hashlib.sha256(text.encode(errors='replace')).hexdigest()}", 1) == 1
    except (RuntimeError, AttributeError):  # whoever kept it has ended: better twice than never
        return True


def on_main(accelerator: Any, act: Callable[[], Any]) -> None:
    """act() on the main process alone, while the others wait. An error that a user can mend ends all of them: it is raised on
    the main process, and the others leave with status 2 without a word.
    """
    error = None
    if accelerator.is_main_process:
        try:
            act()
        except USER_ERRORS as raised:
            error = raised
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        (failed,) = broadcast_object_list([error is not None])
        if failed and error is None:
            end_processes()
            raise SystemExit(2)
    if error is not None:
        raise error


def fail(error: BaseException, prefix: str = "error") -> NoReturn:
    """Say it and leave with exit status 2."""
    say(error, prefix)
    end_processes()
    raise SystemExit(2)


@contextmanager
def user_errors(prefix: str = "error") -> Iterator[None]:
    """Around the whole of a command: what a user can mend is printed as a message and ends it with status 2; anything else is our
    defect and keeps its traceback.
    """
    try:
        yield
    except USER_ERRORS as error:
        fail(error, prefix)
