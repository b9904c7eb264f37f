"""Test training and evaluation steps: random bits, metrics, padding, and loops on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cifar_flax import models
from cifar_flax.data import sources
from cifar_flax.data.augment import AugmentConfig, normalize
from cifar_flax.data.batches import Batch, Indices
from cifar_flax.data.info import DatasetInfo
from cifar_flax.models import CNNConfig
from cifar_flax.training import metrics, steps
from cifar_flax.training.averaging import AveragingConfig
from cifar_flax.training.setup import setup
from cifar_flax.training.state import root_keys


@pytest.fixture
def prepared(tiny_config):
    arrays = sources.load(tiny_config.data, "train")
    info = DatasetInfo.of(arrays, np.arange(len(arrays.labels), dtype=np.int32), "standard")
    task, init = setup(tiny_config, info)
    state = init(tiny_config.seed, None)
    index = np.arange(64, dtype=np.int32)
    batch = Batch(arrays.images[:64], arrays.labels[:64], index, np.zeros_like(index), np.ones(64, bool))
    return task, state, jax.device_put(batch)


def take(batch, order):
    return jax.tree.map(lambda x: x[order], batch)


def test_training_decreases_the_loss(prepared):
    task, state, batch = prepared
    step = jax.jit(functools.partial(steps.train_step, task))
    losses = []
    for _ in range(30):
        state, values = step(state, batch)
        losses.append(float(values["loss"]))
    assert int(state.step) == 30
    assert losses[-1] < losses[0] - 0.5


def test_result_does_not_depend_on_the_order_of_the_batch(prepared):
    """The random bits of dropout and augmentation depend on the example, not on its position in the batch."""
    task, state, batch = prepared
    step = jax.jit(functools.partial(steps.train_step, task))
    order = np.random.default_rng(0).permutation(64)
    (one, a), (other, b) = step(state, batch), step(state, take(batch, order))
    assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
    # Rounding errors may change one prediction.
    assert float(a["accuracy"]) == pytest.approx(float(b["accuracy"]), abs=1.01 / 64)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one.batch_stats, other.batch_stats)


def test_random_bits_depend_on_seed_epoch_and_example():
    def bits(seed, epoch, index):
        keys = steps.example_keys(jnp.uint32(seed), jnp.array([epoch], jnp.int32), jnp.array([index], jnp.int32))
        return tuple(np.asarray(jax.random.key_data(keys)).ravel().tolist())

    seen = {bits(*key) for key in np.ndindex(3, 4, 5)}
    assert len(seen) == 3 * 4 * 5


def test_augmentation_and_dropout_use_the_two_halves_of_the_key_of_an_example(prepared):
    """Earlier releases split this key; a run that continues has to draw the same numbers."""
    _, state, batch = prepared
    epoch = batch.epoch + 3
    halves = jax.vmap(jax.random.split, out_axes=1)(steps.example_keys(state.seed, epoch, batch.index))
    for keys, expected in zip(steps._keys(state, batch, epoch), halves, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(expected))


def test_steps_depend_on_epoch_and_seed(prepared):
    """Augmentation and dropout of the same images differ between epochs and seeds."""
    task, state, batch = prepared
    step = jax.jit(functools.partial(steps.train_step, task))

    def loss(seed, epoch):
        other_batch = dataclasses.replace(batch, epoch=batch.epoch + epoch)
        return float(step(state._replace(seed=jnp.uint32(seed)), other_batch)[1]["loss"])

    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3
    assert loss(0, 0) == loss(0, 0)


def test_weights_and_examples_use_different_keys(tiny_config, prepared):
    _, state, _ = prepared
    weights, examples = root_keys(state.seed)
    assert not np.array_equal(jax.random.key_data(weights), jax.random.key_data(examples))
    network = models.build(tiny_config.model, (32, 32, 3), 10, platform="cpu", rngs=nnx.Rngs(weights))
    np.testing.assert_allclose(state.params["head"]["kernel"], network.head.kernel[...], rtol=1e-6)
    key = steps.example_keys(state.seed, jnp.array([2], jnp.int32), jnp.array([3], jnp.int32))[0]
    expected = jax.random.fold_in(jax.random.fold_in(examples, 2), 3)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))


def test_step_metrics_equal_their_definitions(prepared):
    """Without augmentation and dropout, compute the metrics from logits with batch statistics."""
    task, state, batch = prepared
    task = dataclasses.replace(task, augment=AugmentConfig(), label_smoothing=0.3, graphdef=without_dropout())
    state = state._replace(step=jnp.int32(3))  # at step 0 the learning rate is 0
    keys = steps.example_keys(state.seed, batch.epoch, batch.index)

    @jax.jit
    def logits(image):
        model = nnx.merge(task.graphdef, state.params, state.batch_stats)
        return model(normalize(image, task.mean, task.std), keys)

    log_probability = np.asarray(jax.nn.log_softmax(logits(batch.image)))
    own = log_probability[np.arange(64), batch.label]
    _, values = jax.jit(functools.partial(steps.train_step, task))(state, batch)
    expected = -np.mean(0.7 * own + 0.3 * log_probability.mean(axis=1))
    assert float(values["loss"]) == pytest.approx(expected, rel=1e-5)
    expected = float(np.mean(log_probability.argmax(axis=1) == batch.label))
    assert float(values["accuracy"]) == pytest.approx(expected, abs=1.01 / 64)  # rounding may change one prediction
    assert float(values["learning_rate"]) == pytest.approx(float(task.learning_rates[0, 3]))


def without_dropout():
    config = CNNConfig(width=4, hidden=16, conv_dropout=0.0, hidden_dropout=0.0)
    return nnx.graphdef(models.build(config, (32, 32, 3), 10, platform="cpu", rngs=nnx.Rngs(0)))


def test_padding_does_not_change_the_evaluation(prepared):
    task, state, batch = prepared
    step = jax.jit(functools.partial(steps.eval_step, task))
    garbage = jax.random.randint(jax.random.key(0), (64, 32, 32, 3), 0, 256).astype(jnp.uint8)
    mask = np.arange(64) < 40
    padded = Batch(
        jnp.where(mask[:, None, None, None], batch.image, garbage),
        jnp.where(mask, batch.label, 0),
        batch.index,
        batch.epoch,
        jnp.asarray(mask),
    )
    names = tuple("0123456789")
    whole = metrics.add(None, jax.device_get(step((state.params, state.batch_stats), padded)[0]))
    masked = Batch(batch.image, batch.label, batch.index, batch.epoch, jnp.asarray(mask))
    plain = metrics.add(None, jax.device_get(step((state.params, state.batch_stats), masked)[0]))
    assert metrics.summarize(whole, names) == metrics.summarize(plain, names)
    assert metrics.summarize(whole, names)["num_examples"] == 40


def test_a_loop_on_the_device_equals_single_steps(prepared):
    """Include cutout, alternating flips and Lookahead, across the end of an epoch."""
    task, state, batch = prepared
    task = dataclasses.replace(
        task,
        augment=AugmentConfig(flip="alternating", crop_padding=2, cutout=8),
        averaging=AveragingConfig(name="lookahead", decay=0.5, every=2),
    )
    state = state._replace(average=jax.tree.map(jnp.copy, (state.params, state.batch_stats)))
    index = np.random.default_rng(0).integers(0, 64, (4, 32)).astype(np.int32)
    epoch = np.repeat(np.array([[0], [0], [1], [1]], np.int32), 32, axis=1)
    looped, values = jax.jit(functools.partial(steps.train_steps, task))(
        state, Indices(index, epoch, index >= 0), batch.image.reshape(64, -1), batch.label
    )
    step = jax.jit(functools.partial(steps.train_step, task))
    for number in range(4):
        one = Batch(batch.image[index[number]], batch.label[index[number]], index[number], epoch[number], index[0] >= 0)
        state, expected = step(state, one)
        assert float(values["loss"][number]) == pytest.approx(float(expected["loss"]), rel=1e-4)
    assert int(looped.step) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), looped.params, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), looped.average, state.average)


@pytest.mark.parametrize("groups", [(6,), (1, 2, 3), (5, 1)])
def test_the_bits_do_not_depend_on_the_grouping_of_steps_into_calls(looping, groups):
    """One compiled program, whose number of steps is an argument, runs six steps in one or several calls."""
    call, state, indices = looping
    expected_state, expected = call(state, indices, 6)
    losses = []
    for stop, count in zip(np.cumsum(groups), groups, strict=True):
        # The rows after the first `count` are of other examples.
        rows = jax.tree.map(lambda x, first=stop - count: jnp.roll(x, -first, axis=0), indices)
        state, values = call(state, rows, count)
        assert not any(np.asarray(column[count:]).any() for column in values.values())
        losses += values["loss"][:count].tolist()
    assert int(state.step) == 6
    assert losses == expected["loss"].tolist()
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)


@pytest.fixture
def looping(prepared):
    """Return a compiled call of up to six steps, a state, and the indices of six steps."""
    task, state, batch = prepared
    index = np.random.default_rng(0).integers(0, 64, (6, 32)).astype(np.int32)
    indices = jax.device_put(Indices(index, 0 * index, index >= 0))
    compiled = jax.jit(functools.partial(steps.train_steps, task))
    images = batch.image.reshape(len(batch.image), -1)
    return lambda state, indices, count: compiled(state, indices, images, batch.label, count), state, indices


def test_flips_alternate_between_epochs(prepared, monkeypatch):
    """The step passes the keys of epoch 0, without which each epoch would flip at random."""
    task, state, batch = prepared
    task = dataclasses.replace(task, augment=AugmentConfig(flip="alternating"))
    seen, augment = [], steps.augment

    def observed(*arguments):
        augmented = augment(*arguments)
        seen.append(augmented.image)
        return augmented

    monkeypatch.setattr(steps, "augment", observed)

    @jax.jit
    def augmented_images(batch):
        steps.train_step(task, state, batch)
        return seen.pop()

    epochs = (dataclasses.replace(batch, epoch=jnp.full_like(batch.epoch, epoch)) for epoch in range(3))
    first, second, third = (np.asarray(augmented_images(batch)) for batch in epochs)
    np.testing.assert_array_equal(second, first[:, :, ::-1])
    np.testing.assert_array_equal(third, first)


def test_random_bits_do_not_depend_on_the_default_prng_of_jax():
    expected = [jax.random.key_data(key) for key in root_keys(jnp.uint32(3))]
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal([jax.random.key_data(key) for key in root_keys(jnp.uint32(3))], expected)
