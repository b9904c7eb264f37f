"""TensorFlow as a reader of data: quiet, and blind to the accelerators that JAX needs whole.

Imported only where it is used: it takes seconds and hundreds of megabytes.
"""

import os
from typing import Any

# It tells of these kernels on every start, and no reader of data uses them.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np

from cifar_flax import packages

# Keras' code, which imports scikit-learn and matplotlib too, is a third of the time and 100 MB. Were the whole of Keras
# hidden, TensorFlow would not note where it lies, and nobody could import `tensorflow.keras` later.
with packages.without("keras.src"):
    tf: Any = packages.load("tensorflow")

tf.config.set_visible_devices([], "GPU")

_ALIGNMENT = 64  # bytes; TensorFlow ends the process on a tensor that lies otherwise


def as_tensor(array: np.ndarray) -> Any:
    """A tensor of the array's own memory where that can be had; `tf.constant` takes twice its size for a moment.

    Memory that is read-only cannot: the version of DLPack that TensorFlow reads has no word for it.
    """
    if array.flags.carray and array.ctypes.data % _ALIGNMENT == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.constant(array)


def dataset_options() -> Any:
    """Keeps the order of examples and tunes nothing: with tuning, TensorFlow 2.21 took 7 to 32 s to close 3 of 14."""
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    return options
