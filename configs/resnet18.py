"""ResNet-18, a common baseline, trained for 200 epochs with SGD and a cosine schedule.

Command:  python main.py --config configs/resnet18.py
Hardware: not measured
Accuracy: not measured; 95 % is commonly reported
Operations: 33.7 PFLOP
Time:     not measured
"""

from cifar_flax.config import AugmentConfig, Config, DataConfig, EvalConfig, OptimConfig, ResNetConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10", pipeline="auto"),
        augment=AugmentConfig(flip="random", crop_padding=4),
        model=ResNetConfig(dtype="auto"),
        optim=OptimConfig(name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine"),
        train=TrainConfig(batch_size=128, epochs=200, steps_per_call=50),
        eval=EvalConfig(batch_size=1000),
    )
