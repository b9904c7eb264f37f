import os
import subprocess
import sys

import fake_tfds  # noqa: F401  registers the data sets
import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY

from cifar_flax.data import cache, sources, streaming
from cifar_flax.data.cache import Arrays
from cifar_flax.data.sources import DataConfig
from cifar_flax.data.tensorflow import as_tensor

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 5, 3), np.uint8)


def stored(folder):
    return cache.store(
        folder,
        [(IMAGES, np.zeros(20, np.int32))],
        num_examples=20,
        image_shape=(4, 5, 3),
        class_names=("a",),
        dataset="set/1.0.0",
    )


def test_images_of_the_cache_are_not_copied(tmp_path):
    images = stored(tmp_path / "train").images
    tensor = as_tensor(images)
    np.testing.assert_array_equal(tensor, IMAGES)
    images[3] += 1
    np.testing.assert_array_equal(tensor[3], IMAGES[3] + np.uint8(1))
    np.testing.assert_array_equal(cache.load(tmp_path / "train").images, IMAGES)  # which reads the file again


@pytest.mark.parametrize("offset", range(1, 65))
def test_arrays_anywhere_in_memory_become_tensors(offset):
    """TensorFlow ends the process when it gathers from a tensor that is not aligned as its own are."""
    memory = np.zeros(IMAGES.size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    images = memory[start : start + IMAGES.size].reshape(IMAGES.shape)
    images[:] = IMAGES
    images.flags.writeable = offset % 64 != 0
    arrays = Arrays(images, np.zeros(20, np.int32), ("a",), "set/1.0.0")
    examples = np.arange(20, dtype=np.int32)
    for batch in streaming.training_batches(arrays, examples, batch_size=5, seed=0, start=0, stop=4):
        np.testing.assert_array_equal(batch.image, IMAGES[batch.index])


def test_no_pipeline_tunes_itself(tmp_path, monkeypatch):
    """See `dataset_options`; the wait itself is too rare to be tested."""
    iterate, tuned = tf.data.Dataset.as_numpy_iterator, []

    def recorded(dataset):
        tuned.append(dataset.options().autotune.enabled)
        return iterate(dataset)

    monkeypatch.setattr(tf.data.Dataset, "as_numpy_iterator", recorded)
    arrays = sources.load(DataConfig(name="fake_color"), "train")
    examples = np.arange(40, dtype=np.int32)
    assert len(list(streaming.training_batches(arrays, examples, batch_size=5, seed=0, start=0, stop=4))) == 4
    assert tuned == [False, False]


def test_keras_is_left_alone_and_left_importable(tmp_path):
    """TensorFlow would import it."""
    (tmp_path / "keras.py").write_text("print('keras imported')")
    code = "import cifar_flax.data.tensorflow; print('TensorFlow imported'); import keras"
    run = [sys.executable, "-c", code]
    path = f"{REPOSITORY}:{tmp_path}"
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["TensorFlow imported", "keras imported"]
