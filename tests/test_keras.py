"""The reference network beside Keras itself, which comes with TensorFlow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_flax.data.augment import AugmentConfig
from cifar_flax.data.batches import Batch
from cifar_flax.models import CNNConfig
from cifar_flax.runtime.devices import ParallelConfig, make_layout
from cifar_flax.training import optimizers, state, steps
from cifar_flax.training.averaging import AveragingConfig

BATCH = 32
EPS = 1e-12


def test_the_same_weights_and_batches_train_alike():
    """Loss, gradients, BatchNorm statistics and Adam: equal for as long as rounding errors stay small.

    Dropout is off, the only part that cannot be the same bit for bit. Adam's epsilon is too small to matter: Keras adds
    it before the bias correction, as in Kingma and Ba 2015, end of section 2, optax after it, as in their algorithm 1.
    """
    import keras

    from benchmarks import keras_notebook

    config = optimizers.OptimConfig(name="adam", learning_rate=1e-3, eps=EPS)
    optimizer = optimizers.make_optimizer(config, 100, 10)
    network = CNNConfig(conv_dropout=0.0, hidden_dropout=0.0)
    graphdef, init = state.create(network, (32, 32, 3), 10, optimizer, AveragingConfig(), platform="cpu")
    train_state = init(jnp.uint32(0), None)
    task = steps.Task(
        graphdef=graphdef,
        optimizer=optimizer,
        schedule=optimizers.make_schedule(config, 100, 10),
        mean=(0.0,) * 3,
        std=(255.0,) * 3,
        augment=AugmentConfig(),
        label_smoothing=0.0,
        averaging=AveragingConfig(),
        total_steps=100,
        layout=make_layout(ParallelConfig()),
        sync_batchnorm=True,
    )
    train_step = jax.jit(functools.partial(steps.train_step, task))

    model = keras_notebook.build(network, train_state.params)
    assert model.count_params() == 3_693_002 + 64  # the running statistics
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3, epsilon=EPS), loss, jit_compile=False)

    rng = np.random.default_rng(0)
    for _ in range(4):
        label = rng.integers(0, 10, BATCH).astype(np.int32)
        image = (rng.integers(0, 100, (BATCH, 32, 32, 3)) + 15 * label[:, None, None, None]).astype(np.uint8)
        index = np.arange(BATCH, dtype=np.int32)
        batch = Batch(image, label, index, np.zeros_like(index), np.ones(BATCH, bool))
        train_state, values = train_step(train_state, batch)
        theirs = model.train_on_batch(image.astype(np.float32) / 255, label, return_dict=True)["loss"]
        model.reset_metrics()
        assert float(values["loss"]) == pytest.approx(float(theirs), rel=1e-4)
        # A filter that is active almost everywhere has a bias whose gradient, before BatchNorm, is little but rounding.
        # Adam makes a full step of it, up or down, and the running mean follows by 1 %: at most 2e-4 in four steps.
        for name, other in zip(("mean", "var"), model.get_layer("norm").get_weights()[2:], strict=True):
            np.testing.assert_allclose(train_state.batch_stats["norm"][name], other, atol=2e-4)
