"""Check a folder of images, and estimate the memory and the time of a run on it."""

import contextlib
import io
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from cifar_flax import packages
from cifar_flax.config import Config
from cifar_flax.data import folder
from cifar_flax.data.class_folders import find
from cifar_flax.data.images import FORMATS
from cifar_flax.diagnosis.installation import NOTE, OK, Finding
from cifar_flax.training import steps
from cifar_flax.training.trainer import Trainer

_CLASSES = 50  # whose numbers of images are listed
_OPENED = 1000  # files whose sizes in pixels are read
_SECONDS = 3.0  # of training that the time of a run is estimated from


def contents(config: Config) -> Iterator[Finding]:
    """Decode `data.folder` into the cache, as a run does, and report classes, sizes and files that cannot be read."""
    data = config.data
    listing = find(data, (data.train_split, data.eval_split))
    with contextlib.redirect_stdout(io.StringIO()):  # the findings cover what a run prints
        splits = {split: folder.decoded(data, split, listing) for split in listing.splits}
    train, test = splits.values()
    names = train.class_names
    counts = [np.bincount(arrays.labels, minlength=len(names)) for arrays in (train, test)]
    each = [f"{name} {here:,} + {there:,}" for name, here, there in zip(names, *counts, strict=True)]
    both = f"{data.train_split} + {data.eval_split}"
    yield Finding(OK, f"{len(names):,} classes ({both}): {folder.shortened(each, _CLASSES)}")
    if listing.unused:
        yield Finding(NOTE, f"not used: {folder.shortened(listing.unused, _CLASSES)}")
    size = f"to {data.side}x{data.side} pixels, {(train.nbytes + test.nbytes) / 1e6:,.0f} MB"
    yield Finding(OK, f"decoded {size}" if data.cache == "decoded" else f"decoded at each use {size} in all")
    for split, arrays in splits.items():
        if arrays.skipped:
            count = f"{len(arrays.skipped):,} {split} files cannot be read"
            yield Finding(NOTE, f"{count}: {'; '.join(folder.unreadable(arrays))}")
        folder.require_few_unreadable(data, split, arrays)
    yield Finding(OK, _sizes(listing.root, [*train.files, *test.files]))
    if copies := folder.duplicates(train, test):
        yield Finding(NOTE, copies)
    smallest, largest = (int(end(counts[0])) for end in (np.min, np.max))
    if largest >= 3 * smallest:
        times = f"the largest class has {largest / smallest:.1f} times the images of the smallest"
        yield Finding(NOTE, f"{times}; data.sampling=balanced or train.class_weights=balanced may help")


def _sizes(root: Path, files: Sequence[str]) -> str:
    """Return the sizes in pixels of some of `files`, which have been decoded before."""
    Image, sizes = packages.load("pillow"), []
    with warnings.catch_warnings(action="ignore"):  # of Pillow
        for path in files[:: -(-len(files) // _OPENED)]:
            with Image.open(root / path, formats=FORMATS) as image:
                sizes.append(image.size)
    width, height = np.median(sizes, axis=0)
    ends = [min(sizes, key=np.prod), max(sizes, key=np.prod)]
    shown = " to ".join(f"{columns}x{rows}" for columns, rows in ends)
    return f"images of {shown} pixels, median {width:.0f}x{height:.0f} ({len(sizes):,} files)"


def estimate(trainer: Trainer) -> Iterator[Finding]:
    """Compile the training step and run it for some seconds; report the memory and the time that a run needs."""
    state, total = trainer.initial_state, trainer.total_steps
    calls, starts = trainer.compile(state), [first for first, _ in steps.phases(trainer.task)]
    needed = [memory for first in starts if (memory := calls.program(first).memory_analysis()) is not None]
    if needed:
        size = max(memory.argument_size_in_bytes + memory.temp_size_in_bytes for memory in needed)
        yield Finding(OK, f"a training step needs {size / 1e6:,.0f} MB of memory, besides JAX itself")
    training = 0.0
    for start, end in itertools.pairwise([*starts, total]):
        begin, first, done = time.perf_counter(), start, start
        for call in trainer.inputs(trainer.config.seed, start):
            state = jax.block_until_ready(calls(state, call)[0])
            done = call.stop
            if first == start and done < end:  # the first call may take longer
                begin, first = time.perf_counter(), done
            elif done == end or time.perf_counter() - begin > _SECONDS / len(starts):
                break
        training += (time.perf_counter() - begin) / (done - first) * (end - start)
    evaluation = trainer.evaluator(state)
    assert evaluation is not None
    of_one = evaluation.summary["num_examples"] / evaluation.images_per_second
    number = sum(
        trainer.timetable.is_due(stop, trainer.config.eval.every_epochs) for stop in trainer.timetable.stops(1)
    )
    duration = f"{_duration(training)} of training and {_duration(number * of_one)} of evaluations"
    yield Finding(OK, f"a run takes about {duration}, besides the start ({total:,} steps)")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
