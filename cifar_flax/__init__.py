"""Train, checkpoint and evaluate small-image classifiers in JAX and Flax; classify images with what was trained."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cifar_flax.classifier import Classifier

__all__ = ["load"]
__version__ = "0.1.0"


def load(workdir: str | PathLike[str]) -> "Classifier":
    """The network that the run in the folder `workdir` has trained.

        model = cifar_flax.load("runs/default")
        probabilities = model.predict(images)

    Raises `errors.UserError` where there is none, or it is not as it was saved.
    """
    # Only now: they take seconds.
    from pathlib import Path

    from cifar_flax.classifier import Classifier
    from cifar_flax.restore import restore, saved_config

    folder = Path(workdir)
    return Classifier(restore(saved_config(folder, "workdir"), folder, "workdir"))
