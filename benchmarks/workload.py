"""Write the workload of `benchmarks.compare`: a folder with a config of this project, images and learning rates.

The baselines read it without importing this project, so that its import time and memory do not count against them.
"""

import json
from pathlib import Path

import numpy as np

from cifar_flax import config as configs
from cifar_flax.config import Config, TrainConfig
from cifar_flax.data import order, sources
from cifar_flax.data.augment import AugmentConfig
from cifar_flax.data.cache import Arrays
from cifar_flax.data.info import DatasetInfo
from cifar_flax.models import AirbenchConfig, CNNConfig
from cifar_flax.training import optimizers
from cifar_flax.training.optimizers import OptimConfig
from configs import default


def write_speed(folder: Path, network: str, batch_size: int) -> None:
    """Write a workload of random images: the reference CNN with Adam, or airbench's network with Nesterov SGD.

    The content of the images does not affect the speed of a step.
    """
    adam = OptimConfig(name="adam", learning_rate=1e-3, eps=1e-7)
    sgd = OptimConfig(name="sgd", learning_rate=0.01, momentum=0.85)
    cnn = network == "cnn"
    config = Config(
        augment=AugmentConfig(normalization="unit"),
        model=CNNConfig() if cnn else AirbenchConfig(),
        optim=adam if cnn else sgd,
        train=TrainConfig(batch_size=batch_size, epochs=30 if cnn else 5, label_smoothing=0.0 if cnn else 0.2),
    )
    _write(folder, config, _random_images(50_000), _random_images(10_240 if cnn else 1_024))


def write_accuracy(folder: Path) -> None:
    """Write a workload of the default config and CIFAR-10."""
    config = default.get_config()
    _write(folder, config, sources.load(config.data, "train"), sources.load(config.data, "test"))


def _random_images(count: int) -> Arrays:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return Arrays(images, rng.integers(0, 10, count, np.int32), tuple("0123456789"), "random")


def _write(folder: Path, config: Config, train: Arrays, test: Arrays) -> None:
    info = DatasetInfo.of(train, np.arange(len(train.labels), dtype=np.int32), config.augment.normalization)
    steps = order.total_steps(config.train.epochs, info.num_examples, config.train.batch_size)
    schedule = optimizers.make_schedule(config.optim, steps, info.num_examples / config.train.batch_size)
    rates = np.broadcast_to(np.asarray(schedule(np.arange(steps)), np.float32), (steps,))
    values = {"config": configs.to_dict(config), "mean": info.mean, "std": info.std}
    (folder / "workload.json").write_text(json.dumps(values))
    arrays = {"learning_rates": rates}
    for name, split in (("train", train), ("test", test)):
        arrays |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
