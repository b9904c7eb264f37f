"""Read `.npz` files: `x_train, y_train, x_test, y_test`, or `train_images, train_labels, test_images, test_labels`.

Images have the shape (n, height, width[, 1 or 3]) and labels (n,) or (n, 1). `class_names`, an array of strings, is
optional. Sources: `numpy.savez`, the docstring of `numpy.lib.format`.
"""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from cifar_flax.data.archives.split import Split, numbered
from cifar_flax.data.images import MAX_PIXELS
from cifar_flax.errors import UserError

NAMES = (("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels"))
_CHUNK = 2**24  # bytes of images that are read at a time


def names(path: Path) -> list[str]:
    """Return the names of the arrays in a `.npz` file."""
    with zipfile.ZipFile(path) as file:
        return [name.removesuffix(".npy") for name in file.namelist()]


def read(path: Path, split: str) -> Split:
    """Return a split. Raise `UserError` if an array is missing, occurs twice, or has another type or shape."""
    there = names(path)
    wanted = max(NAMES, key=lambda each: len({*each} & {*there}))
    for name in wanted:
        if there.count(name) != 1:
            raise UserError(f"{name} must occur once, not {there.count(name)} times")
    x, y = wanted[:2] if split == "train" else wanted[2:]
    with _opened(path, x) as (_, shape, dtype):
        count, *image = shape if len(shape) == 4 else (*shape, 1)
        if dtype != np.uint8 or len(image) != 3 or image[-1] not in (1, 3):
            raise UserError(f"{x} must be uint8 of shape (n, height, width[, 1 or 3]), not {dtype} of {shape}")
    if math.prod(image) > MAX_PIXELS:
        raise UserError(f"{x} has too many pixels per image; at most {MAX_PIXELS:,} are allowed")
    with _opened(path, y) as (_, shape, dtype):
        if dtype.kind not in "iu" or shape not in ((count,), (count, 1)):
            raise UserError(f"{y} must be {count:,} integers, not {dtype} of {shape}")
    if "class_names" in there:
        with _opened(path, "class_names") as (_, shape, dtype):
            if dtype.kind != "U" or len(shape) != 1 or shape[0] * dtype.itemsize > 2**20:
                raise UserError(f"class_names must be a list of strings, not {dtype} of {shape}")
        class_names = tuple(map(str, next(_chunks(path, "class_names", shape[0]))))
    else:
        largest = (labels.max() for name in wanted[1::2] for labels in _chunks(path, name, _CHUNK))
        class_names = numbered(1 + int(max(largest)))
    rows = max(1, _CHUNK // math.prod(image))
    pairs = zip(_chunks(path, x, rows), _chunks(path, y, rows), strict=True)
    batches = ((images.reshape(-1, *image), labels.reshape(-1)) for images, labels in pairs)
    return Split(batches, (image[0], image[1], image[2]), class_names)


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """Yield the content of an array, its shape and type; refuse Python objects, which only pickle can read."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        if np.lib.format.read_magic(stream) != (1, 0):  # later versions are for structured arrays
            raise UserError(f"{name} must be an array of numbers")
        shape, transposed, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject or transposed:
            what = "Python objects" if dtype.hasobject else "an array in Fortran order"
            raise UserError(f"{name} holds {what}, which is not read; save it with numpy.ascontiguousarray")
        size = archive.getinfo(f"{name}.npy").file_size - stream.tell()
        if math.prod(shape) * dtype.itemsize != size or not size:
            raise UserError(f"{name} is empty or damaged: {dtype} of {shape} in {size:,} bytes")
        yield stream, shape, dtype


def _chunks(path: Path, name: str, rows: int) -> Iterator[np.ndarray]:
    """Yield an array, `rows` rows at a time."""
    with _opened(path, name) as (stream, shape, dtype):
        for start in range(0, shape[0], rows):
            some = min(rows, shape[0] - start), *shape[1:]
            yield np.frombuffer(stream.read(math.prod(some) * dtype.itemsize), dtype).reshape(some)
