"""Check a folder of images, and estimate the memory and the time of a run on it."""

import time
from collections.abc import Iterator

import jax
import numpy as np

from cifar_flax import packages
from cifar_flax.config import Config
from cifar_flax.data import folder, sources
from cifar_flax.data.config import cache_dir
from cifar_flax.diagnosis.installation import NOTE, OK, Finding
from cifar_flax.runtime.streams import printable
from cifar_flax.training.trainer import Trainer

_CLASSES = 50  # whose numbers of images are listed
_OPENED = 1000  # files whose sizes in pixels are read
_SECONDS = 3.0  # of training that the time of a run is estimated from


def contents(config: Config) -> Iterator[Finding]:
    """Decode `data.folder` into the cache, as a run does, and report classes, sizes and files that cannot be read."""
    data = config.data
    splits = [sources.load(data, split) for split in (data.train_split, data.eval_split)]
    names, counts = splits[0].class_names, [np.bincount(arrays.labels) for arrays in splits]
    each = [f"{name} {train:,} + {test:,}" for name, train, test in zip(names, *counts, strict=True)]
    more = f", and {len(each) - _CLASSES:,} more" if len(each) > _CLASSES else ""
    both = f"{data.train_split} + {data.eval_split}"
    yield Finding(OK, f"{len(names):,} classes ({both}): {printable(', '.join(each[:_CLASSES]))}{more}")
    size = sum(arrays.nbytes for arrays in splits) / 1e6
    yield Finding(OK, f"decoded to {data.side}x{data.side} pixels, {size:,.0f} MB in {cache_dir(data)}")
    yield Finding(OK, _sizes(config))
    bad = sum(len(arrays.skipped) for arrays in splits)
    yield Finding(NOTE if bad else OK, f"{bad:,} files cannot be read{' (listed above)' if bad else ''}")
    smallest, largest = (int(end(counts[0])) for end in (np.min, np.max))
    if largest >= 3 * smallest:
        advice = "data.sampling=balanced or train.class_weights=balanced may help"
        yield Finding(
            NOTE, f"the largest class has {largest / smallest:.1f} times the images of the smallest; {advice}"
        )


def _sizes(config: Config) -> str:
    Image = packages.load("pillow")
    root, _, splits = folder.find(config.data)
    paths = [path for split in splits.values() for path, _ in split.files]
    sizes = []
    for path in paths[:: -(-len(paths) // _OPENED)]:
        try:
            with Image.open(root / path) as image:
                sizes.append(image.size)
        except Exception:  # decoding has reported it
            continue
    width, height = np.median(sizes, axis=0)
    ends = [min(sizes, key=np.prod), max(sizes, key=np.prod)]
    shown = " to ".join(f"{columns}x{rows}" for columns, rows in ends)
    return f"images of {shown} pixels, median {width:.0f}x{height:.0f} ({len(sizes):,} files)"


def estimate(trainer: Trainer) -> Iterator[Finding]:
    """Compile the training step and run it for some seconds; report the memory and the time that a run needs."""
    state, total = trainer.initial_state, trainer.total_steps
    calls = trainer.compile(state)
    needed = calls.program(0).memory_analysis()
    if needed is not None:
        size = needed.argument_size_in_bytes + needed.temp_size_in_bytes
        yield Finding(OK, f"a training step needs {size / 1e6:,.0f} MB of memory, besides JAX itself")
    begin, first, done = time.perf_counter(), 0, 0
    for call in trainer.inputs(trainer.config.seed, 0):
        state = jax.block_until_ready(calls(state, call)[0])
        done = call.stop
        if not first and done < total:  # the first call may take longer
            begin, first = time.perf_counter(), done
        elif time.perf_counter() - begin > _SECONDS:
            break
    seconds = (time.perf_counter() - begin) / (done - first) * total
    yield Finding(OK, f"training takes about {_duration(seconds)} without evaluations ({total:,} steps)")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
