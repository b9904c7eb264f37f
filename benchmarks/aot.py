"""Compile the programs of configs for TPUs and GPUs that this machine does not have, and show what they do there.

    python -m benchmarks.aot --target h100:1 v5e:1x1 --config configs/airbench94_wide.py

Nothing runs. The compilers are the real ones; times are their estimates or lower bounds. `benchmarks/README.md`
describes the columns.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import hlo, operations, topologies
from benchmarks.topologies import Chip, Target
from cifar_flax.errors import UserError, one_line

if TYPE_CHECKING:
    from benchmarks.programs import Program

CONFIGS = ("default", "notebook", "airbench94_wide", "airbench94_muon", "airbench96", "resnet18")
RESULTS = Path(__file__).parent / "results"
LARGEST = 10  # source lines that are listed, if they take at least 1 % of the time
# XLA's estimates for a GPU are in its program only with this option.
GPU_OPTIONS = {"xla_gpu_collect_cost_model_stats": True}
HEADER = (
    "config", "program", "compile s", "GFLOP", "matrix units, ms", "memory, MB", "memory, ms", "estimate, ms",
    "temporary, MiB", "kernels", "copies", "all-reduces", "convolutions",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A compiled program. Counts are per device, and per training step or evaluation batch."""

    config: str
    program: str  # such as train, frozen, eval or final, see `programs.Program`
    compile_seconds: float
    gflop: float  # of convolutions and matrix products
    hbm_bytes: int
    estimate_ms: float | None  # None: the clock of the chip is not known
    temp_bytes: int  # for intermediate results
    donated_bytes: int  # arguments whose memory the results reuse
    kernels: int  # TPU: fusions and other operations on arrays
    copies: int
    copied_image_bytes: int  # of the largest copy of a uint8 array
    gathered_slices: int  # of the gather that collects the most
    convolutions: int
    all_reduces: int
    dtypes: dict[str, int]  # convolutions by dtypes, such as "bf16 x bf16 -> bf16"
    element_types: list[str]  # of all arrays in the program
    jax: str


@dataclass(frozen=True, slots=True)
class Line:
    """The operations that were traced from one line of the source."""

    source: str
    operations: float
    milliseconds: float
    bytes: float


def milliseconds(operation: operations.Operation, target: Target) -> float:
    """Return the compiler's estimate for one execution, or else the larger bound of arithmetic and memory traffic."""
    chip = target.chip
    if operation.is_asynchronous:
        return 0.0
    if operation.estimate is not None and not target.is_tpu:
        return operation.estimate / 1e3
    if operation.estimate is not None and chip.clock is not None:
        return operation.estimate / chip.clock * 1e3
    # On an H100, products of float32 numbers, rounded to TF32, take twice as long as those of bfloat16.
    peak = chip.flops / (2 if "f32[" in operation.instruction.shape else 1)
    return 1e3 * max(operation.flops / peak, operation.bytes / chip.bandwidth)


def row(config: str, program: "Program", target: Target) -> tuple[Row, list[Line]]:
    """Return the figures of `program`, and the lines of the source whose operations take longest."""
    import jax

    text, memory = program.compiled.as_text(), program.compiled.memory_analysis()
    module = hlo.parse(text)
    found, steps = operations.operations(module, program.steps), program.steps
    dtypes = operations.convolution_dtypes(module, found)
    lines: dict[str, Counter[str]] = {}
    for one in found:
        line = lines.setdefault(one.source or f"({one.instruction.opcode})", Counter())
        line.update(count=one.times, time=milliseconds(one, target) * one.times, bytes=one.bytes * one.times)
    whole = sum(line["time"] for line in lines.values())
    ranked = sorted(lines.items(), key=lambda item: -item[1]["time"])[:LARGEST]
    ranked = [(source, line) for source, line in ranked if line["time"] > 0.01 * whole]
    estimated = target.chip.clock is not None or not target.is_tpu

    def count(selected: Iterable[operations.Operation]) -> int:
        return round(sum(one.times for one in selected) / steps)

    return Row(
        config=config,
        program=program.name,
        compile_seconds=round(program.seconds, 1),
        gflop=round(program.flops / 1e9, 2),
        hbm_bytes=round(sum(one.bytes * one.times for one in found) / steps),
        estimate_ms=round(whole / steps, 3) if estimated else None,
        temp_bytes=memory.temp_size_in_bytes,
        donated_bytes=memory.alias_size_in_bytes,
        kernels=count(one for one in found if one.is_kernel),
        copies=count(one for one in found if one.instruction.opcode == "copy"),
        copied_image_bytes=operations.copied_image_bytes(module, found),
        gathered_slices=operations.gathered_slices(module, found),
        convolutions=round(sum(dtypes.values()) / steps),
        all_reduces=round(operations.all_reduces(module, found) / steps),
        dtypes={name: round(times / steps) for name, times in sorted(dtypes.items())},
        element_types=sorted(hlo.element_types(text)),
        jax=jax.__version__,
    ), [Line(source, *(line[key] / steps for key in ("count", "time", "bytes"))) for source, line in ranked]


