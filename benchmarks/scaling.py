"""Predict the scaling efficiency on many accelerators, or measure the input pipeline of one of several hosts.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --input configs/default.py

The model: a step performs the operations counted by XLA's cost analysis at a fixed fraction of the chip's peak; then a
ring all-reduce sums the gradients, without overlap. Peaks and link speeds are from data sheets; the constants below
state the assumptions.
"""

import argparse
import functools
import itertools
import math
import statistics
import sys
import time
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from benchmarks.hardware import PEAKS
from benchmarks.programs import DATASET
from cifar_flax import arguments, models
from cifar_flax.data import sources
from cifar_flax.data.batches import empty_batch
from cifar_flax.errors import UserError
from cifar_flax.runtime import allocator
from cifar_flax.training import steps
from cifar_flax.training.setup import setup

CONFIGS = ("default", "airbench94_muon", "airbench96", "resnet18")
DEVICES = (1, 8, 64, 512)
HOSTS = (1, 2, 4)
UTILISATION = 0.4  # assumed fraction of the chip's peak during a step
LATENCY = 5e-6  # assumed seconds for each of the 2 log2(n) stages of an all-reduce
MIN_EFFICIENCY = 0.5  # lowest efficiency at which more devices are considered useful


@dataclass(frozen=True, slots=True)
class Chip:
    name: str
    flops: float  # dense bfloat16 operations per second
    inside: float  # bytes per second that each device sends within its group
    outside: float  # bytes per second that each device sends to other groups
    group: int  # devices per group (node or slice)


CHIPS = (
    # Within a node of eight: NVLink 4, 900 GB/s in both directions together. Between nodes: one 400 Gbit/s adapter per
    # GPU (DGX H100).
    Chip("H100", PEAKS["NVIDIA H100 80GB HBM3"], 450e9, 50e9, 8),
    # Six links per chip with 4,800 Gbit/s in total, both directions together; a single slice.
    Chip("TPU v5p", PEAKS["TPU v5"], 300e9, 300e9, 8960),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one training step of the last phase of a config."""

    batch_size: int  # images per step, over all devices, in the recipe
    side: int  # height and width of the images in pixels
    flops: float  # operations per image
    bytes: int  # bytes of float32 gradients and metrics to all-reduce
    statistics: int  # bytes of two values per channel of all BatchNorm layers
    sums: int  # number of all-reduces, which run one after the other


def cost(name: str) -> Cost:
    """Return the cost of a step with the accelerator kernels; `tests/many_devices.py` checks the byte counts."""
    config = arguments.parse(["--config", f"configs/{name}.py"]).config
    shape = DATASET.image_shape
    task, init = setup(config, DATASET, jax.devices()[:1], platform="cuda")
    state = jax.eval_shape(lambda: init(0, None))
    size = config.train.batch_size
    _, last = steps.phases(task)[-1]
    step = task.layout.parallelize(functools.partial(steps.train_step, last), shared=0)
    flops = step.lower(state, empty_batch(size, shape)).cost_analysis()["flops"]
    network = nnx.eval_shape(lambda: models.build(config.model, shape, 10, platform="cuda", rngs=nnx.Rngs(0)))
    norms = [module for _, module in nnx.iter_modules(network) if isinstance(module, nnx.BatchNorm)]
    return Cost(
        batch_size=size,
        side=last.side or shape[0],
        flops=flops / size,
        bytes=4 * (sum(leaf.size for leaf in jax.tree.leaves(state.params)) + 2),
        statistics=sum(4 * 2 * norm.num_features for norm in norms),
        sums=1 + 2 * len(norms),
    )


def sum_seconds(cost: Cost, chip: Chip, devices: int) -> float:
    """Return the seconds of all all-reduces of a step: a ring inside each group, then a ring over the groups."""
    if devices == 1:
        return 0.0
    inside, groups = min(devices, chip.group), math.ceil(devices / chip.group)
    # BatchNorm all-reduces the statistics of each device in the forward pass, and sums in the backward pass.
    size = cost.bytes + cost.statistics * (devices + 1)
    ring = 2 * (inside - 1) / inside * size / chip.inside
    ring += 2 * (groups - 1) / groups * size / inside / chip.outside
    return ring + cost.sums * 2 * math.log2(devices) * LATENCY


def weak_efficiency(cost: Cost, chip: Chip, devices: int) -> float:
    """Return the weak-scaling efficiency: images/s of `devices` / (`devices` x images/s of one), same batch on each."""
    compute = cost.batch_size * cost.flops / (chip.flops * UTILISATION)
    return compute / (compute + sum_seconds(cost, chip, devices))


def most_devices(cost: Cost, chip: Chip) -> int:
    """Return the largest power of two of devices that divide the recipe's batch with at least `MIN_EFFICIENCY`."""
    compute = cost.batch_size * cost.flops / (chip.flops * UTILISATION)

    def pays(devices: int) -> bool:
        each = compute / devices
        return each / (each + sum_seconds(cost, chip, devices)) >= MIN_EFFICIENCY

    powers = [2**power for power in range(int(math.log2(cost.batch_size)) + 1)]
    return max(itertools.takewhile(pays, powers))


def print_prediction() -> None:
    efficiencies = " | ".join(map(str, DEVICES))
    columns = f"chip | MB summed | image size | GFLOP per image | {efficiencies} | useful devices at this batch size"
    print(f"| config | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in CONFIGS:
        one = cost(name)
        for chip in CHIPS:
            weak = " | ".join(f"{weak_efficiency(one, chip, devices):.0%}" for devices in DEVICES)
            size, most = (one.bytes + one.statistics) / 1e6, most_devices(one, chip)
            print(
                f"| {name} | {chip.name} | {size:.1f} | {one.side}x{one.side} | {one.flops / 1e9:.3f} | {weak} "
                f"| {most} of {one.batch_size} |"
            )


def print_input(path: str, epochs: int) -> None:
    """Measure how fast the first host reads its rows of each batch; other hosts read as many rows in parallel."""
    from cifar_flax.data.streaming import training_batches

    config = arguments.parse(["--config", path]).config
    arrays, size = sources.load(config.data, "train"), config.train.batch_size
    examples = np.arange(len(arrays.labels), dtype=np.int32)
    count = len(examples) // size
    settings = {"batch_size": size, "seed": config.seed, "start": 0, "stop": (epochs + 1) * count}
    pipelines = {hosts: training_batches(arrays, examples, rows=slice(0, size // hosts), **settings) for hosts in HOSTS}
    seconds: dict[int, list[float]] = {hosts: [] for hosts in HOSTS}
    touched: dict[int, int] = {}
    for _ in range(epochs + 1):  # alternately, because the machine's speed varies; the first epoch is a warm-up
        for hosts, batches in pipelines.items():
            start = time.perf_counter()
            for batch in itertools.islice(batches, count):
                touched[hosts] = sum(array.nbytes for array in jax.tree.leaves(batch))
            seconds[hosts].append((time.perf_counter() - start) / count)
    print("| hosts | images per host and step | bytes per host and step | milliseconds per step, median (min to max) |")
    print("|---|---|---|---|")
    for hosts, times in seconds.items():
        low, middle, high = (1e3 * statistic(times[1:]) for statistic in (min, statistics.median, max))
        print(f"| {hosts} | {size // hosts} | {touched[hosts]:,} | {middle:.3f} ({low:.3f} to {high:.3f}) |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", metavar="CONFIG", help="measure the input pipeline of this config instead")
    args = parser.parse_args()
    allocator.keep_freed_memory()
    try:
        if args.input:
            print_input(args.input, epochs=20)
        else:
            print_prediction()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
