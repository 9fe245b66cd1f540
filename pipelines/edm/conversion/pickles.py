"""Reads pickles as data: no object of theirs is made, nothing of theirs is called.

A pickle is a program for a small stack machine. This is such a machine whose only values are numbers, strings, bytes, tuples,
lists, dicts, sets, and what the caller's own functions make. Where a program asks for a class, it gets its name; where it calls
one, only the names that the caller lists are known (torch_pickles.py). All else is refused with its name and offset.

Why not pickle.Unpickler with stand-ins for the names: it copies every tensor out of the file, allocates its memo by the largest
index that a file names, hashes any tuple as a key (a deep one ends the process), and sets attributes on stand-ins. Here a step is
an opcode or an item that it touches, and they are counted (bounds.py); keys are strings and small integers, so that hashing
neither recurses nor collides; tensors stay views of the file; nothing that a file holds is walked through, printed or compared
as a whole.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import numpy as np

from .bounds import DAMAGE, INTEGER_BYTES, KEY, NAME, Budget, SnapshotError, reason, shown

MARK = object()


class Global(NamedTuple):
    """The name of a class or function; never the thing itself."""

    name: str


class Instance(NamedTuple):
    """A module or another object of the snapshot: the name of its class and its attributes."""

    class_name: str
    state: dict[str, Any]


def read_pickle(
    data: memoryview,
    calls: Mapping[str, Callable[..., Any]],
    names: Container[str] = (),
    persistent: Callable[[Any], Any] | None = None,
    start: int = 0,
    budget: Budget | None = None,
) -> tuple[Any, int]:
    """(the value of the pickle that begins at `start`, where it ends).

    calls: what the names that are called stand for; names: others that may be mentioned; persistent: what a persistent id stands
    for; budget: shared by the pickles of one file. SnapshotError names what is not known, and its offset.
    """
    return _Machine(data, calls, names, persistent, start, budget or Budget()).run()


class _Machine:
    def __init__(
        self,
        data: memoryview,
        calls: Mapping[str, Callable[..., Any]],
        names: Container[str],
        persistent_value: Callable[[Any], Any] | None,
        start: int,
        budget: Budget,
    ) -> None:
        self.data, self.calls, self.names, self.position, self.budget = data, calls, names, start, budget
        self.persistent_value = persistent_value
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        while True:
            at = self.position
            name = OPCODES.get(self.take(1)[0])
            if name is None:
                raise SnapshotError(f"byte {at}: {_opcode_name(self.data[at])} is not something that a snapshot holds")
            if name == "stop":
                return self.pop(), self.position
            try:
                self.budget.spend(1)
                getattr(self, name)(at)
            except SnapshotError as error:
                said = str(error)
                raise SnapshotError(said if said.startswith("byte ") else f"byte {at}: {said}") from None
            except DAMAGE as error:
                raise SnapshotError(f"byte {at}: damaged pickle ({reason(error)})") from error

    # Bytes and the stack -------------------------------------------------------------------------------------------------

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise SnapshotError(f"byte {self.position}: the file ends here, where {count} more bytes should be; it is truncated")
        taken, self.position = self.data[self.position : end], end
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """Up to the next line break, which must be near: only names are written so."""
        length = bytes(self.data[self.position : self.position + 201]).find(b"\n")
        if length < 0:
            raise SnapshotError("a name without an end")
        return bytes(self.take(length + 1)[:-1]).decode("ascii")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise SnapshotError(f"byte {self.position}: damaged pickle (the stack is empty)")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        items = []
        while self.stack[-1] is not MARK:
            items.append(self.stack.pop())
        self.stack.pop()
        return items[::-1]

    # Values --------------------------------------------------------------------------------------------------------------

    def protocol(self, at: int) -> None:
        if (version := self.number("<B")) > 5:
            raise SnapshotError(f"byte {at}: pickle protocol {version} is not known")

    def frame(self, at: int) -> None:
        self.take(8)

    def mark(self, at: int) -> None:
        self.stack.append(MARK)

    def none(self, at: int) -> None:
        self.stack.append(None)

    def true(self, at: int) -> None:
        self.stack.append(True)

    def false(self, at: int) -> None:
        self.stack.append(False)

    def int4(self, at: int) -> None:
        self.stack.append(self.number("<i"))

    def int1(self, at: int) -> None:
        self.stack.append(self.number("<B"))

    def int2(self, at: int) -> None:
        self.stack.append(self.number("<H"))

    def long1(self, at: int) -> None:
        if (size := self.number("<B")) > INTEGER_BYTES:
            raise SnapshotError(f"a whole number of {size} bytes; expected {INTEGER_BYTES} at most")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def float8(self, at: int) -> None:
        self.stack.append(self.number(">d"))

    def text1(self, at: int) -> None:
        self._text("<B")

    def text4(self, at: int) -> None:
        self._text("<I")

    def text8(self, at: int) -> None:
        self._text("<Q")

    def bytes1(self, at: int) -> None:
        self.stack.append(self.take(self.number("<B")))

    def bytes4(self, at: int) -> None:
        self.stack.append(self.take(self.number("<I")))

    def bytes8(self, at: int) -> None:
        self.stack.append(self.take(self.number("<Q")))

    def _text(self, size: str) -> None:
        text = self.take(self.number(size))
        self.budget.read(len(text))
        self.stack.append(str(text, "utf-8"))

    def empty_tuple(self, at: int) -> None:
        self.stack.append(())

    def empty_list(self, at: int) -> None:
        self.stack.append([])

    def empty_dict(self, at: int) -> None:
        self.stack.append({})

    def empty_set(self, at: int) -> None:
        self.stack.append(set())

    def tuple_of_mark(self, at: int) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def tuple1(self, at: int) -> None:
        self._tuple(1)

    def tuple2(self, at: int) -> None:
        self._tuple(2)

    def tuple3(self, at: int) -> None:
        self._tuple(3)

    def _tuple(self, count: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    # Containers: only of their own plain types, so that nothing else can be filled with anything ------------------------------

    def append(self, at: int) -> None:
        item = self.pop()
        self._top(list, at).append(item)

    def appends(self, at: int) -> None:
        items = self.pop_mark()
        self._top(list, at).extend(items)

    def set_item(self, at: int) -> None:
        value, key = self.pop(), _key(self.pop())
        self._top(dict, at)[key] = value

    def set_items(self, at: int) -> None:
        items = self.pop_mark()
        self._top(dict, at).update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def add_items(self, at: int) -> None:
        items = self.pop_mark()
        self._top(set, at).update(map(_key, items))

    def _top(self, kind: type, at: int) -> Any:
        if type(self.stack[-1]) is not kind:
            raise SnapshotError(f"byte {at}: damaged pickle ({type(self.stack[-1]).__name__} where a {kind.__name__} should be)")
        return self.stack[-1]

    # Memo ----------------------------------------------------------------------------------------------------------------

    def memoize(self, at: int) -> None:
        self.memo[len(self.memo)] = self._peek()

    def put1(self, at: int) -> None:
        self.memo[self.number("<B")] = self._peek()

    def put4(self, at: int) -> None:
        self.memo[self.number("<I")] = self._peek()

    def get1(self, at: int) -> None:
        self.stack.append(self.memo[self.number("<B")])

    def get4(self, at: int) -> None:
        self.stack.append(self.memo[self.number("<I")])

    def _peek(self) -> Any:
        if self.stack[-1] is MARK:
            raise SnapshotError(f"byte {self.position}: damaged pickle (a mark is remembered)")
        return self.stack[-1]

    # Names and what is called ---------------------------------------------------------------------------------------------

    def name_by_line(self, at: int) -> None:
        self._global(f"{self.line()}.{self.line()}", at)

    def name_from_stack(self, at: int) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str or len(name) + len(module) > 200:
            raise SnapshotError(f"the name of a class is {shown(module)}, {shown(name)}; expected two short strings")
        self._global(f"{module}.{name}", at)

    def _global(self, name: str, at: int) -> None:
        if name not in self.calls and name not in self.names:
            asked = repr(name) if NAME.fullmatch(name) else shown(name)
            raise SnapshotError(f"byte {at}: the file asks for {asked}, which no snapshot needs; nothing has been executed")
        self.stack.append(Global(name))

    def reduce(self, at: int) -> None:
        arguments, function = self.pop(), self.pop()
        self._call(function, arguments, at)

    def new_object(self, at: int) -> None:
        arguments, cls = self.pop(), self.pop()
        self._call(cls, arguments, at)

    def _call(self, function: Any, arguments: Any, at: int) -> None:
        if type(function) is not Global or function.name not in self.calls or type(arguments) is not tuple:
            called = f"{function.name!r} on {shown(arguments)}" if type(function) is Global else shown(function)
            raise SnapshotError(f"byte {at}: {called} is called, which no snapshot does; nothing has been executed")
        self.stack.append(self.calls[function.name](*arguments))

    def build(self, at: int) -> None:
        """State for the object on top of the stack: a module's attributes. Left alone: a numpy type's byte order, and versions
        of a state dict.
        """
        state, target = self.pop(), self.pop()
        native = isinstance(target, np.dtype) and type(state) is tuple and state[1:2] in (("<",), ("|",))
        versions = type(target) is dict and type(state) is dict and state.keys() == {"_metadata"}
        if type(target) is Instance and type(state) is dict and not target.state:
            self.budget.spend(len(state))
            target.state.update(state)
        elif not native and not versions:
            raise SnapshotError(f"byte {at}: attributes are set on {type(target).__name__}, which no snapshot does")
        self.stack.append(target)

    def persistent(self, at: int) -> None:
        key = self.pop()
        if self.persistent_value is None:
            raise SnapshotError(f"byte {at}: a persistent id where a snapshot has none")
        self.stack.append(self.persistent_value(key))


# The opcodes that pickle's protocols 2 to 5 use for what is known here.
OPCODES = {
    ord(code): name
    for code, name in {
        "\x80": "protocol",
        "\x95": "frame",
        ".": "stop",
        "(": "mark",
        "N": "none",
        "\x88": "true",
        "\x89": "false",
        "J": "int4",
        "K": "int1",
        "M": "int2",
        "\x8a": "long1",
        "G": "float8",
        "\x8c": "text1",
        "X": "text4",
        "\x8d": "text8",
        "C": "bytes1",
        "B": "bytes4",
        "\x8e": "bytes8",
        ")": "empty_tuple",
        "]": "empty_list",
        "}": "empty_dict",
        "\x8f": "empty_set",
        "t": "tuple_of_mark",
        "\x85": "tuple1",
        "\x86": "tuple2",
        "\x87": "tuple3",
        "a": "append",
        "e": "appends",
        "s": "set_item",
        "u": "set_items",
        "\x90": "add_items",
        "\x94": "memoize",
        "q": "put1",
        "r": "put4",
        "h": "get1",
        "j": "get4",
        "c": "name_by_line",
        "\x93": "name_from_stack",
        "R": "reduce",
        "\x81": "new_object",
        "b": "build",
        "Q": "persistent",
    }.items()
}


def _key(value: Any) -> str | int:
    """What may be a dictionary's key or in a set."""
    if type(value) is str or (type(value) is int and -KEY < value < KEY):
        return value
    raise SnapshotError(f"a dictionary or set with the key {shown(value)}; expected strings and small whole numbers")


def _opcode_name(code: int) -> str:
    known = {ord(op.code): op.name for op in pickletools.opcodes}
    return f"pickle opcode {known[code]}" if code in known else f"byte {code:#04x}"
