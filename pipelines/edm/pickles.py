"""Reads pickles as data: no object of theirs is made, nothing of theirs is called.

A pickle is a program for a small stack machine. This is such a machine whose only values are numbers, strings, bytes, tuples,
lists, dicts, sets, and what the caller's own functions make. Where a program asks for a class, it gets its name; where it calls
one, only the names that the caller lists are known (torch_pickles.py). All else is refused with its name and offset.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError

MARK = object()
# what reading damaged bytes comes to in Python
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class SnapshotError(UserError):
    """A file that is not what it should be; nothing in it has been executed."""


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
) -> tuple[Any, int]:
    """(the value of the pickle that begins at `start`, where it ends).

    calls: what the names that are called stand for; names: others that may be mentioned; persistent: what a persistent id stands
    for. SnapshotError names what is not known, and its offset.
    """
    return _Machine(data, calls, names, persistent, start).run()


class _Machine:
    def __init__(
        self,
        data: memoryview,
        calls: Mapping[str, Callable[..., Any]],
        names: Container[str],
        persistent_value: Callable[[Any], Any] | None,
        start: int,
    ) -> None:
        self.data, self.calls, self.names, self.position = data, calls, names, start
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
                getattr(self, name)(at)
            except SnapshotError as error:
                said = str(error)
                raise SnapshotError(said if said.startswith("byte ") else f"byte {at}: {said}") from None
            except DAMAGE as error:
                raise SnapshotError(f"byte {at}: damaged pickle ({type(error).__name__}: {error})") from error

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
        end = self.position
        while self.data[end] != 10:
            end += 1
        return bytes(self.take(end + 1 - self.position)[:-1]).decode("ascii")

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
        self.stack.append(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

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
        self.stack.append(str(self.take(self.number(size)), "utf-8"))

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
        value, key = self.pop(), self.pop()
        self._top(dict, at)[key] = value

    def set_items(self, at: int) -> None:
        items = self.pop_mark()
        self._top(dict, at).update(zip(items[::2], items[1::2], strict=True))

    def add_items(self, at: int) -> None:
        items = self.pop_mark()
        self._top(set, at).update(items)

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
        self._global(f"{module}.{name}", at)

    def _global(self, name: str, at: int) -> None:
        if name not in self.calls and name not in self.names:
            raise SnapshotError(f"byte {at}: the file asks for {name!r}, which no snapshot needs; nothing has been executed")
        self.stack.append(Global(name))

    def reduce(self, at: int) -> None:
        arguments, function = self.pop(), self.pop()
        self._call(function, arguments, at)

    def new_object(self, at: int) -> None:
        arguments, cls = self.pop(), self.pop()
        self._call(cls, arguments, at)

    def _call(self, function: Any, arguments: Any, at: int) -> None:
        if not isinstance(function, Global) or function.name not in self.calls or not isinstance(arguments, tuple):
            raise SnapshotError(f"byte {at}: {function!r} is called, which no snapshot does; nothing has been executed")
        self.stack.append(self.calls[function.name](*arguments))

    def build(self, at: int) -> None:
        """State for the object on top of the stack: a module's attributes. Left alone: a numpy type's byte order, and versions
        of a state dict.
        """
        state, target = self.pop(), self.pop()
        native = isinstance(target, np.dtype) and isinstance(state, tuple) and state[1:2] in (("<",), ("|",))
        versions = type(target) is dict and isinstance(state, dict) and set(state) == {"_metadata"}
        if isinstance(target, Instance) and isinstance(state, dict) and not target.state:
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


def _opcode_name(code: int) -> str:
    known = {ord(op.code): op.name for op in pickletools.opcodes}
    return f"pickle opcode {known[code]}" if code in known else f"byte {code:#04x}"
