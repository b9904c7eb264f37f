"""Training batches from host memory, with a `tf.data` pipeline: sampling order -> gather -> prefetch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from cifar_flax.data import order
from cifar_flax.data.batches import Batch
from cifar_flax.data.cache import Arrays
from cifar_flax.data.tensorflow import as_tensor, dataset_options, tf

_PREFETCH = 4  # batches


def training_batches(
    arrays: Arrays,
    examples: Int32[np.ndarray, " n"],
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    drop_last: bool = False,
    rows: slice = slice(None),
    classes: Int32[np.ndarray, " n"] | None = None,
) -> Iterator[Batch]:
    """Yield the batches of steps `start` to `stop - 1` as NumPy arrays; of each batch, only `rows`.

    `classes`, the labels of `examples`, balances the classes.
    """
    images, labels = as_tensor(arrays.images), as_tensor(arrays.labels)

    def gather(index: Any, epoch: Any) -> tuple[Any, ...]:
        mask = tf.ones_like(index, tf.bool)
        return tf.gather(images, index), tf.gather(labels, index), index, epoch, mask

    index, epoch = order.indices(seed, examples, batch_size, start, stop, drop_last, classes)
    dataset = tf.data.Dataset.from_tensor_slices((index[:, rows], epoch[:, rows])).map(gather).prefetch(_PREFETCH)
    options = dataset_options()
    # One thread suffices to gather a few hundred small images; more would take cores from the training step.
    options.threading.private_threadpool_size = 1
    for batch in dataset.with_options(options).as_numpy_iterator():
        yield Batch(*batch)
