"""The reference CNN the Keras notebook's way: Adam with a constant learning rate, no augmentation.

Command:  python main.py --config configs/notebook.py
Hardware: two cores of an AMD EPYC (Zen 3), no GPU; Python 3.11, jax 0.10.2
Accuracy: after 10 epochs 65.11 % of the test split, at the best of them 66.95 % (means of seeds 0 to 5; standard
          deviations 1.77 and 0.83)
Keras:    63.52 % and 65.60 % (2.04 and 1.16), Keras 3.15 on TensorFlow 2.21, seeds 0 to 2 on two other cores, by
          python -m benchmarks.keras_notebook --seeds 0 1 2 3 4 5
Time:     5 min 33 s (seed 5), compilation and evaluations included

Training goes alike: the accuracy after epochs 1 to 7 is 48, 60, 65, 70, 73, 76, 78 % in Keras (seed 3) and 47, 59, 65,
69, 72, 76, 78 % here (seed 0). The test split's swings by several points from epoch to epoch in both. Here, at least,
BatchNorm's running averages trail the weights: with statistics measured afresh on 10,000 training images, seeds 0, 1
and 2 end at 68.0, 69.2 and 68.2 % instead of 63.2, 66.8 and 64.6 %.
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
