"""Training from device memory: the split is copied to each device once, and compiled steps gather their batches."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32

from cifar_flax.data import order
from cifar_flax.data.batches import Indices
from cifar_flax.data.cache import Arrays
from cifar_flax.runtime.devices import Layout


def put(arrays: Arrays, layout: Layout) -> Arrays:
    """Return `arrays` replicated in the memory of each device."""
    images, labels = layout.replicate((np.asarray(arrays.images), np.asarray(arrays.labels)))
    return dataclasses.replace(arrays, images=images, labels=labels)


def training_indices(
    examples: Int32[np.ndarray, " n"],
    *,
    batch_size: int,
    steps_per_call: int,
    seed: int,
    start: int,
    stop: int,
    drop_last: bool,
    rows: slice = slice(None),
) -> Iterator[Indices]:
    """Yield the indices of steps `start` to `stop - 1`, `steps_per_call` at a time; of each batch, only `rows`.

    Shuffling takes the host milliseconds per epoch. Each epoch is shuffled when it is needed, while the device still
    trains on the previous one.
    """
    per_epoch = max(order.epoch_images(len(examples), batch_size, drop_last) // batch_size // steps_per_call, 1)
    for begin in range(start, stop, per_epoch * steps_per_call):
        end = min(begin + per_epoch * steps_per_call, stop)
        index, epoch = order.indices(seed, examples, batch_size, begin, end, drop_last)
        for call in range(0, end - begin, steps_per_call):
            here = slice(call, call + steps_per_call), rows
            yield Indices(index[here], epoch[here], np.ones(index[here].shape, np.bool_))
