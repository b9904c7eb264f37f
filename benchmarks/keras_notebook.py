"""The reference CNN trained by Keras on TensorFlow: what `configs/notebook.py` is compared with.

    pip install keras tensorflow-cpu tensorflow-datasets importlib_resources
    python -m benchmarks.keras_notebook --seeds 0 1 2 --epochs 10

Adam 1e-3, batch 128, no augmentation, inputs scaled to [0, 1]. One line of JSON per seed on standard output.
"""

import argparse
import json
import time

import keras
import numpy as np
import tensorflow_datasets as tfds
from keras import layers


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """A CIFAR-10 split as float32 images in [0, 1], [N, 32, 32, 3], and integer labels [N]."""
    data = tfds.load("cifar10", split=split, batch_size=-1, as_supervised=True)
    images, labels = tfds.as_numpy(data)
    return images.astype(np.float32) / 255, labels


def build() -> keras.Model:
    return keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.BatchNormalization(),
            layers.Dropout(0.2),
            layers.Flatten(),
            layers.Dense(512, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    train, test = load("train"), load("test")
    for seed in args.seeds:
        keras.utils.set_random_seed(seed)
        model = build()
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False)
        start = time.perf_counter()
        history = model.fit(
            *train, batch_size=128, epochs=args.epochs, validation_data=test, validation_batch_size=500, verbose=0
        )
        accuracies = [round(100 * a, 2) for a in history.history["val_accuracy"]]
        result = {"seed": seed, "test_accuracy_per_epoch": accuracies, "best": max(accuracies), "last": accuracies[-1]}
        print(json.dumps(result | {"seconds": round(time.perf_counter() - start)}), flush=True)


if __name__ == "__main__":
    main()
