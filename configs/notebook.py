"""The reference CNN the Keras notebook's way: Adam with a constant learning rate, no augmentation.

Command:  python main.py --config configs/notebook.py
Hardware: two cores of an AMD EPYC (Zen 5), no GPU; Python 3.11, jax 0.10.2
Accuracy: after 10 epochs 64.88 % of the test split, at the best of them 67.53 % (means of seeds 0 to 5; standard
          deviations 3.08 and 0.56)
Keras:    65.77 % and 67.31 % (1.39 and 0.50), Keras 3.15 on TensorFlow 2.21, same initial weights, on an AMD EPYC
          (Zen 3), by python -m benchmarks.keras_notebook --seeds 0 1 2 3 4 5
Time:     1 min 49 s (seed 0), compilation and evaluations included

Seeds 0, 1 and 2 alone: 63.00 % and, at best, 67.71 % here, 66.15 % and 67.22 % in Keras. The last epoch's figure says
little: the test split's accuracy swings by several points from epoch to epoch in both. Here, at least, BatchNorm's
running averages trail the weights: with statistics measured afresh on 10,000 training images, seeds 0, 1 and 2 end at
68.2, 69.1 and 68.4 %.
"""

from cifar_flax.config import AugmentConfig, CNNConfig, Config, DataConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10"),
        augment=AugmentConfig(normalization="unit"),
        model=CNNConfig(),
        optim=OptimConfig(name="adam", learning_rate=1e-3, eps=1e-7),
        train=TrainConfig(batch_size=128, epochs=10),
    )
