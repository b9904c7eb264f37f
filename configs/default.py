"""The reference CNN with AdamW, a cosine schedule, flips, crops and label smoothing.

Command:  python main.py --config configs/default.py
Hardware: two cores of an Intel Xeon (Emerald Rapids), no GPU; Python 3.13, jax 0.12
Accuracy: 77.85 % (mean of n=3; standard deviation 0.20)
Operations: 0.0355 PFLOP
Time:     7 min 31 s (seed 0), including compilation and evaluations
Memory:   1.7 GiB at its peak (seed 0)
"""

from cifar_flax.config import AugmentConfig, CNNConfig, Config, DataConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10", pipeline="auto"),
        augment=AugmentConfig(flip="random", crop_padding=2),
        model=CNNConfig(),
        optim=OptimConfig(name="adamw", learning_rate=2e-3, schedule="cosine", warmup_epochs=1.6, weight_decay=0.02),
        train=TrainConfig(batch_size=256, epochs=28, label_smoothing=0.1, steps_per_call=50),
    )
