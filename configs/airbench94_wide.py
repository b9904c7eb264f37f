"""Airbench's network and Muon in 296 wide steps, meant for GPUs: on images of 24, 28 and then 32 pixels.

Command:  python main.py --config configs/airbench94_wide.py
Hardware: two cores of an Intel Xeon (Emerald Rapids), no GPU; Python 3.13, jax 0.12; float32
Accuracy: 93.80 % (seed 0)
Operations: 0.229 PFLOP
Time:     not measured on a machine without other load

Sources: network and optimizer are those of `airbench94_muon.py` (the repository KellerJordan/cifar10-airbench), batch
size, learning rates, label smoothing and TTA for a quarter of the images those of hiverge/cifar10-speedrun, and the
image sizes and the final learning rate those of E1 in fulcrumresearch/cifar-10-speedrun. An EMA of the weights is
evaluated, whereas E1 uses Lookahead in its last steps. The originals sum the loss over the batch, whereas this project
averages it: SGD's learning rates are multiplied by the batch size, and its weight decays are divided by it.
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

BATCH = 1536  # 32 steps per epoch; the remaining 848 images are dropped
DECAY = 1.0418e-6  # each group's weight decay times its learning rate (without the factor BATCH)


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10", pipeline="resident", drop_last=True),
        augment=AugmentConfig(flip="alternating", crop_padding=2),
        model=AirbenchConfig(dtype="auto", norm_decay=0.5566, global_pool=True),
        optim=OptimConfig(
            name="muon",
            learning_rate=0.2255,
            momentum=0.655,
            schedule="linear",
            final_share=0.05,
            final_epochs=0.8,
            dense=GroupConfig(momentum=0.825, learning_rate=0.5415 * BATCH, weight_decay=DECAY / 0.5415),
            biases=GroupConfig(momentum=0.825, learning_rate=0.0573 * BATCH, weight_decay=DECAY / 0.0573),
            whitening=GroupConfig(frozen_from=0.25, own_decay=True),
        ),
        averaging=AveragingConfig(name="ema", decay=0.93),
        train=TrainConfig(
            batch_size=BATCH,
            epochs=9.25,
            resolutions=((0, 24), (3, 28), (6, 32)),
            label_smoothing=0.09,
            steps_per_call=8,  # divides the steps of each image size, so that all calls are equally long
            log_every=32,
        ),
        eval=EvalConfig(batch_size=2000, tta="mirror_translate", tta_fraction=0.25),
    )
