"""A narrower and deeper airbench network and Muon for 20.5 epochs: images of 20, then 32 pixels.

Command:  python main.py --config configs/airbench94.py
Hardware: two cores of an Intel Xeon (Emerald Rapids), no GPU; Python 3.13, jax 0.12; float32
Accuracy: 94.06 % (mean of n=5; standard deviation 0.09)
Operations: 0.220 PFLOP
Time:     24 min 4 s by airbench's clock (seed 0)

Sources: network, optimizer and TTA are those of `airbench94_wide.py`, with the third convolution and the residual
connection of each block of `airbench96.py`. Widths, depth, batch size and image sizes were chosen on 5,000 held-out
training images (docs/records.md, "Experiments"). Muon's learning rate is about 0.2255 sqrt(BATCH / 1536). The originals
sum the loss over the batch, whereas this project averages it: SGD's learning rates are multiplied by the batch size,
and its weight decays are divided by it.
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

BATCH = 250  # 200 steps per epoch
DECAY = 1.0418e-6  # each group's weight decay times its learning rate (without the factor BATCH)


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10", pipeline="resident"),
        augment=AugmentConfig(flip="alternating", crop_padding=2),
        model=AirbenchConfig(
            dtype="auto", widths=(40, 160, 160), depth=3, residual=True, norm_decay=0.5566, global_pool=True
        ),
        optim=OptimConfig(
            name="muon",
            learning_rate=0.092,
            momentum=0.655,
            schedule="linear",
            final_share=0.05,
            final_epochs=0.8,
            dense=GroupConfig(momentum=0.825, learning_rate=0.5415 * BATCH, weight_decay=DECAY / 0.5415),
            biases=GroupConfig(momentum=0.825, learning_rate=0.0573 * BATCH, weight_decay=DECAY / 0.0573),
            whitening=GroupConfig(frozen_from=0.25, own_decay=True),
        ),
        averaging=AveragingConfig(name="ema", decay=0.995),
        train=TrainConfig(
            batch_size=BATCH,
            epochs=20.5,
            resolutions=((0, 20), (14, 32)),
            label_smoothing=0.09,
            steps_per_call=25,  # divides the steps of each image size, so that all calls are equally long
        ),
        eval=EvalConfig(batch_size=2000, tta="mirror_translate", tta_fraction=0.25),
    )
