"""TensorFlow for reading data: without log output, and without GPUs, whose memory JAX needs.

Import this module only when it is used: TensorFlow takes seconds and hundreds of megabytes to import.
"""

import os
from typing import Any

# Otherwise TensorFlow logs a message about these kernels at every start; reading data does not use them.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np

from cifar_flax import packages

# Not importing keras.src, which also imports scikit-learn and matplotlib, saves a third of the time and 100 MB. Hiding
# all of Keras would make a later import of `tensorflow.keras` fail.
with packages.without("keras.src"):
    tf: Any = packages.load("tensorflow")

tf.config.set_visible_devices([], "GPU")

_ALIGNMENT = 64  # bytes; TensorFlow aborts the process on a tensor with another alignment


def as_tensor(array: np.ndarray) -> Any:
    """Return a tensor that shares the array's memory if possible; otherwise copy, which briefly takes twice the memory.

    Read-only memory cannot be shared, because TensorFlow's version of DLPack has no read-only flag.
    """
    if array.flags.carray and array.ctypes.data % _ALIGNMENT == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.constant(array)


def dataset_options() -> Any:
    """Return options that keep the sampling order and disable autotuning and rewrites of the graph.

    With autotuning, TensorFlow 2.21 took 7 to 32 s to close the pipeline in 3 of 14 runs. To rewrite a graph, it copies
    all tensors that the graph refers to: the whole split.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return options
