"""Training batches from device memory: the whole split is copied there once, each step gathers from it."""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Int32

from cifar_flax.data import order
from cifar_flax.data.batches import Batch
from cifar_flax.data.cache import Arrays


def training_batches(
    arrays: Arrays, examples: Int32[np.ndarray, " n"], *, batch_size: int, seed: int, start: int, stop: int
) -> Iterator[Batch]:
    """The batches of the steps from `start` up to `stop`, on the device; byte for byte those of `streaming`."""
    images, labels = jax.device_put((np.asarray(arrays.images), np.asarray(arrays.labels)))
    mask = jax.device_put(np.ones(batch_size, np.bool_))
    gather = jax.jit(lambda images, labels, index: (images[index], labels[index]))
    for index, epoch in zip(*order.positions(seed, examples, batch_size, start, stop), strict=True):
        index, epoch = jax.device_put((index, epoch))
        image, label = gather(images, labels, index)
        yield Batch(image, label, index, epoch, mask)
