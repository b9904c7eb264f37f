"""Inputs and compiled steps of test_accelerator.py: small networks on random images of CIFAR-10's shape."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cifar_flax.config import Config, DataConfig, TrainConfig
from cifar_flax.data import cache, sources
from cifar_flax.data.augment import AugmentConfig, Context, Examples
from cifar_flax.data.augment.cutout import cutout
from cifar_flax.data.augment.flip_crop import flip_and_crop
from cifar_flax.data.batches import Indices, gather
from cifar_flax.data.cache import Arrays
from cifar_flax.data.info import DatasetInfo
from cifar_flax.models import AirbenchConfig, CNNConfig, ResNetConfig
from cifar_flax.models.layers import dropout
from cifar_flax.runtime.devices import ParallelConfig
from cifar_flax.training import steps
from cifar_flax.training.evaluator import all_examples
from cifar_flax.training.optimizers import OptimConfig
from cifar_flax.training.setup import setup

BATCH, SIZE = 64, 250
NETWORKS = {
    "cnn": CNNConfig(width=8, hidden=32),
    "airbench": AirbenchConfig(widths=(8, 16, 16)),
    "resnet18": ResNetConfig(width=8),
}


def make_images(size=SIZE, seed=0):
    """Return random images of CIFAR-10's shape, brighter in higher classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, size).astype(np.int32)
    images = rng.integers(0, 160, (size, 32, 32, 3)) + 9 * labels[:, None, None, None]
    return Arrays(images.astype(np.uint8), labels, tuple("0123456789"), "noise")


def store_images(folder, **sizes):
    """Write a cache of such images under the name of CIFAR-10; `sizes` are the numbers of images of its splits."""
    config = DataConfig(name="cifar10", pipeline="resident", cache_dir=str(folder), drop_last=True)
    for seed, (split, size) in enumerate(sizes.items()):
        images = make_images(size, seed)
        cache.store(
            sources.cache_folder(config, split, "0.0.0"), [(images.images, images.labels)],
            num_examples=size, image_shape=(32, 32, 3), class_names=images.class_names, dataset="cifar10/0.0.0",
        )  # fmt: skip
    return config


IMAGES = make_images()
INFO = DatasetInfo.of(IMAGES, all_examples(IMAGES), "standard")


def build(name, devices, *, dtype="float32", platform=None, **parallel):
    """Return the task and the initial state of a network with all augmentations and, in the CNN, dropout."""
    config = Config(
        deterministic=True,
        augment=AugmentConfig(flip="alternating", crop_padding=2, cutout=4),
        model=dataclasses.replace(NETWORKS[name], dtype=dtype),
        optim=OptimConfig(name="sgd", learning_rate=1e-3, momentum=0.9),
        train=TrainConfig(batch_size=BATCH, epochs=2),
        parallel=ParallelConfig(**parallel),
    )
    task, init = setup(config, INFO, devices, platform=platform)
    return task, init(0, IMAGES.images)


def batch_of(number):
    index = np.arange(BATCH * number, BATCH * (number + 1), dtype=np.int32) % SIZE
    epoch = (np.arange(BATCH, dtype=np.int32) + number) % 3
    return gather(IMAGES.images, IMAGES.labels, Indices(index, epoch, index >= 0))


def call(task, step, state, inputs, precision="highest"):
    """Compile `step` with the task's layout and run it; `inputs` are on the host."""
    inputs = task.layout.shard_batch(inputs)
    with jax.default_matmul_precision(precision):
        return jax.device_get(task.layout.compile(step, state, inputs)(state, inputs))


def random_bits(task, state, batch):
    """Return the results of random bits in a step: the augmented bytes, the squares of cutout, and a dropout mask."""
    keys, dropout_keys = steps._keys(state, batch, batch.epoch)
    first_epoch_keys, _ = steps._keys(state, batch, jnp.zeros_like(batch.epoch))
    context = Context(
        config=task.augment, platform=task.layout.platform, epoch=batch.epoch, epoch_keys=keys,
        first_epoch_keys=first_epoch_keys, next_row=functools.partial(steps.next_row, task),
    )  # fmt: skip
    target = jax.nn.one_hot(batch.label, task.num_classes)
    moved = flip_and_crop(Examples(batch.image, target), context).image
    squares = cutout(Examples(jnp.ones(batch.image.shape), target), context).image
    kept = dropout(jnp.ones((len(batch.label), 1000)), dropout_keys, 0.3)
    return [steps.all_gather(task, array.astype(jnp.int32)) for array in (moved, squares, kept > 0)]


def assert_trees_equal(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def bits_of(name, devices, **parallel):
    """Return the arguments of `call` for the random bits of a batch."""
    task, state = build(name, devices, **parallel)
    return task, functools.partial(random_bits, task), state, batch_of(1)


@contextlib.contextmanager
def gradients_kept():
    """Replace the optimizer of all tasks by one that keeps the gradient as its state; yield it."""
    optimizer = optax.trace(decay=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps.Task, "optimizer", property(lambda task: optimizer))
        yield optimizer


def loss_and_gradient(task, state, precision):
    """Return the loss of a training step and its gradient, as one vector."""
    with gradients_kept() as optimizer:
        state = state._replace(opt_state=optimizer.init(state.params))
        state, values = call(task, functools.partial(steps.train_step, task), state, batch_of(0), precision)
    return float(values["loss"]), np.concatenate([x.ravel() for x in jax.tree.leaves(state.opt_state)])


@functools.cache
def on_cpu(name):
    """Return the initial state, on the host, and the loss and gradient on the CPU, in float32."""
    task, state = build(name, jax.devices("cpu")[:1])
    return jax.device_get(state), loss_and_gradient(task, state, "highest")


@functools.cache
def three_steps(backend, count):
    """Return the losses, the parameters and the random bits on `count` devices."""
    devices = jax.devices()[:count]
    bits = call(*bits_of("cnn", devices, backend=backend))
    task, state = build("cnn", devices, backend=backend)
    inputs = task.layout.shard_batch(batch_of(0))
    with jax.default_matmul_precision("highest"):
        step = task.layout.compile(functools.partial(steps.train_step, task), state, inputs, donate=True)
    losses = []
    for number in range(3):
        state, values = step(state, task.layout.shard_batch(batch_of(number)))
        losses.append(float(values["loss"]))
    return losses, jax.device_get(state.params), bits
