"""Read the pickles of CIFAR's Python version without executing anything.

Pickle is a language for a stack machine that may import and call any function. This reader knows only the instructions
that make up dicts, lists, tuples, strings, integers and NumPy arrays of uint8, as Python 2 and 3 write them with
protocols 2 to 4; it refuses everything else. It needs memory in proportion to the content alone.
Sources: the docstrings of CPython's `pickletools`; `ndarray.__reduce__` and `__setstate__` of NumPy.
"""

import enum
import struct
from typing import Any

import numpy as np

from cifar_flax.errors import UserError

_MOST_STEPS = 2_000_000  # CIFAR-100's take 250,000; limits the memory of lists, which an instruction of one byte makes


class _Name(enum.Enum):
    """A function or class that a pickle may name. None is imported or called."""

    ARRAY, RECONSTRUCT, DTYPE, ENCODE = range(4)


_NAMES = {
    "numpy ndarray": _Name.ARRAY,
    "numpy dtype": _Name.DTYPE,
    "numpy.core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "_codecs encode": _Name.ENCODE,  # how Python 3 writes bytes with protocol 2
}
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_INTEGERS = {b"J": "<i", b"K": "<B", b"M": "<H"}
_BYTES = {b"U": 1, b"T": 4, b"C": 1, b"B": 4}  # -> bytes of the length; U and T: strings of Python 2
_TEXTS = {b"X": 4, b"\x8c": 1}
_PUTS, _GETS = {b"q": 1, b"r": 4}, {b"h": 1, b"j": 4}  # -> bytes of the index in the memo
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}


def loads(content: bytes) -> Any:
    """Return what `pickle.loads(content, encoding="bytes")` would return. Raise `UserError` if it is refused."""
    try:
        return _Reader(content).run()
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise UserError("an instruction lacks its operands") from error


class _Reader:
    """The stack machine."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0
        self.left = 2 * len(content)  # bytes still to be made of strings, of which a file may use one repeatedly
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MOST_STEPS):
            if (code := self.take(1)) == b".":
                (result,) = self.stack
                return result
            self.step(code)
        raise UserError("it has too many instructions")

    def take(self, length: int) -> bytes:
        start, self.place = self.place, self.place + length
        if self.place > len(self.content):
            raise UserError("its end is missing")
        return self.content[start : self.place]

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def line(self) -> str:
        end = self.content.index(b"\n", self.place, self.place + 100)
        return self.take(end + 1 - self.place)[:-1].decode("ascii")

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def count(self, length: int) -> None:
        self.left -= length
        if self.left < 0:
            raise UserError("its arrays exceed its size")

    def step(self, code: bytes) -> None:
        """Execute one instruction."""
        stack = self.stack
        if code in _INTEGERS:
            stack += struct.unpack(_INTEGERS[code], self.take(struct.calcsize(_INTEGERS[code])))
        elif code in _BYTES:
            stack.append(self.take(self.number(_BYTES[code])))
        elif code in _TEXTS:
            stack.append(self.take(self.number(_TEXTS[code])).decode("utf-8", "surrogatepass"))
        elif code in _PUTS:
            self.memo[self.number(_PUTS[code])] = stack[-1]
        elif code in _GETS:
            stack.append(self.memo[self.number(_GETS[code])])
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[code])]
            stack.append(tuple(items[::-1]))
        else:
            self.rare_step(code)

    def rare_step(self, code: bytes) -> None:
        match code:
            case b"\x80":  # the version of the protocol
                self.take(1)
            case b"\x95":  # the length of a frame
                self.take(8)
            case b"\x94":
                self.memo[len(self.memo)] = self.stack[-1]
            case b"(":
                self.below.append(self.stack)
                self.stack = []
            case b")":
                self.stack.append(())
            case b"]":
                self.stack.append([])
            case b"}":
                self.stack.append({})
            case b"t":
                items = self.since_mark()
                self.stack.append(tuple(items))
            case b"a":
                item = self.stack.pop()
                _checked(self.stack[-1], list).append(item)
            case b"e":
                items = self.since_mark()
                _checked(self.stack[-1], list).extend(items)
            case b"s":
                value = self.stack.pop()
                self.set_items([self.stack.pop(), value])
            case b"u":
                self.set_items(self.since_mark())
            case b"c":
                self.name(f"{self.line()} {self.line()}")
            case b"\x93":
                name = self.stack.pop()
                self.name(f"{_checked(self.stack.pop(), str)} {_checked(name, str)}")
            case b"R":
                arguments = _checked(self.stack.pop(), tuple)
                self.stack.append(self.call(self.stack.pop(), *arguments))
            case b"b":
                state = _checked(self.stack.pop(), tuple)
                self.build(self.stack[-1], *state)
            case _:
                raise UserError(f"the instruction {code!r} is not allowed")

    def set_items(self, items: list[Any]) -> None:
        # Keys are strings: the hash of a deeply nested tuple would overflow the C stack.
        keys = (_checked(key, bytes | str) for key in items[::2])
        _checked(self.stack[-1], dict).update(zip(keys, items[1::2], strict=True))

    def name(self, name: str) -> None:
        if name not in _NAMES:
            raise UserError(f"{name[:60]!r} is not allowed")
        self.stack.append(_NAMES[name])

    def call(self, function: Any, *arguments: Any) -> Any:
        """Return an empty array, the data type uint8, or encoded bytes, whichever the instruction asks for."""
        match function, *arguments:
            case _Name.RECONSTRUCT, _Name.ARRAY, _, _:
                return np.empty(0, np.uint8)
            case _Name.DTYPE, bytes() | str() as kind, _, _ if kind in (b"u1", "u1"):
                return np.dtype(np.uint8)
            case _Name.ENCODE, str(text), str(encoding) if encoding == "latin1":
                self.count(len(text))
                return text.encode("latin1")
        raise UserError("it holds an array of another type than uint8, or calls a function")

    def build(self, target: Any, *state: Any) -> None:
        """Set the shape and content of an array. The state of uint8 has no meaning: it has no byte order."""
        match target, *state:
            case np.dtype(), *_:
                return
            case np.ndarray(), int(1), (int(rows), int(columns)), np.dtype(), bool(transposed), bytes(content):
                if min(rows, columns) >= 0 and rows * columns == len(content):
                    self.count(len(content))
                    target.resize((rows, columns), refcheck=False)  # in place, as the memo may refer to it
                    order: Any = "F" if transposed else "C"
                    target[:] = np.frombuffer(content, np.uint8).reshape((rows, columns), order=order)
                    return
        raise UserError("it holds an array whose size is not that of its content")


def _checked(value: Any, kind: Any) -> Any:
    """Return `value`; raise `TypeError` if it has another type."""
    if not isinstance(value, kind):
        raise TypeError
    return value
