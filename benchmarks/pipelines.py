"""Measure the images that each input pipeline delivers to the device per second and per CPU second, without training.

python -m benchmarks.pipelines --config configs/default.py
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.arguments import at_least_one
from cifar_flax import arguments
from cifar_flax.config import Config
from cifar_flax.data import resident, sources
from cifar_flax.data.batches import Batch, to_device
from cifar_flax.data.cache import Arrays
from cifar_flax.errors import UserError
from cifar_flax.runtime import allocator
from cifar_flax.runtime.devices import ParallelConfig, make_layout

Settings = dict[str, int]  # keyword arguments of `streaming.training_batches`


def streamed(arrays: Arrays, examples: np.ndarray, settings: Settings) -> Iterator[Batch]:
    from cifar_flax.data.streaming import training_batches

    return training_batches(arrays, examples, **settings)


def gathered(arrays: Arrays, examples: np.ndarray, settings: Settings) -> Iterator[Batch]:
    """Gather batches on the device as in training, but in a separate program."""
    on_device = resident.put(arrays, make_layout(ParallelConfig()))
    compiled = jax.jit(functools.partial(resident.gather, image_shape=arrays.images.shape[1:]))
    ends = range(settings["start"] + 1, settings["stop"] + 1)
    for positions in resident.training_indices(examples, ends=ends, steps_per_call=1, drop_last=False, **settings):
        yield compiled(on_device.images, on_device.labels, jax.tree.map(lambda rows: rows[0], positions))


PIPELINES = {"streaming": streamed, "resident": gathered}


def measure(pipeline: str, arrays: Arrays, config: Config, epochs: int) -> tuple[float, float]:
    """Return images per second and per second of CPU time (medians over `epochs`), after one warm-up epoch."""
    size = config.train.batch_size
    examples = np.arange(len(arrays.labels), dtype=np.int32)
    steps = len(examples) // size
    settings = {"batch_size": size, "seed": config.seed, "start": 0, "stop": (epochs + 1) * steps}
    batches = to_device(PIPELINES[pipeline](arrays, examples, settings))
    rates, per_core = [], []
    for _ in range(epochs + 1):
        start, cpu = time.perf_counter(), time.process_time()
        last = deque(itertools.islice(batches, steps), maxlen=1)
        jax.block_until_ready(last.pop())
        rates.append(steps * size / (time.perf_counter() - start))
        per_core.append(steps * size / (time.process_time() - cpu))
    return statistics.median(rates[1:]), statistics.median(per_core[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="--config.FIELD=VALUE overrides a field of it")
    parser.add_argument("--epochs", type=at_least_one, default=20, help="timed epochs per pipeline (default: 20)")
    args, overrides = parser.parse_known_args()
    allocator.keep_freed_memory()
    try:
        config = arguments.parse(["--config", args.config, *overrides]).config
        arrays = sources.load(config.data, "train")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("| pipeline | images/s | images per CPU second |")
    print("|---|---|---|")
    for pipeline in PIPELINES:
        rate, per_core = measure(pipeline, arrays, config, args.epochs)
        print(f"| {pipeline} | {rate:,.0f} | {per_core:,.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
