"""Read the pickles of CIFAR's Python version without executing anything.

Pickle is a language for a stack machine that may import and call any function. This reader knows only the instructions
that make up dicts, lists, tuples, strings, integers and NumPy arrays of uint8, as Python 2 and 3 write them with
protocols 2 to 4, and refuses everything else. It takes at most a few times the memory of the content.
Sources: the docstrings of CPython's `pickletools`; `ndarray.__reduce__` and `__setstate__` of NumPy.
"""

import enum
import io
from typing import Any

import numpy as np

from cifar_flax.errors import UserError

_MOST_STEPS = 500_000  # CIFAR-100 takes 250,000; bounds the memory of lists, which an instruction of one byte makes


class _Name(enum.Enum):
    """A function or class that a pickle may name, none of which is imported or called, or an object to be set up."""

    ARRAY, RECONSTRUCT, DTYPE, ENCODE, NEW_ARRAY, UINT8 = range(6)


_NAMES = {
    ("numpy", "ndarray"): _Name.ARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
    ("numpy.core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("_codecs", "encode"): _Name.ENCODE,  # Python 3 writes bytes as text with protocol 2
}
# Instruction -> size in bytes of the number after it: an integer, a length, an index of the memo, or without meaning.
_SIZES = {b"K": 1, b"M": 2, b"J": 4, b"U": 1, b"T": 4, b"C": 1, b"B": 4, b"\x8c": 1, b"X": 4}
_SIZES |= {b"q": 1, b"r": 4, b"h": 1, b"j": 4, b"\x80": 1, b"\x95": 8}
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}


def loads(content: bytes) -> Any:
    """Return what `pickle.loads(content, encoding="bytes")` would return. Raise `UserError` if it is refused."""
    try:
        return _run(io.BytesIO(content), len(content))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError("an instruction lacks its operands") from error


def _run(stream: io.BytesIO, size: int) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks below the marks
    memo: dict[int, Any] = {}
    encoded = 0  # bytes: a file may encode one text repeatedly
    for _ in range(_MOST_STEPS):
        code = _take(stream, 1)
        number = int.from_bytes(_take(stream, _SIZES.get(code, 0)), "little", signed=code == b"J")
        if code in b"JKM":
            stack.append(number)
        elif code in b"BCTU":
            stack.append(_take(stream, number))
        elif code in b"X\x8c":
            stack.append(_take(stream, number).decode("utf-8", "surrogatepass"))
        elif code in b"qr\x94":
            memo[len(memo) if code == b"\x94" else number] = stack[-1]
        elif code in b"hj":
            stack.append(memo[number])
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in b"]}":
            stack.append([] if code == b"]" else {})
        elif code in b"\x85\x86\x87":
            items = [stack.pop() for _ in range(code[0] - 0x84)]
            stack.append(tuple(items[::-1]))
        elif code == b"(":
            below.append(stack)
            stack = []
        elif code in b"teu":
            items, stack = stack, below.pop()
            stack.append(tuple(items)) if code == b"t" else _extend(stack[-1], items)
        elif code in b"as":
            items = [stack.pop()] if code == b"a" else [stack.pop(-2), stack.pop()]
            _extend(stack[-1], items)
        elif code == b"c":
            stack.append(_named(*(stream.readline(100).decode().rstrip("\n") for _ in range(2))))
        elif code == b"\x93":
            stack.append(_named(stack.pop(-2), stack.pop()))
        elif code in b"Rb":
            stack.append(_called(stack.pop(-2), stack.pop()))
            encoded += len(stack[-1]) if isinstance(stack[-1], bytes) else 0
            if encoded > size:
                raise UserError("its strings exceed its size")
        elif code == b".":
            return stack.pop()
        elif code not in b"\x80\x95":  # the version and the length of a frame mean nothing here
            raise UserError(f"the instruction {code!r} is not allowed")
    raise UserError("it has too many instructions")


def _take(stream: io.BytesIO, length: int) -> bytes:
    if len(content := stream.read(length)) < length:
        raise UserError("its end is missing")
    return content


def _named(module: Any, name: Any) -> _Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError
    if (module, name) not in _NAMES:
        raise UserError(f"{f'{module}.{name}'!r:.60} is not allowed")
    return _NAMES[module, name]


def _called(target: Any, arguments: Any) -> Any:
    """Return the result of a call, or of setting the state of `target`."""
    match target, arguments:
        case _Name.RECONSTRUCT, (_Name.ARRAY, _, _):
            return _Name.NEW_ARRAY
        case _Name.NEW_ARRAY, (_, (int(rows), int(columns)), _Name.UINT8, bool(transposed), bytes(content)):
            values = np.frombuffer(content, np.uint8)
            return values.reshape(columns, rows).T if transposed else values.reshape(rows, columns)
        case _Name.DTYPE, (bytes() | str() as kind, _, _) if kind in (b"u1", "u1"):
            return _Name.UINT8
        case _Name.UINT8, _:  # the state is a byte order, which has no meaning for bytes
            return target
        case _Name.ENCODE, (str(text), str(encoding)) if encoding == "latin1":
            return text.encode("latin1")
    raise UserError("only calls that make arrays of uint8 are allowed")


def _extend(target: Any, items: list[Any]) -> None:
    """Append `items` to a list, or insert them, keys and values in turn, into a dict."""
    if isinstance(target, list):
        target.extend(items)
    # The hash of a deeply nested tuple would overflow the C stack, so keys must be strings.
    elif isinstance(target, dict) and all(isinstance(key, bytes | str) for key in items[::2]):
        target.update(zip(items[::2], items[1::2], strict=True))
    else:
        raise TypeError
