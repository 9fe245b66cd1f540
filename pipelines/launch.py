"""What every command that may run in several processes does first and last."""

from __future__ import annotations

import os
import sys
from typing import Any


def check_processes(accelerator: Any) -> None:
    """ValueError where several processes were started that do not know of each other: each would do all of the work."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
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
