"""Which example stands at which position of training: a pure function of the seed, the epoch and the position."""

import math

import numpy as np
from jaxtyping import Int

# Keeps the held-out examples apart from every training order.
_VALIDATION_KEY = 0x76616C6964


def permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, " size"]:
    """The order in which epoch `epoch` visits `size` examples.

    Sorts by the raw output of the counter-based generator Philox (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3"), whose stream NumPy promises not to change, unlike that of its `permutation`.
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(size), kind="stable").astype(np.int32)


def split_validation(size: int, fraction: float) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " validation"]]:
    """Indices kept for training and indices held out, ascending; the same for every run of the same `fraction`."""
    shuffled = permutation(_VALIDATION_KEY, 0, size)
    held_out = round(fraction * size)
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


def epoch_images(num_examples: int, batch_size: int, drop_last: bool) -> int:
    """How many images an epoch shows: all of them or, with `drop_last`, as many as fill whole batches."""
    return num_examples - num_examples % batch_size if drop_last else num_examples


def total_steps(epochs: float, num_examples: int, batch_size: int, drop_last: bool = False) -> int:
    """Steps of so many epochs; without `drop_last` the last batch runs on into the next epoch to be full."""
    return math.ceil(epochs * epoch_images(num_examples, batch_size, drop_last) / batch_size)


def indices(
    seed: int, examples: Int[np.ndarray, " n"], batch_size: int, start: int, stop: int, drop_last: bool = False
) -> tuple[Int[np.ndarray, "steps batch"], Int[np.ndarray, "steps batch"]]:
    """For the steps from `start` up to `stop`: which example and which epoch stand at each place of each batch.

    Position `p = step * batch_size + i` belongs to epoch `p // n`, whose order is a fresh permutation of `examples`.
    Batches run across the ends of epochs, so nothing is dropped; with `drop_last`, n is what `epoch_images` says, and
    the rest of each permutation is left out. Starting late replays nothing.
    """
    size = epoch_images(len(examples), batch_size, drop_last)
    position = np.arange(start * batch_size, stop * batch_size, dtype=np.int64)
    epoch = (position // size).astype(np.int32)
    index = np.empty(len(position), np.int32)
    for e in range(start * batch_size // size, -(-stop * batch_size // size)):
        here = slice(*np.searchsorted(epoch, [e, e + 1]))
        index[here] = examples[permutation(seed, e, len(examples))[position[here] - e * size]]
    return index.reshape(-1, batch_size), epoch.reshape(-1, batch_size)
