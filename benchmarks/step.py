"""Measure the time of a training step of a config's last phase and, with `--profile`, of each of its operations.

    python -m benchmarks.step --config configs/default.py --profile

For each operation, the table lists the floating-point operations and bytes of XLA's cost analysis. Their rates are
fractions of the speeds of a matrix product and of a copy in memory, measured in the same process.
"""

import argparse
import functools
import re
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax._src.lib import xla_client
from jaxlib import _hlo

from benchmarks import hlo
from benchmarks.arguments import at_least_one
from benchmarks.hardware import Speed, measure_speed, median_seconds
from cifar_flax import arguments
from cifar_flax.config import Config
from cifar_flax.data import sources
from cifar_flax.data.batches import Indices, gather
from cifar_flax.errors import UserError
from cifar_flax.runtime import allocator, compilation
from cifar_flax.training import steps
from cifar_flax.training.state import TrainState
from cifar_flax.training.trainer import Trainer

TRACES = 9  # profiler traces, each of one step
SECONDS = 5.0  # duration of the timed steps


@dataclass(frozen=True, slots=True)
class Operation:
    """One instruction of the compiled step."""

    name: str
    source: str  # the layer and the JAX operation that it was lowered from
    seconds: float  # per step
    flops: float  # per step
    bytes: float  # size of operands and result; caches may save part of the traffic


class Step:
    """Run the compiled training step of a config on the first batch of its data, without the training loop.

    The step is that of the last phase: `side` is the height and width that it resizes the images to, in pixels.
    """

    def __init__(self, config: Config):
        trainer = Trainer(config)
        index = trainer.examples[: config.train.batch_size]
        arrays = sources.load(config.data, config.data.train_split)  # those of the trainer may be in device memory
        host = gather(arrays.images, arrays.labels, Indices(index, 0 * index, index >= 0))
        self._batch = trainer.layout.shard_batch(host)
        _, task = steps.phases(trainer.task)[-1]
        self.side = task.side or trainer.info.image_shape[0]
        step = functools.partial(steps.train_step, task)
        self.compiled = trainer.layout.compile(step, trainer.initial_state, self._batch, donate=True)
        self._state: TrainState = trainer.initial_state

    def __call__(self) -> Any:
        self._state, values = self.compiled(self._state, self._batch)
        return values


def operations(compiled: jax.stages.Compiled, run: Callable[[], Any], traces: int) -> list[Operation]:
    """Return the instructions of `compiled`, which `run` runs once, slowest first; times are medians of `traces`."""
    (module,) = compiled.runtime_executable().hlo_modules()
    functions = module.to_string().split("\nENTRY ")[0]
    entry = hlo.parse(module.to_string()).entry
    producers: dict[str, list[str]] = {}  # the operands of each instruction, looking through aliases
    aliases: set[str] = set()
    for name, instruction in entry.items():
        known = ((producers[other] if other in aliases else [other]) for other in instruction.operands)
        producers[name] = [producer for group in known for producer in group]
        if instruction.opcode in ("bitcast", "tuple", "get-tuple-element", "opt-barrier"):
            aliases.add(name)
    found = []
    for name, seconds in _operation_seconds(run, traces, producers).items():
        if name in entry and seconds > 0:
            line = entry[name].line
            cost = _cost(functions, line, {operand: entry[operand].shape for operand in entry[name].operands})
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Operation(
                    name=name,
                    source=source[1].removeprefix("jit(train_step)/") if source else "",
                    seconds=seconds,
                    flops=cost.get("flops", 0.0),
                    bytes=cost.get("bytes accessed", 0.0),
                )
            )
    return sorted(found, key=lambda operation: -operation.seconds)


def _operation_seconds(run: Callable[[], Any], traces: int, producers: dict[str, list[str]]) -> dict[str, float]:
    """Return the seconds of each instruction per call of `run`, measured with JAX's profiler."""
    seconds = []
    for _ in range(traces):
        jax.block_until_ready(run())
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(run())
            (path,) = Path(folder).rglob("*.xplane.pb")
            seconds.append(_attribute(jax.profiler.ProfileData.from_file(str(path)), producers))
    return {name: statistics.median(one.get(name, 0.0) for one in seconds) for name in set().union(*seconds)}


