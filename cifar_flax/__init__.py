"""Train, checkpoint and evaluate small-image classifiers in JAX and Flax, and classify images with them."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cifar_flax.classifier import Classifier

__all__ = ["load"]
__version__ = "0.1.0"


def load(workdir: str | PathLike[str]) -> "Classifier":
    """Return the classifier trained by the run in the folder `workdir`.

        model = cifar_flax.load("runs/default")
        probabilities = model.predict(images)

    Raise `errors.UserError` if the folder has no checkpoint, or if the checkpoint is damaged.
    """
    # Imported here because they take seconds.
    from cifar_flax.classifier import Classifier
    from cifar_flax.paths import local_path
    from cifar_flax.restore import restore, saved_config
    from cifar_flax.runtime import settings

    folder = local_path("workdir", workdir)
    with settings.pinned_in_this_thread():  # the caller's own may differ
        return Classifier(restore(saved_config(folder, "workdir"), folder, "workdir"))
