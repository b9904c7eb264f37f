"""The notebook run.

Command:  python main.py --config configs/notebook.py
Hardware: not measured
Accuracy: not measured
Time:     not measured
"""

from cifar_flax.config import Config, TrainConfig
from cifar_flax.data.augment import AugmentConfig
from cifar_flax.data.sources import DataConfig
from cifar_flax.models import CNNConfig
from cifar_flax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10"),
        augment=AugmentConfig(normalization="unit"),
        model=CNNConfig(),
        optim=OptimConfig(name="adam", learning_rate=1e-3, eps=1e-7),
        train=TrainConfig(batch_size=128, epochs=10),
    )
