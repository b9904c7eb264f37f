"""Images that stay in their files and are decoded whenever they are read, as an array that `batches.gather` indexes."""

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cifar_flax.data.images import Shape, read_image
from cifar_flax.errors import UserError
from cifar_flax.runtime.environment import usable_cores
from cifar_flax.runtime.streams import printable


class FileImages:
    """The images of `paths`, relative to `root`, resized to `image_shape`: uint8 [n, height, width, channels].

    Indexing returns an array with the bytes that the cache of decoded images would hold.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, root: Path, paths: Sequence[str], digests: Sequence[int], image_shape: Shape):
        """Read the images with the hashes `digests` (see `digest`)."""
        self._root, self._paths, self._digests = root, paths, digests
        self.shape = (len(paths), *image_shape)
        self.nbytes = math.prod(self.shape)  # of the decoded images

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> UInt8[np.ndarray, "*n height width channels"]:
        """Return the images at `index`, an integer, a slice or an array of integers, decoded on all CPU cores.

        Raise `UserError` if a file can no longer be read, or has changed.
        """
        chosen = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        images = np.empty((chosen.size, *self.shape[1:]), np.uint8)
        for place, image in enumerate(_pool().map(self._read, chosen.ravel().tolist())):
            images[place] = image
        return images.reshape(*chosen.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def _read(self, number: int) -> UInt8[np.ndarray, "height width channels"]:
        path = self._paths[number]
        try:
            image = read_image(self._root / path, self.shape[1:])
        except UserError as error:
            raise UserError(f"{printable(os.fspath(self._root / path))}: {error}; it was readable before") from error
        if digest(image) != self._digests[number]:
            raise UserError(f"{printable(os.fspath(self._root / path))} has changed since the start")
        return image


def digest(image: UInt8[np.ndarray, "height width channels"]) -> int:
    """Return a 64-bit hash of the pixels."""
    return int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest())


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cores())
