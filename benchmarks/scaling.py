"""Predict the scaling efficiency on many accelerators, and measure the input pipeline of one of several hosts.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --input configs/default.py

The model: a step computes the operations of XLA's cost analysis at a fraction of the chip's peak, then a ring
all-reduce sums the gradients over the links, without overlap. Peaks and links are from data sheets; the constants below
state what is assumed.
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
from cifar_flax import arguments, models
from cifar_flax.data import sources
from cifar_flax.data.batches import empty_batch
from cifar_flax.data.info import DatasetInfo
from cifar_flax.errors import UserError
from cifar_flax.runtime import allocator
from cifar_flax.training import steps
from cifar_flax.training.setup import setup

CONFIGS = ("default", "airbench94", "airbench96", "resnet18")
DEVICES = (1, 8, 64, 512)
HOSTS = (1, 2, 4)
UTILISATION = 0.4  # assumed fraction of the chip's peak during a step
LATENCY = 5e-6  # assumed seconds for each of the 2 log2(n) stages of an all-reduce
MIN_EFFICIENCY = 0.5  # of the largest number of devices that is listed as useful


@dataclass(frozen=True, slots=True)
class Chip:
    name: str
    flops: float  # dense bfloat16, per second
    inside: float  # bytes per second that each device sends within its group
    outside: float  # bytes per second that each device sends to other groups
    group: int  # devices


CHIPS = (
    # NVLink 4, 900 GB/s in both directions together; beyond a node of eight one 400 Gbit/s adapter per GPU (DGX H100)
    Chip("H100", PEAKS["NVIDIA H100 80GB HBM3"], 450e9, 50e9, 8),
    # 4,800 Gbit/s of links per chip, of six, in both directions together; one slice
    Chip("TPU v5p", PEAKS["TPU v5"], 300e9, 300e9, 8960),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one training step of a config."""

    batch_size: int  # of the recipe
    flops: float  # per image
    bytes: int  # of gradients and metrics to all-reduce, float32
    statistics: int  # bytes of BatchNorm's sums, forward and backward
    sums: int  # all-reduces, one after the other


def cost(name: str) -> Cost:
    """Return XLA's operation count for the accelerator version; `tests/many_devices.py` checks the bytes."""
    config = arguments.parse(["--config", f"configs/{name}.py"]).config
    shape, names = (32, 32, 3), tuple("0123456789")
    info = DatasetInfo(
        name="", image_shape=shape, class_names=names, num_examples=50_000, mean=(0.0,) * 3, std=(255.0,) * 3
    )
    task, init = setup(config, info, jax.devices()[:1], platform="cuda")
    state = jax.eval_shape(lambda: init(0, None))
    size = config.train.batch_size
    step = task.layout.parallelize(functools.partial(steps.train_step, task), shared=0)
    flops = step.lower(state, empty_batch(size, shape)).cost_analysis()["flops"]
    network = nnx.eval_shape(lambda: models.build(config.model, shape, 10, platform="cuda", rngs=nnx.Rngs(0)))
    norms = [module for _, module in nnx.iter_modules(network) if isinstance(module, nnx.BatchNorm)]
    return Cost(
        batch_size=size,
        flops=flops / size,
        bytes=4 * (sum(leaf.size for leaf in jax.tree.leaves(state.params)) + 2),
        statistics=2 * sum(4 * 2 * norm.num_features for norm in norms),
        sums=1 + 2 * len(norms),
    )


def sum_seconds(cost: Cost, chip: Chip, devices: int) -> float:
    """Return the seconds of a ring all-reduce inside each group, followed by one over the groups."""
    if devices == 1:
        return 0.0
    inside, groups = min(devices, chip.group), math.ceil(devices / chip.group)
    size = cost.bytes + cost.statistics
    ring = 2 * (inside - 1) / inside * size / chip.inside
    ring += 2 * (groups - 1) / groups * size / inside / chip.outside
    return ring + cost.sums * 2 * math.log2(devices) * LATENCY


def weak_efficiency(cost: Cost, chip: Chip, devices: int) -> float:
    """Return the rate of `devices`, each with a batch of the recipe's size, over `devices` times the rate of one."""
    compute = cost.batch_size * cost.flops / (chip.flops * UTILISATION)
    return compute / (compute + sum_seconds(cost, chip, devices))


def most_devices(cost: Cost, chip: Chip) -> int:
    """Return the largest power of two that splits the recipe's batch with at least `MIN_EFFICIENCY`."""
    compute = cost.batch_size * cost.flops / (chip.flops * UTILISATION)

    def pays(devices: int) -> bool:
        each = compute / devices
        return each / (each + sum_seconds(cost, chip, devices)) >= MIN_EFFICIENCY

    powers = [2**power for power in range(int(math.log2(cost.batch_size)) + 1)]
    return max(itertools.takewhile(pays, powers))


def print_prediction() -> None:
    print("| config | chip | MB summed | GFLOP per image | 1 | 8 | 64 | 512 | the recipe's own batch pays up to |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in CONFIGS:
        of = cost(name)
        for chip in CHIPS:
            weak = " | ".join(f"{weak_efficiency(of, chip, devices):.0%}" for devices in DEVICES)
            size, most = (of.bytes + of.statistics) / 1e6, most_devices(of, chip)
            print(f"| {name} | {chip.name} | {size:.1f} | {of.flops / 1e9:.3f} | {weak} | {most} of {of.batch_size} |")


def print_input(path: str, epochs: int) -> None:
    """Measure the rows of the first host; the other hosts read as many rows at the same time."""
    from cifar_flax.data.streaming import training_batches

    config = arguments.parse(["--config", path]).config
    arrays, size = sources.load(config.data, "train"), config.train.batch_size
    examples = np.arange(len(arrays.labels), dtype=np.int32)
    count = len(examples) // size
    settings = {"batch_size": size, "seed": config.seed, "start": 0, "stop": (epochs + 1) * count}
    shares = {hosts: training_batches(arrays, examples, rows=slice(0, size // hosts), **settings) for hosts in HOSTS}
    seconds: dict[int, list[float]] = {hosts: [] for hosts in HOSTS}
    touched: dict[int, int] = {}
    for _ in range(epochs + 1):  # alternately, as the machine's speed varies; the first epoch is a warm-up
        for hosts, batches in shares.items():
            start = time.perf_counter()
            for batch in itertools.islice(batches, count):
                touched[hosts] = sum(array.nbytes for array in jax.tree.leaves(batch))
            seconds[hosts].append((time.perf_counter() - start) / count)
    print("| hosts | images per host and step | bytes per host and step | milliseconds per step (least to most) |")
    print("|---|---|---|---|")
    for hosts, times in seconds.items():
        low, middle, high = (1e3 * of(times[1:]) for of in (min, statistics.median, max))
        print(f"| {hosts} | {size // hosts} | {touched[hosts]:,} | {middle:.3f} ({low:.3f} to {high:.3f}) |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", metavar="CONFIG", help="measure the input side of this config instead")
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
