"""The default run.

Command:  python main.py --config configs/default.py
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
        data=DataConfig(name="cifar10", pipeline="streaming"),
        augment=AugmentConfig(flip=True, crop_padding=2),
        model=CNNConfig(),
        optim=OptimConfig(name="adamw", learning_rate=2e-3, schedule="cosine", warmup_epochs=1.6, weight_decay=0.02),
        train=TrainConfig(batch_size=256, epochs=16, label_smoothing=0.1),
    )
