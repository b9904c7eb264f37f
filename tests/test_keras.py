"""Compare training of the reference CNN with Keras, which is installed with TensorFlow."""

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


def test_training_steps_equal_keras():
    """Train with the same weights and batches; losses and BatchNorm statistics agree within rounding errors.

    There are only four steps because rounding errors grow. Dropout is off because its random bits differ. Adam's
    epsilon is negligibly small because Keras adds it before the bias correction, as in Kingma and Ba 2015, end of
    section 2, and optax after it, as in their algorithm 1.
    """
    keras = pytest.importorskip("keras")

    from benchmarks import keras_notebook

    config = optimizers.OptimConfig(name="adam", learning_rate=1e-3, eps=EPS)
    network = CNNConfig(conv_dropout=0.0, hidden_dropout=0.0)
    model = state.create_model(network, (32, 32, 3), 10, platform="cpu")
    rates = optimizers.learning_rates(config, 100, 10)
    optimizer = optimizers.make_optimizer(config, rates, model.param_groups)
    train_state = state.init(model, optimizer, AveragingConfig(), jnp.uint32(0), None)
    task = steps.Task(
        graphdef=model.graphdef,
        optim=config,
        steps_per_epoch=10,
        param_groups=model.param_groups,
        image_shape=(32, 32, 3),
        mean=(0.0,) * 3,
        std=(255.0,) * 3,
        augment=AugmentConfig(),
        num_classes=10,
        label_smoothing=0.0,
        averaging=AveragingConfig(),
        total_steps=100,
        layout=make_layout(ParallelConfig()),
        sync_batchnorm=True,
    )
    train_step = jax.jit(functools.partial(steps.train_step, task))

    model = keras_notebook.build(network, train_state.params)
    assert model.count_params() == 3_693_002 + 64  # parameters and running statistics
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
        # BatchNorm cancels the bias of a filter that is active almost everywhere, so the gradient of this bias is
        # mostly rounding error. Adam turns it into a full step in either direction, and the running mean follows by
        # 1 %: at most 2e-4 in four steps.
        for name, other in zip(("mean", "var"), model.get_layer("norm").get_weights()[2:], strict=True):
            np.testing.assert_allclose(train_state.batch_stats["norm"][name], other, atol=2e-4)
