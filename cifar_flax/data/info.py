"""Description of the training data, saved with every checkpoint."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from cifar_flax.data.cache import Arrays, pixel_histogram
from cifar_flax.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """Image shape, classes and normalization statistics of the training data."""

    name: str  # dataset and version, such as "cifar10/3.0.2"
    image_shape: tuple[int, int, int]  # height, width, channels
    class_names: tuple[str, ...]
    num_examples: int  # number of training examples
    mean: tuple[float, ...]  # per channel, of pixels in [0, 255]
    std: tuple[float, ...]  # likewise
    checksum: str = ""  # of images and labels of the whole train split; "" in checkpoints of earlier releases
    eval_checksum: str = ""  # likewise of the evaluation split
    class_counts: tuple[int, ...] = ()  # training examples of each class; () in checkpoints of earlier releases

    @classmethod
    def of(cls, arrays: Arrays, examples: Int32[np.ndarray, " n"], normalization: str) -> "DatasetInfo":
        """Return the description of `examples` in `arrays`, with exact statistics, computed from integer sums.

        With `normalization` "unit", the mean is 0 and the standard deviation is 255.
        """
        _, height, width, channels = arrays.images.shape
        mean, std = (0.0,) * channels, (255.0,) * channels
        if normalization == "standard":
            mean, std = _mean_and_std(_histogram(arrays, examples))
        return cls(
            name=arrays.dataset,
            image_shape=(height, width, channels),
            class_names=arrays.class_names,
            num_examples=len(examples),
            mean=mean,
            std=std,
            class_counts=tuple(np.bincount(arrays.labels[examples], minlength=len(arrays.class_names)).tolist()),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DatasetInfo":
        fields: dict[str, Any] = {key: tuple(of) if isinstance(of, list) else of for key, of in values.items()}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def check(self, arrays: Arrays) -> None:
        """Raise `UserError` unless `arrays` has the same image shape and classes."""
        for what, ours, theirs in (
            ("images of shape", self.image_shape, arrays.images.shape[1:]),
            ("classes", self.class_names, arrays.class_names),
        ):
            if ours != theirs:
                raise UserError(f"{arrays.dataset}: has {what} {theirs}; must be {ours}, as in the training data")


def _histogram(arrays: Arrays, examples: Int32[np.ndarray, " n"]) -> Int[np.ndarray, "channels 256"]:
    """Return the histogram of `examples`; if that of all is known, subtract that of the other examples."""
    if arrays.histogram is None:
        return pixel_histogram(arrays.images, examples)
    others = np.ones(len(arrays.labels), np.bool_)
    others[examples] = False
    return arrays.histogram - pixel_histogram(arrays.images, np.flatnonzero(others))


def _mean_and_std(histogram: Int[np.ndarray, "channels 256"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of each channel."""
    value, count = np.arange(256), histogram.sum(axis=1)
    mean = histogram @ value / count
    variance = histogram @ value**2 / count - mean**2
    # Divide a constant channel by 1, not by 0.
    std = np.sqrt(np.where(variance > 0, variance, 1.0))
    return tuple(mean.tolist()), tuple(std.tolist())
