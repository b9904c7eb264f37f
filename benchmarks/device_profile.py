"""The time of each operation of a training step on a device, from a trace of JAX's profiler."""

import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from benchmarks import flops
from cifar_flax.config import Config
from cifar_flax.training import steps
from cifar_flax.training.trainer import Trainer

ROWS = 40  # operations in the result


def profile(config: Config, calls: int = 5) -> dict[str, Any]:
    """Return the milliseconds of a training step, and of its slowest operations, from a trace of one call.

    The step is one of the last phase of the run, whose images have `side` pixels in height and width. `step_ms` is the
    median over `calls` calls without the profiler. `busy_ms` is the sum over all operations in the trace, so the device
    idles for the rest of `step_ms` (or runs several operations at a time, if it is larger).
    """
    trainer = Trainer(config)
    first, task = steps.phases(trainer.task)[-1]
    state, train_call = trainer.initial_state, trainer.compile(trainer.initial_state, first)
    call = next(trainer.inputs(config.seed, first))  # always the same one: its duration does not depend on the images
    count, times = call.stop - call.start, []
    for _ in range(1 + calls):  # the first one is a warm-up
        start = time.perf_counter()
        state, _values = jax.block_until_ready(train_call(state, call))
        times.append((time.perf_counter() - start) / count)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(train_call(state, call))
        (path,) = Path(folder).rglob("*.xplane.pb")
        seconds, executed = operations(jax.profiler.ProfileData.from_file(str(path)))
    training = [part for part in flops.parts(config, trainer.info, num_test=0) if part.unit == "steps"][-1]
    (module,) = train_call.program(first).runtime_executable().hlo_modules()
    sources = operation_sources(module.to_string())
    return {
        "side": task.side or trainer.info.image_shape[0],
        "flops_per_step": training.flops // training.number,
        "step_ms": 1e3 * statistics.median(times[1:]),
        "busy_ms": 1e3 * sum(seconds.values()) / count,
        "kernels_per_step": executed / count,
        "operations": [
            {"name": name, "source": sources.get(plain(name), ""), "ms": 1e3 * value / count}
            for name, value in seconds.most_common(ROWS)
        ],
    }


def operations(trace: jax.profiler.ProfileData) -> tuple[Counter[str], int]:
    """Return the seconds of each operation, and the number of executed operations.

    An operation is named after its HLO instruction or, where the trace does not state it, after its kernel. On a
    device, operations are the events of its streams; on a CPU, those that state an HLO instruction. The time of an
    operation inside another one, such as a loop, counts for the inner one only.
    """
    seconds: Counter[str] = Counter()
    count = 0
    planes = list(trace.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and any(plane.lines)]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not re.match(r"Stream|XLA Ops", line.name):
                continue
            events = []
            for event in line.events:
                if name := dict(event.stats).get("hlo_op", event.name if devices else None):
                    events.append((event.start_ns, event.start_ns + event.duration_ns, str(name)))
            seconds.update(own_seconds(events))
            count += len(events)
    return seconds, count


def own_seconds(events: list[tuple[float, float, str]]) -> Counter[str]:
    """Return the seconds of each name in `events`, (start, end, name) in ns, without those of events inside it."""
    seconds: Counter[str] = Counter()
    around: list[tuple[float, str]] = []  # (end, name) of the events that contain the current one
    for start, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while around and around[-1][0] <= start:
            around.pop()
        if around:
            seconds[around[-1][1]] -= (min(end, around[-1][0]) - start) / 1e9
        seconds[name] += (end - start) / 1e9
        around.append((end, name))
    return seconds


def operation_sources(hlo: str) -> dict[str, str]:
    """Return the JAX operation that each HLO instruction in the text `hlo` was lowered from, by its `plain` name."""
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', hlo, re.MULTILINE)
    return {plain(name): re.sub(r"^jit\(\w+\)/(while/body/)?(closed_call/)?", "", source) for name, source in found}


def plain(name: str) -> str:
    """Return the name of an HLO instruction as kernels spell it."""
    return re.sub(r"\W", "_", name)
