"""The reference network beside Keras itself, which comes with TensorFlow."""

import functools

import jax
import numpy as np
import pytest

from cifar_flax import optim, state, steps
from cifar_flax.data.augment import AugmentConfig
from cifar_flax.data.batches import Batch
from cifar_flax.models import CNNConfig

BATCH = 32


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_same_weights_and_batches_train_alike():
    """Loss, BatchNorm statistics and Adam: equal at once, and until rounding errors have grown.

    Dropout is off, the only part that cannot be the same bit for bit.
    """
    import keras
    from keras import layers

    config = optim.OptimConfig(name="adam", learning_rate=1e-3, eps=1e-7)
    schedule = optim.make_schedule(config, 100, 10)
    optimizer = optim.make_optimizer(config, schedule)
    network = CNNConfig(conv_dropout=0.0, hidden_dropout=0.0)
    graphdef, train_state = state.create(network, (32, 32, 3), 10, optimizer, 0)
    task = steps.Task(
        graphdef=graphdef,
        optimizer=optimizer,
        schedule=schedule,
        mean=(0.0,) * 3,
        std=(255.0,) * 3,
        augment=AugmentConfig(),
        label_smoothing=0.0,
    )
    train_step = jax.jit(functools.partial(steps.train_step, task))

    stack = {
        "conv": layers.Conv2D(32, 3, activation="relu"),
        "pool": layers.MaxPooling2D(2),
        "norm": layers.BatchNormalization(),
        "flatten": layers.Flatten(),
        "hidden": layers.Dense(512, activation="relu"),
        "head": layers.Dense(10, activation="softmax"),
    }
    model = keras.Sequential([layers.Input((32, 32, 3)), *stack.values()])
    assert model.count_params() == 3_693_002 + 64  # the running statistics
    for name in ("conv", "hidden", "head"):
        stack[name].set_weights([np.asarray(train_state.params[name][part]) for part in ("kernel", "bias")])
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", jit_compile=False)

    rng = np.random.default_rng(0)
    for step in range(4):
        label = rng.integers(0, 10, BATCH).astype(np.int32)
        image = (rng.integers(0, 100, (BATCH, 32, 32, 3)) + 15 * label[:, None, None, None]).astype(np.uint8)
        index = np.arange(BATCH, dtype=np.int32)
        batch = Batch(image, label, index, np.zeros_like(index), np.ones(BATCH, bool))
        train_state, values = train_step(train_state, batch)
        theirs = model.train_on_batch(image.astype(np.float32) / 255, label, return_dict=True)["loss"]
        model.reset_metrics()
        assert float(values["loss"]) == pytest.approx(float(theirs), rel=1e-6 if step == 0 else 1e-2)
        for name, other in zip(("mean", "var"), stack["norm"].get_weights()[2:], strict=True):
            np.testing.assert_allclose(train_state.batch_stats["norm"][name], other, atol=1e-6 if step == 0 else 1e-3)
