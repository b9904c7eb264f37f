"""The classifier that `cifar_flax.load` returns."""

import functools
import warnings
from collections.abc import Iterable
from os import PathLike
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from cifar_flax.data.images import read_image
from cifar_flax.errors import UserError
from cifar_flax.paths import local_path
from cifar_flax.restore import RestoredRun
from cifar_flax.runtime import settings
from cifar_flax.training import steps


class Classifier:
    """The trained model of a run, with the weights and the test-time augmentation that its evaluation uses.

    `class_names` are the classes of the training dataset; `image_shape` is (height, width, channels).
    """

    def __init__(self, run: RestoredRun):
        self.class_names = run.info.class_names
        self.image_shape = run.info.image_shape
        self.batch_size = run.task.layout.round_up(run.config.eval.batch_size)  # maximum number of images per call
        self._task, self._weights, self._eval = run.task, run.weights, run.config.eval
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return f"<Classifier of {shape} images: {len(self.class_names)} classes, {', '.join(self.class_names[:10])}>"

    def predict(
        self, images: UInt8[Any, "n height width channels"] | Iterable[str | PathLike[str]]
    ) -> Float32[np.ndarray, "n classes"]:
        """Return the probability of each class for each image; column `i` belongs to `class_names[i]`.

        `images` is a uint8 array (0 to 255) of shape (n, *image_shape), or a list of image files of any size.

        Raise `UserError` if the array has another shape or dtype, or if a file cannot be read.
        """
        images = np.asarray(images) if isinstance(images, np.ndarray | jax.Array) else self._read(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            actual = f"{images.dtype} of shape {images.shape}"
            raise UserError(f"images={actual}: must be uint8 (0 to 255) of shape (n, {str(self.image_shape)[1:]}")
        probabilities = np.empty((len(images), len(self.class_names)), np.float32)
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            probabilities[start : start + len(batch)] = self._probabilities(batch)
        return probabilities

    def _read(self, files: Any) -> UInt8[np.ndarray, "n height width channels"]:
        is_list = isinstance(files, Iterable) and not isinstance(files, str | PathLike)
        paths: list[Any] = list(files) if is_list else [None]
        if not all(isinstance(path, str | PathLike) for path in paths):
            raise UserError("images: must be one array (n, height, width, channels) or a list of files")
        pixels = np.empty((len(paths), *self.image_shape), np.uint8)
        with warnings.catch_warnings(action="ignore"):  # of Pillow
            for i, path in enumerate(paths):
                try:
                    pixels[i] = read_image(local_path("images", path), self.image_shape)
                except UserError as error:
                    raise UserError(f"{path}: {error}") from error
        return pixels

    @settings.pinned_in_this_thread()
    def _probabilities(self, images: UInt8[np.ndarray, "n h w c"]) -> Float32[np.ndarray, "n classes"]:
        layout = self._task.layout
        # Pad to a power of two, so that only a few batch sizes are compiled.
        size = layout.round_up(min(1 << (len(images) - 1).bit_length(), self.batch_size))
        padded = np.zeros((size, *self.image_shape), np.uint8)
        padded[: len(images)] = images
        batch = layout.shard_batch(padded)
        if size not in self._compiled:
            step = functools.partial(steps.predict_step, self._task, tta=self._eval.tta)
            self._compiled[size] = layout.compile(step, self._weights, batch)
        return np.asarray(self._compiled[size](self._weights, batch))[: len(images)]
