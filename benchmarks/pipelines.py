"""Images per second that each input pipeline delivers to the device alone, and per core that it keeps busy.

python -m benchmarks.pipelines --config configs/default.py
"""

import argparse
import statistics
import sys
import time
from collections import deque
from importlib import import_module

import jax
import numpy as np

from cifar_flax import allocator, cli
from cifar_flax.config import Config
from cifar_flax.data import sources
from cifar_flax.data.batches import to_device
from cifar_flax.data.cache import Arrays
from cifar_flax.errors import UserError

PIPELINES = ("streaming", "resident")


def measure(pipeline: str, arrays: Arrays, config: Config, seconds: float) -> tuple[float, float]:
    """Images per second, and per second of processor time, over one epoch after another for that long."""
    size = config.train.batch_size
    examples = np.arange(len(arrays.labels), dtype=np.int32)
    epoch = len(examples) // size
    batches = to_device(
        import_module(f"cifar_flax.data.{pipeline}").training_batches(
            arrays, examples, batch_size=size, seed=config.seed, start=0, stop=100 * epoch
        )
    )

    def run(count: int) -> None:
        last = deque((next(batches) for _ in range(count)), maxlen=1)
        jax.block_until_ready(last.pop())

    run(epoch)
    rates, per_core = [], []
    begin = time.perf_counter()
    while not rates or time.perf_counter() - begin < seconds:
        start, cpu = time.perf_counter(), time.process_time()
        run(epoch)
        rates.append(epoch * size / (time.perf_counter() - start))
        per_core.append(epoch * size / (time.process_time() - cpu))
    return statistics.median(rates), statistics.median(per_core)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="--config.FIELD=VALUE changes a field of it")
    parser.add_argument("--seconds", type=float, default=5.0, help="per pipeline (default: 5)")
    args, overrides = parser.parse_known_args()
    allocator.keep_freed_memory()
    try:
        config = cli.parse(["--config", args.config, *overrides], ("train",)).config
        arrays = sources.load(config.data, "train")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("| pipeline | images/s | images/s per core |")
    print("|---|---|---|")
    for pipeline in PIPELINES:
        rate, per_core = measure(pipeline, arrays, config, args.seconds)
        print(f"| {pipeline} | {rate:,.0f} | {per_core:,.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
