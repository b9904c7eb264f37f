"""Sampling order: the example at each position of training, a pure function of seed, epoch and position."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

SAMPLING = ("shuffled", "balanced")

# Philox keys. Seeds are below 2**32, so that no run shuffles epochs with the key of the validation split or of a class.
_VALIDATION_KEY = 0x76616C6964
_CLASS_KEYS = 2**40  # factor of the number of a class, counted from 1


def permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, " size"]:
    """Return the permutation of `size` examples in epoch `epoch`.

    Sort stably by the output of the counter-based generator Philox (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3"): NumPy guarantees that its stream does not change, but not that of `Generator.permutation`.
    """

    keys = np.random.Philox(key=[seed, epoch]).random_raw(size)
    # Unless two keys are equal, any sort is stable; with AVX-512, this one is six times as fast.
    result, ordered = np.argsort(keys).astype(np.int32), np.sort(keys)
    if (ordered[1:] == ordered[:-1]).any():
        result = np.argsort(keys, kind="stable").astype(np.int32)
    return result


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


def batches(
    seed: int,
    examples: Int[np.ndarray, " n"],
    batch_size: int,
    start: int,
    stop: int,
    drop_last: bool = False,
    classes: Int[np.ndarray, " n"] | None = None,
) -> Iterator[Int[np.ndarray, "2 batch"]]:
    """Yield the batches of steps `start` to `stop - 1`: the example of each row, and its epoch.

    No pair of example and epoch occurs twice, so that they can seed the random numbers of the row.

    Position `p = step * batch_size + i` belongs to epoch `p // n`, and each epoch has its own permutation of
    `examples`. Batches span epoch boundaries, so no example is dropped. With `drop_last`, n is `epoch_images`, and the
    rest of each permutation is dropped.

    With `classes`, the labels of `examples`, each class is equally frequent. The permutation of an epoch is then of n
    draws, which take the classes in turn; the draws of a class go through its examples again and again, each time in
    another order. The epoch of a row is the number of times that its example was drawn before.

    Earlier epochs are not computed. Each epoch is shuffled when its first batch is taken, so the memory does not depend
    on the number of epochs: 8 bytes per example, and less than 30 in all while an epoch is shuffled.
    """
    size = epoch_images(len(examples), batch_size, drop_last)
    by_class: list[np.ndarray] = []
    if classes is not None:
        by_label = np.argsort(classes, kind="stable")
        by_class = np.split(examples[by_label], np.unique(classes[by_label], return_index=True)[1][1:])
    first, last = start * batch_size, stop * batch_size  # positions
    rest = np.empty((2, 0), np.int32)  # the rows of an epoch after its last full batch
    for epoch in range(first // size, -(-last // size)):
        begin = epoch * size
        index = permutation(seed, epoch, len(examples))[max(first - begin, 0) : min(last - begin, size)]
        if classes is None:
            index, visit = examples[index], np.broadcast_to(np.int32(epoch), index.shape)
        else:
            index, visit = _balanced(seed, by_class, epoch * len(examples) + index.astype(np.int64))
        kept = rest.shape[1]
        rows = np.empty((2, kept + len(index)), np.int32)
        rows[:, :kept], rows[0, kept:], rows[1, kept:] = rest, index, visit
        whole = rows.shape[1] - rows.shape[1] % batch_size
        for row in range(0, whole, batch_size):
            yield rows[:, row : row + batch_size]
        rest = rows[:, whole:]


def _balanced(
    seed: int, by_class: Sequence[Int[np.ndarray, " _"]], draw: Int[np.ndarray, " draws"]
) -> tuple[Int[np.ndarray, " draws"], Int[np.ndarray, " draws"]]:
    """Return the example of each draw, and the number of times that it was drawn before.

    Draw d is of class `d % k` of k and takes the next example of this class. Each order in which a class goes through
    its examples is a function of the seed, the class and the number of earlier orders alone.
    """
    turn, label = np.divmod(draw, len(by_class))
    index, visit = np.empty(len(draw), np.int32), np.empty(len(draw), np.int32)
    rows = np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label, minlength=len(by_class)))[:-1])
    for number, (examples, here) in enumerate(zip(by_class, rows, strict=True)):
        if len(here):
            visit[here], place = np.divmod(turn[here], len(examples))
            first, last = int(visit[here].min()), int(visit[here].max())
            width = -(-len(examples) // 4)  # Philox yields four numbers for each value of its counter
            stream = np.random.Philox(key=[seed + (number + 1) * _CLASS_KEYS, 0], counter=first * width)
            raw = stream.random_raw((last - first + 1) * width * 4).reshape(-1, width * 4)[:, : len(examples)]
            index[here] = examples[np.argsort(raw, axis=1, kind="stable")[visit[here] - first, place]]
    return index, visit
