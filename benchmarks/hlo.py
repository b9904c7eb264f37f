"""Parse the text of an optimized XLA program.

The text is not an interface of XLA: the parser skips what it does not know. Tested with jax 0.10 to 0.12.
"""

import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import PurePath

_BITS = {"pred": 8, "c64": 64, "c128": 128}  # the names of the other types state their width

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


@dataclass(frozen=True, slots=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    bytes: int  # including the padding to whole tiles
    dims: tuple[int, ...]
    in_main_memory: bool  # False: in a memory on the chip


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    shape: str  # as in the text
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # the rest of the line
    line: str

    def called(self, attribute: str) -> str | None:
        """Return the name of the computation that `attribute`, such as "calls" or "body", refers to."""
        match = re.search(rf"\b{attribute}=%?([\w.-]+)", self.attributes)
        return match[1] if match else None

    @property
    def target(self) -> str:
        """Return the target of a custom call, such as "__cudnn$convForward"."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""


Computation = dict[str, Instruction]  # by name, in the order in which they run


@dataclass(frozen=True, slots=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation
    sources: dict[int, str] = field(repr=False)  # stack frame -> innermost line of the project


def parse(text: str) -> Module:
    """Parse `text`, which is what `Compiled.as_text` returns."""
    computations: dict[str, Computation] = {}
    entry: Computation = {}
    current: Computation | None = None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            current = computations[header[2]] = {}
            entry = current if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            name, shape, opcode, rest = match.groups()
            end = _closing(rest)
            operands = tuple(re.findall(r"%([\w.-]+)", rest[:end]))
            current[name] = Instruction(name, shape, opcode, operands, rest[end:], line)
    return Module(computations, entry, _sources(text))


def _closing(text: str) -> int:
    """Return the position of the parenthesis that closes the one before `text`."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _sources(text: str) -> dict[int, str]:
    """Return the innermost line of the package in each stack frame of the tables at the beginning of `text`."""
    tables: dict[str, dict[int, str]] = {}
    for name, rows in re.findall(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n((?:\d+ .*\n)+)", text, re.M):
        tables[name] = {int(row.split(" ", 1)[0]): row.split(" ", 1)[1] for row in rows.splitlines()}
    if len(tables) < 4:
        return {}

    def fields(table: str, row: int) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", tables[table][row])}

    @functools.cache
    def source(frame: int) -> str:
        row = fields("StackFrames", frame)
        place = fields("FileLocations", row["file_location_id"])
        file = PurePath(tables["FileNames"][place["file_name_id"]].strip('"'))
        function = tables["FunctionNames"][place["function_name_id"]].strip('"')
        parent = row["parent_frame_id"] - 1  # the text counts the parents from 1, with 1 for no parent
        inside = file.parts[::-1].index("cifar_flax") if "cifar_flax" in file.parts else 0
        if inside or parent < 1:
            return f"{'/'.join(file.parts[-inside or -1 :])}:{place['line']} {function}"
        return source(parent)

    return {frame: source(frame) for frame in tables["StackFrames"]}


def shapes(text: str) -> list[Shape]:
    """Return the arrays of a shape such as `(f32[8,3]{1,0:T(8,128)S(1)}, u32[])`."""
    found = []
    for dtype, sizes, order, layout in _SHAPE.findall(text):
        dims = [int(size.removeprefix("<=")) for size in sizes.split(",") if size]
        physical = [dims[int(axis)] for axis in order.split(",") if axis] or dims[::-1]  # fastest axis first
        if tile := re.search(r"T\(([\d,]+)\)", layout):
            for place, size in enumerate(reversed([int(size) for size in tile[1].split(",")])):
                if place < len(physical):
                    physical[place] = math.ceil(physical[place] / size) * size
        width = _BITS.get(dtype) or int((re.findall(r"\d+", dtype) or ["0"])[0])
        space = re.search(r"S\((\d+)\)", layout)
        size = math.ceil(math.prod(physical) * width / 8)
        found.append(Shape(dtype, size, tuple(dims), space is None or space[1] == "0"))
    return found


def element_types(text: str) -> set[str]:
    """Return the dtypes of all arrays in the program `text`, in XLA's names, such as "f32"."""
    return {
        dtype
        for line in text.splitlines()
        if (found := _INSTRUCTION.match(line))
        for dtype in re.findall(r"\b([a-z]\w*)\[", found[2])
    }