def _attribute(trace: jax.profiler.ProfileData, producers: dict[str, list[str]]) -> Counter[str]:
    """Return the seconds of each instruction; while n instructions run concurrently, each is charged 1/n of the time.

    The calls of some matrix products return immediately, while other threads compute the product. The trace has an end
    event for each such call: the event's `_c` equals the call's `_p`. The end event is late if the last of the threads
    runs the instruction that uses the product before it records the event. Therefore, a product also ends when the
    first instruction that uses it starts. `producers` lists the inputs of each instruction.
    """
    calls: list[tuple[float, float, dict[str, Any]]] = []
    ends: dict[int, float] = {}
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    calls.append((event.start_ns, event.start_ns + event.duration_ns, stats))
                elif "_c" in stats:
                    ends[stats["_c"]] = event.start_ns
    used: dict[str, list[float]] = defaultdict(list)  # instruction -> start times of the instructions that use it
    for start, _, stats in calls:
        for producer in producers.get(stats["hlo_op"], ()):
            used[producer].append(start)
    edges: list[tuple[float, int, str]] = []  # (time, +1 at the start or -1 at the end, instruction)
    for start, end, stats in calls:
        name = stats["hlo_op"]
        later = [ends.get(stats.get("_p", 0), end), *(time for time in used[name] if time > start)]
        edges += [(start, 1, name), (max(end, min(later)), -1, name)]
    seconds: Counter[str] = Counter()
    running: Counter[str] = Counter()
    before = 0.0
    for now, change, name in sorted(edges):
        for other, count in running.items():
            seconds[other] += (now - before) * count / running.total() / 1e9
        running[name] += change
        running += Counter()  # remove the instructions that have ended
        before = now
    return seconds


def _cost(functions: str, line: str, operands: dict[str, str]) -> dict[str, float]:
    """Return XLA's cost analysis of a program with only the instruction `line`; `operands` maps names to shapes."""
    parameters = [f"  %{name} = {shape} parameter({i})" for i, (name, shape) in enumerate(operands.items())]
    root = f"  ROOT {line.strip().removeprefix('ROOT ')}"
    program = "\n".join([functions, "ENTRY %main {", *parameters, root, "}"])
    # The module's attributes, such as the entry layout, are those of the whole step.
    program = re.sub(r"^(HloModule \S+?),.*", r"\1", program, count=1)
    module = _hlo.hlo_module_from_text(program)
    return xla_client._xla.hlo_module_cost_analysis(jax.devices()[0].client, module)


def table(found: list[Operation], machine: Speed, step_seconds: float, rows: int) -> str:
    lines = [
        "| operation | source | ms | of the step | GFLOP | of matrix speed | MB | of memory speed |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(name: str, source: str, group: list[Operation]) -> str:
        seconds, flops, moved = (sum(getattr(one, field) for one in group) for field in ("seconds", "flops", "bytes"))
        cells = (
            name,
            source,
            f"{seconds * 1e3:.2f}",
            f"{seconds / step_seconds:.1%}",
            f"{flops / 1e9:.2f}",
            f"{flops / seconds / machine.flops:.0%}",
            f"{moved / 1e6:.1f}",
            f"{moved / seconds / machine.bytes:.0%}",
        )
        return f"| {' | '.join(cells)} |"

    lines += [row(one.name, one.source, [one]) for one in found[:rows]]
    if found[rows:]:
        lines.append(row(f"{len(found) - rows} others", "", found[rows:]))
    lines.append(row("all", "", found))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="--config.FIELD=VALUE overrides a field of it")
    parser.add_argument("--profile", action="store_true", help="print the time of each operation")
    parser.add_argument("--rows", type=at_least_one, default=25, help="operations listed separately (default: 25)")
    args, overrides = parser.parse_known_args()
    allocator.keep_freed_memory()
    compilation.enable_cache()
    try:
        config = arguments.parse(["--config", args.config, *overrides]).config
        step = Step(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    machine = measure_speed()
    seconds = median_seconds(step, SECONDS)
    cost = step.compiled.cost_analysis()
    print(
        f"{jax.devices()[0].device_kind}: matrix product {machine.flops / 1e9:,.0f} GFLOP/s, "
        f"memory {machine.bytes / 1e9:,.1f} GB/s"
    )
    print(
        f"step of {config.train.batch_size} images of {step.side}x{step.side} pixels: {seconds * 1e3:.1f} ms, "
        f"{config.train.batch_size / seconds:,.0f} images/s, {cost['flops'] / 1e9:.1f} GFLOP, "
        f"{cost['bytes accessed'] / 1e6:,.0f} MB"
    )
    if args.profile:
        print(table(operations(step.compiled, step, TRACES), machine, seconds, args.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
