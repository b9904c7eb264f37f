"""95 % on CIFAR-10 in 720 steps: a wider airbench network with SGD and Lookahead.

Command:  python main.py --config configs/airbench95.py
Hardware: not measured
Accuracy: not measured; the original reports 95.01 % (n=200)
Operations: 1.24 PFLOP
Time:     not measured; the original takes 10.4 s on an NVIDIA A100

Source: `legacy/airbench95.py` of the repository KellerJordan/cifar10-airbench. The original sums the loss
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
RATE = 10.0 / (1 + 1 / (1 - MOMENTUM))  # divisor: the original's estimate of how Nesterov momentum enlarges steps
DECAY = 0.0153 / 10.0  # the original's weight decay divided by its learning rate
BIAS = 64  # learning rate of the biases as a multiple of RATE


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10", pipeline="resident", drop_last=True),
        augment=AugmentConfig(flip="alternating", crop_padding=2),
        model=AirbenchConfig(dtype="auto", widths=(128, 384, 384), init="sgd"),
        optim=OptimConfig(
            name="sgd",
            learning_rate=RATE,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            schedule="linear",
            warmup_epochs=165 / STEPS_PER_EPOCH,
            warmup_start=0.2,
            final_share=0.07,
            biases=GroupConfig(learning_rate=BIAS * RATE, weight_decay=DECAY / BIAS),
            whitening=GroupConfig(learning_rate=RATE, weight_decay=DECAY, frozen_from=3),
        ),
        averaging=AveragingConfig(name="lookahead", decay=0.95, every=5),
        train=TrainConfig(batch_size=1024, epochs=15, label_smoothing=0.2, steps_per_call=48, log_every=48),
        eval=EvalConfig(batch_size=2000, tta="mirror_translate"),
    )
