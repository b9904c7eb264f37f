"""--mode=train: train a model, then evaluate it."""

from pathlib import Path

from cifar_flax import restore, workdir
from cifar_flax.checkpoints.metadata import CHECKPOINTS, saved_steps
from cifar_flax.config import Config
from cifar_flax.models.summary import summarize
from cifar_flax.modes.evaluate import evaluate
from cifar_flax.runtime import processes
from cifar_flax.training import loop
from cifar_flax.training.trainer import Trainer


def train(config: Config, folder: Path, *, summary: bool = False) -> None:
    """Train to the end, resuming from the newest checkpoint in `folder` if there is one, then evaluate.

    Config and data are checked before anything in `folder` changes. If `summary` is True, print the model's layers
    first.

    Raise `signals.Stopped` if a signal stops the run; its progress is saved.
    """
    if processes.is_main():
        workdir.require_usable(folder, config)  # before the data is decoded
    trainer = Trainer(config)
    if config.train.init_from and not saved_steps(folder / CHECKPOINTS):
        trainer.initial_state = restore.init_from(
            config, trainer.info, trainer.initialize_optimizer, trainer.initial_state
        )
    with workdir.opened(folder, config):
        if summary:
            processes.log(summarize(config.model, trainer.info.image_shape, len(trainer.info.class_names)))
        loop.run(trainer, folder)
        evaluate(config, folder)
