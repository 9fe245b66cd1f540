"""What every command that may run in several processes checks about how it was started."""

from __future__ import annotations

import os
from typing import Any


def check_processes(accelerator: Any) -> None:
    """ValueError where several processes were started that do not know of each other: each would do all of the work."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate takes each for the only one; on a CPU set ACCELERATE_USE_CPU=true "
            "(or launch with configs/accelerate/cpu_2.yaml)"
        )
