"""TensorFlow as a reader of data: quiet, and blind to the accelerators that JAX needs whole.

Imported only where it is used: it takes seconds and hundreds of megabytes.
"""

import os
import sys

# It tells of these kernels on every start, and no reader of data uses them.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np

# TensorFlow imports Keras for those who might use it, and that imports scikit-learn and matplotlib: a third of the time
# and 100 MB. A module that is None cannot be imported.
_keras = sys.modules.setdefault("keras", None)  # type: ignore[arg-type]
import tensorflow as tf

if _keras is None:
    del sys.modules["keras"]

tf.config.set_visible_devices([], "GPU")

__all__ = ["as_tensor", "dataset_options", "tf"]

_ALIGNMENT = 64  # bytes; TensorFlow ends the process on a tensor that lies otherwise


def as_tensor(array: np.ndarray) -> tf.Tensor:
    """A tensor of the array's own memory where that can be had; `tf.constant` takes twice its size for a moment."""
    if array.flags.writeable and array.ctypes.data % _ALIGNMENT == 0:  # NumPy shares no memory that is read-only
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.constant(array)


def dataset_options() -> tf.data.Options:
    """Keeps the order of examples and tunes nothing: with tuning, 3 of 14 iterators took 7 to 32 s to end."""
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    return options
