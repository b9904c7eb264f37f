"""The handwritten digits of scikit-learn, with the network and training loop of CIFAR-10. Needs no download.

Command:  python main.py --config configs/quickstart.py
Hardware: two cores of an AMD EPYC (Zen 5), no GPU; Python 3.11, jax 0.10.2
Accuracy: 98.50 % (mean of n=3; standard deviation 0.16)
Time:     20 s, including compilation and evaluation; 12 to 14 s with cached compiled programs
"""

from cifar_flax.config import AugmentConfig, Config, DataConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="digits", pipeline="resident"),
        augment=AugmentConfig(crop_padding=2),
        optim=OptimConfig(name="adamw", learning_rate=1e-3, schedule="cosine", warmup_epochs=1, weight_decay=0.02),
        train=TrainConfig(batch_size=64, epochs=15, log_every=10, steps_per_call=10),
    )
