"""TensorFlow as a reader of data: quiet, and blind to the accelerators that JAX needs whole.

Imported only where it is used: it takes seconds and hundreds of megabytes.
"""

import os

# It tells of these kernels on every start, and no reader of data uses them.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
