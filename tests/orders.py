"""The sampling order of several steps at once."""

import numpy as np

from cifar_flax.data import order


def indices(seed, examples, batch_size, start, stop, drop_last=False, classes=None):
    """Return the example and the epoch of each row of the batches of steps `start` to `stop - 1`."""
    steps = list(order.batches(seed, examples, batch_size, start, stop, drop_last, classes))
    return np.array(steps, np.int32).reshape(-1, 2, batch_size).transpose(1, 0, 2)
