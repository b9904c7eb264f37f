"""Batches, which every pipeline yields and every step takes, and their transfer to devices."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Int32, UInt8

# Number of batches that the input thread fetches at a time. Waking it for every batch would delay the training loop by
# 0.1 ms on a busy CPU, and sometimes by milliseconds. After an evaluation, the loop takes several batches at once.
GROUP = 4


T = TypeVar("T")  # input of one call: a `Batch`, or the `Indices` of one or several steps


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Batch:
    """The images and labels of one step: NumPy arrays on the host or JAX arrays on devices.

    The leading axis of devices exists only with pmap.
    """

    image: UInt8[Any, "*devices batch height width channels"]
    label: Int32[Any, "*devices batch"]
    index: Int32[Any, "*devices batch"]  # of the example in its split; with epoch, it seeds the augmentation
    epoch: Int32[Any, "*devices batch"]  # or, with balanced sampling, how often the example was drawn before
    mask: Bool[Any, "*devices batch"]  # False: padding, which must not count


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Indices:
    """The examples of one batch, or of the batches of several steps, without their images."""

    index: Int32[Any, "*steps batch"]
    epoch: Int32[Any, "*steps batch"]
    mask: Bool[Any, "*steps batch"]


def gather(images: UInt8[Any, "n height width channels"], labels: Int32[Any, " n"], indices: Indices) -> Batch:
    """Return the batch of one step. `resident.gather` does the same in a compiled program."""
    index = indices.index
    return Batch(images[index], labels[index], index, indices.epoch, indices.mask)


def empty_indices(*shape: int) -> Indices:
    """Return indices of zeros, all masked: shapes for a compilation, or a buffer to fill."""
    return Indices(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.bool_))


def empty_batch(batch_size: int, image_shape: tuple[int, int, int]) -> Batch:
    """Return a batch of zeros with which to compile a step."""
    images, labels = np.zeros((1, *image_shape), np.uint8), np.zeros(1, np.int32)
    return gather(images, labels, empty_indices(batch_size))


def evaluation_indices(examples: Int32[np.ndarray, " n"], batch_size: int) -> Iterator[Indices]:
    """Yield batches of `examples`, each once and in order. The last batch is padded with its first example, masked."""
    for start in range(0, len(examples), batch_size):
        index = examples[start : start + batch_size]
        mask = np.arange(batch_size) < len(index)
        index = np.concatenate([index, np.full(batch_size - len(index), index[0], np.int32)])
        yield Indices(index, np.zeros_like(index), mask)


def to_device(batches: Iterable[T], put: Callable[[T], T] = jax.device_put, group: int = GROUP) -> Iterator[T]:
    """Return an iterator over `batches` on the device; a thread transfers them with `put`, one `group` ahead of use.

    The thread starts with the first group at once and fetches one more for each group that is consumed, so it stops
    when its consumer stops. If `batches` raises, the exception is raised in place of the group.
    """
    source = iter(batches)

    def fetch() -> list[T]:
        return [put(batch) for batch in itertools.islice(source, group)]

    executor = ThreadPoolExecutor(max_workers=1)
    first = executor.submit(fetch)

    def rest() -> Iterator[T]:
        try:
            following = first
            while fetched := following.result():
                following = executor.submit(fetch)
                yield from fetched
        finally:
            # Do not wait: the garbage collector may close this generator inside `Thread.start`, which would deadlock.
            executor.shutdown(wait=False)

    return rest()


class InputTimer(Iterator[T]):
    """Iterate over `batches` and sum up the time spent waiting for them, in `seconds`."""

    def __init__(self, batches: Iterator[T]):
        self._batches = batches
        self.seconds = 0.0

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - start
