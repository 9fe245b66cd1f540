"""Files and folders that appear whole or not at all, and can be read by everybody whom the umask lets read them.

Each is written under a temporary name beside its place and renamed when it is complete. Libraries that write through private
temporary files (safetensors) leave mode 0600, which shuts others out of a shared folder; here each file gets the mode that any
other new file has there.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError

REMEDIES = {
    "free space there, or name another folder": {errno.ENOSPC, errno.EDQUOT},
    "make it writable, or name another folder": {errno.EACCES, errno.EPERM, errno.EROFS},
}


class WriteError(UserError):
    """A file or folder that could not be written. Nothing of it is left; what stood in its place before still stands."""


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Where to write what shall become the file `path`, whose folder is made; it is there when the block ends.

    WriteError, and nothing changed, where the system or safetensors cannot write.
    """
    path = Path(path)
    partial = path.with_name(f".partial_{secrets.token_hex(4)}_{path.name}")
    try:
        with _parents(path):
            try:
                mode = _new_file_mode(partial)
                yield partial
                partial.chmod(mode)
                os.replace(partial, path)
            finally:
                _remove(partial)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def write_atomically(path: Path, content: bytes) -> None:
    """No reader ever sees half of the file. WriteError where it cannot be written."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """A whole UTF-8 file or none; WriteError says why not."""
    write_atomically(path, text.encode())


def append_line(path: Path, line: str) -> None:
    """One more line of a text file, or, with a WriteError, none of it."""
    before = None
    try:
        with path.open("a") as stream:
            before = stream.tell()
            stream.write(f"{line}\n")
    except OSError as error:
        if before is not None and path.is_file():
            os.truncate(path, before)
        raise cannot_write(path, error) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill with what shall become the folder `path`, on disk and in its place when the block ends.

    A folder that stands there is replaced. WriteError, and nothing changed, where the system or safetensors cannot write.
    The temporary names are the same each time: only one process at a time may make the folder.
    """
    path = Path(path)
    partial, replaced = _partial(path), _replaced(path)
    try:
        with _parents(path):
            try:
                _remove(partial)
                partial.mkdir()
                yield partial
                mode = partial.stat().st_mode & 0o666
                for file in (f for f in partial.rglob("*") if f.is_file()):
                    file.chmod(mode)
                    _fsync(file)
                if path.is_dir():
                    _remove(replaced)
                    os.replace(path, replaced)
                os.replace(partial, path)
                _fsync(path.parent)
            finally:
                recover(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def recover(path: Path) -> None:
    """Undo what was done of new_folder(path) when it was stopped; nothing where it came to its end."""
    _remove(_partial(path))
    if _replaced(path).is_dir() and not path.exists():  # stopped between the two renames
        os.replace(_replaced(path), path)
    _remove(_replaced(path))


def unfinished(folder: Path) -> set[Path]:
    """The paths in `folder` that `recover` has something to do for."""
    left = (f.name.partition("_") for f in folder.glob(".*_*") if f.is_dir())
    return {folder / name for kind, _, name in left if kind in (".partial", ".replaced")}


def cannot_write(path: Path, error: OSError | SafetensorError) -> WriteError:
    """One sentence: what could not be written, the system's reason and what helps against it."""
    found = re.search(r"I/O error: (.*) \(os error (\d+)\)", str(error))  # as safetensors says it
    number = int(found[2]) if found else getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error)
    remedy = next((f"; {text}" for text, numbers in REMEDIES.items() if number in numbers), "")
    return WriteError(f"cannot write {str(path)!r}: {reason}{remedy}")


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """The folders above `path`, made where they are missing; those are gone again if `path` has not come to be."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in [] if os.path.lexists(path) else made:
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()


def _partial(path: Path) -> Path:
    return path.with_name(f".partial_{path.name}")


def _replaced(path: Path) -> Path:
    return path.with_name(f".replaced_{path.name}")


def _new_file_mode(path: Path) -> int:
    """The permissions that a new file gets in this folder, by the umask or the folder's default list; makes an empty one."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o666
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """What is there, if anything; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
