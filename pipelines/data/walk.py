"""The one walk: the pictures below a folder or in a zip file, in the order in which a person counts.

Names are relative, with "/" between folders. Those that are no UTF-8 are kept as Python keeps them (surrogate escapes), so any
name that a file can have is read; `errors.printable` shows it.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common.errors import UserError, message, printable
from .decode import suffixes

# What operating systems, network disks and notebooks leave in folders, beside names that begin with a dot
TOOLS = {"__MACOSX", "__pycache__", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "$RECYCLE.BIN"}
TOOLS |= {"System Volume Information", "lost+found", "Thumbs.db", "ehthumbs.db", "desktop.ini"}
EXAMPLES, LONGEST_NAME = 3, 100  # names in a message
LARGEST = 2**30  # bytes of a file in a zip, which is read as a whole
NUMBER = re.compile("([0-9]+)")


@dataclass
class Tree:
    """files: all that are not hidden, in order; hidden: files and folders of that kind; again: folders and links met before;
    empty: folders with nothing (but hidden files) in them, which may have been meant as classes.
    """

    files: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def natural(name: str) -> tuple:
    """Sorting by it puts 2.png before 10.png, folder by folder; a.png before a1.png. Equal numbers ("1", "01") by their text."""
    *folders, last = name.split("/")
    stem, dot, suffix = last.rpartition(".")
    parts = [_runs(part) for part in (*folders, stem or last)]
    return [*parts, (suffix if dot and stem else "",)], name


def _runs(text: str) -> tuple:
    """Text and numbers in turn; a number by its length without leading zeros, then its digits, so that it may be any long."""
    runs = NUMBER.split(text)
    return tuple((len(r.lstrip("0")), r.lstrip("0")) if i % 2 else r for i, r in enumerate(runs))


def is_picture(name: str) -> bool:
    """By its name: the endings of image files that are read."""
    return os.path.splitext(name)[1].lower() in suffixes()


def is_hidden(name: str) -> bool:
    """Whether a name, or a folder in it, begins with a dot or is a tool's."""
    return any(part.startswith(".") or part in TOOLS for part in name.split("/"))


