"""A folder of your own images, in one folder per class, with a small airbench network.

Command:  python main.py --config configs/folder.py --config.data.folder=PATH
Hardware: not measured
Accuracy: not measured
Time:     not measured
"""

from cifar_flax.config import AirbenchConfig, AugmentConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="folder", image_size=64),
        augment=AugmentConfig(flip="random", crop_padding=4, color_jitter=0.2),
        model=AirbenchConfig(widths=(32, 64, 128), global_pool=True, dtype="auto"),
        optim=OptimConfig(name="adamw", learning_rate=5e-3, schedule="cosine", warmup_epochs=2, weight_decay=0.05),
        train=TrainConfig(batch_size=32, epochs=30, steps_per_call=10, log_every=20),
        eval=EvalConfig(tta="mirror"),
    )
