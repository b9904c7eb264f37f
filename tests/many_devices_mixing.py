"""Augmentations that mix examples, with different layouts; test_parallel.py runs this file as `many_devices.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from many_devices import LAYOUTS, batches, build

from cifar_flax.data.augment import AugmentConfig, Context, Examples
from cifar_flax.data.augment.mix import mix
from cifar_flax.training import steps


@pytest.mark.parametrize(("backend", "devices"), LAYOUTS)
def test_next_row_is_that_of_the_whole_batch(backend, devices):
    task, state = build(backend, devices)
    batch = next(batches())

    def step(params, batch):
        return steps.all_gather(task, steps.next_row(task, batch.index))

    arguments = state.params, task.layout.shard_batch(batch)
    found = task.layout.compile(step, *arguments)(*arguments)
    np.testing.assert_array_equal(found, np.roll(batch.index, -1))


def test_mixing_does_not_depend_on_the_layout():
    def mixed(backend, devices):
        """Return the images and targets of mixup and CutMix, of the whole batch."""
        task, state = build(backend, devices)

        def step(state, batch):
            keys, _ = steps._keys(state, batch, batch.epoch)
            context = Context(
                config=AugmentConfig(mixup=1.0, cutmix=1.0), platform="cpu", epoch=batch.epoch, epoch_keys=keys,
                first_epoch_keys=keys, next_row=functools.partial(steps.next_row, task),
            )  # fmt: skip
            examples = mix(Examples(batch.image.astype(jnp.float32), jax.nn.one_hot(batch.label, 10)), context)
            return jax.tree.map(functools.partial(steps.all_gather, task), examples)

        arguments = state, task.layout.shard_batch(next(batches()))
        return jax.device_get(task.layout.compile(step, *arguments)(*arguments))

    for found, expected in zip(mixed("shard_map", 8), mixed("jit", 1), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
