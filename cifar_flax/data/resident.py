"""Training from device memory: the split is copied to each device once, and compiled steps gather their batches."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Array, Int32, UInt8

from cifar_flax.data import order
from cifar_flax.data.batches import Batch, Indices, empty_indices
from cifar_flax.data.cache import Arrays
from cifar_flax.runtime.devices import Layout

# XLA for TPUs stores arrays in tiles whose last axis has 128 elements. If this does not divide the size of an image, it
# puts the axis of the examples last instead, and each call of a program would then copy the whole split.
_ALIGNMENT = 128


def put(arrays: Arrays, layout: Layout) -> Arrays:
    """Return `arrays` replicated in the memory of each device; `images` become rows of `row_bytes` bytes."""
    rows = np.asarray(arrays.images).reshape(len(arrays.images), -1)
    if padding := row_bytes(arrays.images.shape[1:]) - rows.shape[1]:
        rows = np.pad(rows, ((0, 0), (0, padding)))
    rows, labels = layout.replicate((rows, np.asarray(arrays.labels)))
    return dataclasses.replace(arrays, images=rows, labels=labels)


def row_bytes(image_shape: tuple[int, ...]) -> int:
    """Return the number of bytes that an image takes in device memory."""
    return math.ceil(math.prod(image_shape) / _ALIGNMENT) * _ALIGNMENT


def gather(
    images: UInt8[Array, "n row_bytes"], labels: Int32[Array, " n"], indices: Indices, image_shape: tuple[int, int, int]
) -> Batch:
    """Return the batch of one step, in a compiled program, from the arrays that `put` returned."""
    index = indices.index
    pixels = images[index][:, : math.prod(image_shape)]
    return Batch(pixels.reshape(-1, *image_shape), labels[index], index, indices.epoch, indices.mask)


def training_indices(
    examples: Int32[np.ndarray, " n"],
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    drop_last: bool,
    ends: Iterable[int],
    steps_per_call: int,
    rows: slice = slice(None),
    classes: Int32[np.ndarray, " n"] | None = None,
) -> Iterator[Indices]:
    """Yield the indices of each call from step `start` to step `stop`, at most `steps_per_call` steps per call.

    `ends` are the numbers of finished steps after each call. Of each batch, yield only `rows`. The arrays have
    `steps_per_call` rows; masked zeros fill those of shorter calls. `classes`, the labels of `examples`, balances the
    classes.

    Shuffling takes the host milliseconds per epoch, while the device still trains on the previous one.
    """
    steps = order.batches(seed, examples, batch_size, start, stop, drop_last, classes)
    for begin, end in itertools.pairwise(itertools.chain([start], ends)):
        call = empty_indices(steps_per_call, len(range(batch_size)[rows]))
        for number, (index, epoch) in enumerate(itertools.islice(steps, end - begin)):
            call.index[number], call.epoch[number], call.mask[number] = index[rows], epoch[rows], True
        yield call
