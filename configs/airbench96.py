"""96 % on CIFAR-10 in 1,776 steps: a wider, deeper, residual airbench network with SGD and Lookahead.

Command:  python main.py --config configs/airbench96.py
Hardware: not measured
Accuracy: not measured; the original reports 96.03 % (n=400)
Operations: 4.62 PFLOP
Time:     not measured; the original takes 34.7 s on an NVIDIA A100

Source: `legacy/airbench96.py` of the repository KellerJordan/cifar10-airbench. The original sums the loss
over the batch, whereas this project averages it: learning rates are multiplied by the batch size, and weight decays are
divided by it.
"""

from cifar_flax.config import (
    AirbenchConfig,
    AugmentConfig,
    AveragingConfig,
    Config,
    DataConfig,
    EvalConfig,
    GroupConfig,
    OptimConfig,
    TrainConfig,
)

STEPS_PER_EPOCH = 48  # batches of 1,024 images; the remaining 848 images are dropped
MOMENTUM = 0.85
RATE = 9.0 / (1 + 1 / (1 - MOMENTUM))  # divisor: the original's estimate of how Nesterov momentum enlarges steps
DECAY = 0.012 / 9.0  # the original's weight decay divided by its learning rate
BIAS = 64  # learning rate of the biases as a multiple of RATE


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10", pipeline="resident", drop_last=True),
        augment=AugmentConfig(flip="alternating", crop_padding=4, cutout=12),
        model=AirbenchConfig(dtype="auto", widths=(128, 384, 512), depth=3, residual=True, norm_decay=0.9, init="sgd"),
        optim=OptimConfig(
            name="sgd",
            learning_rate=RATE,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            schedule="linear",
            warmup_epochs=177 / STEPS_PER_EPOCH,
            warmup_start=0.2,
            biases=GroupConfig(learning_rate=BIAS * RATE, weight_decay=DECAY / BIAS),
            whitening=GroupConfig(learning_rate=RATE, weight_decay=DECAY, frozen_from=3),
        ),
        averaging=AveragingConfig(name="lookahead", decay=0.95, every=5),
        train=TrainConfig(batch_size=1024, epochs=37, label_smoothing=0.2, steps_per_call=48, log_every=48),
        eval=EvalConfig(batch_size=2000, tta="mirror_translate"),
    )