def milliseconds_at_bounds(gflop: float, hbm_bytes: float, chip: Chip) -> tuple[float, float]:
    """Return the times of the matrix units at the bfloat16 peak, and of the memory at its bandwidth."""
    return gflop * 1e12 / chip.flops, hbm_bytes * 1e3 / chip.bandwidth


def cells(row: Row, chip: Chip) -> tuple[str, ...]:
    arithmetic, memory = milliseconds_at_bounds(row.gflop, row.hbm_bytes, chip)
    kinds = {name.split(" ")[0] for name in row.dtypes}
    return (
        row.config,
        row.program,
        f"{row.compile_seconds:.0f}",
        f"{row.gflop:,.1f}",
        f"{arithmetic:.2f}",
        f"{row.hbm_bytes / 1e6:,.0f}",
        f"{memory:.2f}",
        "unknown" if row.estimate_ms is None else f"{row.estimate_ms:.2f}",
        f"{row.temp_bytes / 2**20:,.0f}",
        str(row.kernels),
        str(row.copies),
        str(row.all_reduces),
        f"{row.convolutions} ({', '.join(sorted(kinds))})",
    )


def print_row(values: Sequence[str]) -> None:
    print(f"| {' | '.join(values)} |", flush=True)


def print_largest(rows: dict[str, list[Line]]) -> None:
    for name, lines in rows.items():
        print(f"\n{name}, largest operations by source line:\n")
        print_row(("source", "operations", "ms", "memory, MB"))
        print_row(["---"] * 4)
        for line in lines:
            numbers = f"{line.operations:.1f}", f"{line.milliseconds:.3f}", f"{line.bytes / 1e6:,.0f}"
            print_row((line.source, *numbers))


def save(path: Path, row: Row) -> None:
    """Write `row` to the list in `path`, in the place of the row of the same program."""
    rows = json.loads(path.read_text()) if path.exists() else []
    places = {(old["config"], old["program"]): place for place, old in enumerate(rows)}
    place = places.get((row.config, row.program), len(rows))
    rows[place : place + 1] = [asdict(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def compile_all(target: Target, paths: Sequence[str], output: Path) -> bool:
    """Compile for `target`, print the tables and write the JSON; return whether everything compiled."""
    from cifar_flax import arguments

    devices = target.devices()
    configs = {Path(path).stem: arguments.parse(["--config", path]).config for path in paths}
    largest, failures = {}, []
    print(f"\n{target.name}, compiled, not run:\n")
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    for name, config in configs.items():
        try:
            for found, lines in _rows(name, config, target, devices):
                print_row(cells(found, target.chip))
                save(output / f"aot_{target.name.replace(':', '-')}.json", found)
                largest[f"{target.name} {name} {found.program}"] = lines
        except Exception as error:  # the compilers raise different types
            failures.append(f"{target.name} {name}: {error if isinstance(error, UserError) else one_line(error)}")
    print_largest(largest)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return not failures


def _rows(name: str, config: object, target: Target, devices: Sequence[object]) -> Iterator[tuple[Row, list[Line]]]:
    from benchmarks.programs import programs

    for program in programs(config, devices, {} if target.is_tpu else GPU_OPTIONS):
        yield row(name, program, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", required=True, help=f"any of {', '.join(topologies.TARGETS)}")
    default = [f"configs/{name}.py" for name in CONFIGS]
    parser.add_argument("--config", nargs="+", metavar="FILE", default=default, help=f"default: {', '.join(CONFIGS)}")
    parser.add_argument("--output", metavar="DIR", type=Path, default=RESULTS, help="default: benchmarks/results")
    args = parser.parse_args()
    try:
        targets = [topologies.find(name) for name in args.target]
        for target in targets:
            topologies.require_compiler(target)
        os.environ.update(topologies.ENVIRONMENT)  # before the imports of jax in the functions above
        results = [compile_all(target, args.config, args.output) for target in targets]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
