"""Keras with `model.fit` and a `tf.data` pipeline, on the backend selected by KERAS_BACKEND."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from benchmarks.runner import EVAL_BATCHES, Workload

VERSIONS = {"keras": keras.__version__, keras.backend.backend(): __import__(keras.backend.backend()).__version__}


class Runner:
    def __init__(self, workload: Workload):
        config = workload.config
        keras.utils.set_random_seed(config.seed)
        self._model = cnn(config.model) if config.model.name == "cnn" else airbench(config.model)
        self._model.compile(
            optimizer(config, workload.learning_rates),
            keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=config.train.label_smoothing),
            metrics=["accuracy"],
        )
        mean, std = (np.asarray(statistic, np.float32) for statistic in (workload.mean, workload.std))

        def normalize(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return (tf.cast(image, tf.float32) - mean) / std, tf.one_hot(label, 10)

        def augment(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            if padding := config.augment.crop_padding:
                padded = tf.pad(image, [(padding, padding), (padding, padding), (0, 0)], "REFLECT")
                image = tf.image.random_crop(padded, tf.shape(image))
            return tf.image.random_flip_left_right(image) if config.augment.flip == "random" else image, label

        examples = tf.data.Dataset.from_tensor_slices((workload.train_images, workload.train_labels))
        examples = examples.shuffle(len(workload.train_labels)).repeat()
        if config.augment.flip == "random" or config.augment.crop_padding:
            examples = examples.map(augment, num_parallel_calls=tf.data.AUTOTUNE)
        self._train = examples.batch(config.train.batch_size, drop_remainder=True).map(normalize).prefetch(2)
        test = tf.data.Dataset.from_tensor_slices((workload.test_images, workload.test_labels))
        self._test = {size: test.batch(size).map(normalize).prefetch(2) for size in EVAL_BATCHES}

    def train(self, steps: int) -> None:
        self._model.fit(self._train, steps_per_epoch=steps, epochs=1, verbose=0)

    def evaluate(self, batch_size: int) -> float:
        return float(self._model.evaluate(self._test[batch_size], verbose=0, return_dict=True)["accuracy"])


def cnn(config: Any) -> keras.Model:
    """Return the reference network for images [32, 32, 3] and 10 classes; it returns logits."""
    return keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.Conv2D(config.width, 3, activation="relu", name="conv"),
            layers.MaxPooling2D(2),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(config.conv_dropout),
            layers.Flatten(),
            layers.Dense(config.hidden, activation="relu", name="hidden"),
            layers.Dropout(config.hidden_dropout),
            layers.Dense(10, name="head"),
        ]
    )


class Bias(layers.Layer):
    def build(self, input_shape: tuple[int, ...]) -> None:
        self.bias = self.add_weight(shape=input_shape[-1:], initializer="zeros")

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        return x + self.bias


def airbench(config: Any) -> keras.Model:
    def gelu() -> layers.Layer:
        return layers.Activation(lambda x: keras.activations.gelu(x, approximate=False))

    def norm() -> layers.Layer:
        return layers.BatchNormalization(momentum=0.6, epsilon=1e-12, scale=False)

    network = [layers.Input((32, 32, 3)), layers.Conv2D(24, 2, use_bias=False, trainable=False), Bias(), gelu()]
    for width in config.widths:
        for number in range(config.depth):
            network.append(layers.Conv2D(width, 3, padding="same", use_bias=False))
            network += [layers.MaxPooling2D(2)] * (number == 0) + [norm(), gelu()]
    network += [layers.MaxPooling2D(3), layers.Flatten(), layers.Dense(10, use_bias=False)]
    return keras.Sequential([*network, layers.Rescaling(1 / config.widths[-1])])


class Table(keras.optimizers.schedules.LearningRateSchedule):
    """Look up the learning rate of each step in a table."""

    def __init__(self, values: np.ndarray):
        self._values = keras.ops.convert_to_tensor(values)

    def __call__(self, step: keras.KerasTensor) -> keras.KerasTensor:
        return keras.ops.take(self._values, keras.ops.cast(step, "int32"))


def optimizer(config: Any, rates: np.ndarray) -> keras.optimizers.Optimizer:
    settings = config.optim
    if settings.name == "sgd":
        return keras.optimizers.SGD(Table(rates), momentum=settings.momentum or 0.0, nesterov=True)
    if not settings.weight_decay:
        return keras.optimizers.Adam(Table(rates), epsilon=settings.eps or 1e-8)
    adamw = keras.optimizers.AdamW(Table(rates), weight_decay=settings.weight_decay, epsilon=settings.eps or 1e-8)
    adamw.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return adamw
