"""Training from device memory: the split is copied to each device once, and compiled steps gather their batches."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int32

from cifar_flax.data import order
from cifar_flax.data.batches import Indices, empty_indices
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
    seed: int,
    start: int,
    stop: int,
    drop_last: bool,
    ends: Iterable[int],
    steps_per_call: int,
    rows: slice = slice(None),
) -> Iterator[Indices]:
    """Yield the indices of the calls that finish `ends` steps, from step `start` to `stop - 1`; of each batch, `rows`.

    Each call has at most `steps_per_call` steps; the indices of the others are masked zeros.

    Shuffling takes the host milliseconds per epoch. Each epoch is shuffled when it is needed, while the device still
    trains on the previous one.
    """
    per_epoch = max(order.epoch_images(len(examples), batch_size, drop_last) // batch_size, 1)
    steps = itertools.chain.from_iterable(
        zip(*order.indices(seed, examples, batch_size, begin, min(begin + per_epoch, stop), drop_last), strict=True)
        for begin in range(start, stop, per_epoch)
    )
    for begin, end in itertools.pairwise(itertools.chain([start], ends)):
        call = empty_indices(steps_per_call, len(range(batch_size)[rows]))
        for number, (index, epoch) in enumerate(itertools.islice(steps, end - begin)):
            call.index[number], call.epoch[number], call.mask[number] = index[rows], epoch[rows], True
        yield call
