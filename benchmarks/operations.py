"""Count the operations that a device executes in an optimized XLA program, and the memory traffic of each."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.hlo import Computation, Instruction, Module, shapes

# Instructions that neither compute nor move anything.
_FREE = {
    "after-all", "bitcast", "constant", "domain", "get-tuple-element", "opt-barrier", "parameter", "partition-id",
    "replica-id", "tuple",
}  # fmt: skip
_COLLECTIVES = ("all-", "reduce-scatter", "collective-")
_SLICES = {"dynamic-slice", "gather", "slice", "slice-start"}  # read only as much of their first operand as they return
_RESHAPES = {"bitcast", "reshape"}


@dataclass(frozen=True, slots=True)
class Operation:
    """An instruction that the device executes, with its costs per execution."""

    instruction: Instruction
    times: float  # executions of it in one execution of the program
    source: str  # line that it was traced from, such as "models/layers.py:40 conv2d"
    bytes: int  # read from and written to main memory
    estimate: float | None  # what the compiler estimates: TPU: cycles; GPU: microseconds
    flops: int  # of cuDNN's convolutions, for which there is no estimate; otherwise 0
    is_kernel: bool  # computes something else than a scalar

    @property
    def is_asynchronous(self) -> bool:
        """Return whether it only starts a transfer, which other operations may hide."""
        return self.instruction.opcode.endswith("-start")


def operations(module: Module, unknown: int = 1) -> list[Operation]:
    """Return what one execution of the program executes, loops with their number of iterations.

    `unknown` is assumed of the outer loops whose number the program does not state, such as an argument.
    """
    return list(_operations(module, module.entry, 1.0, unknown))


def _operations(module: Module, computation: Computation, times: float, unknown: int = 1) -> Iterator[Operation]:
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode == "while":
            body = module.computations[instruction.called("body") or ""]
            yield from _operations(module, body, times * _iterations(module, instruction, unknown))
        elif opcode in ("call", "async-start"):
            name = instruction.called("to_apply") or instruction.called("calls") or ""
            yield from _operations(module, module.computations[name], times)
        elif opcode == "conditional":
            # One of the branches runs; assume the one that does most.
            listed = re.search(r"(?:branch_computations=\{|true_computation=)([^}]*)", instruction.attributes)
            names = [name for name in re.findall(r"%([\w.-]+)", listed[1] if listed else "")]
            branches = [list(_operations(module, module.computations[name], times)) for name in names]
            yield from max(branches, key=lambda found: sum(one.bytes * one.times for one in found), default=[])
        elif opcode in _FREE or opcode.endswith(("-done", "-update")) or instruction.target == "AllocateBuffer":
            continue
        else:
            yield _operation(module, computation, instruction, times)


def _iterations(module: Module, loop: Instruction, unknown: int) -> int:
    """Return the number of iterations: what XLA states, or the limit of the loop's condition, or else `unknown`."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations.get(loop.called("condition") or "", {})
    limits = [int(one.line.split("constant(")[1].split(")")[0]) for one in condition.values() if _is_count(one)]
    return max(limits, default=unknown)


def _is_count(instruction: Instruction) -> bool:
    return instruction.opcode == "constant" and re.search(r"constant\(\d+\)", instruction.line) is not None


def _operation(module: Module, computation: Computation, instruction: Instruction, times: float) -> Operation:
    frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
    if not frame and (callee := module.computations.get(instruction.called("calls") or "")):
        frames = (re.search(r"stack_frame_id=(\d+)", one.attributes) for one in reversed(callee.values()))
        frame = next(filter(None, frames), None)
    estimate = re.search(r'"(?:estimated_cycles|exec_time_us)":"?([\d.]+(?:e[+-]?\d+)?)', instruction.attributes)
    result, opcode = shapes(instruction.shape), instruction.opcode
    scalar = opcode not in ("fusion", "custom-call") and all(math.prod(shape.dims) <= 1 for shape in result)
    moves = opcode.startswith(("copy", "slice-start", *_COLLECTIVES))
    return Operation(
        instruction=instruction,
        times=times,
        source=module.sources.get(int(frame[1]), "") if frame else "",
        bytes=_read(module, computation, instruction) + _written(module, computation, instruction),
        estimate=float(estimate[1]) if estimate else None,
        flops=_cudnn_flops(computation, instruction),
        is_kernel=not moves and not scalar,
    )


def _cudnn_flops(computation: Computation, instruction: Instruction) -> int:
    """Return the floating-point operations of a convolution of cuDNN, including those with padding."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    if not instruction.target.startswith("__cudnn$conv") or labels is None:
        return 0
    first, second = (shapes(computation[name].shape)[0].dims for name in instruction.operands[:2])
    result = shapes(instruction.shape)[0].dims
    if instruction.target.endswith("BackwardFilter"):
        output, kernel = second, result
    else:
        output, kernel = first if instruction.target.endswith("BackwardInput") else result, second
    return 2 * math.prod(output) * math.prod(kernel) // kernel[labels[1].index("o")]


def _read(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Return the bytes that `instruction` reads from main memory; of an operand that it slices, only the slices."""
    called = module.computations.get(instruction.called("calls") or "", {})
    inside = [one for one in called.values() if one.opcode == "parameter"]
    parameters = {one.line.split("parameter(")[1].split(")")[0]: one for one in inside}
    total = 0
    for index, name in enumerate(instruction.operands):
        if name not in computation:
            continue
        arrays = [shape for shape in shapes(computation[name].shape) if shape.in_main_memory]
        whole = sum(shape.bytes for shape in arrays)
        if instruction.opcode in _SLICES and index == 0:
            whole = min(whole, _slice_bytes(instruction))
        elif instruction.opcode == "dynamic-update-slice" and index == 0:
            whole = 0
        elif parameter := parameters.get(str(index)):
            sliced = _sliced(called, parameter.name)
            whole = whole if sliced is None else min(whole, sliced)
        total += whole
    return total