def walk(root: str | Path) -> Tree:
    """Everything below a folder. Links are followed, but each folder is read once: first under its own name, so that a link to a
    folder above ends there. OSError for a folder that may not be read.
    """
    tree, seen = Tree(), set[tuple[int, int]]()
    folders, links = [""], list[str]()
    while folders or links:
        if not folders:
            links.sort(key=natural, reverse=True)
            folders.append(links.pop() + "/")
        prefix = folders.pop()
        path = os.path.join(root, prefix)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            tree.again.append(prefix.removesuffix("/"))
            continue
        seen.add((status.st_dev, status.st_ino))
        bare = True
        with os.scandir(path) as entries:
            for entry in entries:
                bare = bare and is_hidden(entry.name)
                name = prefix + entry.name
                if is_hidden(entry.name):
                    tree.hidden.append(name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(name + "/")
                elif entry.is_dir():
                    links.append(name)
                else:
                    tree.files.append(name)
        if bare and prefix:
            tree.empty.append(prefix.removesuffix("/"))
    for names in (tree.files, tree.hidden, tree.again, tree.empty):
        names.sort(key=natural)
    return tree


class Pictures:
    """The pictures of a folder or zip file. names: theirs; others: of files that are none, as their names end.

    option: what the user calls the source. FileNotFoundError where it is not there; UserError where it is something else, is
    damaged, holds no pictures or links to some that are not there. Can be given to other processes.
    """

    def __init__(self, source: str, option: str) -> None:
        self.source, self.option = source, option
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        self._members_of: dict[str, str] = {}
        if os.path.isdir(source):
            self.zipped, tree = False, walk(source)
        elif source.lower().endswith(".zip") and os.path.isfile(source):
            self.zipped, tree = True, self._members()
        elif os.path.lexists(source):
            raise UserError(f"{option}: {source!r} is neither a folder nor a .zip file")
        else:
            raise FileNotFoundError(f"{option}: no such folder or .zip {source!r}")
        self.hidden, self.again, self.empty = tree.hidden, tree.again, tree.empty
        self.names = [n for n in tree.files if is_picture(n)]
        self.others = [n for n in tree.files if not is_picture(n)]
        if not self.zipped:
            self._check_files()
        if not self.names:
            raise UserError(f"{option}: no pictures in {source!r}; {self.left_out() or 'it is empty'}")

    def file(self, name: str) -> Path | bytes:
        """What decode takes: the path of a picture (or other file), or its content from the zip file."""
        return self.read(name) if self.zipped else Path(self.source, name)

    def read(self, name: str) -> bytes:
        """The content of one of its files."""
        if not self.zipped:
            return Path(self.source, name).read_bytes()
        try:
            archive, member = self._archive(), self._members_of.get(name, name)
            if archive.getinfo(member).file_size > LARGEST:
                raise UserError(f"{self.option}: {name!r} of {self.source} has more than {LARGEST / 2**30:.0f} GiB; take it out")
            return archive.read(member)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.option}: {name!r} of {self.source} cannot be read: {message(error)}; mend it") from error

    @property
    def top(self) -> str:
        """Of a zip that was made of one folder, its name and "/": classes lie in it, not beside it. "" of others."""
        top = self.names[0].partition("/")[0] + "/"
        return top if self.zipped and all(n.startswith(top) for n in self.names) else ""

    def left_out(self, used: Sequence[str] = ()) -> str:
        """One sentence of what is not read, with examples; "" for nothing. used: others that are read for something else."""
        read = set(used)
        kinds = {
            "of another kind than the pictures that are read here": [n for n in self.others if n not in read],
            "hidden or a tool's": self.hidden,
            "folders met before under another name": self.again,
            "empty folders": self.empty,
        }
        parts = [f"{len(names):,} {kind} ({examples(names)})" for kind, names in kinds.items() if names]
        return f"left out: {'; '.join(parts)}" if parts else ""

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_zip": None}  # workers must not share a file position

    def _archive(self) -> zipfile.ZipFile:
        """Opened once in each process: to read the list of members takes long."""
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = os.getpid(), zipfile.ZipFile(self.source)
        return self._zip[1]

    def _members(self) -> Tree:
        try:
            members = [(_named(m), m.filename) for m in self._archive().infolist() if not _named(m).endswith("/")]
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise UserError(f"{self.option}: {self.source} is not a whole zip file ({message(error)}); copy it again") from error
        names = [name for name, _ in members]
        self._members_of = {name: member for name, member in members if name != member}
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UserError(f"{self.option}: {self.source} holds {len(twice):,} names twice ({examples(twice)}); pack it again")
        names.sort(key=natural)
        return Tree([n for n in names if not is_hidden(n)], [n for n in names if is_hidden(n)])

    def _check_files(self) -> None:
        """Links to nothing are refused: pictures that a user believes to be there. Sockets and the like are no pictures."""
        regular: list[str] = []
        lost: list[str] = []
        for name in self.names:
            try:
                (regular if stat.S_ISREG(os.stat(os.path.join(self.source, name)).st_mode) else self.others).append(name)
            except OSError:
                lost.append(name)
        if lost:
            raise UserError(
                f"{self.option}: {len(lost):,} pictures in {self.source!r} are links to files that are not there "
                f"({examples(lost)}); bring the files or remove the links"
            )
        self.names = regular


def _named(member: zipfile.ZipInfo) -> str:
    """Its name. Some programs of Windows put "\\" between folders, where the format has "/" (APPNOTE 4.4.17.1)."""
    return member.filename.replace("\\", "/") if member.create_system == 0 else member.filename


def refuse_pictures(path: str, option: str, instead: str) -> None:
    """UserError for a folder of pictures where a data set by name is expected: `datasets` would take words like "train" and
    "val" in their names for splits, and leave out the rest. Folders that hold tables or archives are data sets.
    """
    files = walk(path).files if os.path.isdir(path) else []
    if any(map(is_picture, files)) and not any(f.endswith((".parquet", ".arrow", ".tar", ".zip")) for f in files):
        raise UserError(f"{option}: {path!r} is a folder of pictures, no data set; use {instead}")


def examples(names: Iterable[str]) -> str:
    """The first names and three dots, printable on one line, for a message."""
    names = list(names)
    shown = [printable(n, LONGEST_NAME).replace("\n", "\\n") for n in names[:EXAMPLES]]
    return ", ".join(shown) + (", ..." if len(names) > EXAMPLES else "")


def say(*lines: str) -> None:
    """Lines that are not empty, on stderr, which takes every character; of several processes by the first only."""
    if os.environ.get("RANK", "0") == "0":
        for line in filter(None, lines):
            print(printable(line), file=sys.stderr, flush=True)
