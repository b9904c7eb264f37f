"""Training batches from host memory: sampling order -> gather, with `tf.data` or, without it, NumPy."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from cifar_flax import packages
from cifar_flax.data import order
from cifar_flax.data.batches import Batch, Indices, gather
from cifar_flax.data.cache import Arrays
from cifar_flax.errors import UserError

_PREFETCH = 4  # batches
# Steps and images of one `tf.data.Dataset`, which holds their indices, 8 bytes per image. It takes 10 ms to build.
_MOST_STEPS, _MOST_IMAGES = 4096, 2**20


def tensorflow_fault() -> str | None:
    """Return why TensorFlow cannot be used, or None. Import it, which takes seconds and hundreds of megabytes."""
    if fault := packages.fault("tensorflow"):
        return fault
    try:
        from cifar_flax.data import tensorflow  # noqa: F401
    except UserError as error:
        return str(error)
    return None


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

    `classes`, the labels of `examples`, balances the classes. The batches are gathered with `tf.data` if TensorFlow can
    be used and the images are an array, otherwise with NumPy.
    """
    steps = order.batches(seed, examples, batch_size, start, stop, drop_last, classes)
    if not isinstance(arrays.images, np.ndarray) or tensorflow_fault():
        for index, epoch in (step[:, rows] for step in steps):
            yield gather(arrays.images, arrays.labels, Indices(index, epoch, np.ones_like(index, np.bool_)))
    else:
        count = max(min(_MOST_STEPS, _MOST_IMAGES // batch_size), 1)
        while chunk := list(itertools.islice(steps, count)):
            yield from _gathered_by_tensorflow(arrays, *np.stack(chunk, axis=1)[..., rows])


def _gathered_by_tensorflow(
    arrays: Arrays, index: Int32[np.ndarray, "steps rows"], epoch: Int32[np.ndarray, "steps rows"]
) -> Iterator[Batch]:
    from cifar_flax.data.tensorflow import as_tensor, dataset_options, tf

    images, labels = as_tensor(arrays.images), as_tensor(arrays.labels)

    def gathered(index: Any, epoch: Any) -> tuple[Any, ...]:
        mask = tf.ones_like(index, tf.bool)
        return tf.gather(images, index), tf.gather(labels, index), index, epoch, mask

    dataset = tf.data.Dataset.from_tensor_slices((index, epoch)).map(gathered).prefetch(_PREFETCH)
    options = dataset_options()
    # One thread suffices to gather a few hundred small images; more would take cores from the training step.
    options.threading.private_threadpool_size = 1
    for batch in dataset.with_options(options).as_numpy_iterator():
        yield Batch(*batch)
