"""Sampling order: the example at each position of training, a pure function of seed, epoch and position."""

import math

import numpy as np
from jaxtyping import Int

# Philox key of the validation split. Seeds are below 2**32, so that no run shuffles with this key.
_VALIDATION_KEY = 0x76616C6964


def permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, " size"]:
    """Return the permutation of `size` examples in epoch `epoch`.

    Sort by the raw output of the counter-based generator Philox (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3"): NumPy guarantees that its stream does not change, but not that of `Generator.permutation`.
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(size), kind="stable").astype(np.int32)


def split_validation(size: int, fraction: float) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " validation"]]:
    """Return the indices for training and the held-out indices, both sorted. They depend only on the arguments."""
    shuffled = permutation(_VALIDATION_KEY, 0, size)
    held_out = round(fraction * size)
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


def epoch_images(num_examples: int, batch_size: int, drop_last: bool) -> int:
    """Return the number of images per epoch: all or, with `drop_last`, only those that fill whole batches."""
    return num_examples - num_examples % batch_size if drop_last else num_examples


def total_steps(epochs: float, num_examples: int, batch_size: int, drop_last: bool = False) -> int:
    """Return the number of steps in `epochs`. Without `drop_last`, the last batch is filled from the next epoch."""
    return math.ceil(epochs * epoch_images(num_examples, batch_size, drop_last) / batch_size)


def indices(
    seed: int, examples: Int[np.ndarray, " n"], batch_size: int, start: int, stop: int, drop_last: bool = False
) -> tuple[Int[np.ndarray, "steps batch"], Int[np.ndarray, "steps batch"]]:
    """Return the example and the epoch of each row of the batches of steps `start` to `stop - 1`.

    Position `p = step * batch_size + i` belongs to epoch `p // n`, and each epoch has its own permutation of
    `examples`. Batches span epoch boundaries, so no example is dropped. With `drop_last`, n is `epoch_images`, and the
    rest of each permutation is dropped. Earlier steps are not computed.
    """
    size = epoch_images(len(examples), batch_size, drop_last)
    position = np.arange(start * batch_size, stop * batch_size, dtype=np.int64)
    epoch = (position // size).astype(np.int32)
    index = np.empty(len(position), np.int32)
    for e in range(start * batch_size // size, -(-stop * batch_size // size)):
        here = slice(*np.searchsorted(epoch, [e, e + 1]))
        index[here] = examples[permutation(seed, e, len(examples))[position[here] - e * size]]
    return index.reshape(-1, batch_size), epoch.reshape(-1, batch_size)
