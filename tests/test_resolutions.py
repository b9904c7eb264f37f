"""Test progressive resizing: the resized images, the programs of the sizes, and resuming across a change of size."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image
from stops import assert_stops_change_no_bit

from cifar_flax.config import AirbenchConfig, AugmentConfig, CNNConfig
from cifar_flax.data.augment import normalize, resize
from cifar_flax.data.batches import Batch
from cifar_flax.errors import ConfigError
from cifar_flax.training import steps
from cifar_flax.training.setup import require_resolutions
from cifar_flax.training.trainer import Trainer


@pytest.fixture
def config(tiny_config):
    """Return a config that trains at 12 pixels in the first epoch, at 16 in the second, and at 32 from then on."""
    tiny_config.model = AirbenchConfig(widths=(4, 8, 8), global_pool=True)
    tiny_config.augment = AugmentConfig()
    tiny_config.train.resolutions = ((0, 12), (1, 16), (2, 32))
    tiny_config.train.label_smoothing = 0.0
    return tiny_config


@pytest.mark.parametrize("side", [8, 12, 24, 32, 40])
def test_resized_images_equal_those_of_pillow(side):
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    found = np.asarray(jax.jit(resize, static_argnums=1)(images, side))
    for image, channel in itertools.product(range(2), range(3)):
        plane = Image.fromarray(images[image, :, :, channel])
        expected = plane.resize((side, side), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(found[image, :, :, channel], expected, atol=1e-5)


def test_each_size_has_a_program_and_calls_end_where_it_changes(config):
    config.train.steps_per_call = 20
    trainer = Trainer(config)
    assert trainer.task.sides == ((0, 12), (11, 16), (23, 32))
    assert [(first, phase.side) for first, phase in steps.phases(trainer.task)] == [(0, 12), (11, 16), (23, 32)]
    assert [(first, phase.side) for first, phase in steps.phases(trainer.task, 15)] == [(15, 16), (23, 32)]
    assert {11, 23} <= set(trainer.timetable.calls(0, trainer.total_steps))


def test_a_step_trains_on_the_resized_images_and_takes_fewer_operations(config):
    """The loss of a step is that of the network on images that were resized before."""
    trainer = Trainer(config)
    task, state = trainer.task, trainer.initial_state
    # Not the digits: their three channels are equal, so the whitening layer would amplify rounding errors.
    images = np.random.default_rng(0).integers(0, 256, (64, *task.image_shape), np.uint8)
    index = np.arange(64, dtype=np.int32)
    batch = jax.device_put(Batch(images, index % 10, index, 0 * index, index >= 0))
    (_, small), _, (_, whole) = steps.phases(task)
    small, whole = (jax.jit(functools.partial(steps.train_step, one)).lower(state, batch) for one in (small, whole))

    def expected(side):
        model = nnx.merge(task.graphdef, state.params, state.batch_stats)
        images = resize(normalize(batch.image, task.mean, task.std), side)
        logits = model(images, jax.random.split(jax.random.key(0), 64))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()

    loss = float(small.compile()(state, batch)[1]["loss"])
    assert loss == pytest.approx(float(jax.jit(expected, static_argnums=0)(12)), rel=1e-4)
    before, after = (lowered.cost_analysis()["flops"] for lowered in (whole, small))
    assert after < before / 4  # 144 instead of 1,024 pixels


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["streaming", "resident"])
def test_a_run_that_stops_before_and_after_a_change_of_size_ends_with_the_same_bits(
    pipeline, config, tmp_path, monkeypatch
):
    config.data.pipeline = pipeline
    config.train = dataclasses.replace(config.train, steps_per_call=4, resolutions=((0, 12), (1, 16)))
    assert_stops_change_no_bit(config, tmp_path, monkeypatch, (8, 16))


def test_a_network_whose_parameters_depend_on_the_size_is_refused(config):
    config.model = CNNConfig(width=4, hidden=16)
    with pytest.raises(ConfigError, match=r"train.resolutions=.*: cnn has other parameters at 12x12"):
        Trainer(config)
    config.model = AirbenchConfig(widths=(4, 8, 8))
    with pytest.raises(ConfigError, match=r"train.resolutions=.*: 12x12 pixels are too few for airbench"):
        Trainer(config)


def test_images_must_be_square_and_not_become_larger(config):
    with pytest.raises(ConfigError, match=r"train.resolutions=.*: needs square images, but these are 32x24"):
        require_resolutions(config, (32, 24, 3), 10)
    with pytest.raises(ConfigError, match=r"train.resolutions=.*: sides must be at most 28 pixels"):
        require_resolutions(config, (28, 28, 3), 10)
