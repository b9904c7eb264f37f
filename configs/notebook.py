"""The reference CNN, trained like the Keras notebook: Adam with a constant learning rate, no augmentation.

Command:  python main.py --config configs/notebook.py
Hardware: two cores of an AMD EPYC (Zen 5), no GPU; Python 3.11, jax 0.10.2
Accuracy: 64.88 % (mean of n=6; standard deviation 3.08)
Operations: 0.0127 PFLOP
Time:     1 min 49 s (seed 0), including compilation and evaluations
Keras:    65.77 % (mean of n=6; standard deviation 1.39); Keras 3.15 on TensorFlow 2.21, same initial weights, on an AMD
          EPYC (Zen 3), measured by python -m benchmarks.keras_notebook --seeds 0 1 2 3 4 5

These are the accuracies after 10 epochs. At the best epoch of each run, the means are 67.53 % (standard deviation 0.56)
in this project and 67.31 % (standard deviation 0.50) in Keras.

For seeds 0, 1 and 2 alone, the accuracies are 63.00 % and 67.71 % (best epoch) in this project, and 66.15 % and 67.22 %
in Keras. The accuracy of the last epoch is noisy: in both, test accuracy changes by several points from epoch to epoch.
In this project, BatchNorm's running averages lag behind the weights: with statistics recomputed on 10,000 training
images, seeds 0, 1 and 2 end at 68.2, 69.1 and 68.4 %.
"""

from cifar_flax.config import AugmentConfig, CNNConfig, Config, DataConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10", pipeline="auto"),
        augment=AugmentConfig(normalization="unit"),
        model=CNNConfig(),
        optim=OptimConfig(name="adam", learning_rate=1e-3, eps=1e-7),
        train=TrainConfig(batch_size=128, epochs=10, steps_per_call=50),
    )