def _slice_bytes(instruction: Instruction) -> int:
    """Return the size of the slice that `instruction` returns; `slice-start` returns its operands before it."""
    arrays = shapes(instruction.shape)
    return arrays[min(1, len(arrays) - 1)].bytes


def _sliced(computation: Computation, name: str) -> int | None:
    """Return the bytes of the slices that a fusion takes of its parameter, or None if it uses all of it."""
    total = 0
    for user in computation.values():
        if name not in user.operands:
            continue
        if user.opcode in _RESHAPES:
            part = _sliced(computation, user.name)
        elif user.opcode in _SLICES and user.operands[0] == name:
            part = _slice_bytes(user)
        else:  # an update in place reads nothing
            part = 0 if user.opcode == "dynamic-update-slice" and user.operands[0] == name else None
        if part is None:
            return None
        total += part
    return total


def _written(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Return the bytes that `instruction` writes to main memory; of an update in place, only the update."""
    arrays = shapes(instruction.shape)
    count = len(instruction.operands)
    if instruction.opcode == "copy-start":  # returns the copy, the operand and a flag
        arrays = arrays[:1]
    elif instruction.opcode.endswith("-start") and len(arrays) > count:  # returns the operands before the results
        arrays = arrays[count : 2 * count]
    called = module.computations.get(instruction.called("calls") or "", {})
    inside, roots = computation, [instruction]
    if called:
        root = next(reversed(called.values()))
        inside, roots = called, [called[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for array, root in itertools.zip_longest(arrays, roots):
        size = array.bytes if array is not None and array.in_main_memory else 0
        while root is not None and root.opcode in _RESHAPES and root.operands and root.operands[0] in inside:
            root = inside[root.operands[0]]
        if root is not None and root.opcode == "dynamic-update-slice" and root.operands[1] in inside:
            size = min(size, sum(shape.bytes for shape in shapes(inside[root.operands[1]].shape)))
        total += size
    return total


def nested(module: Module, found: Iterable[Operation]) -> Iterator[tuple[Instruction, Computation, float]]:
    """Yield each instruction of `found` and those inside its fusions, with its computation and its executions."""
    owner = {id(one): computation for computation in module.computations.values() for one in computation.values()}

    def inside(instruction: Instruction, times: float) -> Iterator[tuple[Instruction, Computation, float]]:
        yield instruction, owner[id(instruction)], times
        for one in module.computations.get(instruction.called("calls") or "", {}).values():
            yield from inside(one, times)

    for operation in found:
        yield from inside(operation.instruction, operation.times)


def gathered_slices(module: Module, found: Iterable[Operation]) -> int:
    """Return the largest number of slices that one gather collects. A TPU takes them one after the other."""
    largest = 0
    for one, _, _ in nested(module, found):
        if one.opcode == "gather" and (sizes := re.search(r"slice_sizes=\{([\d,]*)\}", one.attributes)):
            slice_size = math.prod(int(size) for size in sizes[1].split(","))
            largest = max(largest, math.prod(shapes(one.shape)[0].dims) // slice_size)
    return largest


def copied_image_bytes(module: Module, found: Iterable[Operation]) -> int:
    """Return the size of the largest uint8 array that the program copies, such as a split of images."""
    copies = [one for one, _, _ in nested(module, found) if one.opcode == "copy"]
    return max((shape.bytes for one in copies for shape in shapes(one.shape) if shape.dtype == "u8"), default=0)


def is_convolution(instruction: Instruction) -> bool:
    """Return whether this is a convolution: cuDNN's, or XLA's with spatial axes (on a TPU also matrix products are)."""
    if instruction.target.startswith("__cudnn$conv"):
        return True
    has_axes = re.search(r"dim_labels=\S*\d", instruction.attributes) is not None
    return instruction.opcode == "convolution" and has_axes and "dot_general" not in instruction.attributes


def convolution_dtypes(module: Module, found: Iterable[Operation]) -> Counter[str]:
    """Return the number of executions of convolutions by their dtypes, such as "bf16 x bf16 -> bf16"."""
    counts: Counter[str] = Counter()
    for instruction, computation, times in nested(module, found):
        if is_convolution(instruction):
            inputs = " x ".join(shapes(computation[name].shape)[0].dtype for name in instruction.operands[:2])
            counts[f"{inputs} -> {shapes(instruction.shape)[0].dtype}"] += times
    return counts


def all_reduces(module: Module, found: Iterable[Operation]) -> float:
    """Return the number of executions of all-reduces, which XLA may also put into fusions."""
    return sum(times for one, _, times in nested(module, found) if one.opcode in ("all-reduce", "all-reduce-start"))
