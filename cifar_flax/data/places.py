"""The folders in which other programs keep CIFAR-10 and CIFAR-100."""

import os
from collections.abc import Iterator
from pathlib import Path

# By data.name, in order of preference: unpacked, as Keras and torchvision leave it (Keras 3 names it "-target", and
# its archive "_archive"), and packed.
_NAMES = {
    "cifar10": (
        "cifar-10-batches-py", "cifar-10-batches-py-target", "cifar-10-batches-bin", "cifar-10-python.tar.gz",
        "cifar-10-batches-py.tar.gz", "cifar-10-batches-py-target_archive", "cifar-10-binary.tar.gz",
    ),
    "cifar100": (
        "cifar-100-python", "cifar-100-python-target", "cifar-100-binary", "cifar-100-python.tar.gz",
        "cifar-100-python-target_archive", "cifar-100-binary.tar.gz",
    ),
}  # fmt: skip
# The usual values of torchvision's `root`, which may also have a folder of the name of the dataset.
_ROOTS = ("data", ".", "datasets", "../data", "~/data", "~/datasets", "~/.torch/data")


def find(name: str) -> Iterator[Path]:
    """Yield the files and folders that have the names of those of `data.name`; they may be incomplete."""
    keras = os.path.join(os.environ.get("KERAS_HOME") or "~/.keras", "datasets")
    for root in map(os.path.expanduser, (keras, *_ROOTS)):
        for path in (Path(root, folder, file) for folder in ("", name) for file in _NAMES[name]):
            if os.path.exists(path):  # not Path.exists, which raises if a folder is not readable
                yield path
