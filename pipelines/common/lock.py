"""One run at a time in an output_dir, one at a time that makes a cache: two that write to the same files would mix silently.

The lock is the system's (flock), so it ends with the process, however that ends, and a file that is left over locks nobody out.
Its content says who holds it, to whom it may concern.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from io import TextIOWrapper
from pathlib import Path

from pipelines.common.atomic import cannot_write
from pipelines.common.errors import UserError

NAME = ".lock"
GRACE = 1.0  # seconds: another process may just be looking whether the folder is free
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class FolderLock:
    """Held from `acquire` to `release` by one process on any machine that shares the folder. key: what the user calls it."""

    def __init__(self, folder: Path, key: str = "output_dir") -> None:
        self.folder, self.key, self.file = folder, key, folder / NAME
        self.stream: TextIOWrapper | None = None

    def acquire(self) -> None:
        """UserError if another process holds it. On a file system without locks a warning, and no lock."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            patience = time.monotonic() + GRACE
            while True:
                stream = self.file.open("a+")
                while not _lock(stream, fcntl.LOCK_EX):
                    if time.monotonic() > patience:
                        raise in_use(self.key, self.folder, _holder(stream))
                    time.sleep(0.05)
                if self.file.exists() and os.path.samestat(os.fstat(stream.fileno()), self.file.stat()):
                    break
                stream.close()  # who held it removed the file in the meantime: this one is nobody's
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise cannot_write(self.file, error) from error
            print(f"WARNING: {self.file} cannot be locked ({error.strerror}): start no second run there", file=sys.stderr)
            return
        self.stream = stream

    def release(self) -> None:
        """Let others use the folder; a second time nothing happens."""
        if self.stream is not None:
            self.file.unlink(missing_ok=True)
            self.stream.close()
            self.stream = None


def check_unlocked(folder: Path) -> None:
    """UserError if a process holds the lock of the folder. Writes nothing."""
    try:
        with (folder / NAME).open("r") as stream:
            if not _lock(stream, fcntl.LOCK_SH):
                raise in_use("output_dir", folder, _holder(stream))
    except OSError:
        return  # no such file; or no locks, of which acquire warns


def in_use(key: str, folder: Path, holder: str) -> UserError:
    """The error of a folder, named by this key, that another process holds."""
    return UserError(
        f"{key} {str(folder)!r} is in use by another run ({holder}); wait until it has ended, stop it, or name another folder"
    )


def _lock(stream: TextIOWrapper, kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(stream: TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read(200) or "it has just started"
