"""The datasets that need neither TFDS nor the cache. To add one, write a reader and add a row to `DATASETS`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar_flax import packages
from cifar_flax.data.cache import Arrays
from cifar_flax.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A row of `DATASETS`."""

    read: Callable[[str, Path], Arrays]  # (split, data.data_dir) -> images of one size, with labels
    splits: tuple[str, ...] = ("train", "test")


def read(name: str, split: str, data_dir: Path) -> Arrays:
    """Return a split of the dataset `name`, a key of `DATASETS`.

    Raise `UserError` if its files cannot be read, or if the reader returns something else than uint8 images of shape
    (n, height, width, 1 or 3) with one integer label each.
    """
    try:
        arrays = DATASETS[name].read(split, data_dir)
    except OSError as error:
        raise UserError(f"data.name={name!r}: its {split} split cannot be read ({error})") from error
    images, labels = np.asarray(arrays.images), np.asarray(arrays.labels)
    _require(name, images.dtype == np.uint8, f"images must be uint8, not {images.dtype}")
    fits = images.ndim == 4 and images.shape[-1] in (1, 3)
    _require(name, fits, f"images must have the shape (n, height, width, 1 or 3), not {images.shape}")
    fits = labels.shape == (len(images),) and len(images) > 0 and labels.dtype.kind in "iu"
    _require(name, fits, f"labels must be {len(images)} integers, not {labels.dtype} of shape {labels.shape}")
    classes = len(arrays.class_names)
    fits = int(labels.min()) >= 0 and int(labels.max()) < classes
    _require(name, fits, f"labels must be 0 to {classes - 1}, not {labels.min()} to {labels.max()}")
    return Arrays(images, labels.astype(np.int32), tuple(arrays.class_names), arrays.dataset)


def _require(name: str, condition: bool, allowed: str) -> None:
    if not condition:
        raise UserError(f"data.name={name!r}: its {allowed}")


def _digits(split: str, data_dir: Path) -> Arrays:
    """Return the 1,797 handwritten digits of scikit-learn, 8x8 pixels, enlarged four times to 32x32x3.

    Every fifth example of each class is in the test split. Source: Alpaydin and Kaynak 1998, "Optical Recognition of
    Handwritten Digits", UCI Machine Learning Repository (its test set).
    """
    digits = packages.load("scikit-learn").load_digits()
    labels = digits.target.astype(np.int32)
    rank_in_class = np.tril(labels[:, None] == labels, -1).sum(axis=1)
    chosen = (rank_in_class % 5 == 4) == (split == "test")
    gray = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = np.repeat(gray.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    return Arrays(images, labels[chosen], tuple("0123456789"), "digits")


# data.name -> dataset
DATASETS = {"digits": Dataset(read=_digits)}
