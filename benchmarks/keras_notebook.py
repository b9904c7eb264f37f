"""Train `configs/notebook.py` with Keras on TensorFlow, from the initial weights of this project.

    python -m benchmarks.keras_notebook --seeds 0 1 2

Network, data, optimizer and batch size are those of the config; shuffling and dropout masks are those of Keras. Print
one line of JSON per seed.
"""

import argparse
import json
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.baselines.keras_ import cnn
from cifar_flax.data import sources
from cifar_flax.data.cache import Arrays
from cifar_flax.data.info import DatasetInfo
from cifar_flax.models import CNNConfig
from cifar_flax.training import evaluator
from cifar_flax.training.setup import setup
from configs import notebook


def build(network: CNNConfig, params: dict[str, Any]) -> keras.Model:
    """Return the reference network in Keras, which returns logits, with the weights `params` of this project."""
    model = cnn(network)
    for name in ("conv", "hidden", "head"):
        model.get_layer(name).set_weights([np.asarray(params[name][part]) for part in ("kernel", "bias")])
    return model


def dataset(arrays: Arrays, batch_size: int, shuffle_seed: int | None = None) -> tf.data.Dataset:
    """Return batches of images in [0, 1], float32 [B, 32, 32, 3], and labels [B].

    With `shuffle_seed`, each epoch is shuffled differently. The shuffling of `fit` is not used, because it repeats the
    same order in every epoch after `set_random_seed`.
    """
    batches = tf.data.Dataset.from_tensor_slices((arrays.images, arrays.labels))
    if shuffle_seed is not None:
        batches = batches.shuffle(len(arrays.labels), shuffle_seed)
    return batches.batch(batch_size).map(lambda image, label: (tf.cast(image, tf.float32) / 255, label))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    config = notebook.get_config()
    train, test = sources.load(config.data, "train"), sources.load(config.data, "test")
    info = DatasetInfo.of(train, evaluator.all_examples(train), config.augment.normalization)
    for seed in args.seeds:
        config.seed = seed
        _, init = setup(config, info)
        keras.utils.set_random_seed(seed)
        model = build(config.model, init(seed, None).params)
        adam = keras.optimizers.Adam(config.optim.learning_rate, epsilon=config.optim.eps)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(adam, loss, metrics=["accuracy"], jit_compile=False)
        start = time.perf_counter()
        batches = dataset(train, config.train.batch_size, seed)
        history = model.fit(
            batches, epochs=config.train.epochs, validation_data=dataset(test, 500), shuffle=False, verbose=0
        )
        accuracies = [round(100 * accuracy, 2) for accuracy in history.history["val_accuracy"]]
        result = {"seed": seed, "test_accuracy_per_epoch": accuracies, "best": max(accuracies), "last": accuracies[-1]}
        print(json.dumps(result | {"seconds": round(time.perf_counter() - start)}), flush=True)


if __name__ == "__main__":
    main()
