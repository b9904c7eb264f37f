"""A wide and deep airbench network and Muon for 27.5 epochs: images of 20, then 32 pixels.

Command:  python main.py --config configs/airbench95.py
Hardware: two cores of an Intel Xeon (Emerald Rapids), no GPU; Python 3.13, jax 0.12; float32
Accuracy: 95.06 % (seed 0)
Operations: 0.984 PFLOP
Time:     79 min 33 s by airbench's clock (seed 0), with some other load

Source: `airbench94.py`, except for the widths, the epochs, the epoch of the change to 32 pixels (18 instead of 14) and
the EMA decay (0.996 instead of 0.995). Widths and epochs were set for almost 1 PFLOP. None of the four was tried on
held-out images (docs/records.md, "Results"). Learning rates and weight decays are scaled as in `airbench94.py`.
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
            dtype="auto", widths=(72, 288, 288), depth=3, residual=True, norm_decay=0.5566, global_pool=True
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
        averaging=AveragingConfig(name="ema", decay=0.996),
        train=TrainConfig(
            batch_size=BATCH,
            epochs=27.5,
            resolutions=((0, 20), (18, 32)),
            label_smoothing=0.09,
            steps_per_call=25,  # divides the steps of each image size, so that all calls are equally long
        ),
        eval=EvalConfig(batch_size=2000, tta="mirror_translate", tta_fraction=0.25),
    )
