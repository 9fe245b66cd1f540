"""The folder that a command writes to, tried before minutes of work. Imports nothing heavy."""

from __future__ import annotations

import tempfile
from pathlib import Path


def require_writable(folder: Path) -> None:
    """Make it. OSError, with the option's name, where no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"--output {folder}: cannot write there ({reason}); name a folder you may write to") from error
