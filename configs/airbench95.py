"""95 % of CIFAR-10 in 720 steps: airbench's network, wider, with SGD and Lookahead.

Command:  python main.py --config configs/airbench95.py
Hardware: not measured
Accuracy: not measured; the original's is 95.01 % (n=200)
Time:     not measured; the original's is 10.4 s on an NVIDIA A100

Source: `legacy/airbench95.py` of the repository KellerJordan/cifar10-airbench. There the loss is the sum over the
batch, here it is the mean: learning rates are times the batch size, and weight decays divided by it.
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

STEPS_PER_EPOCH = 48  # of 1,024 images; the last 848 are left out
MOMENTUM = 0.85
RATE = 10.0 / (1 + 1 / (1 - MOMENTUM))  # Nesterov momentum multiplies a steady gradient by the divisor
DECAY = 0.0153 / 10.0  # of each group, over its learning rate
BIAS = 64  # times the learning rate


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
