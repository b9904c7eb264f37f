"""Test the use of TensorFlow: no copies of images, unaligned arrays, options of pipelines, lazy imports."""

import subprocess
import sys

import fake_tfds  # noqa: F401  registers the datasets
import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY

from cifar_flax.data import cache, sources, streaming
from cifar_flax.data.cache import Arrays
from cifar_flax.data.sources import DataConfig

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


def batches_of(images):
    arrays = Arrays(images, np.zeros(20, np.int32), ("a",), "set/1.0.0")
    examples = np.arange(20, dtype=np.int32)
    return streaming.training_batches(arrays, examples, batch_size=1, seed=0, start=0, stop=20)


def test_cached_images_are_not_copied(tmp_path):
    images = stored(tmp_path / "train").images
    batches = batches_of(images)
    next(batches)
    images[:] = 0
    *_, last = batches  # read after the change
    assert not last.image.any()
    np.testing.assert_array_equal(cache.load(tmp_path / "train").images, IMAGES)  # the file is unchanged


def memory_at(offset):
    """Return memory for the images whose address is `offset` bytes after a multiple of 64."""
    memory = np.zeros(IMAGES.size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + IMAGES.size]


@pytest.mark.parametrize(
    "images",
    [
        *(memory_at(offset).reshape(IMAGES.shape) for offset in (0, 1, 16, 32)),
        memory_at(0).reshape(20, 3, 4, 5).transpose(0, 2, 3, 1),
        memory_at(0).reshape(IMAGES.shape)[:, ::-1],
    ],
)
@pytest.mark.parametrize("writeable", [True, False])
def test_any_memory_layout_becomes_tensors(images, writeable):
    """TensorFlow would end the process if it got an unaligned array."""
    images = images.view()
    images[:] = IMAGES
    images.flags.writeable = writeable
    for batch in batches_of(images):
        np.testing.assert_array_equal(batch.image, IMAGES[batch.index])


def test_autotuning_and_rewrites_are_off_in_all_pipelines(monkeypatch):
    """See `dataset_options` for the reasons: a wait that is too rare to be tested, and copies of all images."""
    iterate, tuned = tf.data.Dataset.as_numpy_iterator, []

    def recorded(dataset):
        options = dataset.options()
        tuned.append((options.autotune.enabled, options.experimental_optimization.apply_default_optimizations))
        return iterate(dataset)

    monkeypatch.setattr(tf.data.Dataset, "as_numpy_iterator", recorded)
    arrays = sources.load(DataConfig(name="fake_color"), "train")
    examples = np.arange(40, dtype=np.int32)
    assert len(list(streaming.training_batches(arrays, examples, batch_size=5, seed=0, start=0, stop=4))) == 4
    assert tuned == [(False, False)] * 2


def test_tfds_does_not_import_keras():
    """TFDS would import TensorFlow, which would import Keras. Keras can still be imported later."""
    use = "from cifar_flax.data import tfds; tfds.builder_of(config)"
    config = "from cifar_flax.data.sources import DataConfig; config = DataConfig(name='mnist')"
    then = "import sys, tensorflow; assert 'keras' not in sys.modules; from tensorflow.keras import layers"
    subprocess.run([sys.executable, "-c", f"{config}; {use}; {then}"], cwd=REPOSITORY, check=True)
