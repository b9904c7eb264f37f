"""Batches: what every pipeline yields and every step takes."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Int32, UInt8

# Batches fetched at a time. Waking a thread for each of them would cost the training loop a tenth of a millisecond on a
# busy CPU and, now and then, its core for milliseconds. After an evaluation the loop takes several at once, and should
# find them there.
GROUP = 4


T = TypeVar("T")  # what one call takes: a batch, or the indices of several


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Batch:
    """NumPy arrays on the host, JAX arrays on a device; pmap has one on each of its devices."""

    image: UInt8[Any, "*devices batch height width channels"]
    label: Int32[Any, "*devices batch"]
    index: Int32[Any, "*devices batch"]  # of the example in its split: with the epoch, the source of its random bits
    epoch: Int32[Any, "*devices batch"]
    mask: Bool[Any, "*devices batch"]  # False where the place is padding and must not count


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Indices:
    """What stands at each place of a batch, or of those of several steps; the images are elsewhere."""

    index: Int32[Any, "*steps batch"]
    epoch: Int32[Any, "*steps batch"]
    mask: Bool[Any, "*steps batch"]


def gather(images: UInt8[Any, "n height width channels"], labels: Int32[Any, " n"], indices: Indices) -> Batch:
    """The batch of one step, from a split on the host or, in a compiled program, on the device."""
    index = indices.index
    return Batch(images[index], labels[index], index, indices.epoch, indices.mask)


def empty_indices(*shape: int) -> Indices:
    """Return indices, all 0, to compile a call for."""
    zeros = np.zeros(shape, np.int32)
    return Indices(zeros, zeros, zeros > 0)


def empty_batch(batch_size: int, image_shape: tuple[int, int, int]) -> Batch:
    """Return an empty batch to compile a step for."""
    images, labels = np.zeros((1, *image_shape), np.uint8), np.zeros(1, np.int32)
    return gather(images, labels, empty_indices(batch_size))


def evaluation_indices(examples: Int32[np.ndarray, " n"], batch_size: int) -> Iterator[Indices]:
    """Every one of `examples` once, in order; the last batch is filled up with masked repeats of its first example."""
    for start in range(0, len(examples), batch_size):
        index = examples[start : start + batch_size]
        mask = np.arange(batch_size) < len(index)
        index = np.concatenate([index, np.full(batch_size - len(index), index[0], np.int32)])
        yield Indices(index, np.zeros_like(index), mask)


def to_device(batches: Iterable[T], put: Callable[[T], T] = jax.device_put, group: int = GROUP) -> Iterator[T]:
    """Has batches `put` on the device by a thread, a `group` at a time and from now on one group ahead of use.

    The thread does one group for each that is taken, so it never runs on when its user stops. What the source raises
    arrives in place of the group in which it does.
    """
    source = iter(batches)

    def fetch() -> list[T]:
        return [put(batch) for batch in itertools.islice(source, group)]

    executor = ThreadPoolExecutor(max_workers=1)
    first = executor.submit(fetch)

    def rest() -> Iterator[T]:
        with executor:
            following = first
            while fetched := following.result():
                following = executor.submit(fetch)
                yield from fetched

    return rest()


class InputTimer(Iterator[T]):
    """Hands batches on and adds up how long its user waited for them."""

    def __init__(self, batches: Iterator[T]):
        self._batches = batches
        self.seconds = 0.0

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - start
