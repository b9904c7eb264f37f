"""92 % on CIFAR-10 with less than 0.07 PFLOP: a narrow airbench network, on images of 20 and then 32 pixels.

Command:  python main.py --config configs/laptop.py
Hardware: two cores of an Intel Xeon (Emerald Rapids), no GPU; Python 3.13, jax 0.12; float32
Accuracy: 92.26 % (mean of n=3; standard deviation 0.08)
Operations: 0.0687 PFLOP
Time:     9 min 47 s by airbench's clock (mean of n=3; the speed of the processor varied)

Sources: network, optimizer and TTA are those of `airbench94_wide.py`. Widths, batch size and image sizes were chosen on
5,000 held-out training images (docs/records.md, "Experiments"). Muon's learning rate is about 0.2255 sqrt(BATCH /
1536). The originals sum the loss over the batch, whereas this project averages it: SGD's learning rates are multiplied
by the batch size, and its weight decays are divided by it.
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

BATCH = 500  # 100 steps per epoch
DECAY = 1.0418e-6  # each group's weight decay times its learning rate (without the factor BATCH)


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10", pipeline="resident"),
        augment=AugmentConfig(flip="alternating", crop_padding=2),
        model=AirbenchConfig(dtype="auto", widths=(40, 160, 160), norm_decay=0.5566, global_pool=True),
        optim=OptimConfig(
            name="muon",
            learning_rate=0.13,
            momentum=0.655,
            schedule="linear",
            final_share=0.05,
            final_epochs=0.5,
            dense=GroupConfig(momentum=0.825, learning_rate=0.5415 * BATCH, weight_decay=DECAY / 0.5415),
            biases=GroupConfig(momentum=0.825, learning_rate=0.0573 * BATCH, weight_decay=DECAY / 0.0573),
            whitening=GroupConfig(frozen_from=0.25, own_decay=True),
        ),
        averaging=AveragingConfig(name="ema", decay=0.95),
        train=TrainConfig(
            batch_size=BATCH,
            epochs=9.5,
            resolutions=((0, 20), (7, 32)),
            label_smoothing=0.09,
            steps_per_call=25,  # divides the steps of each image size, so that all calls are equally long
        ),
        eval=EvalConfig(batch_size=2000, tta="mirror_translate", tta_fraction=0.25),
    )
