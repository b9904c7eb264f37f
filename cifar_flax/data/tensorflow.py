"""TensorFlow as a reader of data: quiet, and blind to the accelerators that JAX needs whole.

Imported only where it is used: it takes seconds and hundreds of megabytes.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
